"""The maths of a streamed MoE layer: one module per operation, with a reference, a GPU kernel and a dispatcher.

The model calls only the dispatchers, so a Mac or CUDA user runs the kernels by default. ``FLASH_MOE_REFERENCE=1`` makes
every dispatcher run its reference; it is the only debug switch. No function is imported here, since it would hide the
module of the same name.
"""
