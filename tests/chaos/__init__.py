"""Chaos: kill, stop and flush everything, and verify that nothing is lost."""
