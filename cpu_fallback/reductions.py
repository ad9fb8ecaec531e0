"""Reduce: fold axes with sum, mean, prod, min or max, an expression before and one after.

Two forms of one kernel: the innermost axis is folded, lane by lane and then across the lanes, or it is kept and every
lane folds a column of its own. Sums and products of float32 and narrower accumulate in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cpu_fallback.calls import Native
from cpu_fallback.code import Code, Reg, element, i64, literal, retyped, vector
from cpu_fallback.lanes import COMPUTED, find_operation, is_supported, narrowed, write_expr
from cpu_fallback.loops import (
    STRIDED,
    Read,
    Window,
    Words,
    Write,
    broadcasts,
    folded,
    lane_zero,
    row_offsets,
    splat,
    thread_share,
)
from cpu_fallback.maps import compacted, inner_access, lane_count, operand_dtypes
from cpu_fallback.native import Target, host
from cpu_fallback.vector_math import Num
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import BOOL, FLOAT32, FLOAT64, DType, compute_dtype, is_float, limits
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import Map, Reduce
from gpu_engine.plan.axes import Shape, broadcast_strides, collapsed, contiguous_strides
from gpu_engine.plan.lower import Lowering
from gpu_engine.plan.words import Address, Word

COMBINE = {"sum": "add", "mean": "add", "prod": "mul", "min": "min", "max": "max"}
WIDE_COLUMNS = 256


@dataclass(frozen=True)
class ReduceKernel:
    """A reduction by content. `kept` and `folded` count the outer axes of each kind that are left; `wide` columns are
    taken four vectors at a time. Words: addresses of the result and the operands; the extent of the inner axis; kept
    extents but the first, their product; folded extents; how many elements make one; for the result its kept strides,
    for every operand its kept, then folded strides, and the inner one where strided; strides in bytes.
    """

    text: str
    kind: str
    accesses: tuple[str, ...]
    kept: int
    folded: int
    inner_folded: bool
    wide: bool
    before: Expr = field(compare=False, repr=False)
    after: Expr = field(compare=False, repr=False)

    def write(self, code: Code, target: Target) -> None:
        writer = _Writer(self, code, target)
        code.loop(*thread_share(code, writer.rows, 1), i64(1), writer.row)


class _Writer:
    """Writes one reduction; its attributes are the words of the argument block."""

    def __init__(self, kernel: ReduceKernel, code: Code, target: Target) -> None:
        self.kernel, self.code, self.target = kernel, code, target
        self.lanes = min(64, lane_count([kernel.before, kernel.after], target) * (4 if kernel.wide else 1))
        self.fold = Fold(code, kernel.kind, kernel.before.dtype, self.lanes)
        self.dtypes = operand_dtypes(kernel.before)
        words = Words(code)
        self.bases = words.pointers(1 + len(self.dtypes))
        self.inner = words.take()
        self.extents, self.rows = words.numbers(max(0, kernel.kept - 1)), words.take()
        self.folded_extents, self.count = words.numbers(kernel.folded), words.take()
        self.kept_strides = [words.numbers(kernel.kept)]
        self.folded_strides = []
        for _ in self.dtypes:
            self.kept_strides.append(words.numbers(kernel.kept))
            self.folded_strides.append(words.numbers(kernel.folded))
        self.steps = [words.take() if access == STRIDED else None for access in kernel.accesses]

    def row(self, index: Reg, _: list[Reg]) -> list[Reg]:
        """Everything that one place of the kept outer axes gives: an element, or a row of them."""
        code, offsets = self.code, [i64(0)] * len(self.kept_strides)
        if self.kernel.kept:
            offsets = row_offsets(code, index, self.extents, self.kept_strides)
        out, *places = (code.at(base, offset) for base, offset in zip(self.bases, offsets, strict=True))
        if self.kernel.inner_folded:
            total = self._nest(places, self.fold.start(), self._across)
            self._store_first(self.fold.finish(folded(code, total, self.fold.combine), self.count), out)
        else:
            code.loop(i64(0), self.inner, i64(self.lanes), lambda column, _: self._columns(out, places, column))
        return []

    def _columns(self, out: Reg, places: Sequence[Reg], column: Reg) -> list[Reg]:
        """A vector of kept columns, each folded in a lane of its own."""
        left = self.code.binary("sub", self.inner, column)

        def one(moved: Sequence[Reg], total: Reg) -> Reg:
            return self.fold.combine(total, self._elements(moved, column, left)[0])

        total = self._nest(places, self.fold.start(), one)
        result = write_expr(self.code, self.kernel.after, {0: self.fold.finish(total, self.count)}, self.lanes)
        window = Window(self.code, self.target, self.lanes, column, left)
        window.write([Write(out, self.kernel.after.dtype)], [result])
        return []

    def _across(self, places: Sequence[Reg], total: Reg) -> Reg:
        """The folded inner axis, lane by lane."""
        code = self.code

        def body(index: Reg, carried: list[Reg]) -> list[Reg]:
            value, window = self._elements(places, index, code.binary("sub", self.inner, index))
            return [self.fold.combine(carried[0], code.select(window.mask(), value, self.fold.start()))]

        return code.loop(i64(0), self.inner, i64(self.lanes), body, [total])[0]

    def _elements(self, places: Sequence[Reg], index: Reg, left: Reg) -> tuple[Reg, Window]:
        """A vector of what is folded, and the window it came through."""
        streams = zip(places, self.dtypes, self.kernel.accesses, self.steps, strict=True)
        reads = [Read(*stream) for stream in streams]
        window = Window(self.code, self.target, self.lanes, index, left)
        loaded = window.read(reads, broadcasts(self.code, reads, self.lanes))
        return self.fold.widen(write_expr(self.code, self.kernel.before, dict(enumerate(loaded)), self.lanes)), window

    def _nest(
        self, places: Sequence[Reg], total: Reg, innermost: Callable[[Sequence[Reg], Reg], Reg], axis: int = 0
    ) -> Reg:
        """Loops over the folded outer axes around `innermost`."""
        if axis == len(self.folded_extents):
            return innermost(places, total)
        code = self.code

        def body(index: Reg, carried: list[Reg]) -> list[Reg]:
            moved = [
                code.at(place, code.binary("mul", index, steps[axis]))
                for place, steps in zip(places, self.folded_strides, strict=True)
            ]
            return [self._nest(moved, carried[0], innermost, axis + 1)]

        return code.loop(i64(0), self.folded_extents[axis], i64(1), body, [total])[0]

    def _store_first(self, result: Reg, place: Reg) -> None:
        dtype = self.kernel.after.dtype
        final = narrowed(self.code, write_expr(self.code, self.kernel.after, {0: result}, self.lanes), dtype)
        self.code.store(lane_zero(self.code, final), place, dtype.itemsize)


class Fold:
    """How elements of a dtype accumulate."""

    def __init__(self, code: Code, kind: str, dtype: DType, lanes: int) -> None:
        self._code, self._kind = code, kind
        self.computed = compute_dtype(dtype)
        self.dtype = FLOAT64 if self.computed == FLOAT32 and kind in ("sum", "mean", "prod") else self.computed
        self.type = vector(lanes, COMPUTED[self.dtype])

    def start(self) -> Reg:
        """What folding nothing gives."""
        if self._kind in ("min", "max"):
            low, high = (-float("inf"), float("inf")) if is_float(self.dtype) else limits(self.dtype)
            return literal(self.type, high if self._kind == "min" else low)
        return literal(self.type, 1 if self._kind == "prod" else 0)

    def widen(self, x: Reg) -> Reg:
        return self._code.convert("fpext", x, self.type)

    def combine(self, a: Reg, b: Reg) -> Reg:
        operation = find_operation(COMBINE[self._kind], self.dtype)
        assert operation is not None
        return operation(Num(self._code, a), Num(self._code, b)).reg

    def finish(self, total: Reg, count: Reg) -> Reg:
        """The result in the computing form of the elements' dtype."""
        if self._kind == "mean":
            number = self._code.convert("sitofp", count, element(total.type))
            lanes = splat(self._code, number, self.lanes(total))
            total = self._code.binary("fdiv", total, lanes)
        return self._code.convert("fptrunc", total, retyped(total.type, COMPUTED[self.computed]))

    @staticmethod
    def lanes(x: Reg) -> int:
        return int(x.type[1:].split()[0]) if x.type.startswith("<") else 1


def lower_reduce(lowering: Lowering, op: Reduce, node: Node, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> bool:
    call = reduce_call(op, [(b, v.shape) for b, v in zip(inputs, node.inputs, strict=True)], outputs[0], node)
    if call is None:
        return False
    lowering.emit(call, inputs, outputs)
    return True


def reduce_call(op: Reduce, inputs: Sequence[tuple[int, Shape]], out: int, node: Node) -> Native | None:
    """The native call of a reduction; None if its expressions or element type have no native form."""
    element_type = node.inputs[0].type
    if op.before is not None:
        (element_type,) = Map(op.before).infer(*(value.type for value in node.inputs))
    before, used = compacted(op.before if op.before is not None else expr.arg(0, element_type.dtype))
    after = op.after if op.after is not None else expr.arg(0, element_type.dtype)
    if not _foldable(op.kind, before.dtype) or not all(is_supported(part, host()) for part in (before, after)):
        return None
    shape = element_type.shape
    operands = [inputs[i] for i in used]
    sizes = [dtype.itemsize for dtype in operand_dtypes(before)]
    strides = [broadcast_strides(own, shape) for _, own in operands]
    kept, reduced, inner = _split_axes(shape, op.axes, strides)
    accesses = tuple(inner_access(stride) for stride in inner.strides[1:])
    words: list[Word] = [Address(out), *(Address(buffer) for buffer, _ in operands), inner.extent]
    words += [*(axis.extent for axis in kept[1:]), dims.product(axis.extent for axis in kept)]
    words += [axis.extent for axis in reduced]
    words.append(dims.product(shape[axis] for axis in op.axes))
    words += [axis.strides[0] * after.dtype.itemsize for axis in kept]
    for i, size in enumerate(sizes, 1):
        words += [axis.strides[i] * size for axis in (*kept, *reduced)]
    words += [
        stride * size for stride, size, access in zip(inner.strides[1:], sizes, accesses, strict=True)
        if access == STRIDED
    ]  # fmt: skip
    wide = not inner.folded and isinstance(inner.extent, int) and inner.extent >= WIDE_COLUMNS
    text = f"{expr.text(before)} | {expr.text(after)}"
    kernel = ReduceKernel(text, op.kind, accesses, len(kept), len(reduced), inner.folded, wide, before, after)
    return Native(kernel, tuple(words))


def _foldable(kind: str, dtype: DType) -> bool:
    return dtype != BOOL and dtype in COMPUTED and (kind != "mean" or is_float(dtype))


@dataclass(frozen=True)
class Axis:
    """A run of neighbouring axes of one kind; `strides` of the result first (0 where folded), then of the operands."""

    extent: Dim
    folded: bool
    strides: tuple[Dim, ...]


def _split_axes(
    shape: Shape, axes: Sequence[int], operands: Sequence[Sequence[Dim]]
) -> tuple[list[Axis], list[Axis], Axis]:
    """(kept outer, folded outer, innermost) axes of the elements."""
    out = iter(contiguous_strides(tuple(extent for i, extent in enumerate(shape) if i not in axes)))
    results = [0 if i in axes else next(out) for i in range(len(shape))]
    runs: list[Axis] = []
    start = 0
    while start < len(shape):
        stop = start + 1
        while stop < len(shape) and (stop in axes) == (start in axes):
            stop += 1
        streams = [stream[start:stop] for stream in (results, *operands)]
        runs += [Axis(extent, start in axes, tuple(steps)) for extent, steps in collapsed(shape[start:stop], streams)]
        start = stop
    if not runs or not (runs[-1].folded or runs[-1].strides[0] == 1):
        runs.append(Axis(1, False, (1,) * (1 + len(operands))))
    *outer, inner = runs
    return [axis for axis in outer if not axis.folded], [axis for axis in outer if axis.folded], inner
