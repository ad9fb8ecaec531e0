"""What an engine takes of a device's memory, known before it takes it, and what gives way where that is too much."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gpu_engine.errors import OutOfMemory
from gpu_engine.options import Options
from gpu_engine.plan.plan import Plan
from gpu_engine.runtime.buckets import powers
from gpu_engine.runtime.device import Device
from gpu_engine.runtime.sizing import BatchPlan, Sizes, capped, resized

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes; all but `staging` are the devices' own memory.

    weights      once on each of `devices`
    activations  the arenas of all slots together at a full batch; smaller batches use them too
    slots        of all streams on all devices
    buckets      {rows: the arena of one slot} for each size that executions have; empty where they have any
    graphs       of all slots, for the launches that are captured for their buckets
    staging      of all slots in the host's memory, for inputs and outputs on their way
    """

    weights: int
    activations: int
    slots: int
    devices: int
    buckets: Mapping[int, int]
    graphs: int
    staging: int

    @property
    def total(self) -> int:
        """Of all devices together."""
        return self.weights * self.devices + self.activations + self.graphs


@dataclass(frozen=True)
class Budget:
    """How much of a device an engine may take: a fraction of what is free there, and `limit` bytes in all."""

    fraction: float
    limit: int | None = None

    def room(self, free: int, weights: int, loaded: bool) -> int:
        """Bytes that all slots on a device may take, beside its weights; `free` is without these once `loaded`."""
        room = int(free * self.fraction - (0 if loaded else weights))
        return room if self.limit is None else min(room, self.limit - weights)

    @property
    def whole(self) -> Budget:
        """The same of everything that is free, which a single execution may take."""
        return Budget(1.0, self.limit)

    def bound(self, free: int, weights: int, loaded: bool) -> str:
        """What decides `room`, for people."""
        free_room = Budget(self.fraction).room(free, weights, loaded)
        return "free memory" if self.room(free, weights, loaded) == free_room else f"memory_limit={self.limit:,}"


def budget_of(options: Options) -> Budget:
    """The budget that options give."""
    return Budget(options.memory_fraction, options.memory_limit)


def extents_at(plan: Plan, rows: int, others: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The extents of `rows` rows; the others are as given, or 1."""
    others = others or (1,) * len(plan.symbols)
    return tuple(rows if name == plan.batching.symbol else n for name, n in zip(plan.symbols, others, strict=True))


def fitted(sizes: Sizes, plan: Plan, device: Device, budget: Budget) -> Sizes:
    """The sizes within the memory: a smaller batch, then fewer streams; OutOfMemory if one row at a time does not fit.

    Where extents other than the batch are open `Admission` decides, when they come.
    """
    batched = plan.symbols == (plan.batching.symbol,) and not plan.batching.refused
    if plan.symbols and not batched:
        return sizes
    free, weights, loaded = device.free_memory(), device.memory(plan, extents_at(plan, 1))[0], not device.own_memory
    least = _slot_nbytes(plan, device, 1)
    if least > (most := budget.whole.room(free, weights, loaded)):
        raise OutOfMemory(
            f"one stream of one row needs {weights:,} bytes of weights and {least:,} of activations, and of "
            f"{device.name} {max(0, most):,} are left for activations by {budget.whole.bound(free, weights, loaded)} "
            f"({free:,} bytes are free)"
        )
    room = budget.room(free, weights, loaded)
    found = sizes
    if batched:
        most_rows = bisect_right(
            range(1, sizes.batch.batch + 1),
            room // sizes.slots_per_device,
            key=lambda rows: _slot_nbytes(plan, device, rows),
        )
        found = resized(sizes, capped(sizes.batch, max(1, most_rows), budget.bound(free, weights, loaded)))
    streams = max(1, room // max(1, least * sizes.slots)) * sizes.devices
    if streams < sizes.streams:
        found = _with_streams(found, streams, f"{least * sizes.slots:,} bytes for each, {room:,} for all")
    if found != sizes:
        _LOGGER.warning("memory is short on %s: %s", device.name, found.batch.reason)
    return found


def memory_plan(sizes: Sizes, plan: Plan, device: Device, seen: tuple[int, ...] | None) -> MemoryPlan:
    """At a full batch; extents other than the batch are those `seen`, or 1."""
    rows = sizes.batch.batch if sizes.shared else 0
    extents = extents_at(plan, rows, seen) if rows else seen or (1,) * len(plan.symbols)
    weights, activations = device.memory(plan, extents)
    sized = powers(rows) if device.bucketed and rows else ()
    slots = sizes.streams * sizes.slots
    return MemoryPlan(
        weights=weights,
        activations=activations * slots,
        slots=slots,
        devices=sizes.devices,
        buckets={size: device.memory(plan, extents_at(plan, size, extents))[1] for size in sized},
        graphs=device.captured_nbytes(plan) * max(1, len(sized)) * slots,
        staging=device.staging_nbytes(plan, extents) * slots,
    )


def _slot_nbytes(plan: Plan, device: Device, rows: int) -> int:
    """Of a slot for executions of up to `rows` rows, with what is captured for them."""
    captured = len(powers(rows)) if device.bucketed else 1
    return device.memory(plan, extents_at(plan, rows))[1] + captured * device.captured_nbytes(plan)


def _with_streams(sizes: Sizes, streams: int, numbers: str) -> Sizes:
    """As many streams as fit."""
    plan = sizes.batch
    reason = f"{plan.reason}; {streams} of {sizes.streams} streams fit the memory ({numbers})"
    requests = sizes.optimal_requests * streams // sizes.streams
    batch = BatchPlan(plan.batch, reason, "memory", plan.refused_inputs)
    return replace(sizes, streams=streams, batch=batch, optimal_requests=requests)
