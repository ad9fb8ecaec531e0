"""Epilogues: an Expr applied to a tile of sums while it is in registers, beside operands broadcast to the result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gpu_engine.gpu.launches import is_multiple
from gpu_engine.gpu.maps import Walked
from gpu_engine.gpu.text import KernelText
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.expr import Expr
from gpu_engine.plan.axes import Shape, collapsed
from gpu_engine.plan.lower import Lowering


@dataclass(frozen=True)
class Walk:
    """A tile's index: the lanes of `index` are points of the neighbouring `axes` of a result, in row-major order.

    Lanes outside `mask` are no points; None says that all are. Indices of different walks broadcast to the tile: a
    column [BLOCK_M, 1], a row [1, BLOCK_N], a scalar for axes along which a program does not move.
    """

    index: str
    axes: tuple[int, ...]
    mask: str | None = None


def finish(
    text: KernelText, root: Expr, sums: str, operands: Sequence[Walked], walks: Sequence[Walk], shape: Shape
) -> str:  # fmt: skip
    """The name of the printable `root` over a tile of `sums` (arg 0, in computing form) and operands (args 1, 2, ...).

    Operands have strides over the axes of `shape`, 0 where they are broadcast. Lanes that are no points hold garbage.
    """
    values = {0: sums}
    for node in expr.walk(root):
        if node.op == "arg" and node.value:
            operand = operands[node.value - 1]
            with text.apart(f"operand {node.value}"):
                values[node.value] = text.load(operand.buffer, *place(text, operand, walks, shape))
    return text.evaluate(root, values)


def place(text: KernelText, walked: Walked, walks: Sequence[Walk], shape: Shape) -> tuple[str, str | None]:
    """(where in a buffer, in elements, the points of a tile are; the mask of lanes that are points, as far as they
    differ in where they are)."""
    terms = [number(text, walked.offset)] * (walked.offset != 0)
    moving = []
    for walk in walks:
        steps = [walked.strides[axis] for axis in walk.axes]
        found = _steps(text, walk.index, collapsed(tuple(shape[axis] for axis in walk.axes), [steps]))
        moving += [walk] * bool(found)
        terms += found
    return " + ".join(terms) or "0", inside(moving)


HEAVY = frozenset({
    "div", "mod", "fmod", "pow", "exp", "erf", "log", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh",
    "tanh", "asinh", "acosh", "atanh",
})  # fmt: skip
"""Functions that take many registers beside their result."""


def is_heavy(root: Expr) -> bool:
    """Whether a tile of an expression needs many registers beside its result."""
    return any(node.op in HEAVY for node in expr.walk(root))


def inside(walks: Iterable[Walk]) -> str | None:
    """The mask of the lanes that are points of all walks."""
    masks = [walk.mask for walk in walks if walk.mask is not None]
    return " & ".join(masks) or None


def number(text: KernelText, dim: Dim) -> str:
    """A number that kernels share as a parameter, times the greatest power of two that divides it and matters to the
    width of loads, which Triton does not know of otherwise; 0 and 1 are literals."""
    if dim in (0, 1):
        return str(dim)
    factor = next(power for power in (16, 8, 4, 2, 1) if power <= text.widest and is_multiple(dim, power))
    part = text.parameter(dims.floor_div(dim, factor), hint=False)
    return part if factor == 1 else f"({part} * {factor})"


def widest(lowering: Lowering, buffers: Iterable[int]) -> int:
    """The elements that a load of 16 bytes has of the narrowest of the buffers."""
    return max(16 // lowering.buffers[buffer].dtype.itemsize for buffer in buffers)


def _steps(text: KernelText, index: str, axes: Sequence[tuple[Dim, list[Dim]]]) -> list[str]:
    """One term for every axis along which the buffer moves; `index` counts the points of all."""
    terms = []
    for depth, (extent, (stride,)) in reversed(list(enumerate(axes))):
        if depth:
            here = f"({index} % {number(text, extent)})"
            index = text.let("i", f"{index} // {number(text, extent)}")
        else:
            here = index
        if stride != 0:
            terms.append(here if stride == 1 else f"{here} * {number(text, stride)}")
    return terms
