"""The algorithm and its driver: pure, without I/O. Read `loop.py` first, then `run.py`."""
