"""Programs of the Makefile: installation, pinned requirements, and the documentation."""
