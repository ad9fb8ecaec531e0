"""What a step of a GPU plan does: launch a kernel, or run a function over arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_engine.gpu.kernel import DIVISIBILITY, Kernel
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.ops.control import If, Loop
from gpu_engine.plan.plan import Plan
from gpu_engine.plan.words import Word

Grid = tuple[Dim, Dim, Dim]


@dataclass(frozen=True)
class Launch:
    """A kernel over a grid of programs; `words` are its arguments.

    `zeroed` are buffers, in the step's scratch, that hold zeros when it starts and again when it has ended. All of a
    slot lie in one place, so launches that have some must follow each other: were they ever to run at the same time,
    each would need its own.
    """

    kernel: Kernel
    grid: Grid
    words: tuple[Word, ...]
    zeroed: tuple[int, ...] = ()


ArrayFunction = Callable[[Any, Any, Sequence[Any]], Sequence[Any]]
"""function(xp, op, inputs) gives the outputs; `op` has ints for all its extents."""


@dataclass(frozen=True)
class ArrayCall:
    """A function over arrays; `op` is a dataclass, whose extents binding resolves. With `host`, the reason, it runs
    on NumPy arrays in the host's memory whatever the device, else on the device's own array module."""

    function: ArrayFunction
    op: Any
    host: str = ""


@dataclass(frozen=True)
class BodyCall:
    """Control flow: `op`, whose extents binding resolves, over bodies that are plans of their own, prepared."""

    op: If | Loop
    bodies: tuple[Plan, ...]


def is_multiple(dim: Dim, factor: int = DIVISIBILITY) -> bool:
    """Whether `dim` is a multiple of `factor` whatever its symbols are."""
    return dims.modulo(dim, factor) == 0
