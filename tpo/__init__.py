"""Test-Time Preference Optimization as a durable service: the library.

Rooms, from the bottom up: the core (`state`, `loop`, `ports`, `prompts`, `errors`) is pure; `run` drives it; the edge
(`settings`, `queue`, `jobs`, `backends`) knows the outside world; `cli` is what people type.
"""

__version__ = "0.1.0"
