"""LocalResponseNorm: sums of squares over neighbouring channels, which lie side by side or a plane apart."""

from __future__ import annotations

from dataclasses import dataclass

from cpu_fallback.calls import Native
from cpu_fallback.code import Code, Reg, i64, literal, vector
from cpu_fallback.integers import clamp, least, most, plus, times
from cpu_fallback.lanes import write_expr
from cpu_fallback.loops import Words, lane_mask, literal_zero, thread_share
from cpu_fallback.native import Target
from cpu_fallback.vector_math import Num, mangled
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import FLOAT32
from gpu_engine.ir.expr import Expr, sqrt
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import LocalResponseNorm
from gpu_engine.plan.lower import Lowering
from gpu_engine.plan.words import Address

Buffers = tuple[int, ...]
MAX_SIZE = 32


@dataclass(frozen=True)
class ResponseNormKernel:
    """A LocalResponseNorm by content. Words: addresses of x and the result; extents before, along and, if `planar`,
    behind the normalised axis."""

    size: int
    alpha: float
    beta: float
    bias: float
    planar: bool

    def write(self, code: Code, target: Target) -> None:
        words = Words(code)
        x, out = words.pointers(2)
        writer = _Writer(code, self, target.vector_nbytes // 4, x, out)
        if self.planar:
            writer.write_planes(*words.numbers(3))
        else:
            writer.write_rows(*words.numbers(2))

    @property
    def reach(self) -> tuple[int, int]:
        """How many channels before and behind its own an element counts."""
        return (self.size - 1) // 2, self.size - 1 - (self.size - 1) // 2

    @property
    def result(self) -> Expr:
        """Of an element and the sum of its neighbours' squares."""
        x, total = expr.arg(0, FLOAT32), expr.arg(1, FLOAT32)
        return x / _power(self.bias + self.alpha / self.size * total, self.beta)


def _power(base: Expr, exponent: float) -> Expr:
    match exponent:
        case 0.5:
            return sqrt(base)
        case 0.75:
            return sqrt(base) * sqrt(sqrt(base))
        case 1.0:
            return base
    return base**exponent


@dataclass(frozen=True)
class _Writer:
    """The kernel while it is written."""

    code: Code
    kernel: ResponseNormKernel
    lanes: int
    x: Reg
    out: Reg

    def write_rows(self, rows: Reg, channels: Reg) -> None:
        """Channels side by side: windows are overlapping vectors, of which those at the ends of a row are masked."""
        code, lanes = self.code, self.lanes
        before, after = self.kernel.reach
        start = least(code, i64(-(-before // lanes) * lanes), channels)
        whole = code.binary("sdiv", code.binary("sub", channels, i64(after)), i64(lanes))
        stop = clamp(code, times(code, whole, i64(lanes)), start, channels)

        def row(index: Reg, _: list[Reg]) -> list[Reg]:
            offset = times(code, index, channels, i64(4))
            for span, inside in (((i64(0), start), False), ((start, stop), True), ((stop, channels), False)):

                def step(channel: Reg, _: list[Reg], inside: bool = inside) -> list[Reg]:
                    self._neighbours(plus(code, offset, times(code, channel, i64(4))), channel, channels, inside)
                    return []

                code.loop(*span, i64(lanes), step)
            return []

        code.loop(*thread_share(code, rows, 1), i64(1), row)

    def _neighbours(self, offset: Reg, channel: Reg, channels: Reg, inside: bool) -> None:
        """One vector of channels, `offset` bytes into x; without `inside`, some of its windows leave the row."""
        code, (before, after) = self.code, self.kernel.reach
        total = self._zero
        for tap in range(-before, after + 1):
            mask = None if inside else self._mask(plus(code, channel, i64(tap)), channels)
            total = self._plus_square(total, self._load(plus(code, offset, i64(4 * tap)), mask))
        self._finish(offset, total, None if inside else self._mask(channel, channels))

    def _mask(self, first: Reg, channels: Reg) -> Reg:
        """Which lanes of a vector from channel `first` on, perhaps below 0, are channels."""
        code, lanes = self.code, self.lanes
        ends = [
            self._first_lanes(code.binary("sub", end, first)) for end in (i64(0), channels)
        ]  # fmt: skip
        return code.binary("and", ends[1], code.binary("xor", ends[0], literal(vector(lanes, "i1"), True)))

    def _first_lanes(self, count: Reg) -> Reg:
        """As `lane_mask`, of any count."""
        some = self.code.compare("icmp sgt", count, i64(0))
        mask = lane_mask(self.code, self.lanes, most(self.code, count, i64(1)))
        return self.code.select(some, mask, literal(mask.type, False))

    def write_planes(self, outer: Reg, channels: Reg, inner: Reg) -> None:
        """Channels a plane apart: a vector along the plane and those of its neighbours."""
        code, lanes, (before, after) = self.code, self.lanes, self.kernel.reach
        plane = times(code, inner, i64(4))
        whole = code.binary("sub", inner, code.binary("urem", inner, i64(lanes)))

        def row(index: Reg, _: list[Reg]) -> list[Reg]:
            channel = code.binary("urem", index, channels)
            low = most(code, i64(-before), code.binary("sub", i64(0), channel))
            high = least(code, i64(after + 1), code.binary("sub", channels, channel))
            offset = times(code, index, plane)
            for span, masked in (((i64(0), whole), False), ((whole, inner), True)):

                def step(place: Reg, _: list[Reg], masked: bool = masked) -> list[Reg]:
                    mask = lane_mask(code, lanes, code.binary("sub", inner, place)) if masked else None
                    self._planes(plus(code, offset, times(code, place, i64(4))), plane, (low, high), mask)
                    return []

                code.loop(*span, i64(lanes), step)
            return []

        code.loop(*thread_share(code, times(code, outer, channels), 1), i64(1), row)

    def _planes(self, offset: Reg, plane: Reg, taps: tuple[Reg, Reg], mask: Reg | None) -> None:
        code = self.code

        def tap(k: Reg, carried: list[Reg]) -> list[Reg]:
            return [self._plus_square(carried[0], self._load(plus(code, offset, times(code, k, plane)), mask))]

        (total,) = code.loop(*taps, i64(1), tap, [self._zero])
        self._finish(offset, total, mask)

    @property
    def _zero(self) -> Reg:
        return literal(vector(self.lanes, "float"), 0)

    def _plus_square(self, total: Reg, x: Reg) -> Reg:
        return (Num(self.code, total) + Num(self.code, x) * Num(self.code, x)).reg

    def _finish(self, offset: Reg, total: Reg, mask: Reg | None) -> None:
        code = self.code
        result = write_expr(code, self.kernel.result, {0: self._load(offset, mask), 1: total}, self.lanes)
        place = code.at(self.out, offset)
        if mask is None:
            code.store(result, place, 4)
        else:
            name = f"llvm.masked.store.{mangled(result.type)}.p0"
            code.call("void", name, result, place, Reg("4", "i32"), mask)

    def _load(self, offset: Reg, mask: Reg | None) -> Reg:
        code, kind = self.code, vector(self.lanes, "float")
        place = code.at(self.x, offset)
        if mask is None:
            return code.load(kind, place, 4)
        name = f"llvm.masked.load.{mangled(kind)}.p0"
        return code.call(kind, name, place, Reg("4", "i32"), mask, literal_zero(kind))


def response_norm_call(op: LocalResponseNorm, x: int, out: int, shape: tuple[dims.Dim, ...]) -> Native:
    """The normalisation of buffer `x` to `out`, float32 of this shape."""
    inner = dims.product(shape[op.axis + 1 :])
    planar = inner != 1
    kernel = ResponseNormKernel(op.size, op.alpha, op.beta, op.bias, planar)
    outer, channels = dims.product(shape[: op.axis]), shape[op.axis]
    return Native(kernel, (Address(x), Address(out), outer, channels, *([inner] if planar else [])))


def lower_response_norm(
    lowering: Lowering, op: LocalResponseNorm, node: Node, inputs: Buffers, outputs: Buffers
) -> bool:
    x = node.inputs[0]
    if x.dtype != FLOAT32 or op.size > MAX_SIZE:
        return False
    lowering.emit(response_norm_call(op, inputs[0], outputs[0], x.shape), inputs, outputs)
    return True
