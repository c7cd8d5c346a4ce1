"""CPU kernels: numba for plain loops, LLVM vector code where memory bandwidth is the limit.

MLX's own CPU backend multiplies quantised matrices at a twentieth of the memory's speed. These kernels run eagerly:
they evaluate their arguments and return finished arrays. Modules here import numba; this one does not, so that
everything works without it.
"""

import warnings
from functools import cache
from importlib.util import find_spec

from ...installation import install_command


@cache
def available() -> bool:
    """Return whether numba is installed; log one warning if it is not."""
    if find_spec("numba") is not None:
        return True
    warnings.warn(
        "numba is not installed, so the CPU runs MLX's own operations, 10 to 50 times slower. "
        f"Run: {install_command('cpu')}",
        RuntimeWarning,
        stacklevel=2,
    )
    return False
