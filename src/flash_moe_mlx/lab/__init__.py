"""Measurement and pictures for notebooks and benchmarks: profiles, plots, kernels timed next to MLX's own."""
