"""The maths of a streamed MoE layer: each operation is a reference, a GPU kernel and one dispatcher, in a module.

The model calls the dispatchers and nothing else, so a Mac or CUDA user runs the kernels by default.
``FLASH_MOE_REFERENCE=1`` makes every dispatcher run its reference: the one debug switch.
No name of a function is imported here, since it would hide the module of the same name.
"""
