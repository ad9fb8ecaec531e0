"""What an engine says of itself: whether it serves, on what, and what it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gpu_engine.errors import InputError
from gpu_engine.runtime.gate import Gate
from gpu_engine.runtime.memory import MemoryPlan
from gpu_engine.runtime.sizing import BatchPlan, Sizes

READY, UNHEALTHY, CLOSED = "ready", "unhealthy", "closed"


@dataclass(frozen=True)
class Description:
    """An engine at one moment.

    state             "ready"; "unhealthy": the device failed for good, and requests are refused; "closed"
    reason            why it is not ready, else ""
    device            where it runs, and in parentheses why, with all that decided how many cores it uses
    streams slots     streams on all devices, and slots of each
    optimal_requests  of one row, in flight, that keep every slot busy
    batching memory   as `Engine.explain_batching` and `Engine.memory_plan`; no memory is known before the first request
                      where extents of 1 contradict each other inside the model
    """

    state: str
    reason: str
    device: str
    streams: int
    slots: int
    optimal_requests: int
    batching: BatchPlan
    memory: MemoryPlan | None


def describe(gate: Gate, device: str, sizes: Sizes, plan: Callable[[], MemoryPlan]) -> Description:
    """See `Engine.describe`."""
    try:
        memory = plan()
    except InputError:
        memory = None
    return Description(
        state=UNHEALTHY if gate.lost else CLOSED if gate.is_shut else READY,
        reason=gate.reason,
        device=device,
        streams=sizes.streams,
        slots=sizes.slots,
        optimal_requests=sizes.optimal_requests,
        batching=sizes.batch,
        memory=memory,
    )
