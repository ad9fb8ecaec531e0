"""Loops that kernels share: a thread's rows, and an axis walked in vectors with its tail handled once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cpu_fallback.code import Code, Reg, element, i64, lane_count, literal, vector
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

    def literal(self, dtype: DType, lanes: int) -> Reg:
        """A scalar that fills one word, in every lane and in computing form."""
        place = self._code.at(BLOCK, i64(8 * self._next))
        self._next += 1
        return _splat(self._code, Read(place, dtype, BROADCAST), lanes)

    def numbers(self, count: int) -> list[Reg]:
        return [self.take() for _ in range(count)]

    def address(self) -> Reg:
        """Where the next word lies, which holds data."""
        self._next += 1
        return self._code.at(BLOCK, i64(8 * (self._next - 1)))


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
    splats = broadcasts(code, reads, lanes)

    def step(index: Reg, carried: list[Reg]) -> Sequence[Reg]:
        left = code.binary("sub", span[1], index)
        window = Window(code, target, lanes, index, left)
        operands = window.read(reads, splats)
        results, following = body(operands, window.mask, carried)
        window.write(writes, results)
        return following

    return code.loop(span[0], span[1], i64(lanes), step, carries)


def broadcasts(code: Code, reads: Sequence[Read], lanes: int) -> dict[int, Reg]:
    """The operands that are one element for the whole axis, loaded once."""
    return {i: _splat(code, read, lanes) for i, read in enumerate(reads) if read.access == BROADCAST}


class Window:
    """`lanes` elements of an axis from `index` on, of which `left` (at least one) lie inside.

    Where masks cost nothing every access is masked. Elsewhere what is left of a last, partial vector is copied to the
    stack first, and back afterwards.
    """

    def __init__(self, code: Code, target: Target, lanes: int, index: Reg, left: Reg) -> None:
        self._code, self._target, self._lanes, self._index, self._left = code, target, lanes, index, left
        self._whole = None if target.masked else code.compare("icmp sge", left, i64(lanes))
        self._mask = lane_mask(code, lanes, left) if target.masked else None

    def mask(self) -> Reg:
        """Which lanes lie inside."""
        return self._mask or lane_mask(self._code, self._lanes, self._left)

    def read(self, reads: Sequence[Read], splats: dict[int, Reg]) -> list[Reg]:
        """Every operand in computing form."""
        places = self._staged([read for read in reads if read.access == CONTIGUOUS])
        operands = []
        for i, read in enumerate(reads):
            if read.access == BROADCAST:
                operands.append(splats[i])
                continue
            gathered = read.access == STRIDED
            loaded = _gathered(self._code, read, self._index, self._lanes, self.mask()) if gathered else self._loaded(
                read.dtype, next(places))  # fmt: skip
            operands.append(widened(self._code, loaded, read.dtype))
        return operands

    def write(self, writes: Sequence[Write], results: Sequence[Reg]) -> None:
        """Store results in computing form."""
        for write, result in zip(writes, results, strict=True):
            value = narrowed(self._code, result, write.dtype)
            place = _address(self._code, write.base, self._index, write.dtype)
            if self._mask is not None:
                align = Reg(str(write.dtype.itemsize), "i32")
                name = f"llvm.masked.store.{mangled(value.type)}.p0"
                self._code.call("void", name, value, place, align, self._mask)
            else:
                self._store_staged(value, place, write.dtype)

    def _loaded(self, dtype: DType, place: Reg) -> Reg:
        kind = vector(self._lanes, STORED[dtype])
        if self._mask is None:
            return self._code.load(kind, place, dtype.itemsize)
        name = f"llvm.masked.load.{mangled(kind)}.p0"
        return self._code.call(kind, name, place, Reg(str(dtype.itemsize), "i32"), self._mask, literal_zero(kind))

    def _staged(self, reads: Sequence[Read]) -> Iterator[Reg]:
        """Where to load each contiguous operand from."""
        code = self._code
        bases = [_address(code, read.base, self._index, read.dtype) for read in reads]
        if self._whole is None or not reads:
            return iter(bases)
        stages = [code.alloca(vector(self._lanes, STORED[read.dtype])) for read in reads]

        def copy_in() -> list[Reg]:
            for stage, base, read in zip(stages, bases, reads, strict=True):
                _copy(code, stage, base, self._left, read.dtype)
            return stages

        return iter(code.either(self._whole, lambda: bases, copy_in))

    def _store_staged(self, value: Reg, place: Reg, dtype: DType) -> None:
        code = self._code
        assert self._whole is not None

        def whole() -> list[Reg]:
            code.store(value, place, dtype.itemsize)
            return []

        def partial() -> list[Reg]:
            stage = code.alloca(value.type)
            code.store(value, stage, 64)
            _copy(code, place, stage, self._left, dtype)
            return []

        code.either(self._whole, whole, partial)


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


def _copy(code: Code, to: Reg, source: Reg, count: Reg, dtype: DType) -> None:
    nbytes = code.binary("mul", count, i64(dtype.itemsize))
    code.call("void", "llvm.memcpy.p0.p0.i64", to, source, nbytes, Reg("false", "i1"))


def lane_zero(code: Code, x: Reg) -> Reg:
    """The first lane."""
    return code.let(element(x.type), f"extractelement {x}, i64 0") if x.type.startswith("<") else x


def folded(code: Code, x: Reg, combine: Callable[[Reg, Reg], Reg]) -> Reg:
    """All lanes combined in a tree; the result is in the first lane."""
    lanes = lane_count(x.type)
    while lanes > 1:
        lanes //= 2
        places = ", ".join(f"i32 {lanes + i if i < lanes else i}" for i in range(lane_count(x.type)))
        other = code.let(x.type, f"shufflevector {x}, {x.type} poison, <{lane_count(x.type)} x i32> <{places}>")
        x = combine(x, other)
    return x
