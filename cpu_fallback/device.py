"""The CPU as a device."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from cpu_fallback import cores
from cpu_fallback.blas import cap_threads
from cpu_fallback.expanded_depthwise import join_expansions
from cpu_fallback.gated_conv import join_gates
from cpu_fallback.layouts import assign_layouts
from cpu_fallback.lowering import lower_node
from cpu_fallback.native import host
from cpu_fallback.program import Program, with_program, zone_sizes
from cpu_fallback.stream import CpuStream
from cpu_fallback.turned_attention import turn_attention
from cpu_fallback.wide_floats import widen_floats
from gpu_engine.errors import DeviceError
from gpu_engine.ir.graph import Graph
from gpu_engine.plan.lower import lower_graph
from gpu_engine.plan.plan import Batching, Plan
from gpu_engine.plan.weights import expand_weights

GROWTH = 6
"""At most so many times as large as they are do weights become: a copy, and transforms for Winograd convolutions."""


class CpuDevice:
    """The host's cores, with kernels generated for its vector features. See `runtime.device.Device`."""

    asynchronous = False
    batch_limit = 8

    def __init__(self, ordinal: int | None = None) -> None:
        if ordinal not in (None, 0):
            raise DeviceError(f"there is one CPU device, cpu:0; cpu:{ordinal} does not exist")
        self._cores = cores.usable_cores()

    @property
    def name(self) -> str:
        return "cpu"

    @property
    def reason(self) -> str:
        target = host()
        return f"{target.cpu}, {target.vector_nbytes * 8}-bit vectors, {self._cores}"

    @property
    def stream_limit(self) -> int:
        return len(self._cores.numbers)

    def auto_streams(self) -> int:
        return len(self._cores.numbers)

    def lower(self, graph: Graph, batching: Batching) -> Plan:
        """The plan, its kernels compiled."""
        return with_program(
            lower_graph(graph, batching, lower_node, _arrange, room_nbytes=self.free_memory() // GROWTH)
        )

    def open(self, plan: Plan, streams: int, slots: int, threads: int | None) -> Sequence[CpuStream]:
        """Streams on disjoint cores; `threads` of each stream where given, else one for each of its cores."""
        shares = cores.partition(self._cores.numbers, streams)
        most = max(map(len, shares))
        if threads is not None and threads > most:
            warnings.warn(f"threads exceeds the cores of a stream - capping to {most}", RuntimeWarning, stacklevel=2)
        arrays = any(not segment.only_native for segment in plan.program.segments)
        return [
            CpuStream(
                plan,
                slots,
                share if self._cores.own else (),
                min(threads or len(share), len(share)),
                cap_threads(1) if arrays else lambda: None,
            )
            for share in shares
        ]

    def memory(self, plan: Plan, extents: tuple[int, ...]) -> tuple[int, int]:
        """(weights, activations of one slot) in bytes; the arenas count, although slots of one stream share them.
        Segments whose extents only running tells are left out."""
        program: Program = plan.program
        first = program.segments[0]
        return program.weights_nbytes, sum(zone_sizes(first, first.numbers.evaluate(extents)))

    def free_memory(self) -> int:
        return cores.free_memory()


def _arrange(graph: Graph) -> Graph:
    target = host()
    images = join_gates(assign_layouts(widen_floats(expand_weights(graph)), target), target)
    return turn_attention(join_expansions(images, target), target)
