"""Microbenchmarks of the kernels in kernels/, beside MLX's and mlx-lm's own on the same work."""
