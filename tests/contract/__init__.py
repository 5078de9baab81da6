"""Conformance tests that every database and every back end must pass."""
