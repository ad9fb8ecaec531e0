"""What an engine did so far, under the names of Triton Inference Server's statistics and our own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gpu_engine.runtime.scheduler import Batcher


@dataclass(slots=True)
class Counters:
    """What one slot did; only the thread that owns the slot writes.

    `sizes` are launches by rows; `alone` are those on the thread of a caller, by the reason that closed them.
    """

    queue_s: float = 0.0
    copy_in_s: float = 0.0
    compute_s: float = 0.0
    copy_out_s: float = 0.0
    failed: int = 0
    retried: int = 0
    sizes: Counter[int] = field(default_factory=Counter)
    alone: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Statistics:
    """Totals since the engine was made.

    inference_count      rows that were run              execution_count   launches that succeeded
    batch_sizes          launches by rows                close_reasons     launches by why their batch was closed
    queue_ns             time from submit to launch, summed over requests
    copy_in_ns, compute_ns, copy_out_ns                  time of executions, summed over slots
    padded_rows          rows run only to fill a bucket  served_by_callers executions on the calling thread of run()
    rejected cancelled expired failed                    requests that got no result
    delayed              requests that waited longer than their timeout and were put behind the others
    retried              executions that failed and were halved to find the request at fault
    busy                 for each stream the fraction of time with an execution in flight
    max_in_flight        for each stream the most executions in flight at once
    waiting              requests in the queue now
    """

    inference_count: int
    execution_count: int
    batch_sizes: Mapping[int, int]
    close_reasons: Mapping[str, int]
    queue_ns: int
    copy_in_ns: int
    compute_ns: int
    copy_out_ns: int
    padded_rows: int
    served_by_callers: int
    rejected: int
    cancelled: int
    expired: int
    delayed: int
    failed: int
    retried: int
    busy: tuple[float, ...]
    max_in_flight: tuple[int, ...]
    waiting: int

    @property
    def mean_batch(self) -> float:
        """Rows per execution."""
        return self.inference_count / self.execution_count if self.execution_count else 0.0


@dataclass(frozen=True)
class QueueCounts:
    """The part of the statistics that the queue keeps."""

    reasons: Mapping[str, int]
    rejected: int
    cancelled: int
    expired: int
    delayed: int
    waiting: int


def queue_counts(batcher: Batcher[Any]) -> QueueCounts:
    """What a batcher counted so far; the caller serializes this with all other calls of it."""
    return QueueCounts(
        batcher.reasons.copy(),
        batcher.rejected,
        batcher.cancelled,
        batcher.expired,
        batcher.delayed,
        batcher.size,
    )


def summed(
    slots: Iterable[Counters], queue: QueueCounts, busy: tuple[float, ...], max_in_flight: tuple[int, ...]
) -> Statistics:
    """The totals over all slots."""
    slots = list(slots)
    sizes: Counter[int] = Counter()
    alone: Counter[str] = Counter()
    for slot in slots:
        sizes.update(slot.sizes.copy())
        alone.update(slot.alone.copy())
    return Statistics(
        inference_count=sum(rows * launches for rows, launches in sizes.items()),
        execution_count=sizes.total(),
        batch_sizes=dict(sorted(sizes.items())),
        close_reasons=dict(alone + Counter(queue.reasons)),
        queue_ns=_ns(slot.queue_s for slot in slots),
        copy_in_ns=_ns(slot.copy_in_s for slot in slots),
        compute_ns=_ns(slot.compute_s for slot in slots),
        copy_out_ns=_ns(slot.copy_out_s for slot in slots),
        padded_rows=0,
        served_by_callers=alone.total(),
        rejected=queue.rejected,
        cancelled=queue.cancelled,
        expired=queue.expired,
        delayed=queue.delayed,
        failed=sum(slot.failed for slot in slots) + queue.expired,
        retried=sum(slot.retried for slot in slots),
        busy=busy,
        max_in_flight=max_in_flight,
        waiting=queue.waiting,
    )


def _ns(seconds: Iterable[float]) -> int:
    return round(sum(seconds) * 1e9)
