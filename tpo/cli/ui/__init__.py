"""Render output for terminals and programs."""
