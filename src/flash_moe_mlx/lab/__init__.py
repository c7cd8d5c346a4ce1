"""Measurements and plots for notebooks and benchmarks: profiles, plots, kernel timings against MLX's own."""
