"""Reductions over axes, positions of extremes, and running totals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_engine.frontend.operators.operands import (
    fresh_type,
    known_extents,
    known_scalar,
    normal_axes,
    static_length,
)
from gpu_engine.frontend.registry import emit_array, normal_axis, operator
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import FLOAT64, DType, compute_dtype, is_float
from gpu_engine.ir.expr import Expr, cast
from gpu_engine.ir.graph import Builder, Value
from gpu_engine.ir.ops import ArgReduce, Map, Reduce, Reshape
from gpu_engine.ir.ops.reduction import reduced_shape
from gpu_engine.ir.ops.running import accumulate

AXES_AS_INPUT = {"ReduceSum": 13}
"""The opset in which `axes` became an input, where it is not 18."""


@dataclass(frozen=True)
class Reduction:
    """One of ONNX's Reduce operators: fold `before(x)` with `kind`, then `after`; both in a wide enough dtype."""

    name: str
    kind: str
    before: Callable[[Expr], Expr] | None = None
    after: Callable[[Expr], Expr] | None = None


REDUCTIONS = (
    Reduction("ReduceSum", "sum"),
    Reduction("ReduceMean", "mean"),
    Reduction("ReduceProd", "prod"),
    Reduction("ReduceMax", "max"),
    Reduction("ReduceMin", "min"),
    Reduction("ReduceL1", "sum", before=abs),
    Reduction("ReduceL2", "sum", before=lambda x: x * x, after=expr.sqrt),
    Reduction("ReduceSumSquare", "sum", before=lambda x: x * x),
    Reduction("ReduceLogSum", "sum", after=expr.log),
    Reduction("ReduceLogSumExp", "logsumexp"),
)


def _reducer(reduction: Reduction) -> None:
    """Register both forms of one Reduce operator: axes as an attribute, and as an input."""
    document = f"https://onnx.ai/onnx/operators/onnx__{reduction.name}.html"

    def with_attribute(b: Builder, x: Value, *, axes: tuple[int, ...] | None = None, keepdims: int = 1) -> Value:
        chosen = axes or range(x.rank)
        return reduced(b, reduction, x, normal_axes(chosen, x.rank), bool(keepdims))

    def with_input(
        b: Builder, x: Value, axes: Value | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
    ) -> Value:
        return reduced_by(b, reduction, x, axes, bool(keepdims), bool(noop_with_empty_axes))

    with_attribute.__doc__ = f"{document} (axes as an attribute)"
    with_input.__doc__ = document
    operator(reduction.name, since=1)(with_attribute)
    operator(reduction.name, since=AXES_AS_INPUT.get(reduction.name, 18))(with_input)


def reduced_by(b: Builder, reduction: Reduction, x: Value, axes: Value | None, keepdims: bool, noop: bool) -> Value:
    """x reduced along the axes that a value holds; no axes mean all of them, or none with `noop`."""
    if axes is None or dims.product(axes.shape) == 0:
        return reduced(b, reduction, x, () if noop else tuple(range(x.rank)), keepdims)
    chosen = known_extents(axes)
    if chosen is not None:
        return reduced(b, reduction, x, normal_axes(chosen, x.rank), keepdims)
    rank = x.rank if keepdims else x.rank - static_length(axes, "axes")
    kind = fresh_type(b, x.type, rank)
    attributes = {"name": reduction.name, "keepdims": keepdims, "noop": noop}
    return emit_array(b, reduce_along, lambda b, *_, **__: kind, (x, axes), attributes)[0]


def reduced(b: Builder, reduction: Reduction, x: Value, axes: Sequence[int], keepdims: bool) -> Value:
    """x reduced along known axes."""
    axes = tuple(sorted(axes))
    if reduction.kind == "logsumexp":
        peak, total, join = log_sum_exp(x.dtype, axes)
        most = b.emit(peak, x)
        result = b.emit(join, b.emit(total, x, most), most)
        return result if keepdims else b.emit(Reshape(reduced_shape(x.shape, axes, False)), result)
    before, after = mapping(reduction, x.dtype)
    if axes:
        return b.emit(Reduce(reduction.kind, axes, keepdims, before, after), x)
    for step in (before, after):
        x = x if step is None else b.emit(Map(step), x)
    return x


def mapping(reduction: Reduction, dtype: DType) -> tuple[Expr | None, Expr | None]:
    """What to do to an element of `dtype` before it is folded and to the result: narrow floats are mapped and folded
    in float32, roots and logarithms of integers in float64."""
    if reduction.before is None and reduction.after is None:
        return None, None
    wide = compute_dtype(dtype) if is_float(dtype) else FLOAT64 if reduction.after else dtype
    element, result = cast(expr.arg(0, dtype), wide), expr.arg(0, wide)
    before = reduction.before(element) if reduction.before else element
    after = reduction.after(result) if reduction.after else result
    return before, cast(after, dtype)


def log_sum_exp(dtype: DType, axes: tuple[int, ...]) -> tuple[Reduce, Reduce, Map]:
    """The peak of x (0 where it is infinite), log(sum(exp(x - peak))) of x and the peak, and their sum: it neither
    overflows nor loses small terms. Axes are kept."""
    wide = compute_dtype(dtype) if is_float(dtype) else FLOAT64
    element, second = cast(expr.arg(0, dtype), wide), expr.arg(1, wide)
    result = expr.arg(0, wide)
    peak = Reduce("max", axes, True, element, expr.where(expr.isinf(result), 0, result))
    total = Reduce("sum", axes, True, expr.exp(element - second), expr.log(result))
    return peak, total, Map(cast(result + second, dtype))


def reduce_along(xp: Any, x: Any, axes: Any, *, name: str, keepdims: bool, noop: bool) -> Any:
    """A reduction along axes that only running tells."""
    reduction = next(each for each in REDUCTIONS if each.name == name)
    given = [int(axis) for axis in axes.ravel()]
    chosen = tuple(sorted(normal_axes(given if given or noop else range(x.ndim), x.ndim)))
    if reduction.kind == "logsumexp":
        peak, total, join = log_sum_exp(x.dtype, chosen)
        (most,) = peak.evaluate(xp, x)
        (result,) = join.evaluate(xp, *total.evaluate(xp, x, most), most)
        return result.reshape(reduced_shape(x.shape, chosen, keepdims))
    return Reduce(reduction.kind, chosen, keepdims, *mapping(reduction, x.dtype)).evaluate(xp, x)[0]


for _reduction in REDUCTIONS:
    _reducer(_reduction)


@operator("ArgMax", since=1)
def arg_max(b: Builder, x: Value, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Value:
    """https://onnx.ai/onnx/operators/onnx__ArgMax.html"""
    return b.emit(ArgReduce("max", normal_axis(axis, x.rank), bool(keepdims), bool(select_last_index)), x)


@operator("ArgMin", since=1)
def arg_min(b: Builder, x: Value, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Value:
    """https://onnx.ai/onnx/operators/onnx__ArgMin.html"""
    return b.emit(ArgReduce("min", normal_axis(axis, x.rank), bool(keepdims), bool(select_last_index)), x)


@operator("CumSum", since=11)
def cum_sum(b: Builder, x: Value, axis: Value, *, exclusive: int = 0, reverse: int = 0) -> Value:
    """https://onnx.ai/onnx/operators/onnx__CumSum.html"""
    return accumulated(b, x, axis, {"kind": "sum", "exclusive": exclusive, "reverse": reverse})


@operator("CumProd", since=26)
def cum_prod(b: Builder, x: Value, axis: Value, *, exclusive: int = 0, reverse: int = 0) -> Value:
    """https://onnx.ai/onnx/operators/onnx__CumProd.html"""
    return accumulated(b, x, axis, {"kind": "prod", "exclusive": exclusive, "reverse": reverse})


def accumulated(b: Builder, x: Value, axis: Value, attributes: dict[str, Any]) -> Value:
    """Running totals of x along the axis that a value holds."""
    known = known_scalar(axis)
    place = None if known is None else normal_axes([known], x.rank)[0]
    operands = (x, axis if place is None else None)
    attributes = {"axis": place, **attributes}
    mixes = None if place is None else (place,)
    return emit_array(b, accumulate, lambda b, x, *_, **__: x.type, operands, attributes, mixes=mixes)[0]
