"""Operations that move elements without computing: views, copies, gathers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import DType
from gpu_engine.ir.graph import TensorType


@dataclass(frozen=True)
class Reshape:
    """The same elements in row-major order under another shape; costs nothing at run time."""

    shape: tuple[Dim, ...]
    shape_arithmetic = True
    fold_as_view = True

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        before, after = dims.product(inputs[0].shape), dims.product(self.shape)
        if isinstance(before, int) and isinstance(after, int) and before != after:
            raise InvalidModel(f"{inputs[0]} has {before} elements, a reshape to {list(self.shape)} wants {after}")
        return (TensorType(inputs[0].dtype, self.shape),)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        return (arrays[0].reshape(self.shape),)


@dataclass(frozen=True)
class Transpose:
    """Axis i of the output is axis perm[i] of the input."""

    perm: tuple[int, ...]
    shape_arithmetic = True
    fold_as_view = True

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        if sorted(self.perm) != list(range(inputs[0].rank)):
            raise InvalidModel(f"{list(self.perm)} does not permute the axes of {inputs[0]}")
        return (TensorType(inputs[0].dtype, tuple(inputs[0].shape[axis] for axis in self.perm)),)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        return (arrays[0].transpose(self.perm),)


@dataclass(frozen=True)
class Expand:
    """Broadcast to `shape`, which has the output's rank and is already joined with the input's shape."""

    shape: tuple[Dim, ...]
    shape_arithmetic = True
    fold_as_view = True

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        return (TensorType(inputs[0].dtype, self.shape),)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        return (xp.broadcast_to(arrays[0], self.shape),)


@dataclass(frozen=True)
class Concat:
    """Join the operands along `axis` (non-negative)."""

    axis: int
    shape_arithmetic = True

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        first = inputs[0]
        for other in inputs[1:]:
            if other.rank != first.rank or other.dtype != first.dtype:
                raise InvalidModel(f"{first} and {other} do not concatenate")
            for axis, (a, b) in enumerate(zip(first.shape, other.shape, strict=True)):
                if axis != self.axis and isinstance(a, int) and isinstance(b, int) and a != b:
                    raise InvalidModel(f"{first} and {other} do not concatenate along axis {self.axis}")
        joined: Dim = sum((kind.shape[self.axis] for kind in inputs), 0)
        shape = tuple(
            joined if axis == self.axis else reduce(known_extent, (kind.shape[axis] for kind in inputs))
            for axis in range(first.rank)
        )
        return (TensorType(first.dtype, shape),)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        return (xp.concatenate(arrays, axis=self.axis),)


def known_extent(a: Dim, b: Dim) -> Dim:
    """Whichever of two extents that must be equal is an int, else the first."""
    return b if isinstance(b, int) else a


@dataclass(frozen=True)
class Slice:
    """Every axis from starts[i] (non-negative) by steps[i] (never 0), extents[i] elements of it."""

    starts: tuple[Dim, ...]
    steps: tuple[int, ...]
    extents: tuple[Dim, ...]
    shape_arithmetic = True

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        return (TensorType(inputs[0].dtype, self.extents),)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        index = []
        for start, step, extent in zip(self.starts, self.steps, self.extents, strict=True):
            assert isinstance(start, int) and isinstance(extent, int)
            stop = start + step * extent
            index.append(slice(0, 0) if extent <= 0 else slice(start, None if stop < 0 else stop, step))
        return (arrays[0][tuple(index)],)


@dataclass(frozen=True)
class Pad:
    """Add before[i] and after[i] elements to axis i (negative: take off), mode "constant", "reflect", "edge" or "wrap".

    Operands: x and, for "constant", a 0-d value (default 0).
    """

    before: tuple[Dim, ...]
    after: tuple[Dim, ...]
    mode: str = "constant"

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        shape = tuple(a + x + b for a, x, b in zip(self.before, inputs[0].shape, self.after, strict=True))
        if any(isinstance(extent, int) and extent < 0 for extent in shape):
            raise InvalidModel(f"pads {self.before}, {self.after} take more than {inputs[0]} has")
        return (TensorType(inputs[0].dtype, shape),)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        x = arrays[0]
        cut = tuple(
            slice(max(0, -dims.number(a)), extent - max(0, -dims.number(b)))
            for a, b, extent in zip(self.before, self.after, x.shape, strict=True)
        )
        grown = [(max(0, dims.number(a)), max(0, dims.number(b))) for a, b in zip(self.before, self.after, strict=True)]
        x = x[cut]
        if self.mode == "constant":
            shape = tuple(a + extent + b for extent, (a, b) in zip(x.shape, grown, strict=True))
            result = xp.full(shape, arrays[1].reshape(()) if len(arrays) > 1 else x.dtype.type(0), x.dtype)
            inside = tuple(slice(a, a + extent) for extent, (a, _) in zip(x.shape, grown, strict=True))
            result[inside] = x
            return (result,)
        return (xp.pad(x, grown, mode=self.mode),)


@dataclass(frozen=True)
class Gather:
    """Slices of x along `axis` at int64 `indices` (operand 1); a negative index counts from the end.

    An index outside the axis is an error at run time, never a wild read.
    """

    axis: int
    shape_arithmetic = True

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        x, indices = inputs
        return (TensorType(x.dtype, x.shape[: self.axis] + indices.shape + x.shape[self.axis + 1 :]),)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        x, indices = arrays
        return (xp.take(x, indices.astype(np.int64), axis=self.axis),)


@dataclass(frozen=True)
class GatherElements:
    """out[i][j]... = x at the same position but indices[i][j]... along `axis`."""

    axis: int

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        return (TensorType(inputs[0].dtype, inputs[1].shape),)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        x, indices = arrays
        extent = x.shape[self.axis]
        indices = xp.where(indices < 0, indices + extent, indices)
        trimmed = tuple(slice(None) if a == self.axis else slice(0, n) for a, n in enumerate(indices.shape))
        return (xp.take_along_axis(x[trimmed], indices, axis=self.axis),)


@dataclass(frozen=True)
class GatherND:
    """https://onnx.ai/onnx/operators/onnx__GatherND.html"""

    batch_dims: int

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        x, indices = inputs
        depth = indices.shape[-1]
        if not isinstance(depth, int):
            raise InvalidModel(f"the last extent of the indices {indices} must be known")
        return (TensorType(x.dtype, indices.shape[:-1] + x.shape[self.batch_dims + depth :]),)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        x, indices = arrays
        batch = x.shape[: self.batch_dims]
        grids = [
            xp.arange(extent).reshape((1,) * i + (extent,) + (1,) * (indices.ndim - 2 - i))
            for i, extent in enumerate(batch)
        ]
        picks = [indices[..., i] for i in range(indices.shape[-1])]
        return (x[(*grids, *picks)],)


@dataclass(frozen=True)
class Iota:
    """0, 1, 2, ... of a dtype, one axis."""

    extent: Dim
    dtype: DType

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        return (TensorType(self.dtype, (self.extent,)),)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        return (xp.arange(self.extent, dtype=self.dtype),)
