"""Size of MLX's command buffers. A module of its own, because importing the package must stay cheap."""

import os

MAX_MB_PER_BUFFER = "1000"
"""Value for MLX_MAX_MB_PER_BUFFER: one decoded layer of a 397B model has about 300 Mi elements of inputs."""


def lift_command_buffer_size() -> None:
    """Let MLX end a GPU's command buffers by their number of operations instead of at each layer's expert slots.

    MLX ends one once its inputs exceed 40 to 50 Mi elements, and counts a layer's slots whole although a kernel reads K
    records of them: four to five command buffers per layer on Metal, and as many CUDA graphs. A prompt's large
    intermediate arrays still end theirs. MLX reads the variable once, when it first uses the GPU; a value set by the
    user is kept.
    """
    os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", MAX_MB_PER_BUFFER)
