"""Implementations on Metal and CUDA: kernel sources, launch geometry."""
