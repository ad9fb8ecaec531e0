"""Running sums and products as a function over an array module, which an `Array` node holds: devices with kernels for
it know it."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_engine.ir.dtypes import compute_dtype


def accumulate(xp: Any, x: Any, where: Any = None, *, axis: int | None, kind: str, exclusive: int, reverse: int) -> Any:
    """Inclusive or exclusive running sums or products, from the start or from the end."""
    place = (int(where.ravel()[0]) if axis is None else axis) % x.ndim
    wide = compute_dtype(x.dtype)
    x = xp.flip(x, place) if reverse else x
    function, neutral = (xp.cumsum, 0) if kind == "sum" else (xp.cumprod, 1)
    with np.errstate(all="ignore"):
        total = function(x.astype(wide, copy=False), axis=place, dtype=wide)
    if exclusive:
        first = xp.full((*x.shape[:place], 1, *x.shape[place + 1 :]), neutral, wide)
        total = xp.concatenate((first, total), axis=place)[(slice(None),) * place + (slice(0, x.shape[place]),)]
    return xp.flip(total, place) if reverse else total
