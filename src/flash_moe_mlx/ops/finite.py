"""Test of whether a pass computed finite numbers, and the error if it did not."""

from math import isfinite

import mlx.core as mx
import numpy as np

from ..errors import NonFiniteError


def is_finite(array: mx.array | np.ndarray) -> bool:
    """Return whether all numbers are finite. Cost: one pass over memory; a lazy array is evaluated."""
    if isinstance(array, mx.array):
        if array.dtype != mx.float32 or mx.default_device().type == mx.DeviceType.gpu:
            return bool(mx.isfinite(array).all().item())
        array = np.asarray(array)
    with np.errstate(invalid="ignore", over="ignore"):
        total = float(array.sum())
    return isfinite(total) or bool(np.isfinite(array).all())


def first_bad_row(array: mx.array) -> int:
    """Return the index of the first row of (T, N) in which a number is not finite; 0 if there is none."""
    return int(np.argmax(~np.isfinite(np.array(array.astype(mx.float32))).all(axis=-1)))


def non_finite(layer: int | None, where: str, token: int | None = None) -> NonFiniteError:
    """Return the error that names a layer, and which of its values are NaN or infinite."""
    place = where if layer is None else f"layer {layer}, {where}"
    return NonFiniteError(
        f"[{place}] must be finite numbers, got NaN or infinity. A weight is damaged, or the dtype of activations too "
        'narrow: run "flash-moe verify PATH".',
        layer,
        token,
    )
