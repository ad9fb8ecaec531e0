"""Reduce: axes folded with sum, mean, prod, min or max, an expression before and one after.

Every lane folds elements of its own, then the lanes are folded. Where too few results would keep a GPU busy, programs
share the elements and a second launch folds what they found, always in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gpu_engine.gpu.folds import ENOUGH_PROGRAMS, Folding, FoldTile, TileShape, folding, pass_shape, typical
from gpu_engine.gpu.maps import Walked
from gpu_engine.gpu.printing import NAN, computing, is_printable, literal
from gpu_engine.gpu.text import KernelText, power_of_two
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import BOOL, DType, compute_dtype, is_float, limits
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import Map, Reduce
from gpu_engine.plan.axes import Shape, broadcast_strides, contiguous_strides
from gpu_engine.plan.lower import Lowering

MOST_SPLITS = 256


@dataclass(frozen=True)
class Fold:
    """How elements of a dtype fold. Bools fold as small integers: a sum is an or, a product an and."""

    kind: str
    dtype: DType

    @property
    def computed(self) -> str:
        """The element type of the totals."""
        return "tl.int8" if self.dtype == BOOL else computing(self.dtype)

    @property
    def operation(self) -> str:
        if self.dtype == BOOL:
            return "min" if self.kind in ("prod", "min") else "max"
        return "sum" if self.kind == "mean" else self.kind

    @property
    def neutral(self) -> str:
        """What folding nothing gives."""
        if self.operation in ("sum", "prod"):
            return f"{int(self.operation == 'prod')}" + (".0" if is_float(self.dtype) else "")
        if is_float(self.dtype):
            return f'float("{"inf" if self.kind == "min" else "-inf"}")'
        low, high = limits(self.dtype)
        return str(int(high if self.operation == "min" else low))

    def combine(self, a: str, b: str) -> str:
        if self.operation in ("sum", "prod"):
            return f"{a} {'+' if self.operation == 'sum' else '*'} {b}"
        nan = f", {NAN}" if is_float(self.dtype) else ""
        return f"tl.{self.operation}imum({a}, {b}{nan})"

    def across(self, text: KernelText, lanes: str, tile: FoldTile) -> str:
        """The name of the totals of all lanes, in computing form."""
        if self.operation == "prod":
            return text.let("total", f"tl.reduce({lanes}, {tile.axis}, multiply, keep_dims=True)")
        folded = f"tl.{self.operation}({{}}, axis={tile.axis}, keep_dims=True)"
        if self.operation == "sum" or not is_float(self.dtype):
            total = text.let("total", f"{folded.format(lanes)}.to({self.computed})")
            return text.let("total", f"{total} != 0") if self.dtype == BOOL else total
        missing = text.let("nan", f"tl.max(({lanes} != {lanes}).to(tl.int32), axis={tile.axis}, keep_dims=True)")
        found = folded.format(f"tl.where({lanes} == {lanes}, {lanes}, {self.neutral})")
        return text.let("total", f'tl.where({missing} != 0, float("nan"), {found})')


def lower_reduce(lowering: Lowering, op: Reduce, node: Node, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> bool:
    element = node.inputs[0].type
    if op.before is not None:
        (element,) = Map(op.before).infer(*(value.type for value in node.inputs))
    before = op.before if op.before is not None else expr.arg(0, element.dtype)
    count = dims.product(element.shape[axis] for axis in op.axes)
    after = _finish(op, element.dtype, count)
    if not is_printable(before) or not is_printable(after):
        return False
    used = sorted({part.value for part in expr.walk(before) if part.op == "arg"})
    before = expr.substitute(before, {i: expr.arg(k, node.inputs[i].dtype) for k, i in enumerate(used)})
    operands = [Walked(inputs[i], broadcast_strides(node.inputs[i].shape, element.shape)) for i in used]
    out = Walked(outputs[0], kept_strides(element.shape, op.axes))
    emit_fold(lowering, Fold(op.kind, before.dtype), before, after, operands, out, element.shape, op.axes)
    return True


def kept_strides(shape: Shape, axes: Sequence[int]) -> tuple[Dim, ...]:
    """Strides of a contiguous result over the axes of what is folded, 0 along `axes`."""
    return tuple(
        0 if axis in axes else step
        for axis, step in enumerate(contiguous_strides(tuple(1 if i in axes else e for i, e in enumerate(shape))))
    )


def _finish(op: Reduce, dtype: DType, count: Dim) -> Expr:
    """From the total (arg 0, in the accumulator's type) and a mean's number of elements (arg 1) to the result."""
    wide = compute_dtype(dtype)
    result = expr.arg(0, wide)
    if op.kind == "mean" and dtype != BOOL:
        number = expr.arg(1, wide)
        if isinstance(count, int):
            number = expr.const(count if is_float(wide) else wide.type(max(count, 1)), wide)
        result = result / number
    result = expr.cast(result, dtype)
    return result if op.after is None else expr.substitute(op.after, {0: result})


def emit_fold(
    lowering: Lowering,
    fold: Fold,
    before: Expr,
    after: Expr,
    operands: Sequence[Walked],
    out: Walked,
    shape: Shape,
    axes: Sequence[int],
) -> None:
    """Launch what folds `axes` of `before` over the operands into `after` of the total and the number of elements."""
    streams = [out, *operands]
    split = folding(shape, axes, streams)
    tile = with_splits(split, pass_shape(split))
    count = split.count
    if tile.splits == 1:
        _emit_pass(lowering, "reduce", fold, before, (after, count), streams, split, tile)
        return
    wide = compute_dtype(fold.dtype)
    kept = tuple(extent for extent, _ in split.kept)
    parts = lowering.buffer(wide, (tile.splits, *kept))
    first = replace(out, buffer=parts, strides=kept_strides(shape, axes), offset=0)
    partial = expr.arg(0, wide)
    _emit_pass(lowering, "reduce_parts", fold, before, (partial, count), [first, *operands], folding(
        shape, axes, [first, *operands]), tile)  # fmt: skip
    rest = (tile.splits, *kept)
    steps = tuple(strides[0] for _, strides in split.kept)
    found = [Walked(out.buffer, (0, *steps), out.offset), Walked(parts, contiguous_strides(rest))]
    last = folding(rest, (0,), found)
    fold = Fold(fold.kind, wide)
    _emit_pass(lowering, "reduce", fold, partial, (after, count), found, last, pass_shape(last))


def with_splits(axes: Folding, tile: TileShape) -> TileShape:
    """`tile` with as many programs for every result as it takes to keep a GPU busy."""
    programs = -(-typical(axes.places) // tile.width)
    steps = typical(axes.count) // (4 * tile.block)
    if programs * 2 > ENOUGH_PROGRAMS or steps < 2 or programs == 0:
        return tile
    return replace(tile, splits=min(MOST_SPLITS, power_of_two(-(-ENOUGH_PROGRAMS // programs)), power_of_two(steps)))


def _emit_pass(
    lowering: Lowering,
    name: str,
    fold: Fold,
    before: Expr,
    finish: tuple[Expr, Dim],
    streams: Sequence[Walked],
    axes: Folding,
    shape: TileShape,
) -> None:
    text = KernelText(lowering, name)
    tile = FoldTile(text, axes, streams, shape)
    if not tile.whole:
        text.line(f"lanes = tl.full({tile.shape}, {fold.neutral}, {fold.computed})")
    with tile.blocks() as block:
        values = {i: block.load(i + 1) for i in range(len(streams) - 1)}
        element = text.evaluate(before, values)
        if fold.dtype == BOOL:
            element = text.let("v", f"tl.where({element}, 1, 0).to(tl.int8)")
        value = block.masked(element, f"tl.full([], {fold.neutral}, {fold.computed})")
        text.line(f"lanes = {value if tile.whole else fold.combine('lanes', value)}")
    after, count = finish
    number = {1: literal(0, after.dtype)}
    if any(node.op == "arg" and node.value == 1 for node in expr.walk(after)):
        number = {1: text.let("count", f"({text.number(count)}).to({computing(compute_dtype(fold.dtype))})")}
    total = fold.across(text, "lanes", tile)
    tile.store_folded(0, text.evaluate(after, {0: total, **number}))
    text.launch(tile.grid, tuple(stream.buffer for stream in streams[1:]), (streams[0].buffer,),
                num_warps=shape.num_warps)  # fmt: skip
