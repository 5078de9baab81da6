"""Benchmarks; each module describes its command. Figures are ratios within one run, because machines are noisy."""
