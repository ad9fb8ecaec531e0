"""LSTM, GRU and RNN as one kernel: for a few rows of the batch all steps of time, the state staying in the cache.

Every row has a record in scratch memory: its states, what they give with the recurrent weights, and their bytes if they
are quantised. Columns of a gate are padded to whole vectors there; only operands and results are masked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cpu_fallback.code import Code, Reg, i64, literal, vector
from cpu_fallback.integers import ceil_div, clamp, least, most, plus, times
from cpu_fallback.lanes import COMPUTED, write_expr
from cpu_fallback.loops import CONTIGUOUS, THREADS, Read, Window, Words, Write, splat, thread_share
from cpu_fallback.native import Target, attributes
from cpu_fallback.packing import parameters
from cpu_fallback.recurrent_products import call_product, product_table
from cpu_fallback.recurrent_states import SCALE, TOTAL, ZERO, Record, quantise
from cpu_fallback.vector_math import Num
from gpu_engine.ir.dtypes import DType, compute_dtype
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.ops.recurrent import GATES

RUN = "ptr %block, i64 %direction, i64 %backwards, i64 %first, i64 %rows"


@dataclass(frozen=True)
class RecurrentKernel:
    """A recurrent layer by content.

    `present` are the optional operands with their dtypes; `rows` of the batch run together, or all if 0; `heights` are
    the numbers of rows that a product may have; `functions` are the activations of every direction, which clip what
    enters them, and `texts` spell them; `centred` says that the zero points of quantised weights are all 0.

    Words: addresses of the sequence, the last state, the last cell state of an LSTM, the products of the inputs, the
    packed weights, of quantised ones what `columns` of the lowering gives, the records, the operands of `present`; the
    steps of time; the rows.
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
        directions = len(self.reverse)
        most_rows = most(code, given.batch, i64(1))
        block = most_rows
        if self.rows:
            even = ceil_div(code, times(code, given.batch, i64(directions)), THREADS)
            block = clamp(code, even, i64(1), i64(self.rows))
        per = ceil_div(code, given.batch, block)
        first, last = thread_share(code, times(code, per, i64(directions)), 1)
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
        self.columns = words.take("ptr") if kernel.record.quantised else None
        self.records = words.take("ptr")
        self.operands = {name: words.take("ptr") for name, _ in kernel.present}
        self.steps, self.batch = words.numbers(2)


@dataclass(frozen=True)
class _Row:
    """A row at one step of time: its record, its inputs' products, its results, what is known of its quantised state."""

    record: Reg
    x: Reg
    out: Reg
    known: tuple[Reg, ...] = ()


@dataclass(frozen=True)
class _Lanes:
    """Some columns of a gate: the first, the window on operands and results, and what was read of these."""

    column: Reg
    window: Window
    x: list[Num]
    operands: Mapping[str, list[Num]]


Gates = Callable[[_Row, _Lanes], Sequence[Reg]]


class _Run:
    """The function RUN: some rows through all steps."""

    def __init__(self, kernel: RecurrentKernel, code: Code, target: Target, functions: tuple[Expr, ...]) -> None:
        self.kernel, self.code, self.target, self.functions = kernel, code, target, functions
        self.given = _Arguments(kernel, code)
        self.record, self.dtype = kernel.record, compute_dtype(kernel.dtype)
        self.lanes, self.hidden = kernel.record.form.lanes, kernel.record.hidden
        self.type = vector(self.lanes, COMPUTED[self.dtype])
        _, self.direction, self.backwards, self.first, self.rows = parameters(RUN)
        self.dtypes = dict(kernel.present)
        start = plus(code, times(code, self.direction, self.given.batch), self.first)
        self.state_row = start
        self.records = code.at(self.given.records, times(code, start, i64(self.record.nbytes)))

    def write(self) -> None:
        code = self.code
        self._start()
        final = code.binary("sub", self.given.steps, i64(1))
        back = code.compare("icmp ne", self.backwards, i64(0))

        def step(index: Reg, _: list[Reg]) -> list[Reg]:
            self._step(code.select(back, code.binary("sub", final, index), index))
            return []

        code.loop(i64(0), self.given.steps, i64(1), step)
        self._end()

    def _step(self, time: Reg) -> None:
        record = self.record
        self._multiply(0, record.state)
        if self.kernel.kind == "lstm":
            self._pass(time, range(4), self._lstm)
        elif self.kernel.kind == "rnn":
            self._pass(time, range(1), self._rnn)
        elif len(record.phases) == 1:
            self._pass(time, range(3), self._gru_linear)
        else:
            self._pass(time, range(2), self._reset)
            self._multiply(1, record.reset)
            self._pass(time, range(2, 3), self._gru)

    def _multiply(self, phase: int, source: int) -> None:
        """The products of a phase for all rows: panel after panel where there are more rows than one tile takes."""
        code, record, form = self.code, self.record, self.record.form
        if record.quantised:
            quantise(code, record, self.records, self.rows, source)
            source = record.codes
        depth = form.depth(self.hidden)
        panel_nbytes = depth * form.nbytes * form.vectors
        counts = [width // (form.lanes * form.vectors) for width in record.widths]
        line = form.lanes * form.vectors * form.word
        table = product_table(code, self.target, form, self.kernel.heights)
        own = plus(code, times(code, self.direction, i64(sum(counts))), i64(sum(counts[:phase])))
        weights = code.at(self.given.weights, times(code, own, i64(panel_nbytes)))
        sums = code.at(self.records, i64(record.sums + sum(counts[:phase]) * line))
        row_nbytes = i64(record.nbytes)
        tiles = ceil_div(code, self.rows, i64(self.kernel.heights[-1]))
        height = ceil_div(code, self.rows, tiles)

        def product(panel: Reg, panels: Reg) -> None:
            place = code.at(weights, times(code, panel, i64(panel_nbytes)))
            here = code.at(sums, times(code, panel, i64(line)))

            def tile(row: Reg, _: list[Reg]) -> list[Reg]:
                offset = times(code, row, row_nbytes)
                rows = least(code, code.binary("sub", self.rows, row), height)
                state = code.at(code.at(self.records, i64(source)), offset)
                arguments = [state, row_nbytes, place, code.at(here, offset), row_nbytes, i64(depth), panels]
                call_product(code, table, rows, *arguments)
                return []

            code.loop(i64(0), self.rows, height, tile)

        def panel(index: Reg, _: list[Reg]) -> list[Reg]:
            product(index, span)
            return []

        many = code.compare("icmp sgt", tiles, i64(1))
        span = code.select(many, i64(1), i64(counts[phase]))
        code.loop(i64(0), i64(counts[phase]), span, panel)

    def _pass(self, time: Reg, gates: range, one: Gates) -> None:
        """`one` for all columns of all rows; what it gives, if anything, is the sequence there."""
        code, given = self.code, self.given
        size = self.kernel.dtype.itemsize
        directions = len(self.kernel.reverse)
        x_row = GATES[self.kernel.kind] * self.hidden * size
        x = plus(code, times(code, plus(code, times(code, time, given.batch), self.first), i64(directions)), self.direction)
        slot = plus(code, times(code, plus(code, times(code, time, i64(directions)), self.direction), given.batch))
        out = code.at(given.sequence, times(code, plus(code, slot, self.first), i64(self.hidden * size)))
        x_base = code.at(given.x, times(code, x, i64(x_row)))

        def row(index: Reg, _: list[Reg]) -> list[Reg]:
            record = code.at(self.records, times(code, index, i64(self.record.nbytes)))
            inputs = code.at(x_base, times(code, index, i64(directions * x_row)))
            own = _Row(record, inputs, code.at(out, times(code, index, i64(self.hidden * size))), self._known(record))
            if "lengths" not in self.dtypes or one == self._reset:
                self._columns(own, gates, one)
                return []
            place = code.at(given.operands["lengths"], times(code, plus(code, self.first, index), i64(4)))
            length = code.convert("sext", code.load("i32", place, 4), "i64")
            active = code.compare("icmp sgt", length, time)
            code.either(active, lambda: self._columns(own, gates, one), lambda: self._silence(own))
            return []

        code.loop(i64(0), self.rows, i64(1), row)

    def _known(self, record: Reg) -> tuple[Reg, ...]:
        """The sum, the zero point and the scale of a row's quantised state, in every lane."""
        if not self.record.quantised:
            return ()
        code = self.code
        return tuple(
            splat(code, code.load(kind, code.at(record, i64(self.record.known + offset)), 4), self.lanes)
            for kind, offset in (("i32", TOTAL), ("i32", ZERO), ("float", SCALE))
        )

    def _columns(self, row: _Row, gates: range, one: Gates) -> list[Reg]:
        code, dtype, size = self.code, self.kernel.dtype, self.kernel.dtype.itemsize
        used = {"lstm": ("peepholes", 3), "gru": ("bias", 1)}.get(self.kernel.kind, ("", 0))
        name, count = used if used[0] in self.dtypes and one != self._reset else ("", 0)

        def body(column: Reg, _: list[Reg]) -> list[Reg]:
            window = Window(code, self.target, self.lanes, column, code.binary("sub", i64(self.hidden), column))
            reads = [Read(code.at(row.x, i64(gate * self.hidden * size)), dtype, CONTIGUOUS) for gate in gates]
            reads += [self._operand(name, i, count) for i in range(count)]
            loaded = [Num(code, reg) for reg in window.read(reads, {})]
            lanes = _Lanes(column, window, loaded[: len(gates)], {name: loaded[len(gates) :]})
            results = one(row, lanes)
            window.write([Write(row.out, dtype)] * len(results), results)
            return []

        code.loop(i64(0), i64(self.hidden), i64(self.lanes), body)
        return []

    def _operand(self, name: str, part: int, parts: int) -> Read:
        """One of the equal parts of an operand [D, parts * H]."""
        code, dtype = self.code, self.dtypes[name]
        place = plus(code, times(code, self.direction, i64(parts)), i64(part))
        base = code.at(self.given.operands[name], times(code, place, i64(self.hidden * dtype.itemsize)))
        return Read(base, dtype, CONTIGUOUS)

    def _silence(self, row: _Row) -> list[Reg]:
        """Zeros for a row that has ended."""
        code = self.code

        def body(column: Reg, _: list[Reg]) -> list[Reg]:
            window = Window(code, self.target, self.lanes, column, code.binary("sub", i64(self.hidden), column))
            window.write([Write(row.out, self.kernel.dtype)], [literal(self.type, 0.0)])
            return []

        code.loop(i64(0), i64(self.hidden), i64(self.lanes), body)
        return []

    def _start(self) -> None:
        """The initial states, or zeros, into the records."""
        places = [("initial_h", self.record.state), ("initial_c", self.record.cell)]
        for name, place in places[: 1 + self.record.cells]:
            self._copy(self.given.operands.get(name), self.dtypes.get(name), place, out=False)

    def _end(self) -> None:
        """The last states from the records."""
        for pointer, place in zip(self.given.last, (self.record.state, self.record.cell), strict=False):
            self._copy(pointer, self.kernel.dtype, place, out=True)

    def _copy(self, pointer: Reg | None, dtype: DType | None, place: int, *, out: bool) -> None:
        """States [D, B, H] at `pointer` into the records, or out of them."""
        code = self.code

        def row(index: Reg, _: list[Reg]) -> list[Reg]:
            record = code.at(self.records, times(code, index, i64(self.record.nbytes)))
            base = pointer
            if pointer is not None and dtype is not None:
                nbytes = i64(self.hidden * dtype.itemsize)
                base = code.at(pointer, times(code, plus(code, self.state_row, index), nbytes))

            def body(column: Reg, _: list[Reg]) -> list[Reg]:
                window = Window(code, self.target, self.lanes, column, code.binary("sub", i64(self.hidden), column))
                if base is None or dtype is None:
                    self._keep(record, place, column, Num(code, literal(self.type, 0.0)))
                elif out:
                    window.write([Write(base, dtype)], [self._kept(record, place, column).reg])
                else:
                    (value,) = window.read([Read(base, dtype, CONTIGUOUS)], {})
                    self._keep(record, place, column, Num(code, value))
                return []

            code.loop(i64(0), i64(self.hidden), i64(self.lanes), body)
            return []

        code.loop(i64(0), self.rows, i64(1), row)

    def _place(self, record: Reg, offset: int, column: Reg) -> Reg:
        code = self.code
        return code.at(code.at(record, i64(offset)), times(code, column, i64(self.record.size)))

    def _kept(self, record: Reg, offset: int, column: Reg) -> Num:
        place = self._place(record, offset, column)
        return Num(self.code, self.code.load(self.type, place, self.record.size))

    def _keep(self, record: Reg, offset: int, column: Reg, value: Num) -> None:
        self.code.store(value.reg, self._place(record, offset, column), self.record.size)

    def _sum(self, row: _Row, gate: int, column: Reg) -> Num:
        """What the state gives for a gate."""
        code, start = self.code, self.record.column(gate)
        place = self._place(row.record, self.record.sums + start * self.record.size, column)
        if not self.record.quantised:
            return Num(code, code.load(self.type, place, self.record.size))
        assert self.given.columns is not None
        whole, width = vector(self.lanes, "i32"), sum(self.record.widths)
        total, (codes, zero, scale) = Num(code, code.load(whole, place, 4)), row.known
        first = times(code, self.direction, i64(3 * width))
        base = code.at(self.given.columns, times(code, plus(code, first, column, i64(start)), i64(4)))
        kinds = (whole, whole, self.type)
        offsets, sums, scales = (
            Num(code, code.load(kind, code.at(base, i64(4 * i * width)), 4)) for i, kind in enumerate(kinds)
        )
        if not self.kernel.centred:
            total = total - offsets * Num(code, codes)
        total = total - sums * Num(code, zero)
        return total.cast("sitofp", "float") * (Num(code, scale) * scales)

    def _apply(self, function: int, x: Num) -> Num:
        return Num(self.code, write_expr(self.code, self.functions[function], {0: x.reg}, self.lanes))

    def _lstm(self, row: _Row, lanes: _Lanes) -> list[Reg]:
        column = lanes.column
        i, o, forget, cell = (x + self._sum(row, gate, column) for gate, x in enumerate(lanes.x))
        c = self._kept(row.record, self.record.cell, column)
        to = lanes.operands.get("peepholes")
        i = self._apply(0, i + to[0] * c if to else i)
        if self.kernel.input_forget:
            forget = Num(self.code, literal(self.type, 1.0)) - i
        else:
            forget = self._apply(0, forget + to[2] * c if to else forget)
        c = forget * c + i * self._apply(1, cell)
        h = self._apply(0, o + to[1] * c if to else o) * self._apply(2, c)
        self._keep(row.record, self.record.cell, column, c)
        self._keep(row.record, self.record.state, column, h)
        return [h.reg]

    def _rnn(self, row: _Row, lanes: _Lanes) -> list[Reg]:
        h = self._apply(0, lanes.x[0] + self._sum(row, 0, lanes.column))
        self._keep(row.record, self.record.state, lanes.column, h)
        return [h.reg]

    def _gru_linear(self, row: _Row, lanes: _Lanes) -> list[Reg]:
        """With the reset gate behind the product."""
        z, r = (self._apply(0, lanes.x[gate] + self._sum(row, gate, lanes.column)) for gate in range(2))
        inner = self._sum(row, 2, lanes.column)
        bias = lanes.operands.get("bias")
        return self._mixed(row, lanes, z, lanes.x[2] + r * (inner + bias[0] if bias else inner))

    def _reset(self, row: _Row, lanes: _Lanes) -> list[Reg]:
        """The update gate in the place of its product, and the state after the reset gate."""
        z, r = (self._apply(0, x + self._sum(row, gate, lanes.column)) for gate, x in enumerate(lanes.x))
        self._keep(row.record, self.record.sums, lanes.column, z)
        self._keep(row.record, self.record.reset, lanes.column, r * self._kept(row.record, self.record.state, lanes.column))
        return []

    def _gru(self, row: _Row, lanes: _Lanes) -> list[Reg]:
        z = self._kept(row.record, self.record.sums, lanes.column)
        return self._mixed(row, lanes, z, lanes.x[0] + self._sum(row, 2, lanes.column))

    def _mixed(self, row: _Row, lanes: _Lanes, z: Num, new: Num) -> list[Reg]:
        state = self._kept(row.record, self.record.state, lanes.column)
        h = (Num(self.code, literal(self.type, 1.0)) - z) * self._apply(1, new) + z * state
        self._keep(row.record, self.record.state, lanes.column, h)
        return [h.reg]
