"""Bytes on disk: safetensors headers, quantisation, expert layouts, packed checkpoints. Imports no MLX."""
