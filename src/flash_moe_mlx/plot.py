"""Plots of time, routing and speed: the public name of `flash_moe_mlx.lab.plot`."""

from .lab.plot import *  # noqa: F403
from .lab.plot import __all__ as __all__
