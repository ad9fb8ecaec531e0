"""Softmax and LayerNorm over a contiguous innermost axis: a few passes over each row while it is in the cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

from cpu_fallback import packing
from cpu_fallback.calls import Native
from cpu_fallback.code import Code, Reg, i64, lane_count, literal, vector
from cpu_fallback.lanes import COMPUTED, STORED, find_operation, narrowed, widened
from cpu_fallback.loops import (
    BROADCAST,
    CONTIGUOUS,
    Body,
    Mask,
    Read,
    Words,
    Write,
    broadcasts,
    folded,
    lane_zero,
    splat,
    thread_share,
    vector_loop,
)
from cpu_fallback.native import Target, host
from cpu_fallback.reductions import COMBINE, Fold
from cpu_fallback.vector_math import Num, exp_of_negative
from gpu_engine.ir import dims
from gpu_engine.ir.dtypes import FLOAT16, FLOAT32, DType, compute_dtype, is_float
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import LayerNorm, Softmax
from gpu_engine.plan.lower import Lowering
from gpu_engine.plan.words import Address, Word

Buffers = tuple[int, ...]
GROUP = 4
"""Vectors of a row that are taken at a time."""
OneRow = Callable[[Sequence[Reg], Reg], None]


@dataclass(frozen=True)
class SoftmaxKernel:
    """exp(x - max) / sum of every row, or its logarithm. Words: result, x, extent of a row, rows."""

    dtype: DType
    log: bool

    def write(self, code: Code, target: Target) -> None:
        passes = Passes(code, target, self.dtype)
        computed = compute_dtype(self.dtype)
        exp, log = find_operation("exp", computed), find_operation("log", computed)
        assert exp is not None and log is not None
        if computed == FLOAT32:
            exp = exp_of_negative
        keeps = computed == self.dtype and not self.log

        def row(places: Sequence[Reg], inner: Reg) -> None:
            out, x = places
            top = passes.fold("max", inner, [Read(x, self.dtype, CONTIGUOUS)], lambda loaded: loaded[0])

            def power(loaded: list[Reg]) -> Reg:
                return exp(Num(code, loaded[0]) - passes.as_many(top, loaded)).reg

            kept = [Write(out, self.dtype)] if keeps else []
            total = passes.fold("sum", inner, [Read(x, self.dtype, CONTIGUOUS)], power, kept)
            level = (log(Num(code, total)) if self.log else passes.one / Num(code, total)).reg

            def last(loaded: list[Reg]) -> Reg:
                if self.log:
                    return ((Num(code, loaded[0]) - passes.as_many(top, loaded)) - passes.as_many(level, loaded)).reg
                return (Num(code, loaded[0] if keeps else power(loaded)) * passes.as_many(level, loaded)).reg

            passes.map(inner, [Read(out if keeps else x, self.dtype, CONTIGUOUS)], Write(out, self.dtype), last)

        passes.rows(2, [self.dtype.itemsize] * 2, row)


@dataclass(frozen=True)
class LayerNormKernel:
    """Every row normalised, scaled and shifted. Words: result, x, scale and bias as present, extent of a row, rows."""

    dtype: DType
    epsilon: float
    centered: bool
    affine: tuple[tuple[DType, str], ...]

    def write(self, code: Code, target: Target) -> None:
        passes = Passes(code, target, self.dtype)

        def row(places: Sequence[Reg], inner: Reg) -> None:
            out, x, *others = places
            source = Read(x, self.dtype, CONTIGUOUS)
            mean = passes.one.reg
            if self.centered:
                mean = passes.fold("mean", inner, [source], lambda loaded: loaded[0])

            def moved(loaded: list[Reg]) -> Num:
                number = Num(code, loaded[0])
                return number - passes.as_many(mean, loaded) if self.centered else number

            def square(loaded: list[Reg]) -> Reg:
                number = moved(loaded)
                return (number * number).reg

            variance = Num(code, passes.fold("mean", inner, [source], square))
            scale = (passes.one / (variance + self.epsilon).intrinsic("sqrt")).reg

            def last(loaded: list[Reg]) -> Reg:
                result = moved(loaded) * passes.as_many(scale, loaded)
                for i, operand in enumerate(loaded[1:]):
                    result = result * Num(code, operand) if i == 0 else result + Num(code, operand)
                return result.reg

            reads = [Read(place, dtype, access) for place, (dtype, access) in zip(others, self.affine, strict=True)]
            passes.map(inner, [source, *reads], Write(out, self.dtype), last)

        passes.rows(2 + len(self.affine), [self.dtype.itemsize] * 2 + [0] * len(self.affine), row)


class Passes:
    """Row kernels as passes over a row: folds whose result is in every lane, and maps.

    `GROUP` vectors are taken at a time while there are so many, as one of `wide` lanes, and added up before they join a
    sum in float64. What is the same for all places is kept in as many lanes.
    """

    def __init__(self, code: Code, target: Target, dtype: DType) -> None:
        self._code, self._target, self._dtype = code, target, compute_dtype(dtype)
        self.lanes = target.vector_nbytes // self._dtype.itemsize
        self.wide = self.lanes * GROUP
        self.one = Num(code, literal(vector(self.wide, COMPUTED[self._dtype]), 1.0))

    def as_many(self, x: Reg, loaded: Sequence[Reg]) -> Num:
        """What is the same in all lanes in as many lanes as were loaded."""
        return Num(self._code, packing.lanes_of(self._code, x, 0, lane_count(loaded[0].type)))

    def rows(self, streams: int, row_sizes: Sequence[int], one: OneRow) -> None:
        """Every row of this thread; `row_sizes` are the bytes of an element, 0 for what all rows share."""
        code, words = self._code, Words(self._code)
        bases = words.pointers(streams)
        inner, rows = words.take(), words.take()

        def body(index: Reg, _: list[Reg]) -> list[Reg]:
            first = code.binary("mul", index, inner)
            one(
                [code.at(base, code.binary("mul", first, i64(size))) if size else base
                 for base, size in zip(bases, row_sizes, strict=True)], inner,
            )  # fmt: skip
            return []

        code.loop(*thread_share(code, rows, 1), i64(1), body)

    def fold(
        self,
        kind: str,
        inner: Reg,
        reads: Sequence[Read],
        element: Callable[[list[Reg]], Reg],
        writes: Sequence[Write] = (),
    ) -> Reg:
        """The fold of `element` over a row, in every lane; `writes` keep the elements."""
        code, fold = self._code, Fold(self._code, kind, self._dtype, self.lanes)
        join = find_operation(COMBINE[kind], self._dtype)
        assert join is not None
        neutral = -math.inf if kind == "max" else 0.0

        def body(loaded: list[Reg], mask: Mask, carried: list[Reg]) -> tuple[list[Reg], list[Reg]]:
            value = element(loaded)
            inside = code.select(mask(), value, literal(value.type, neutral))
            starts = range(0, lane_count(value.type), self.lanes)
            parts = [Num(code, packing.lanes_of(code, inside, start, self.lanes)) for start in starts]
            total = fold.widen(reduce(join, parts).reg)
            return [value] * len(writes), [fold.combine(carried[0], total)]

        (total,) = self._walk(inner, reads, writes, body, [fold.start()])
        result = fold.finish(folded(code, total, fold.combine), inner)
        return splat(code, lane_zero(code, result), self.wide)

    def map(self, inner: Reg, reads: Sequence[Read], write: Write, element: Callable[[list[Reg]], Reg]) -> None:
        """`element` of every place of a row."""
        self._walk(inner, reads, [write], lambda loaded, _, __: ([element(loaded)], []), [])

    def _walk(
        self, inner: Reg, reads: Sequence[Read], writes: Sequence[Write], body: Body, carries: list[Reg]
    ) -> list[Reg]:
        """`vector_loop`, after groups of vectors. Nothing is strided."""
        code = self._code
        most = code.binary("and", inner, i64(-self.wide))
        splats = broadcasts(code, reads, self.wide)

        def place(stream: Read | Write, index: Reg) -> Reg:
            return code.at(stream.base, code.binary("mul", index, i64(stream.dtype.itemsize)))

        def group(index: Reg, carried: list[Reg]) -> Sequence[Reg]:
            loaded = []
            for i, read in enumerate(reads):
                kind = vector(self.wide, STORED[read.dtype])
                stored = splats.get(i) or code.load(kind, place(read, index), read.dtype.itemsize)
                loaded.append(stored if i in splats else widened(code, stored, read.dtype))
            results, following = body(loaded, lambda: literal(vector(self.wide, "i1"), True), carried)
            for write, result in zip(writes, results, strict=True):
                code.store(narrowed(code, result, write.dtype), place(write, index), write.dtype.itemsize)
            return following

        carried = code.loop(i64(0), most, i64(self.wide), group, carries)
        return vector_loop(code, self._target, self.lanes, (most, inner), reads, writes, body, carried)


def _native_float(dtype: DType) -> bool:
    return is_float(dtype) and dtype in COMPUTED and (dtype != FLOAT16 or host().halves)


def lower_softmax(lowering: Lowering, op: Softmax, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    x = node.inputs[0]
    if not _native_float(x.dtype) or any(extent != 1 for extent in x.shape[op.axis + 1 :]):
        return False
    words: list[Word] = [Address(outputs[0]), Address(inputs[0]), x.shape[op.axis], dims.product(x.shape[: op.axis])]
    lowering.emit(Native(SoftmaxKernel(x.dtype, op.log), tuple(words)), inputs, outputs, in_place=(0,))
    return True


def lower_layer_norm(lowering: Lowering, op: LayerNorm, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    x, *affine = node.inputs
    if not _native_float(x.dtype):
        return False
    row = x.shape[op.axis :]
    accesses = []
    for value in affine:
        core = _without_leading_ones(value.shape)
        if not _native_float(value.dtype) or compute_dtype(value.dtype) != compute_dtype(x.dtype):
            return False
        if core not in ((), _without_leading_ones(row)):
            return False
        accesses.append((value.dtype, CONTIGUOUS if core == _without_leading_ones(row) else BROADCAST))
    words: list[Word] = [
        Address(outputs[0]),
        *map(Address, inputs),
        dims.product(row),
        dims.product(x.shape[: op.axis]),
    ]
    kernel = LayerNormKernel(x.dtype, op.epsilon, op.centered, tuple(accesses))
    lowering.emit(Native(kernel, tuple(words)), inputs, outputs, in_place=(0,))
    return True


def _without_leading_ones(shape: tuple[dims.Dim, ...]) -> tuple[dims.Dim, ...]:
    while shape and shape[0] == 1:
        shape = shape[1:]
    return shape
