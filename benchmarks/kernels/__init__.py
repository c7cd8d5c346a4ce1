"""Microbenchmarks of the kernels in kernels/, next to MLX's and mlx-lm's own on the same work."""
