"""Recurrent: a layer's whole run over time in one launch.

A program owns rows of the batch in one direction and goes through all steps, so that no program waits for another; the
state stays float32 (float64 for float64) in scratch memory, which a program's own threads pass to each other across a
barrier. A few rows are multiplied with the weights one by one, more of them by matrix instructions in tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from gpu_engine.gpu.printing import computing, is_printable, is_printable_dtype
from gpu_engine.gpu.recurrent_cells import Cell, Products, write_step
from gpu_engine.gpu.text import KernelText, power_of_two
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import FLOAT32, FLOAT64, INT32, DType, compute_dtype, is_float
from gpu_engine.ir.graph import Node, Value
from gpu_engine.ir.ops import Recurrent
from gpu_engine.ir.ops.recurrent import GATES
from gpu_engine.plan.lower import Lowering

Buffers = tuple[int, ...]
FEW_ROWS = 4
"""A batch of so many rows is no matrix: most of the 16 rows of a matrix instruction would be idle."""
TILE_ROWS = 16
STATES = {"lstm": 3, "gru": 4, "rnn": 2}
"""Planes of scratch: the state before and after a step; then the cell state, or r * h and z."""


@dataclass(frozen=True)
class Form:
    """How a program multiplies: `rows` of the state at a time, in blocks of outputs and of terms of a sum."""

    rows: int
    block_n: int
    block_k: int
    num_warps: int


def lower_recurrent(lowering: Lowering, op: Recurrent, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    """Declines quantised weights, unknown hidden sizes, and functions that kernels do not print."""
    x, weights = node.inputs[:2]
    hidden = weights.shape[2]
    given = dict(zip(op.present, node.inputs[2:], strict=True))
    if not isinstance(hidden, int) or not hidden or not _is_supported(op, x, weights, given):
        return False
    constant, recurrent, turned = weights.constant, inputs[1], False
    if constant is not None:
        recurrent, turned = lowering.constant(np.ascontiguousarray(constant.transpose(0, 2, 1))), True
    buffers = (inputs[0], recurrent, *inputs[2:])
    groups = [tuple(range(len(op.reverse)))]
    if len(set(op.activations)) > 1:
        groups = [(direction,) for direction in groups[0]]
    for form, share in _forms(op.kind, x.shape[1], hidden, x.dtype, weights.dtype):
        for group in groups:
            writer = _Writer(lowering, op, node, buffers, outputs, form, group, turned)
            writer.launch(share)
    return True


def _is_supported(op: Recurrent, x: Value, weights: Value, given: dict[str, Value]) -> bool:
    wide = compute_dtype(x.dtype)
    floats = [x, weights, *(value for name, value in given.items() if name != "lengths")]
    if "scale" in given or ("lengths" in given and given["lengths"].dtype != INT32):
        return False
    if not all(is_float(v.dtype) and is_printable_dtype(v.dtype) and compute_dtype(v.dtype) == wide for v in floats):
        return False
    functions = [function for own in op.activations for function in own]
    return all(is_printable(f) and all(n.dtype == wide for n in expr.walk(f) if n.op == "arg") for f in functions)


def _forms(kind: str, rows: Dim, hidden: int, dtype: DType, weights: DType) -> list[tuple[Form, Dim]]:
    """The forms that a batch may take, each with 1 or 0 as its extents say: one of them is launched. In float32 the
    four sums of an LSTM spill in blocks of 64."""
    width = power_of_two(hidden)
    block_n, block_k = min(128, width), min(32, width)
    single = Form(1, block_n, block_k, 8 if block_n * block_k >= 4096 else 4)
    if compute_dtype(dtype) == FLOAT64 or (isinstance(rows, int) and rows <= FEW_ROWS):
        return [(single, 1)]
    if weights.itemsize == 2 and width >= 64:
        tiled = Form(TILE_ROWS, 64, 64, 8)
    else:
        most = 32 if kind == "lstm" else 64
        tiled = Form(TILE_ROWS, min(most, max(16, width)), min(32, max(16, width)), 4)
    if isinstance(rows, int):
        return [(tiled, 1)]
    many = dims.minimum(1, dims.floor_div(rows - 1, FEW_ROWS))
    return [(single, 1 - many), (tiled, many)]


class _Writer:
    """Writes the kernel of one form for a group of directions that have their functions in common."""

    def __init__(
        self,
        lowering: Lowering,
        op: Recurrent,
        node: Node,
        inputs: Buffers,
        outputs: Buffers,
        form: Form,
        group: tuple[int, ...],
        turned: bool,
    ) -> None:
        self.op, self.form, self.group, self.turned = op, form, group, turned
        self.inputs, self.outputs = inputs, outputs
        self.steps, self.rows, _ = node.inputs[0].shape
        self.gates, self.hidden = GATES[op.kind], dims.number(node.inputs[1].shape[2])
        self.directions = len(op.reverse)
        self.wide = compute_dtype(node.inputs[0].dtype)
        self.narrow = node.inputs[1].dtype
        self.operands = dict(zip(op.present, inputs[2:], strict=True))
        self.text = KernelText(lowering, op.kind if form.rows > 1 else f"{op.kind}_row")
        self.state = lowering.buffer(self.wide, (STATES[op.kind], self.directions, self.rows, self.hidden))

    def launch(self, share: Dim) -> None:
        text = self.text
        self._write_places()
        with self._blocks():
            self._begin()
        text.line("tl.debug_barrier()")
        with text.block(f"for s in range(0, {text.parameter(self.steps)}):"):
            text.line(f"t = {self._time()}")
            text.line(f"before = s % 2 * {self.plane}")
            text.line(f"after = (s + 1) % 2 * {self.plane}")
            if "lengths" in self.operands:
                text.line(f"active = {text.load(self.operands['lengths'], 'row', self.row_mask, '0')} > t")
            write_step(self._cell())
        text.line(f"before = {text.parameter(self.steps)} % 2 * {self.plane}")
        with self._blocks():
            self._end()
        grid = (dims.ceil_div(self.rows, self.form.rows) * share, len(self.group))
        read = tuple(dict.fromkeys(self.inputs))
        text.launch(grid, read, self.outputs, num_warps=self.form.num_warps, num_stages=2, scratch=(self.state,))

    def _write_places(self) -> None:
        """`row`, `d` and the first element of their states, `own`; the mask of rows."""
        text, count, rows = self.text, self.form.rows, self.text.parameter(self.rows)
        self.row_mask: str | None = None
        if count == 1:
            text.line("row = tl.program_id(0)")
        else:
            text.line(f"row = tl.program_id(0) * {count} + tl.arange(0, {count})[:, None]")
            self.row_mask = text.let("rows", f"row < {rows}")
        text.line("d = tl.program_id(1)" if len(self.group) > 1 or self.directions == 1 else f"d = {self.group[0]}")
        text.line(f"own = (d * {rows} + row) * {self.hidden}")
        self.plane = text.let("plane", f"{rows} * {self.directions * self.hidden}")

    @contextmanager
    def _blocks(self) -> Iterator[None]:
        """Lines for every block `n` of the hidden axis, and the mask `inside` of what is in it and in the rows."""
        text, width = self.text, self.form.block_n
        columns = f"tl.arange(0, {width})" + ("[None, :]" if self.form.rows > 1 else "")
        if width >= self.hidden:
            self._block(columns)
            yield
            return
        with text.block(f"for first in range(0, {self.hidden}, {width}):"):
            self._block(f"first + {columns}")
            yield

    def _block(self, columns: str) -> None:
        self.text.line(f"n = {columns}")
        masks = [self.row_mask] if self.row_mask else []
        masks += [f"(n < {self.hidden})"] * (self.hidden % self.form.block_n != 0)
        self.mask = self.text.let("inside", " & ".join(masks)) if masks else None

    def _begin(self) -> None:
        """The state before the first step."""
        for name, plane in (("initial_h", 0), ("initial_c", 2)):
            if plane == 2 and self.op.kind != "lstm":
                continue
            value = f"tl.zeros({self._tile()}, {computing(self.wide)})"
            if name in self.operands:
                value = self.text.load(self.operands[name], "own + n", self.mask, "0")
            self.text.store(self.state, f"{plane} * {self.plane} + own + n", value, self.mask)

    def _end(self) -> None:
        """The state behind the last step, as results."""
        planes = ["before", f"2 * {self.plane}"] if self.op.kind == "lstm" else ["before"]
        for out, plane in zip(self.outputs[1:], planes, strict=True):
            value = self.text.load(self.state, f"{plane} + own + n", self.mask)
            self.text.store(out, "own + n", value, self.mask)

    def _time(self) -> str:
        """The step of the input for step `s` of the run."""
        backwards = f"{self.text.parameter(self.steps)} - 1 - s"
        flags = [self.op.reverse[d] for d in self.group]
        if all(flag == flags[0] for flag in flags):
            return backwards if flags[0] else "s"
        return f"tl.where(d == {flags.index(True)}, {backwards}, s)"

    def _tile(self) -> str:
        return f"[{self.form.block_n}]" if self.form.rows == 1 else f"[{self.form.rows}, {self.form.block_n}]"

    def _cell(self) -> Cell:
        return Cell(
            self.text, self.op, self.op.clipped(self.op.activations[self.group[0]]), self.hidden, self.inputs[0],
            self.state, self.outputs[0], self.operands, self.plane, self._blocks, self._product, lambda: self.mask,
            f"(t * {self.text.parameter(self.rows)} + row) * {self.directions * self.gates * self.hidden}"
            f" + d * {self.gates * self.hidden} + n",
            f"((t * {self.directions} + d) * {self.text.parameter(self.rows)} + row) * {self.hidden} + n",
        )  # fmt: skip

    def _product(self, plane: str, parts: Sequence[int]) -> Products:
        """Names of block `n` of the products of a state with the weights of some gates."""
        text, form, hidden = self.text, self.form, self.hidden
        tile = f"[{form.block_k}, {form.block_n}]" if form.rows == 1 else self._tile()
        sums = {part: text.let("sum", f"tl.zeros({tile}, {computing(self.wide)})") for part in parts}
        with text.block(f"for start in range(0, {hidden}, {form.block_k}):"):
            text.line(f"k = start + tl.arange(0, {form.block_k})")
            cut = hidden % form.block_k != 0
            index, mask = ("k", "k < %d") if form.rows == 1 else ("k[None, :]", "(k[None, :] < %d)")
            masks = [mask % hidden] * cut + [self.row_mask or ""] * (self.row_mask is not None)
            h = text.load(self.state, f"{plane} + own + {index}", " & ".join(masks) or None, "0" if masks else None)
            for part in parts:
                self._add(sums[part], h, self._weights(part, cut))
        return {part: text.let("p", f"tl.sum({name}, 0)") if form.rows == 1 else name for part, name in sums.items()}

    def _weights(self, part: int, cut: bool) -> str:
        """The name of weights [k, n] as memory has them."""
        text, hidden, width = self.text, self.hidden, self.gates * self.hidden
        column = "n[None, :]" if self.form.rows == 1 else "n"
        row_step, step = (width, 1) if self.turned else (1, hidden)
        place = f"d * {width * hidden} + k[:, None] * {row_step} + ({part * hidden} + {column}) * {step}"
        masks = [f"(k[:, None] < {hidden})"] * cut + [f"({column} < {hidden})"] * (hidden % self.form.block_n != 0)
        tail = f", mask={' & '.join(masks)}, other=0" if masks else ""
        return text.let("w", f"tl.load({text.buffer(self.inputs[1])} + ({place}){tail})")

    def _add(self, total: str, h: str, weights: str) -> None:
        if self.form.rows == 1:
            self.text.line(f"{total} += {h}[:, None] * {weights}.to({computing(self.wide)})")
        elif self.narrow == FLOAT32:
            self.text.line(f'{total} = tl.dot({h}, {weights}, {total}, input_precision="ieee")')
        else:
            self.text.line(f"{total} = tl.dot({h}.to({weights}.dtype), {weights}, {total})")
