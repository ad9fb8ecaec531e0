"""The record of a row of a recurrent layer in scratch memory, and the quantisation of the states in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cpu_fallback.code import Code, Reg, i64, literal, vector
from cpu_fallback.lanes import FLOATS, Operation
from cpu_fallback.loops import folded, lane_mask, lane_zero, splat
from cpu_fallback.recurrent_products import BYTES, QUADS, Form
from cpu_fallback.vector_math import Num, mangled

LINE = 64
TOTAL, ZERO, SCALE = 0, 4, 8
"""Bytes into what is known of a quantised state: the sum of its bytes, its zero point, its scale."""


@dataclass(frozen=True)
class Record:
    """Where everything of a row is, in bytes from its start: for `gates` of `hidden` columns each, in `phases`.

    A phase is a number of gates whose products come from one source, the state or, in the second, the state after the
    reset gate. `cells`: there is a cell state.
    """

    form: Form
    hidden: int
    phases: tuple[int, ...]
    cells: bool

    @property
    def size(self) -> int:
        """Bytes of an element of a state."""
        return self.form.word

    @property
    def padded(self) -> int:
        """Columns of a gate."""
        return -(-self.hidden // self.form.lanes) * self.form.lanes

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of the panels of every phase."""
        width = self.form.lanes * self.form.vectors
        return tuple(self.form.panels(count * self.padded) * width for count in self.phases)

    def column(self, gate: int) -> int:
        """The first column of a gate's products."""
        for count, start in zip(self.phases, (0, *self.widths), strict=False):
            if gate < count:
                return start + gate * self.padded
            gate -= count
        raise IndexError(gate)

    @property
    def state(self) -> int:
        return 0

    @property
    def cell(self) -> int:
        return self._vectors(1)

    @property
    def reset(self) -> int:
        return self._vectors(1 + self.cells)

    @property
    def sums(self) -> int:
        return self._vectors(self.cells + len(self.phases))

    @property
    def codes(self) -> int:
        """The quantised state."""
        return self.sums + _lines(sum(self.widths) * self.size)

    @property
    def known(self) -> int:
        """What is known of the quantised state."""
        return self.codes + (_lines(self.form.depth(self.padded) * self.form.word) if self.quantised else 0)

    @property
    def nbytes(self) -> int:
        """An odd number of lines: rows a power of two apart would push each other out of the first cache."""
        lines = (self.known + LINE * self.quantised) // LINE
        return (lines | 1) * LINE

    @property
    def quantised(self) -> bool:
        return self.form.quantised

    def _vectors(self, count: int) -> int:
        return count * _lines(self.padded * self.size)


def _lines(nbytes: int) -> int:
    return -(-nbytes // LINE) * LINE


def quantise(code: Code, record: Record, records: Reg, rows: Reg, source: int, extra: Reg | None = None) -> None:
    """Write the bytes of all rows of the state at `source`, with one scale and zero point, and what is known of them;
    those that `extra` numbers once more behind them.

    As DynamicQuantizeLinear does, but for NaN, which makes the scale of its row NaN, and of all if it is the extreme.
    """
    writer = _Quantiser(code, record, source)
    low, high = (Num(code, writer.extreme(records, rows, op)) for op in (FLOATS["min"], FLOATS["max"]))
    scale = high.test("oeq", low).select(1.0, (high - low) / 255.0)
    zero = writer.bounded(((low * -1.0) / scale).intrinsic("rint"))

    def row(index: Reg, _: list[Reg]) -> list[Reg]:
        start = code.at(records, code.binary("mul", index, i64(record.nbytes)))
        writer.row(start, scale, zero)
        if extra is not None:
            writer.repeat(start, extra)
        return []

    code.loop(i64(0), rows, i64(1), row)


@dataclass(frozen=True)
class _Quantiser:
    code: Code
    record: Record
    source: int

    @property
    def kind(self) -> str:
        return vector(self.record.form.lanes, "float")

    def extreme(self, records: Reg, rows: Reg, fold: Operation) -> Reg:
        """The least or greatest element of all rows and 0, in every lane; NaN if there is one."""
        code = self.code

        def combine(a: Reg, b: Reg) -> Reg:
            return fold(Num(code, a), Num(code, b)).reg

        def row(index: Reg, carried: list[Reg]) -> Sequence[Reg]:
            start = code.at(records, code.binary("mul", index, i64(self.record.nbytes)))

            def step(column: Reg, inner: list[Reg]) -> list[Reg]:
                x = self._loaded(start, column)
                mask = self._mask(column)
                inside = x if mask is None else code.select(mask, x, literal(self.kind, 0.0))
                return [combine(inside, inner[0])]

            return self._columns(step, carried)

        (result,) = code.loop(i64(0), rows, i64(1), row, [literal(self.kind, 0.0)])
        return splat(code, lane_zero(code, folded(code, result, combine)), self.record.form.lanes)

    def bounded(self, x: Num) -> Num:
        """Within a byte; NaN stays."""
        zero, most = (Num(self.code, literal(self.kind, bound)) for bound in (0.0, 255.0))
        return FLOATS["min"](FLOATS["max"](x, zero), most)

    def row(self, start: Reg, scale: Num, zero: Num) -> None:
        code, record = self.code, self.record
        whole = vector(record.form.lanes, "i32")
        narrow = "i8" if record.form.kind in (QUADS, BYTES) else "i16"

        def step(column: Reg, carried: list[Reg]) -> list[Reg]:
            value = self.bounded((Num(code, self._loaded(start, column)) / scale).intrinsic("rint") + zero)
            invalid = value.test("uno", value)
            mask = self._mask(column)
            number = invalid.select(0.0, value).cast("fptosi", "i32").reg
            if mask is not None:
                invalid = invalid & Num(code, mask)
                number = code.select(mask, number, literal(whole, 0))
            place = code.at(start, code.binary("mul", column, i64(1 if narrow == "i8" else 2)))
            narrowed = code.convert("trunc", number, vector(record.form.lanes, narrow))
            code.store(narrowed, code.at(place, i64(record.codes)), 1)
            return [code.binary("add", carried[0], number), (Num(code, carried[1]) | invalid).reg]

        start_values = [literal(whole, 0), literal(vector(record.form.lanes, "i1"), False)]
        total, invalid = self._columns(step, start_values)
        some = code.call("i1", f"llvm.vector.reduce.or.{mangled(invalid.type)}", invalid)
        known = code.at(start, i64(record.known))
        total = lane_zero(code, folded(code, total, lambda a, b: code.binary("add", a, b)))
        code.store(total, code.at(known, i64(TOTAL)), 4)
        point = zero.test("uno", zero).select(0.0, zero).cast("fptosi", "i32").reg
        code.store(lane_zero(code, point), code.at(known, i64(ZERO)), 4)
        own = code.select(some, literal("float", float("nan")), lane_zero(code, scale.reg))
        code.store(own, code.at(known, i64(SCALE)), 4)

    def repeat(self, start: Reg, extra: Reg) -> None:
        """The bytes that are numbered at `extra` once more, behind the last whole step."""
        code, form = self.code, self.record.form
        codes = code.at(start, i64(self.record.codes))
        behind = code.at(codes, i64((form.depth(self.record.hidden) * form.step) - form.extra))

        def one(index: Reg, _: list[Reg]) -> list[Reg]:
            number = code.load("i32", code.at(extra, code.binary("shl", index, i64(2))), 4)
            value = code.load("i8", code.at(codes, code.convert("zext", number, "i64")), 1)
            code.store(value, code.at(behind, index), 1)
            return []

        code.loop(i64(0), i64(form.extra), i64(1), one)

    def _columns(self, step: Callable[[Reg, list[Reg]], Sequence[Reg]], carries: Sequence[Reg]) -> list[Reg]:
        return self.code.loop(i64(0), i64(self.record.hidden), i64(self.record.form.lanes), step, carries)

    def _loaded(self, start: Reg, column: Reg) -> Reg:
        code, size = self.code, self.record.size
        place = code.at(code.at(start, i64(self.source)), code.binary("mul", column, i64(size)))
        return code.load(self.kind, place, size)

    def _mask(self, column: Reg) -> Reg | None:
        """The lanes inside the state; None if all vectors are whole."""
        if self.record.hidden % self.record.form.lanes == 0:
            return None
        return lane_mask(self.code, self.record.form.lanes, self.code.binary("sub", i64(self.record.hidden), column))
