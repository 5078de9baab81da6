"""Benchmarks, each run by `python -m bench.store` and its siblings. Figures are ratios within one run, because machines are noisy."""
