"""What is measured, and how to repeat it. Figures are ratios within one run: machines are noisy."""
