"""Reading operands that hold extents: what is known while compiling, and what only running tells."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_engine.errors import DependsOnValues, InvalidModel
from gpu_engine.frontend.registry import normal_axis
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.graph import Builder, TensorType, Value


def known_extents(value: Value | None) -> list[Dim] | None:
    """The integers of a value in row-major order, symbolic or not; None where the compiler does not know them."""
    if value is None or value.known is None:
        return None
    return [item if value.symbolic else int(item) for item in value.known.ravel()]


def known_ints(value: Value | None) -> list[int] | None:
    """As known_extents, but None where one of them is symbolic."""
    extents = known_extents(value)
    if extents is None:
        return None
    whole = [extent for extent in extents if isinstance(extent, int)]
    return whole if len(whole) == len(extents) else None


def known_scalar(value: Value | None) -> Dim | None:
    """The only integer of a value, None where it is not known; InvalidModel for more than one."""
    extents = known_extents(value)
    if extents is not None and len(extents) != 1:
        raise InvalidModel(f"one number is wanted, not {len(extents)}")
    return extents[0] if extents else None


def static_length(value: Value, what: str) -> int:
    """How many elements a 1-d (or 0-d) value has; DependsOnValues where even that is not known."""
    length = dims.product(value.shape)
    if not isinstance(length, int):
        raise DependsOnValues(f"{what} of {length} elements leave the rank of the result open")
    return length


def normal_axes(axes: Sequence[Dim], rank: int) -> tuple[int, ...]:
    """Axes in [0, rank), in the order given; InvalidModel for one outside, symbolic or given twice."""
    found = []
    for axis in axes:
        if not isinstance(axis, int):
            raise InvalidModel(f"the axis {axis} is symbolic")
        found.append(normal_axis(axis, rank))
    if len(set(found)) != len(found):
        raise InvalidModel(f"the axes {list(axes)} repeat one of {rank} axes")
    return tuple(found)


def fresh_type(b: Builder, like: TensorType, rank: int) -> TensorType:
    """A type of `rank` extents that only running tells."""
    return TensorType(like.dtype, tuple(b.fresh_dim() for _ in range(rank)))


def fresh_at(b: Builder, kind: TensorType, axes: Sequence[int]) -> TensorType:
    """`kind` with the extents of `axes` left to running."""
    return TensorType(kind.dtype, tuple(b.fresh_dim() if i in axes else x for i, x in enumerate(kind.shape)))
