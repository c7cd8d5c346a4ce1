"""Microbenchmarks of the kernels beside MLX's and mlx-lm's own on the same work: ``flash-moe bench kernels``."""
