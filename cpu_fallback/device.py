"""The CPU as a device."""

from __future__ import annotations

import platform
import uuid
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from cpu_fallback import cores
from cpu_fallback.blas import cap_threads
from cpu_fallback.even import is_even, with_even_sums
from cpu_fallback.expanded_depthwise import join_expansions
from cpu_fallback.gated_conv import join_gates
from cpu_fallback.layouts import assign_layouts
from cpu_fallback.lowering import lower_node
from cpu_fallback.native import LIBRARY, host
from cpu_fallback.object_cache import object_cache
from cpu_fallback.program import Program, with_program, zone_sizes
from cpu_fallback.stream import CpuStream
from cpu_fallback.timing import TimedStream
from cpu_fallback.timing import timed as timed_plan
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
    """The host's cores, with kernels generated for its vector features. See `runtime.device.Device`.

    `deterministic`: a row's bits do not depend on how many others it is run with. `by_node`: each stream has cores of
    one NUMA node only.
    """

    asynchronous = False
    batch_limit = 8
    bucketed = False
    devices = 1
    own_memory = False
    intake = None

    def __init__(
        self, ordinal: int | None = None, deterministic: bool = False, by_node: bool = False, *, timed: bool = False
    ) -> None:
        if ordinal not in (None, 0):
            raise DeviceError(f"there is one CPU device, cpu:0; cpu:{ordinal} does not exist")
        self._cores, self._even, self._timed = cores.usable_cores(), deterministic, timed
        self._by_node, self._from_cache = by_node, False

    @property
    def name(self) -> str:
        return "cpu"

    @property
    def reason(self) -> str:
        target = host()
        return f"{target.cpu}, {target.vector_nbytes * 8}-bit vectors, {self._cores}"

    def properties(self) -> Mapping[str, Any]:
        """See `runtime.device.Device`. The UUID is of the processor's name and features, which decide what runs."""
        target, cache = host(), object_cache()
        return {
            "FULL_DEVICE_NAME": target.cpu,
            "DEVICE_ARCHITECTURE": platform.machine(),
            "DEVICE_UUID": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{target.cpu} {target.features}")),
            "OPTIMIZATION_CAPABILITIES": ("FP32", "INT8", "WINOGRAD"),
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": self._cores.own,
            "CACHE_DIR": "" if cache is None else str(cache.folder),
            "LOADED_FROM_CACHE": self._from_cache,
            "USES_THREADS": True,
        }

    @property
    def stream_limit(self) -> int:
        return len(self._cores.numbers)

    def auto_streams(self) -> int:
        return len(self._cores.numbers)

    def lower(self, graph: Graph, batching: Batching) -> Plan:
        """The plan, its kernels compiled."""
        before = LIBRARY.compiled
        plan = lower_graph(graph, batching, lower_node, _arrange, room_nbytes=self.free_memory() // GROWTH)
        plan = with_program(with_even_sums(plan) if self._even else plan)
        self._from_cache = LIBRARY.compiled == before
        return plan

    def timed(self) -> CpuDevice:
        """See `runtime.device.Device`."""
        return CpuDevice(deterministic=self._even, by_node=self._by_node, timed=True)

    def open(self, plan: Plan, streams: int, slots: int, threads: int | None) -> Sequence[CpuStream | TimedStream]:
        """Streams on disjoint cores; `threads` of each stream where given, else one for each of its cores."""
        shares = (cores.partition_by_node if self._by_node else cores.partition)(self._cores.numbers, streams)
        most = max(map(len, shares))
        if threads is not None and threads > most:
            warnings.warn(f"threads exceeds the cores of a stream - capping to {most}", RuntimeWarning, stacklevel=2)
        arrays = any(not segment.only_native for segment in plan.program.segments)
        steps, plan = len(plan.steps), timed_plan(plan) if self._timed else plan
        opened = [
            CpuStream(
                plan,
                slots,
                share if self._cores.own else (),
                min(threads or len(share), len(share)),
                cap_threads(1) if arrays else lambda: None,
            )
            for share in shares
        ]
        return [TimedStream(stream, steps) for stream in opened] if self._timed else opened

    def memory(self, plan: Plan, extents: tuple[int, ...]) -> tuple[int, int]:
        """(weights, activations of one slot) in bytes; the arenas count, although slots of one stream share them.
        Segments whose extents only running tells are left out."""
        program: Program = plan.program
        first = program.segments[0]
        return program.weights_nbytes, sum(zone_sizes(first, first.numbers.evaluate(extents)))

    def captured_nbytes(self, plan: Plan) -> int:
        """See `runtime.device.Device`."""
        return 0

    def staging_nbytes(self, plan: Plan, extents: tuple[int, ...]) -> int:
        """See `runtime.device.Device`."""
        return 0

    def same_bits(self, plan: Plan) -> bool:
        return self._even and is_even(plan)

    def free_memory(self) -> int:
        return cores.free_memory()


def _arrange(graph: Graph) -> Graph:
    target = host()
    images = join_gates(assign_layouts(widen_floats(expand_weights(graph)), target), target)
    return turn_attention(join_expansions(images, target), target)
