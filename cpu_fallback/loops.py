"""Loops that kernels share: a thread's rows, and an axis walked in vectors with its tail handled once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cpu_fallback.code import Code, Reg, element, i64, literal, vector
from cpu_fallback.lanes import STORED, narrowed, widened
from cpu_fallback.native import Target
from cpu_fallback.vector_math import mangled
from gpu_engine.ir.dtypes import DType

BLOCK, THREAD, THREADS = Reg("%block", "ptr"), Reg("%thread", "i64"), Reg("%threads", "i64")
CONTIGUOUS, BROADCAST, STRIDED = "contiguous", "broadcast", "strided"


@dataclass(frozen=True)
class Read:
    """An operand's elements along an axis from `base` on; `stride` in bytes where the access is strided."""

    base: Reg
    dtype: DType
    access: str
    stride: Reg | None = None


@dataclass(frozen=True)
class Write:
    """Where results go, contiguously."""

    base: Reg
    dtype: DType


Mask = Callable[[], Reg]
Body = Callable[[list[Reg], Mask, list[Reg]], tuple[Sequence[Reg], Sequence[Reg]]]


class Words:
    """The argument block, read in order."""

    def __init__(self, code: Code) -> None:
        self._code, self._next = code, 0

    def take(self, kind: str = "i64") -> Reg:
        place = self._code.at(BLOCK, i64(8 * self._next))
        self._next += 1
        return self._code.load(kind, place, 8)

    def pointers(self, count: int) -> list[Reg]:
        return [self.take("ptr") for _ in range(count)]

    def numbers(self, count: int) -> list[Reg]:
        return [self.take() for _ in range(count)]


def least(code: Code, a: Reg, b: Reg) -> Reg:
    return code.select(code.compare("icmp slt", a, b), a, b)


def thread_share(code: Code, total: Reg, grain: int) -> tuple[Reg, Reg]:
    """[start, stop) of this thread in `total`, in multiples of `grain`."""
    pieces = code.binary("sdiv", code.binary("add", total, i64(grain - 1)), i64(grain))
    ends = []
    for index in (THREAD, code.binary("add", THREAD, i64(1))):
        piece = code.binary("sdiv", code.binary("mul", pieces, index), THREADS)
        ends.append(least(code, code.binary("mul", piece, i64(grain)), total))
    return ends[0], ends[1]


def row_offsets(code: Code, row: Reg, extents: Sequence[Reg], strides: Sequence[Sequence[Reg]]) -> list[Reg]:
    """Byte offsets of `row` in every operand: its coordinates over `extents` (all axes but the first) times strides."""
    offsets = [i64(0)] * len(strides)
    rest = row
    for axis in range(len(extents), -1, -1):
        coordinate = rest
        if axis:
            extent = extents[axis - 1]
            coordinate, rest = code.binary("urem", rest, extent), code.binary("udiv", rest, extent)
        for i, operand in enumerate(strides):
            step = code.binary("mul", coordinate, operand[axis])
            offsets[i] = step if offsets[i].name == "0" else code.binary("add", offsets[i], step)
    return offsets


def vector_loop(
    code: Code,
    target: Target,
    lanes: int,
    span: tuple[Reg, Reg],
    reads: Sequence[Read],
    writes: Sequence[Write],
    body: Body,
    carries: Sequence[Reg] = (),
) -> list[Reg]:
    """Walk indices [start, stop) by `lanes`; the carries at the end.

    body(operands, mask, carries) gives (results for `writes`, carries), all in computing form. Lanes of the last
    vector that lie beyond the end hold anything; `mask()` says which lanes count.
    """
    splats = {i: _splat(code, read, lanes) for i, read in enumerate(reads) if read.access == BROADCAST}
    walk = _masked_step if target.masked else _staged_step

    def step(index: Reg, carried: list[Reg]) -> Sequence[Reg]:
        left = code.binary("sub", span[1], index)
        return walk(code, lanes, index, left, reads, splats, writes, body, carried)

    return code.loop(span[0], span[1], i64(lanes), step, carries)


def lane_mask(code: Code, lanes: int, left: Reg) -> Reg:
    """The first `left` lanes (at least one)."""
    count = code.call("i64", "llvm.umin.i64", left, i64(lanes))
    gone = code.binary("sub", i64(64), count)
    bits = code.convert("trunc", code.binary("lshr", i64(-1), gone), f"i{lanes}")
    return code.convert("bitcast", bits, vector(lanes, "i1")) if lanes > 1 else bits


def _splat(code: Code, read: Read, lanes: int) -> Reg:
    scalar = code.load(STORED[read.dtype], read.base, read.dtype.itemsize)
    return widened(code, splat(code, scalar, lanes), read.dtype)


def splat(code: Code, scalar: Reg, lanes: int) -> Reg:
    """A scalar in every lane."""
    if lanes == 1:
        return scalar
    kind = vector(lanes, scalar.type)
    first = code.let(kind, f"insertelement {kind} poison, {scalar}, i64 0")
    return code.let(kind, f"shufflevector {first}, {kind} poison, <{lanes} x i32> zeroinitializer")


def _address(code: Code, base: Reg, index: Reg, dtype: DType) -> Reg:
    return code.at(base, code.binary("mul", index, i64(dtype.itemsize)))


def _gathered(code: Code, read: Read, index: Reg, lanes: int, mask: Reg) -> Reg:
    """Elements `read.stride` bytes apart."""
    assert read.stride is not None
    kind, numbers = vector(lanes, STORED[read.dtype]), vector(lanes, "i64")
    start = code.at(read.base, code.binary("mul", index, read.stride))
    iota = Reg("<" + ", ".join(f"i64 {i}" for i in range(lanes)) + ">", numbers) if lanes > 1 else i64(0)
    steps = code.binary("mul", iota, splat(code, read.stride, lanes))
    if lanes == 1:
        return code.load(kind, start, read.dtype.itemsize)
    places = code.let(vector(lanes, "ptr"), f"getelementptr i8, {start}, {steps}")
    name = f"llvm.masked.gather.{mangled(kind)}.v{lanes}p0"
    return code.call(kind, name, places, Reg(str(read.dtype.itemsize), "i32"), mask, literal_zero(kind))


def literal_zero(kind: str) -> Reg:
    return Reg("zeroinitializer", kind) if kind.startswith("<") else literal(kind, 0)


def _masked_step(
    code: Code,
    lanes: int,
    index: Reg,
    left: Reg,
    reads: Sequence[Read],
    splats: dict[int, Reg],
    writes: Sequence[Write],
    body: Body,
    carried: list[Reg],
) -> Sequence[Reg]:
    mask = lane_mask(code, lanes, left)
    operands = []
    for i, read in enumerate(reads):
        if read.access == BROADCAST:
            operands.append(splats[i])
            continue
        if read.access == STRIDED:
            loaded = _gathered(code, read, index, lanes, mask)
        else:
            kind = vector(lanes, STORED[read.dtype])
            place = _address(code, read.base, index, read.dtype)
            align = Reg(str(read.dtype.itemsize), "i32")
            loaded = code.call(kind, f"llvm.masked.load.{mangled(kind)}.p0", place, align, mask, literal_zero(kind))
        operands.append(widened(code, loaded, read.dtype))
    results, carries = body(operands, lambda: mask, carried)
    for write, result in zip(writes, results, strict=True):
        value = narrowed(code, result, write.dtype)
        place = _address(code, write.base, index, write.dtype)
        align = Reg(str(write.dtype.itemsize), "i32")
        code.call("void", f"llvm.masked.store.{mangled(value.type)}.p0", value, place, align, mask)
    return carries


def _staged_step(
    code: Code,
    lanes: int,
    index: Reg,
    left: Reg,
    reads: Sequence[Read],
    splats: dict[int, Reg],
    writes: Sequence[Write],
    body: Body,
    carried: list[Reg],
) -> Sequence[Reg]:
    """Without cheap masks: what is left of the last vector is copied to the stack first and back afterwards."""
    contiguous = [read for read in reads if read.access == CONTIGUOUS]
    whole = code.compare("icmp sge", left, i64(lanes))
    bases = [_address(code, stream.base, index, stream.dtype) for stream in (*contiguous, *writes)]
    stages = [code.alloca(vector(lanes, STORED[stream.dtype])) for stream in (*contiguous, *writes)]

    def copy_in() -> list[Reg]:
        for stage, base, read in zip(stages, bases, contiguous, strict=False):
            _copy(code, stage, base, left, read.dtype)
        return stages

    places = code.either(whole, lambda: bases, copy_in)
    inputs = iter(places)
    operands = []
    for i, read in enumerate(reads):
        if read.access == BROADCAST:
            operands.append(splats[i])
            continue
        if read.access == STRIDED:
            loaded = _gathered(code, read, index, lanes, lane_mask(code, lanes, left))
        else:
            loaded = code.load(vector(lanes, STORED[read.dtype]), next(inputs), read.dtype.itemsize)
        operands.append(widened(code, loaded, read.dtype))
    results, carries = body(operands, lambda: lane_mask(code, lanes, left), carried)
    for write, result, place in zip(writes, results, places[len(contiguous) :], strict=True):
        code.store(narrowed(code, result, write.dtype), place, write.dtype.itemsize)

    def copy_out() -> list[Reg]:
        for stage, base, write in zip(stages[len(contiguous) :], bases[len(contiguous) :], writes, strict=True):
            _copy(code, base, stage, left, write.dtype)
        return []

    if writes:
        code.either(whole, list, copy_out)
    return carries


def _copy(code: Code, to: Reg, source: Reg, count: Reg, dtype: DType) -> None:
    nbytes = code.binary("mul", count, i64(dtype.itemsize))
    code.call("void", "llvm.memcpy.p0.p0.i64", to, source, nbytes, Reg("false", "i1"))


def lane_zero(code: Code, x: Reg) -> Reg:
    """The first lane."""
    return code.let(element(x.type), f"extractelement {x}, i64 0") if x.type.startswith("<") else x
