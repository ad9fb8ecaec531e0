"""How many rows share an execution of an engine, before and after warm-up has measured what they cost.

A model whose inputs can be made up is warmed up while compiling, on a GPU and where its rows are quick. Others are as
requests come: the first rows that would share an execution are compared with the same rows alone, and only what has
become frequent is measured.
"""

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
from gpu_engine.runtime.memory import budget_of, fitted
from gpu_engine.runtime.requests import Part, gather_rows
from gpu_engine.runtime.sizing import BatchPlan, Limits, Sizes, choose, resized
from gpu_engine.runtime.warmup import Measured, Row, check, measure, random_rows, took_s

_LOGGER = logging.getLogger(__name__)
FREQUENT = 16
"""Batches of a set of extents that were run before it is measured: what is rare is not worth it."""
REMEMBERED, NOTES = 4096, 4
CHECKED_ROWS = 3
"""Rows that are run singly and together."""
TRIES = 4
"""After so many batches in which comparing raised, rows of these extents are kept apart without trying again."""
QUICK_S = 10e-3
"""A row that takes longer is not worth tens of them while compiling."""


class Tuner:
    """The sizes in effect. `measures` says whether the number of rows is ours to choose."""

    def __init__(self, plan: Plan, device: Device, options: Options, sizes: Sizes, admission: Admission) -> None:
        self.sizes = sizes
        self._plan, self._admission = plan, admission
        self.measures = options.batch is None and sizes.batch.batch > 1
        one_size = options.deterministic and not device.same_bits(plan)
        self._most = sizes.batch.batch
        self._bucketing = (powers if device.bucketed else None) if not one_size else lambda batch: (batch,)
        self._prepares = device.bucketed
        self._clock = perf_counter if device.asynchronous else thread_time
        self._reason = sizes.batch.reason
        self._notes: list[str] = []
        self._seen: Counter[tuple[int, ...]] = Counter()
        self._compared: set[tuple[int, ...]] = set()
        self._failed: Counter[tuple[int, ...]] = Counter()
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
        family = (fit or self._admission.fit_of_one()).family
        if not rows:
            rows = self._made_up(family, CHECKED_ROWS)
        if self._agree(worker, family, rows[:CHECKED_ROWS]):
            self._measure(worker, family, rows)

    def warms_early(self, worker: Worker) -> bool:
        """Whether to warm up while compiling: on a device that prepares each size by itself, and where a row, made up
        and run here, takes so little that nobody notices."""
        if not self.known_extents or self._prepares:
            return self.known_extents
        family = self._admission.fit_of_one().family
        (row,) = self._made_up(family, 1)
        return took_s(worker.slot, family, row, self._clock) < QUICK_S

    def prepare(self, streams: Sequence[BucketStream]) -> None:
        """Let the device prepare every bucket on every slot, which nobody uses yet, with a row that is made up."""
        if self._prepares:
            fit = self._admission.fit_of_one()
            (row,) = self._made_up(fit.family, 1)
            for stream in streams:
                stream.prepare(fit.extents, row)

    def may_share(self, worker: Worker, parts: Sequence[Part]) -> bool:
        """Before a batch runs: whether its parts may share an execution; never raises.

        The first of a set of extents are compared, and extents that have become frequent are measured, with the rows
        of the batch, unless these lie in the device's memory.
        """
        family, shares = parts[0][0].fit.family, len(parts) > 1 or parts[0][0].join is not None
        if parts[0][0].placed is not None:
            return self.sizes.shared
        if self.sizes.shared and shares and family.key not in self._compared:
            self._compare(worker, family, parts)
        if not self.sizes.shared or (shares and family.key not in self._compared):
            return False
        if len(self._seen) >= REMEMBERED:
            self._seen.clear()
        seen = self._seen[family.key] + 1
        self._seen[family.key] = seen
        if seen == FREQUENT:
            try:
                self._measure(worker, family, gather_rows(parts, family.blocks))
            except Exception:
                _LOGGER.exception("what a batch costs could not be measured")
        return True

    def _made_up(self, family: Family, count: int) -> list[Row]:
        return random_rows(self._plan.input_ports, self._admission.input_shapes(family), family.blocks, count)

    def _compare(self, worker: Worker, family: Family, parts: Sequence[Part]) -> None:
        """Compare the first rows of the requests in a batch; after `TRIES` that raised, no more."""
        if self._failed[family.key] >= TRIES:
            return
        first = [(request, 0, min(request.rows, CHECKED_ROWS)) for request, _, _ in parts[:CHECKED_ROWS]]
        try:
            self._agree(worker, family, gather_rows(first, family.blocks)[:CHECKED_ROWS])
        except Exception as error:
            self._failed[family.key] += 1
            _LOGGER.warning("rows could not be compared, so they run apart: %s", error)

    def _agree(self, worker: Worker, family: Family, rows: Sequence[Row]) -> bool:
        """Whether rows give the same together as alone; else batching is off from now on."""
        mismatch = check(worker.slot, family, rows, self._plan.batching.outputs, self._clock)
        with self._lock:
            if mismatch:
                reason = f"batching is switched off, because warm-up found that {mismatch}"
                _LOGGER.warning("%s", reason)
                self.sizes = replace(resized(self.sizes, BatchPlan(1, reason, "graph")), shared=False)
                self._admission.adopt(self.sizes)
            else:
                if len(self._compared) >= REMEMBERED:
                    self._compared.clear()
                self._compared.add(family.key)
        return not mismatch

    def _measure(self, worker: Worker, family: Family, rows: Sequence[Row]) -> None:
        """Measure what batches of a family cost, and from now on use it, if their rows are ours to choose."""
        most = self._admission.row_limit(family, self._most) if self.measures else 1
        if most == 1:
            return
        found = Measured(measure(worker.slot, family, rows[:most], most, self._clock))
        with self._lock:
            self._seen[family.key] = FREQUENT
            plan, only, limit = self.sizes.batch, self.known_extents, found.batch
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
        devices=device.devices,
        asynchronous=device.asynchronous,
        splits=options.deterministic and not device.same_bits(plan),
        refused=refused,
        refused_inputs=tuple(port.name for port, carries in named if not carries),
    )
    return fitted(choose(options, limits), plan, device, budget_of(options))
