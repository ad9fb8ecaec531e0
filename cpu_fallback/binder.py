"""The function that makes a segment's arrays and calls, written for it: one line for each view."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from cpu_fallback.calls import Array, ArrayCall
from cpu_fallback.native import LIBRARY
from gpu_engine.ir.dtypes import STRING
from gpu_engine.plan.binding import Numbers, op_resolver
from gpu_engine.plan.plan import Plan, Step, root

Call = tuple[Callable[..., object], tuple[Any, ...]]
Maker = Callable[..., tuple[dict[int, Array], list[Call]]]
"""make(numbers, arena offsets, ports offsets, arena, ports, bound segments before, address of the jobs) gives the
arrays that were asked for by buffer, and what to call with which arguments."""
JOB_NBYTES = 32
"""What a run of native steps is called with: its table, its steps, and where a team helps the shares and the team."""


class Earlier(Protocol):
    """A bound segment as a later one sees it."""

    @property
    def arrays(self) -> dict[int, Array]: ...

    @property
    def located(self) -> dict[int, tuple[Array, int]]: ...


class Binder:
    """Collects lines. Not reusable after `compile`."""

    def __init__(
        self,
        plan: Plan,
        constants: dict[int, Array],
        numbers: Numbers,
        arena: Sequence[int],
        ports: Sequence[int],
    ) -> None:
        self._plan, self._constants, self._numbers = plan, constants, numbers
        self._places = {buffer: f"arena, a[{i}]" for i, buffer in enumerate(arena)}
        self._places |= {buffer: f"ports, p[{i}]" for i, buffer in enumerate(ports)}
        self._scope: dict[str, Any] = {
            "ndarray": np.ndarray,
            "walk": LIBRARY.walker(),
            "earlier": _earlier,
            "host": _host_array,
        }
        self._lines: list[str] = []
        self._names: dict[int, str] = {}
        self._calls: list[str] = []
        self._exposed: list[int] = []
        self.runs: list[list[int]] = []

    def array_call(self, step: Step) -> None:
        """Append the call of an array step; one that binds extents gives its results instead of writing them."""
        call: ArrayCall = step.kernel
        resolve = op_resolver(call.op, self._numbers)
        op = self._known(call.op) if resolve is None else f"{self._known(resolve)}(n)"
        outputs = () if step.binds else step.outputs
        views = ", ".join(self._tuple(buffers) for buffers in (step.inputs, outputs, step.scratch))
        self._calls.append(f"({self._known(call.function)}, ({op}, {views}))")

    def native_run(self, first: int) -> None:
        """Append a call of the walker from row `first` of the table on."""
        self._calls.append(f"(walk, (jobs + {JOB_NBYTES * len(self.runs)},))")
        self.runs.append([first, 0])

    def extend_run(self) -> None:
        """One more row in the last run."""
        self.runs[-1][1] += 1

    def expose(self, buffers: Sequence[int]) -> None:
        """Arrays that the caller gets."""
        for index in buffers:
            self._view(index)
            self._exposed.append(index)

    def compile(self) -> Maker:
        arrays = ", ".join(f"{i}: {self._names[i]}" for i in dict.fromkeys(self._exposed))
        body = "".join(f"    {line}\n" for line in self._lines)
        calls = ",\n        ".join(self._calls)
        source = f"def make(n, a, p, arena, ports, before, jobs):\n{body}    return {{{arrays}}}, [{calls}]\n"
        exec(compile(source, "<binding>", "exec"), self._scope)
        return self._scope["make"]  # type: ignore[no-any-return]

    def _known(self, value: Any) -> str:
        name = f"k{len(self._scope)}"
        self._scope[name] = value
        return name

    def _tuple(self, buffers: Sequence[int]) -> str:
        return "(" + "".join(f"{self._view(buffer)}, " for buffer in buffers) + ")"

    def _view(self, index: int) -> str:
        """The name of the buffer's array."""
        if index not in self._names:
            text = self._array(index)
            self._names[index] = f"v{index}"
            self._lines.append(f"v{index} = {text}")
        return self._names[index]

    def _array(self, index: int) -> str:
        buffer, owner = self._plan.buffers[index], root(self._plan.buffers, index)
        if owner in self._constants and all(isinstance(extent, int) for extent in buffer.shape):
            return self._known(self._constants[owner].reshape(buffer.shape))
        texts = [str(e) if isinstance(e, int) else f"n[{self._numbers.place(e)}]" for e in buffer.shape]
        shape = "(" + "".join(f"{text}, " for text in texts) + ")"
        if owner in self._constants:
            return f"{self._known(self._constants[owner])}.reshape({shape})"
        if buffer.dtype == STRING:
            if owner != index:
                return f"{self._view(owner)}.reshape({shape})"
            self._exposed.append(index)
            return f"host({index}, {shape}, before)"
        dtype = self._known(buffer.dtype)
        if owner in self._places:
            return f"ndarray({shape}, {dtype}, {self._places[owner]})"
        return f"earlier({owner}, {shape}, {dtype}, before)"


def _earlier(owner: int, shape: tuple[int, ...], dtype: np.dtype[Any], before: Sequence[Earlier]) -> Array:
    """A view of what an earlier segment owns."""
    memory, offset = next(bound.located[owner] for bound in before if owner in bound.located)
    return np.ndarray(shape, dtype, memory, offset)


def _host_array(index: int, shape: tuple[int, ...], before: Sequence[Earlier]) -> Array:
    """Objects live in an array of their own, which later segments share."""
    for bound in before:
        if index in bound.arrays:
            return bound.arrays[index]
    return np.full(shape, "", object)
