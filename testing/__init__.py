"""Fakes, services, processes and seeding that tests and benchmarks share. Not in the wheel."""
