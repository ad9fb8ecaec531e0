"""A Plan: a straight list of steps for one device, with symbolic extents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import DType


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
    """One launch: a device's own kernel over numbered buffers; `binds` names extents that are known only after it."""

    kernel: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    source: str
    binds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Buffer:
    """A tensor of the plan. `alias` is the buffer whose memory it shares (same elements, another shape)."""

    dtype: DType
    shape: tuple[Dim, ...]
    constant: Any = None
    alias: int | None = None


@dataclass(frozen=True)
class Plan:
    """Steps over numbered buffers; `symbols` are the extents that the inputs' shapes bind, in binding order."""

    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    input_ports: tuple[Port, ...]
    output_ports: tuple[Port, ...]
    symbols: tuple[str, ...]
    batching: Batching
