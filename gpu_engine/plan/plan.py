"""A Plan: a straight list of steps for one device, with symbolic extents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import DType
from gpu_engine.ir.structure import Structure

LARGEST = 1 << 47
"""No tensor has more bytes, no extent is greater: what processors address, and many of them still add up in int64."""
LARGEST_EMPTY = 1 << 26
"""An empty tensor takes no memory, but kernels walk its other extents."""


@dataclass(frozen=True)
class Port:
    """A named input or output of a model; shape entries are ints or symbolic extents."""

    name: str
    dtype: DType
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Batching:
    """Whether requests may share one execution along axis 0, and why not.

    `symbol` names the extent that grows with the batch; `inputs` and `outputs` say which ports carry it. A batched
    port's axis 0 has extent `symbol` times a constant of the execution: every row of the batch owns one equal,
    contiguous block of axis 0. `refused` is empty if batching is proven, else the reason with the node that lost it.
    """

    symbol: str | None
    inputs: tuple[bool, ...]
    outputs: tuple[bool, ...]
    refused: str = ""


@dataclass(frozen=True)
class Step:
    """One launch: a device's own kernel over numbered buffers.

    `scratch` are buffers that live during this step alone. `binds` names extents that are known only after it.
    `in_place` lists positions of inputs whose memory the first output may take over, element for element.
    """

    kernel: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    source: str
    binds: tuple[str, ...] = ()
    scratch: tuple[int, ...] = ()
    in_place: tuple[int, ...] = ()


@dataclass(frozen=True)
class Buffer:
    """A tensor of the plan. `alias` is the buffer whose memory it shares (same elements, another shape)."""

    dtype: DType
    shape: tuple[Dim, ...]
    constant: Any = None
    alias: int | None = None


@dataclass(frozen=True)
class Requirement:
    """A relation of extents that only binding can check: equal, or with `broadcast`, `left` equal to 1 or `right`."""

    left: Dim
    right: Dim
    broadcast: bool
    source: str
    what: str


@dataclass(frozen=True)
class Plan:
    """Steps over numbered buffers; `symbols` are the extents that the inputs' shapes bind, in binding order.

    `output_structures` as in ir.graph.Graph. `program` is what the device that lowered the plan prepared for binding
    it, of no meaning to anyone else.
    """

    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    input_ports: tuple[Port, ...]
    output_ports: tuple[Port, ...]
    symbols: tuple[str, ...]
    batching: Batching
    requirements: tuple[Requirement, ...] = ()
    program: Any = None
    output_structures: tuple[tuple[str, Structure], ...] = ()


def root(buffers: tuple[Buffer, ...], index: int) -> int:
    """The buffer that owns the memory of buffer `index`."""
    alias = buffers[index].alias
    while alias is not None:
        index, alias = alias, buffers[alias].alias
    return index


def constant_of(plan: Plan, index: int) -> Any:
    """The contents of a buffer, in the shape of the one that owns its memory, where compiling knew them; else None."""
    return plan.buffers[root(plan.buffers, index)].constant
