"""What the Makefile runs: installation, pinned requirements, and the documentation."""
