"""Extents that a model computes: known when it is compiled, or bound when a step has run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.registry import constant_ints
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.graph import Builder, Value

MAX_LATE_ELEMENTS, MAX_LATE_EMPTY = 1 << 30, 1 << 26


def extents_of(b: Builder, value: Value, count: int | None = None) -> tuple[Dim, ...]:
    """The extents that a 0-d or 1-d integer value holds; where they are not known, one fresh extent for each.

    `count` says how many there are where not even the value's own shape tells; InvalidModel if neither does.
    """
    if value.known is not None:
        return tuple(constant_ints(value, "extents") or ())
    held = value.shape[0] if value.rank else 1
    length = held if isinstance(held, int) else count
    if length is None:
        raise InvalidModel("how many extents there are must be known when the model is compiled")
    return tuple(b.fresh_dim() for _ in range(length))


def unless_known(value: Value | None) -> Value | None:
    """The operand that an array function needs for extents: None where `told` tells them all."""
    return value if value is not None and value.known is None else None


def told(value: Value | None) -> tuple[Dim, ...] | None:
    """The extents that are known when the model is compiled, as an attribute of an array function."""
    return tuple(constant_ints(value, "extents") or ()) if value is not None and value.known is not None else None


def whole_numbers(told: tuple[int, ...] | None, operand: Any) -> tuple[int, ...] | None:
    """What an array function got of extents: as an attribute, as an operand, or not at all."""
    if told is not None or operand is None:
        return told
    return room(operand.ravel())


def room(extents: Iterable[Any]) -> tuple[int, ...]:
    """The extents of a tensor that an array function makes as large as only running tells.

    MemoryError beyond MAX_LATE_ELEMENTS: nothing else sees its size before it is allocated.
    """
    shape = tuple(map(int, extents))
    if math.prod(max(extent, 1) for extent in shape) > (MAX_LATE_EMPTY if 0 in shape else MAX_LATE_ELEMENTS):
        raise MemoryError(f"a tensor of the extents {list(shape)}, which were not known when the model was compiled")
    return shape
