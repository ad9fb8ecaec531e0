"""What one step of LSTM, GRU and RNN computes from a state and its products with the weights.

Lines may use `row`, `d`, `own`, `t`, `before`, `after`, in a block of the hidden axis also `n`, and `active` where rows
have lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from gpu_engine.gpu.text import KernelText
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.ops import Recurrent

Products = dict[int, str]
"""The name of each gate's product."""


@dataclass(frozen=True)
class Cell:
    """One step of a layer being written.

    `product(plane, gates)` names block `n` of the products of the state in a plane with the gates' weights; `blocks`
    opens a block of lines for every `n`, in which `mask` gives its mask. `x_place` and `y_place` are where the first
    gate's input and the result of element `n` are.
    """

    text: KernelText
    op: Recurrent
    functions: Sequence[Expr]
    hidden: int
    x: int
    state: int
    y: int
    operands: Mapping[str, int]
    plane: str
    blocks: Callable[[], AbstractContextManager[None]]
    product: Callable[[str, Sequence[int]], Products]
    mask: Callable[[], str | None]
    x_place: str
    y_place: str

    def input(self, gate: int) -> str:
        return self.text.load(self.x, f"{self.x_place} + {gate * self.hidden}", self.mask())

    def read(self, plane: str) -> str:
        return self.text.load(self.state, f"{plane} + own + n", self.mask())

    def write(self, plane: str, value: str) -> None:
        self.text.store(self.state, f"{plane} + own + n", value, self.mask())

    def vector(self, name: str, part: int, parts: int) -> str:
        """Block `n` of one of the vectors that an operand [D, parts * H] has."""
        place = f"d * {parts * self.hidden} + {part * self.hidden} + n"
        mask = None if self.mask() is None else f"n < {self.hidden}"
        return self.text.load(self.operands[name], place, mask)

    def apply(self, function: int, value: str) -> str:
        return self.text.evaluate(self.functions[function], {0: self.text.let("a", value)})

    def finish(self, new: str) -> None:
        """The state after the step and its result, where the row has not ended."""
        if "lengths" in self.operands:
            shown = self.text.let("y", f"tl.where(active, {new}, 0.0)")
            new = self.text.let("h", f"tl.where(active, {new}, {self.read('before')})")
        else:
            shown = new
        self.write("after", new)
        self.text.store(self.y, self.y_place, shown, self.mask())


def write_step(cell: Cell) -> None:
    """Lines of one step, up to the barrier behind which its state may be read."""
    write = {"lstm": _write_lstm, "rnn": _write_rnn}.get(cell.op.kind)
    if cell.op.kind == "gru":
        write = _write_linear_gru if cell.op.linear_before_reset else _write_gru
    assert write is not None
    write(cell)
    cell.text.line("tl.debug_barrier()")


def _write_rnn(cell: Cell) -> None:
    with cell.blocks():
        product = cell.product("before", (0,))[0]
        cell.finish(cell.apply(0, f"{cell.input(0)} + {product}"))


def _write_lstm(cell: Cell) -> None:
    cells, text = f"2 * {cell.plane}", cell.text
    with cell.blocks():
        products = cell.product("before", (0, 1, 2, 3))
        i, o, f, g = (text.let("g", f"{cell.input(gate)} + {products[gate]}") for gate in range(4))
        old = cell.read(cells)
        peeps = [cell.vector("peepholes", part, 3) for part in range(3)] if "peepholes" in cell.operands else None
        i = cell.apply(0, f"{i} + {peeps[0]} * {old}" if peeps else i)
        if cell.op.input_forget:
            f = text.let("f", f"1 - {i}")
        else:
            f = cell.apply(0, f"{f} + {peeps[2]} * {old}" if peeps else f)
        new = text.let("c", f"{f} * {old} + {i} * {cell.apply(1, g)}")
        o = cell.apply(0, f"{o} + {peeps[1]} * {new}" if peeps else o)
        result = text.let("h", f"{o} * {cell.apply(2, new)}")
        kept = text.let("c", f"tl.where(active, {new}, {old})") if "lengths" in cell.operands else new
        cell.write(cells, kept)
        cell.finish(result)


def _write_linear_gru(cell: Cell) -> None:
    text = cell.text
    with cell.blocks():
        products = cell.product("before", (0, 1, 2))
        z, r = (cell.apply(0, f"{cell.input(gate)} + {products[gate]}") for gate in (0, 1))
        hidden = products[2]
        if "bias" in cell.operands:
            hidden = text.let("p", f"{hidden} + {cell.vector('bias', 0, 1)}")
        new = cell.apply(1, f"{cell.input(2)} + {r} * {hidden}")
        cell.finish(text.let("h", f"(1 - {z}) * {new} + {z} * {cell.read('before')}"))


def _write_gru(cell: Cell) -> None:
    """The last gate's product is one of r * h, which all threads must have written."""
    text, reset, updates = cell.text, f"2 * {cell.plane}", f"3 * {cell.plane}"
    with cell.blocks():
        products = cell.product("before", (0, 1))
        z, r = (cell.apply(0, f"{cell.input(gate)} + {products[gate]}") for gate in (0, 1))
        cell.write(updates, z)
        cell.write(reset, text.let("r", f"{r} * {cell.read('before')}"))
    text.line("tl.debug_barrier()")
    with cell.blocks():
        product = cell.product(reset, (2,))[2]
        new = cell.apply(1, f"{cell.input(2)} + {product}")
        z = cell.read(updates)
        cell.finish(text.let("h", f"(1 - {z}) * {new} + {z} * {cell.read('before')}"))
