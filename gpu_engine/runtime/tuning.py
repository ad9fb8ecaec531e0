"""How many rows share an execution of an engine, before and after warm-up has measured what they cost."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter, thread_time

from gpu_engine.options import Options, numa_nodes
from gpu_engine.plan.plan import Plan
from gpu_engine.plan.signature import Family, Fit
from gpu_engine.runtime.admission import Admission
from gpu_engine.runtime.buckets import BucketStream, powers
from gpu_engine.runtime.device import Device, Stream
from gpu_engine.runtime.execution import Worker
from gpu_engine.runtime.requests import Part, gather_rows
from gpu_engine.runtime.sizing import BatchPlan, Limits, Sizes, capped, choose, memory_cap, resized
from gpu_engine.runtime.warmup import Measured, Row, measure, random_rows

_LOGGER = logging.getLogger(__name__)
FREQUENT = 16
"""Batches of a set of extents that were run before it is measured: what is rare is not worth it."""
REMEMBERED, NOTES = 4096, 4
CHECKED_ROWS = 3
"""Rows that are run singly and together where the batch is given and nothing else is to be found out."""


class Tuner:
    """The sizes in effect. `measures` says whether the number of rows is ours to choose."""

    def __init__(self, plan: Plan, device: Device, options: Options, sizes: Sizes, admission: Admission) -> None:
        self.sizes = sizes
        self._plan, self._admission = plan, admission
        self.measures = options.batch is None and sizes.batch.batch > 1
        one_size = options.deterministic and not device.same_bits(plan)
        self._most = sizes.batch.batch
        self._bucketing = (powers if device.bucketed else None) if not one_size else lambda batch: (batch,)
        self._clock = perf_counter if device.asynchronous else thread_time
        self._reason = sizes.batch.reason
        self._notes: list[str] = []
        self._seen: Counter[tuple[int, ...]] = Counter()
        self._lock = threading.Lock()

    @property
    def known_extents(self) -> bool:
        """Whether the batch is the only extent that callers choose: then inputs can be made up."""
        return self._plan.symbols == (self._plan.batching.symbol,)

    def bucketed(self, streams: Sequence[Stream]) -> list[BucketStream]:
        """The streams with buckets before them where executions are to have few sizes, else nothing."""
        choose, admission = self._bucketing, self._admission
        if choose is None or not self.sizes.shared:
            return []
        return [
            BucketStream(stream, self._plan, lambda extents: choose(admission.limit_at(extents))) for stream in streams
        ]

    @property
    def useful(self) -> bool:
        """Whether rows may share executions, so that there is something to find out."""
        return self.sizes.shared and self.sizes.batch.batch > 1

    def warm(self, worker: Worker, fit: Fit | None, rows: Sequence[Row] = ()) -> None:
        """Compare and measure rows, made up unless given, on the worker's slot; raises what the device raises."""
        if fit is None:
            fit = self._admission.fit_of_one()
        family = fit.family
        if not rows:
            shapes = self._admission.input_shapes(family)
            rows = random_rows(self._plan.input_ports, shapes, family.blocks, CHECKED_ROWS)
        most = self._admission.row_limit(family, self._most) if self.measures else 1
        rows = rows[: max(most, CHECKED_ROWS)]
        self._adopt(family, measure(worker.slot, family, rows, self._plan.batching.outputs, most, self._clock))

    def prepare(self, worker: Worker, parts: Sequence[Part]) -> None:
        """Before a batch runs: measure extents that have become frequent, with the rows of the batch; never raises."""
        request = parts[0][0]
        family = request.fit.family
        if len(self._seen) >= REMEMBERED:
            self._seen.clear()
        seen = self._seen[family.key] + 1
        self._seen[family.key] = seen
        if seen != FREQUENT or not self.useful or not request.fit.rows:
            return
        try:
            self.warm(worker, request.fit, gather_rows(parts, family.blocks))
        except Exception:
            _LOGGER.exception("what a batch costs could not be measured")

    def _adopt(self, family: Family, found: Measured) -> None:
        with self._lock:
            self._seen[family.key] = FREQUENT
            plan, only = self.sizes.batch, self.known_extents
            if found.mismatch:
                reason = f"batching is switched off, because warm-up found that {found.mismatch}"
                _LOGGER.warning("%s", reason)
                self.sizes = replace(resized(self.sizes, BatchPlan(1, reason, "graph")), shared=False)
            elif self.measures:
                limit = found.batch
                where = "" if only else f" at {self._admission.describe(family)}"
                self._notes = [*self._notes[1 - NOTES :], f"{found}{where}: {limit}"]
                reason = "; ".join([self._reason, *self._notes])
                changed = BatchPlan(limit, reason, "device", plan.refused_inputs)
                if not only or limit == plan.batch:
                    changed = replace(plan, reason=reason)
                self.sizes = resized(self.sizes, changed)
                self._admission.limit(family, limit)
            self._admission.adopt(self.sizes)


def sizes_of(plan: Plan, device: Device, options: Options) -> Sizes:
    """Streams, slots and batch for a plan on a device, within its free memory as far as extents are known."""
    batching = plan.batching
    refused = batching.refused or ("" if batching.symbol else "no input carries a batch")
    named = () if refused else zip(plan.input_ports, batching.inputs, strict=True)
    limits = Limits(
        auto_streams=device.auto_streams(),
        numa_nodes=numa_nodes(),
        streams=device.stream_limit,
        batch=device.batch_limit,
        asynchronous=device.asynchronous,
        splits=options.deterministic and not device.same_bits(plan),
        refused=refused,
        refused_inputs=tuple(port.name for port, carries in named if not carries),
    )
    sizes = choose(options, limits)
    if refused or plan.symbols != (batching.symbol,):
        return sizes
    weights, row_nbytes = device.memory(plan, (1,))
    free = device.free_memory() * options.memory_fraction
    cap = memory_cap(free, weights, row_nbytes, sizes.streams * sizes.slots)
    return resized(sizes, capped(sizes.batch, cap))
