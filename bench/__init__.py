"""Benchmarks, each run by `python -m bench.NAME`. Figures are ratios within one run, because machines are noisy."""
