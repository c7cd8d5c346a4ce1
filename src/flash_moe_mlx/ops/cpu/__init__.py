"""Kernels for processors: numba where Python's loops would do, LLVM vector code where speed is memory's.

MLX's own CPU backend multiplies quantised matrices at a twentieth of the memory's speed. These run at once instead of
lazily: they evaluate what they are given and return finished arrays. Modules here import numba; this one does
not, so that everything works without it.
"""

import logging
from functools import cache
from importlib.util import find_spec

logger = logging.getLogger(__name__)


@cache
def available() -> bool:
    """Tell whether numba is installed; warn once where it is not."""
    if find_spec("numba") is not None:
        return True
    logger.warning(
        "numba is not installed: on the CPU every operation runs MLX's own, 10 to 50 times slower. "
        'Run: pip install "flash-moe-mlx[cpu]"'
    )
    return False
