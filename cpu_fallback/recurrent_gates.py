"""What LSTM, GRU and RNN make of the products of a step: some columns of one row at a time, in registers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cpu_fallback.code import Code, Reg, i64, literal, vector
from cpu_fallback.integers import plus, times
from cpu_fallback.lanes import COMPUTED, write_expr
from cpu_fallback.loops import splat
from cpu_fallback.recurrent_states import SCALE, TOTAL, ZERO, Record
from cpu_fallback.vector_math import Num
from gpu_engine.ir.dtypes import DType
from gpu_engine.ir.expr import Expr


@dataclass(frozen=True)
class Layer:
    """What all cells of a direction have in common; `corrections` are those of its quantised weights: see Packing."""

    record: Record
    dtype: DType
    functions: tuple[Expr, ...]
    input_forget: bool
    centred: bool
    corrections: Reg | None

    @property
    def kind(self) -> str:
        """The LLVM type of some columns of a state."""
        return vector(self.record.form.lanes, COMPUTED[self.dtype])


@dataclass(frozen=True)
class Row:
    """A row at one step of time: its record, its inputs' products, its place in the sequence; of a quantised state the
    sum, the zero point and the scale, in every lane."""

    record: Reg
    x: Reg
    out: Reg
    codes: Reg | None = None
    zero: Reg | None = None
    scale: Reg | None = None


def row_of(code: Code, record: Record, place: Reg, x: Reg, out: Reg) -> Row:
    if not record.quantised:
        return Row(place, x, out)
    known = (
        splat(code, code.load(kind, code.at(place, i64(record.known + offset)), 4), record.form.lanes)
        for kind, offset in (("i32", TOTAL), ("i32", ZERO), ("float", SCALE))
    )
    return Row(place, x, out, *known)


@dataclass(frozen=True)
class Cell:
    """Columns of a row, from `column` on, with the products of the inputs for the gates of the stage, and the parts of
    its optional operand if the layer has that."""

    code: Code
    layer: Layer
    row: Row
    column: Reg
    x: Sequence[Num]
    operand: Sequence[Num]

    def kept(self, offset: int) -> Num:
        """What the record holds at `offset`."""
        return self.number(self.code.load(self.layer.kind, self._place(offset), self.layer.record.size))

    def keep(self, offset: int, value: Num) -> None:
        self.code.store(value.reg, self._place(offset), self.layer.record.size)

    def number(self, value: Reg | float) -> Num:
        return Num(self.code, value if isinstance(value, Reg) else literal(self.layer.kind, value))

    def apply(self, function: int, x: Num) -> Num:
        lanes = self.layer.record.form.lanes
        return self.number(write_expr(self.code, self.layer.functions[function], {0: x.reg}, lanes))

    def product(self, gate: int) -> Num:
        """What the recurrent weights give for a gate."""
        record = self.layer.record
        start = record.sums + record.column(gate) * record.size
        return self._scaled(gate, self._place(start)) if record.quantised else self.kept(start)

    def _scaled(self, gate: int, place: Reg) -> Num:
        """The sum of products of bytes, without what the zero points added."""
        code, record = self.code, self.layer.record
        assert self.row.codes and self.row.zero and self.row.scale and self.layer.corrections
        whole, width = vector(record.form.lanes, "i32"), sum(record.widths)
        first = times(code, plus(code, self.column, i64(record.column(gate))), i64(4))
        base = code.at(self.layer.corrections, first)
        zeros, sums, scales = (
            Num(code, code.load(kind, code.at(base, i64(4 * i * width)), 4))
            for i, kind in enumerate((whole, whole, self.layer.kind))
        )
        total = Num(code, code.load(whole, place, 4))
        if not self.layer.centred:
            total = total - zeros * Num(code, self.row.codes)
        total = total - sums * Num(code, self.row.zero)
        return total.cast("sitofp", "float") * (Num(code, self.row.scale) * scales)

    def _place(self, offset: int) -> Reg:
        code = self.code
        return code.at(code.at(self.row.record, i64(offset)), times(code, self.column, i64(self.layer.record.size)))


@dataclass(frozen=True)
class Stage:
    """A product for some gates from the state at `source`, and what follows it: the new state, or None if it is not the
    last stage of a step. `operand` names the optional operand of `parts` times the hidden size that takes part."""

    gates: range
    source: int
    follow: Callable[[Cell], Num | None]
    operand: str = ""
    parts: int = 0

    @property
    def last(self) -> bool:
        return self.follow is not _reset


def stages(kind: str, record: Record) -> list[Stage]:
    """What a step of time consists of."""
    if kind == "lstm":
        return [Stage(range(4), record.state, _lstm, "peepholes", 3)]
    if kind == "rnn":
        return [Stage(range(1), record.state, _rnn)]
    if len(record.phases) == 1:
        return [Stage(range(3), record.state, _gru_linear, "bias", 1)]
    return [Stage(range(2), record.state, _reset), Stage(range(2, 3), record.reset, _gru)]


def _lstm(cell: Cell) -> Num:
    i, o, forget, new = (x + cell.product(gate) for gate, x in enumerate(cell.x))
    record, to = cell.layer.record, cell.operand
    c = cell.kept(record.cell)
    i = cell.apply(0, i + to[0] * c if to else i)
    kept = cell.number(1.0) - i if cell.layer.input_forget else cell.apply(0, forget + to[2] * c if to else forget)
    c = kept * c + i * cell.apply(1, new)
    cell.keep(record.cell, c)
    return cell.apply(0, o + to[1] * c if to else o) * cell.apply(2, c)


def _rnn(cell: Cell) -> Num:
    return cell.apply(0, cell.x[0] + cell.product(0))


def _gru_linear(cell: Cell) -> Num:
    """With the reset gate behind the product."""
    z, r = (cell.apply(0, cell.x[gate] + cell.product(gate)) for gate in range(2))
    inner = cell.product(2)
    return _mixed(cell, z, cell.x[2] + r * (inner + cell.operand[0] if cell.operand else inner))


def _reset(cell: Cell) -> None:
    """The update gate goes where its product was; the second product is of the state after the reset gate."""
    z, r = (cell.apply(0, x + cell.product(gate)) for gate, x in enumerate(cell.x))
    record = cell.layer.record
    cell.keep(record.sums, z)
    cell.keep(record.reset, r * cell.kept(record.state))


def _gru(cell: Cell) -> Num:
    return _mixed(cell, cell.kept(cell.layer.record.sums), cell.x[0] + cell.product(2))


def _mixed(cell: Cell, z: Num, new: Num) -> Num:
    return (cell.number(1.0) - z) * cell.apply(1, new) + z * cell.kept(cell.layer.record.state)
