"""Benchmarks, run by `python -m bench.store` and its siblings. Figures are ratios within one run."""
