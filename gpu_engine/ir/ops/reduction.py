"""Operations that fold axes: reductions, arg-reductions, softmax and layer normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import INT64, compute_dtype
from gpu_engine.ir.expr import NUMPY, Expr
from gpu_engine.ir.graph import TensorType
from gpu_engine.ir.ops.pointwise import Map

EXTENT_REDUCTIONS: dict[str, Any] = {
    "sum": np.add,
    "prod": np.multiply,
    "min": np.frompyfunc(dims.minimum, 2, 1),
    "max": np.frompyfunc(dims.maximum, 2, 1),
}


@dataclass(frozen=True)
class Reduce:
    """Fold `axes` (non-negative, sorted) with kind "sum", "mean", "prod", "min" or "max".

    `before` maps the broadcast operands to the element that is folded (default: operand 0), `after` maps the result
    (its arg 0) on the way out. A sum over nothing is 0, a product 1, a minimum of floats inf, a maximum -inf.
    """

    kind: str
    axes: tuple[int, ...]
    keepdims: bool
    before: Expr | None = None
    after: Expr | None = None
    shape_arithmetic = True

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        (element,) = Map(self.before).infer(*inputs) if self.before is not None else inputs[:1]
        dtype = self.after.dtype if self.after is not None else element.dtype
        return (TensorType(dtype, reduced_shape(element.shape, self.axes, self.keepdims)),)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        x = Map(self.before).evaluate(xp, *arrays)[0] if self.before is not None else arrays[0]
        if x.dtype == object:
            result = _reduce_extents(self.kind, x, self.axes, self.keepdims)
            return (result,) if self.after is None else Map(self.after).evaluate(xp, result)
        dtype, wide = x.dtype, compute_dtype(x.dtype)
        count = int(np.prod([x.shape[axis] for axis in self.axes], dtype=np.int64))
        x = x.astype(wide, copy=False)
        if self.kind == "mean":
            result = xp.add.reduce(x, axis=self.axes, keepdims=self.keepdims, dtype=wide)
            with np.errstate(all="ignore"):
                result = (
                    result / wide.type(count) if wide.kind == "f" else NUMPY["div"](result, wide.type(max(count, 1)))
                )
        elif count == 0 and self.kind in ("min", "max"):
            shape = reduced_shape(x.shape, self.axes, self.keepdims)
            result = xp.full(shape, _identity(self.kind, wide), wide)
        else:
            result = getattr(x, self.kind)(axis=self.axes, keepdims=self.keepdims)
        result = xp.asarray(result, wide).astype(dtype, copy=False)
        return (result,) if self.after is None else Map(self.after).evaluate(xp, result)


def _reduce_extents(kind: str, x: Any, axes: tuple[int, ...], keepdims: bool) -> Any:
    """The reduction of an object array of symbolic extents, exactly; Undecided where it depends on their values."""
    if kind not in EXTENT_REDUCTIONS or 0 in (x.shape[axis] for axis in axes):
        raise dims.Undecided(kind)
    return np.asarray(EXTENT_REDUCTIONS[kind].reduce(x, axis=axes, keepdims=keepdims), object)


def reduced_shape(shape: tuple[Any, ...], axes: tuple[int, ...], keepdims: bool) -> tuple[Any, ...]:
    if keepdims:
        return tuple(1 if axis in axes else extent for axis, extent in enumerate(shape))
    return tuple(extent for axis, extent in enumerate(shape) if axis not in axes)


def _identity(kind: str, dtype: np.dtype[Any]) -> Any:
    if dtype.kind == "f":
        return np.inf if kind == "min" else -np.inf
    if dtype.kind == "b":
        return kind == "min"
    return np.iinfo(dtype).max if kind == "min" else np.iinfo(dtype).min


@dataclass(frozen=True)
class ArgReduce:
    """The int64 index of the least ("min") or greatest ("max") element along `axis`; of equals the first or last."""

    kind: str
    axis: int
    keepdims: bool
    select_last: bool

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        return (TensorType(INT64, reduced_shape(inputs[0].shape, (self.axis,), self.keepdims)),)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        x = arrays[0].astype(compute_dtype(arrays[0].dtype), copy=False)
        x = xp.flip(x, self.axis) if self.select_last else x
        index = (xp.argmin if self.kind == "min" else xp.argmax)(x, axis=self.axis)
        index = x.shape[self.axis] - 1 - index if self.select_last else index
        index = xp.asarray(index, np.int64)
        return (xp.expand_dims(index, self.axis) if self.keepdims else index,)


@dataclass(frozen=True)
class Softmax:
    """exp(x - max) / sum along `axis` (non-negative), or its logarithm; computed in at least float32."""

    axis: int
    log: bool = False

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        return (inputs[0],)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        x = arrays[0].astype(compute_dtype(arrays[0].dtype))
        if x.size == 0:
            return (arrays[0],)
        with np.errstate(all="ignore"):
            x = x - x.max(axis=self.axis, keepdims=True)
            total = xp.exp(x).sum(axis=self.axis, keepdims=True)
            result = x - xp.log(total) if self.log else xp.exp(x) / total
        return (result.astype(arrays[0].dtype, copy=False),)


@dataclass(frozen=True)
class LayerNorm:
    """(x - mean) / sqrt(var + epsilon) * scale + bias over the last axes from `axis`; variance is the biased one.

    Operands: x, then scale and bias where present, both broadcast to x. With `centered` False the mean is not taken
    off (RMSNormalization). Statistics in at least float32.
    """

    axis: int
    epsilon: float
    centered: bool = True

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        return (inputs[0],)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        x, *affine = (array.astype(compute_dtype(array.dtype), copy=False) for array in arrays)
        axes = tuple(range(self.axis, x.ndim))
        with np.errstate(all="ignore"):
            if self.centered:
                x = x - x.mean(axis=axes, keepdims=True)
            result = x / xp.sqrt((x * x).mean(axis=axes, keepdims=True) + x.dtype.type(self.epsilon))
        for i, operand in enumerate(affine):
            result = result * operand if i == 0 else result + operand
        return (result.astype(arrays[0].dtype, copy=False),)


@dataclass(frozen=True)
class LocalResponseNorm:
    """x / (bias + alpha / size * total) ** beta, where `total` is the sum of the squares of `size` neighbours along
    `axis` (non-negative), the middle one x itself, or the one before the middle. In at least float32.
    """

    axis: int
    size: int
    alpha: float
    beta: float
    bias: float

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        return (inputs[0],)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        x = arrays[0].astype(compute_dtype(arrays[0].dtype), copy=False)
        lead, extent = (slice(None),) * self.axis, x.shape[self.axis]
        before, squares = (self.size - 1) // 2, x * x
        total = xp.zeros_like(x)
        for tap in range(max(-before, 1 - extent), min(self.size - before, extent)):
            ends = (max(0, -tap), extent - max(0, tap))
            total[(*lead, slice(*ends))] += squares[(*lead, slice(ends[0] + tap, ends[1] + tap))]
        with np.errstate(all="ignore"):
            scale = (x.dtype.type(self.bias) + x.dtype.type(self.alpha / self.size) * total) ** x.dtype.type(self.beta)
            return ((x / scale).astype(arrays[0].dtype, copy=False),)


def fuse_after(op: Reduce, outer: Expr) -> Reduce:
    """`op` whose result goes through `outer` (of one operand) as well."""
    inner = op.after
    after = outer if inner is None else expr.substitute(outer, {0: inner})
    return Reduce(op.kind, op.axes, op.keepdims, op.before, after)
