"""LSTM, GRU and RNN as one kernel: for some rows of the batch all steps of time, the state staying in the cache.

Every row has a record in scratch memory: its states, what they give with the recurrent weights, and their bytes if they
are quantised. Columns of a gate are padded to whole vectors there; only operands and results are masked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from cpu_fallback.code import Code, Reg, i64, literal
from cpu_fallback.integers import ceil_div, clamp, least, most, plus, times
from cpu_fallback.loops import CONTIGUOUS, THREADS, Read, Window, Words, Write, thread_share
from cpu_fallback.native import Target, attributes
from cpu_fallback.packing import parameters
from cpu_fallback.recurrent_gates import Cell, Layer, Row, Stage, row_of, stages
from cpu_fallback.recurrent_products import call_product, product_table
from cpu_fallback.recurrent_states import Record, quantise
from cpu_fallback.vector_math import Num
from gpu_engine.ir.dtypes import DType, compute_dtype
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.ops.recurrent import GATES

RUN = "ptr %block, i64 %direction, i64 %backwards, i64 %first, i64 %rows"


@dataclass(frozen=True)
class RecurrentKernel:
    """A recurrent layer by content.

    `present` are the optional operands with their dtypes; at most `rows` of the batch run together, or all of them if
    0; `heights` are the numbers of rows that a product may have; `functions` are the activations of every direction,
    which clip what enters them, and `texts` spell them; `centred`: the zero points of quantised weights are all 0.

    Words: addresses of the sequence, the last state, the last cell state of an LSTM, the products of the inputs, the
    packed weights, the corrections of quantised ones, the numbers of elements that come once more, the records, the
    operands of `present`; the steps; the rows; the hidden size.
    """

    kind: str
    dtype: DType
    record: Record
    reverse: tuple[bool, ...]
    rows: int
    heights: tuple[int, ...]
    present: tuple[tuple[str, DType], ...]
    texts: tuple[tuple[str, ...], ...]
    input_forget: bool
    centred: bool
    functions: tuple[tuple[Expr, ...], ...] = field(compare=False, repr=False)

    def write(self, code: Code, target: Target) -> None:
        """Threads share the blocks of rows of all directions."""
        given = _Arguments(self, code)
        directions = i64(len(self.reverse))
        block = most(code, given.batch, i64(1))
        if self.rows:
            even = ceil_div(code, times(code, given.batch, directions), THREADS)
            block = clamp(code, even, i64(1), i64(self.rows))
        per = ceil_div(code, given.batch, block)
        first, last = thread_share(code, times(code, per, directions), 1)
        for d, backwards in enumerate(self.reverse):
            function = self._define(code, target, d)
            before = times(code, per, i64(d))
            start = most(code, code.binary("sub", first, before), i64(0))
            stop = least(code, code.binary("sub", last, before), per)

            def run(index: Reg, _: list[Reg], d: int = d, back: bool = backwards, name: str = function) -> list[Reg]:
                row = code.binary("mul", index, block)
                rows = least(code, block, code.binary("sub", given.batch, row))
                arguments = [Reg("%block", "ptr"), i64(d), i64(int(back)), row, rows]
                code.do(f"call void @{name}({', '.join(map(str, arguments))})")
                return []

            code.loop(start, stop, i64(1), run)

    def _define(self, code: Code, target: Target, direction: int) -> str:
        """The function that runs some rows of one direction; directions with equal activations share it."""
        content = repr((self, self.texts[direction]))
        name = f"recurrent_{hashlib.blake2s(content.encode(), digest_size=8).hexdigest()}"
        functions = self.functions[direction]
        code.define(name, RUN, attributes(target), lambda inner: _Run(self, inner, target, functions).write())
        return name


class _Arguments:
    """The words."""

    def __init__(self, kernel: RecurrentKernel, code: Code) -> None:
        words = Words(code)
        self.sequence = words.take("ptr")
        self.last = words.pointers(1 + kernel.record.cells)
        self.x, self.weights = words.pointers(2)
        self.corrections = words.take("ptr") if kernel.record.quantised else None
        self.extra = words.take("ptr") if kernel.record.form.extra else None
        self.records = words.take("ptr")
        self.operands = {name: words.take("ptr") for name, _ in kernel.present}
        self.steps, self.batch, self.hidden = words.numbers(3)


class _Run:
    """The function RUN: some rows of a direction through all steps."""

    def __init__(self, kernel: RecurrentKernel, code: Code, target: Target, functions: tuple[Expr, ...]) -> None:
        self.kernel, self.code, self.target = kernel, code, target
        self.given, self.record, self.dtypes = _Arguments(kernel, code), kernel.record, dict(kernel.present)
        self.lanes, self.hidden, self.size = kernel.record.form.lanes, kernel.record.hidden, kernel.dtype.itemsize
        _, self.direction, self.backwards, self.first, self.rows = parameters(RUN)
        corrections = self.given.corrections
        if corrections is not None:
            own = times(code, self.direction, i64(12 * sum(self.record.widths)))
            corrections = code.at(corrections, own)
        self.layer = Layer(
            self.record, compute_dtype(kernel.dtype), functions, kernel.input_forget, kernel.centred, corrections
        )  # fmt: skip
        self.state_row = plus(code, times(code, self.direction, self.given.batch), self.first)
        self.records = code.at(self.given.records, times(code, self.state_row, i64(self.record.nbytes)))

    def write(self) -> None:
        code, record, given = self.code, self.record, self.given
        for name, place in [("initial_h", record.state), ("initial_c", record.cell)][: 1 + record.cells]:
            self._copy(given.operands.get(name), self.dtypes.get(name, self.kernel.dtype), place, out=False)
        final = code.binary("sub", given.steps, i64(1))
        back = code.compare("icmp ne", self.backwards, i64(0))
        longest = self._longest()

        def step(index: Reg, _: list[Reg]) -> list[Reg]:
            time = code.select(back, code.binary("sub", final, index), index)
            if longest is None:
                self._step(time)
            else:
                some = code.compare("icmp slt", time, longest)
                code.either(some, lambda: self._step(time), lambda: self._silence(time))
            return []

        code.loop(i64(0), given.steps, i64(1), step)
        for pointer, place in zip(given.last, (record.state, record.cell), strict=False):
            self._copy(pointer, self.kernel.dtype, place, out=True)

    def _step(self, time: Reg) -> list[Reg]:
        for phase, stage in enumerate(stages(self.kernel.kind, self.record)):
            self._multiply(phase, stage.source)
            self._each_row(time, partial(self._follow, stage, time))
        return []

    def _silence(self, time: Reg) -> list[Reg]:
        """A step that no row takes part in."""
        self._each_row(time, lambda row, _: self._zeros(row))
        return []

    def _longest(self) -> Reg | None:
        """The steps of the longest row."""
        if "lengths" not in self.dtypes:
            return None
        code = self.code
        (found,) = code.loop(
            i64(0), self.rows, i64(1), lambda index, carried: [most(code, carried[0], self._length(index))], [i64(0)]
        )  # fmt: skip
        return found

    def _length(self, row: Reg) -> Reg:
        code = self.code
        place = code.at(self.given.operands["lengths"], times(code, plus(code, self.first, row), i64(4)))
        return code.convert("sext", code.load("i32", place, 4), "i64")

    def _multiply(self, phase: int, source: int) -> None:
        """The products of a phase for all rows: panel after panel where there are more rows than one tile takes."""
        code, record, form = self.code, self.record, self.record.form
        if record.quantised:
            extra = self.given.extra
            if extra is not None:
                extra = code.at(extra, times(code, self.direction, i64(4 * form.extra)))
            quantise(code, record, self.records, self.rows, source, extra)
            source = record.codes
        depth, line = form.depth(self.hidden), form.lanes * form.vectors * form.word
        panel_nbytes = depth * form.nbytes * form.vectors
        counts = [width * form.word // line for width in record.widths]
        table = product_table(code, self.target, form, self.kernel.heights)
        own = plus(code, times(code, self.direction, i64(sum(counts))), i64(sum(counts[:phase])))
        weights = code.at(self.given.weights, times(code, own, i64(panel_nbytes)))
        states, sums = (
            code.at(self.records, i64(offset)) for offset in (source, record.sums + sum(counts[:phase]) * line)
        )  # fmt: skip
        tiles = ceil_div(code, self.rows, i64(self.kernel.heights[-1]))
        height = ceil_div(code, self.rows, tiles)
        many = code.compare("icmp sgt", tiles, i64(1))
        span = code.select(many, i64(1), i64(counts[phase]))
        row_nbytes = i64(record.nbytes)

        def panel(index: Reg, _: list[Reg]) -> list[Reg]:
            place = code.at(weights, times(code, index, i64(panel_nbytes)))
            to = code.at(sums, times(code, index, i64(line)))

            def tile(row: Reg, _: list[Reg]) -> list[Reg]:
                offset = times(code, row, row_nbytes)
                rows = least(code, code.binary("sub", self.rows, row), height)
                state, result = code.at(states, offset), code.at(to, offset)
                call_product(code, table, rows, state, row_nbytes, place, result, row_nbytes, i64(depth), span)
                return []

            code.loop(i64(0), self.rows, height, tile)
            return []

        code.loop(i64(0), i64(counts[phase]), span, panel)

    def _each_row(self, time: Reg, one: Callable[[Row, Reg], object]) -> None:
        """`one` of all rows of a step, and their numbers."""
        code, given, record = self.code, self.given, self.record
        directions = i64(len(self.kernel.reverse))
        x_row, out_row = GATES[self.kernel.kind] * self.hidden * self.size, self.hidden * self.size
        row = plus(code, times(code, time, given.batch), self.first)
        x = code.at(given.x, times(code, plus(code, times(code, row, directions), self.direction), i64(x_row)))
        block = times(code, plus(code, times(code, time, directions), self.direction), given.batch)
        out = code.at(given.sequence, times(code, plus(code, block, self.first), i64(out_row)))

        def body(index: Reg, _: list[Reg]) -> list[Reg]:
            place = code.at(self.records, times(code, index, i64(record.nbytes)))
            inputs = code.at(x, times(code, index, directions, i64(x_row)))
            one(row_of(code, record, place, inputs, code.at(out, times(code, index, i64(out_row)))), index)
            return []

        code.loop(i64(0), self.rows, i64(1), body)

    def _follow(self, stage: Stage, time: Reg, row: Row, index: Reg) -> None:
        """What follows a product, of a row that has not ended."""
        if "lengths" not in self.dtypes or not stage.last:
            self._cells(stage, row)
            return
        active = self.code.compare("icmp sgt", self._length(index), time)
        self.code.either(active, lambda: self._cells(stage, row), lambda: self._zeros(row))

    def _cells(self, stage: Stage, row: Row) -> list[Reg]:
        code, dtype = self.code, self.kernel.dtype
        parts = [self._operand(stage, i) for i in range(stage.parts)] if stage.operand in self.dtypes else []

        def columns(column: Reg, window: Window) -> None:
            reads = [
                Read(code.at(row.x, i64(gate * self.hidden * self.size)), dtype, CONTIGUOUS) for gate in stage.gates
            ]
            loaded = [Num(code, reg) for reg in window.read([*reads, *parts], {})]
            cell = Cell(code, self.layer, row, column, loaded[: len(reads)], loaded[len(reads) :])
            state = stage.follow(cell)
            if state is not None:
                cell.keep(self.record.state, state)
                window.write([Write(row.out, dtype)], [state.reg])

        return self._columns(columns)

    def _operand(self, stage: Stage, part: int) -> Read:
        """One of the equal parts of an operand [D, parts * H]."""
        code, dtype = self.code, self.dtypes[stage.operand]
        place = plus(code, times(code, self.direction, i64(stage.parts)), i64(part))
        base = code.at(self.given.operands[stage.operand], times(code, place, i64(self.hidden * dtype.itemsize)))
        return Read(base, dtype, CONTIGUOUS)

    def _zeros(self, row: Row) -> list[Reg]:
        """The sequence of a row that has ended."""
        write, zero = Write(row.out, self.kernel.dtype), literal(self.layer.kind, 0.0)
        return self._columns(lambda _, window: window.write([write], [zero]))

    def _copy(self, pointer: Reg | None, dtype: DType, place: int, *, out: bool) -> None:
        """States [D, B, H] at `pointer` into the records, or out of them; zeros into them without a pointer."""
        code = self.code

        def row(index: Reg, _: list[Reg]) -> list[Reg]:
            record = code.at(self.records, times(code, index, i64(self.record.nbytes)))
            offset = times(code, plus(code, self.state_row, index), i64(self.hidden * dtype.itemsize))
            base = None if pointer is None else code.at(pointer, offset)

            def columns(column: Reg, window: Window) -> None:
                cell = Cell(code, self.layer, Row(record, record, record), column, (), ())
                if base is None:
                    cell.keep(place, cell.number(0.0))
                elif out:
                    window.write([Write(base, dtype)], [cell.kept(place).reg])
                else:
                    cell.keep(place, cell.number(window.read([Read(base, dtype, CONTIGUOUS)], {})[0]))

            return self._columns(columns)

        code.loop(i64(0), self.rows, i64(1), row)

    def _columns(self, one: Callable[[Reg, Window], None]) -> list[Reg]:
        """`one` of all columns of a state, as many as a vector has at a time."""
        code = self.code
        # A mask must not be known to LLVM 22 as one lane: it then stores 32 bits of an element of 16.
        hidden = i64(self.hidden) if self.hidden % self.lanes == 0 else self.given.hidden

        def body(column: Reg, _: list[Reg]) -> list[Reg]:
            one(column, Window(code, self.target, self.lanes, column, code.binary("sub", hidden, column)))
            return []

        return code.loop(i64(0), hidden, i64(self.lanes), body)
