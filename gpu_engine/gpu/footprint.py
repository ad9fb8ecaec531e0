"""What a slot takes while it is bound to some extents: for plans of memory, before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gpu_engine.gpu.graphs import captured_nbytes
from gpu_engine.gpu.program import Segment, zone_nbytes
from gpu_engine.plan.plan import Plan


class SlotMemory(NamedTuple):
    """Bytes of one slot. Activations and inputs and outputs lie on the device; staging is page-locked memory of the
    host; graphs are those of one shape, on the device."""

    activations_nbytes: int
    staging_nbytes: int
    graphs_nbytes: int


def slot_memory(plan: Plan, extents: Sequence[int]) -> SlotMemory:
    """Of segments that are known before running; scratch of kernels and what array functions allocate are left out."""
    segment: Segment = plan.program.segments[0]
    values = np.array(segment.numbers.evaluate(tuple(extents)), np.int64)
    return SlotMemory(zone_nbytes(segment, extents), segment.ports.offsets(values)[1], captured_nbytes(plan))
