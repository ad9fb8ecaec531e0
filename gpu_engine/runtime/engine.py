"""The engine: what a caller holds after compile()."""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from gpu_engine.errors import InputError, OutOfMemory
from gpu_engine.options import Options, numa_nodes
from gpu_engine.plan.plan import Plan, Port
from gpu_engine.runtime.admission import Admission, Admitted
from gpu_engine.runtime.arrays import Array, Wrap
from gpu_engine.runtime.device import Device
from gpu_engine.runtime.execution import clock, run_alone
from gpu_engine.runtime.future import Future
from gpu_engine.runtime.observation import Observer
from gpu_engine.runtime.pool import Pool
from gpu_engine.runtime.requests import Join, Request
from gpu_engine.runtime.rooms import Rooms
from gpu_engine.runtime.scheduler import Batcher
from gpu_engine.runtime.sizing import BatchPlan, Limits, Sizes, capped, choose, memory_cap, resized
from gpu_engine.runtime.statistics import Statistics


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes: weights once, activations for each of all slots."""

    weights: int
    activations: int
    slots: int

    @property
    def total(self) -> int:
        return self.weights + self.activations * self.slots


class Engine:
    """A compiled model with its streams, slots and queue. Every method may be called from any thread.

    Inputs are an array (for a model of one input), a list in the order of the inputs, or a dict by name; outputs come
    back in the same form: an array (a list if the model has several outputs), a list, a dict. Output arrays belong to
    the caller: fresh, writable and C-contiguous. Input arrays are read when the request runs, so they must not be
    changed before its future is done. Nested lists and scalars are converted to the input's dtype, arrays never are.

    Leaving a `with` block closes the engine and runs what waits; dropping the last reference fails what waits.
    """

    def __init__(self, plan: Plan, device: Device, options: Options | None = None, reason: str = "") -> None:
        options = options or Options()
        self._plan, self._device = plan, device
        self._reason = reason or device.reason
        self._sizes = _sizes(plan, device, options)
        self._admission = Admission(plan, device, self._sizes, options.memory_fraction)
        self._rooms = Rooms()
        self._serve_callers = options.batch_timeout_ms == 0 or not self._sizes.shared
        batcher: Batcher[Request] = Batcher(options.batch_timeout_ms / 1000, options.max_queue_size)
        streams = device.open(plan, self._sizes.streams, self._sizes.slots, options.threads)
        self._pool = Pool(streams, batcher, self._sizes.batch.batch, plan.batching.outputs)
        weakref.finalize(self, self._pool.abandon).atexit = False

    @property
    def device(self) -> str:
        """Where the engine runs, and in parentheses why."""
        return f"{self._device.name} ({self._reason})" if self._reason else self._device.name

    @property
    def plan(self) -> Plan:
        """What the engine binds and launches."""
        return self._plan

    @property
    def inputs(self) -> tuple[Port, ...]:
        return self._plan.input_ports

    @property
    def outputs(self) -> tuple[Port, ...]:
        return self._plan.output_ports

    @property
    def input_names(self) -> tuple[str, ...]:
        return self._admission.ports.input_names

    @property
    def output_names(self) -> tuple[str, ...]:
        return self._admission.ports.output_names

    @property
    def streams(self) -> int:
        """Streams that were opened."""
        return self._sizes.streams

    @property
    def batch(self) -> int:
        """The most rows that share an execution."""
        return self._sizes.batch.batch

    @property
    def optimal_requests(self) -> int:
        """How many requests of one row in flight keep every slot busy."""
        return self._sizes.optimal_requests

    def __repr__(self) -> str:
        return f"<Engine on {self._device.name}: {self.streams} streams, batch {self.batch}>"

    def run(self, inputs: Any) -> Any:
        """Run one request and return its outputs; on the calling thread if a slot is idle and nothing waits.

        Raises InputError, OutOfMemory, QueueFull, EngineClosed, and what the device raises for these inputs.
        """
        started = clock()
        arrays, wrap, admitted = self._admission.admit(inputs)
        reason = admitted.reason
        if reason and (self._serve_callers or reason == "full"):
            worker = self._pool.borrow(started)
            if worker is not None:
                try:
                    return wrap(run_alone(worker, arrays, admitted.fit, started, reason))
                finally:
                    self._pool.give_back(worker)
        request = self._request(arrays, wrap, admitted, None)
        self._queue((request,))
        return self._result(request.future)

    def run_many(self, inputs: Any) -> Any:
        """Run one large set of rows: cut along the batch axis over the slots of all streams, joined in order.

        Like `run` of many rows, but the last of them do not wait for a batch to fill. Where batching is not proven the
        inputs run as they are.
        """
        request = self._request(*self._admission.admit(inputs), None)
        self._queue((request,))
        if not self._serve_callers:
            self.flush()
        return self._result(request.future)

    def submit(self, inputs: Any, *, timeout: float | None = None, block: bool = False) -> Future[Any]:
        """Queue one request; the future is a concurrent.futures.Future and may be awaited.

        After `timeout` seconds in the queue (None or 0: never) the request fails with RequestTimeout. If the queue
        holds `max_queue_size` requests: QueueFull, or with `block` wait for room within the same timeout. Inputs are
        checked first, so InputError and OutOfMemory are raised here.
        """
        request = self._request(*self._admission.admit(inputs), timeout)
        self._queue((request,), block)
        return request.future

    def map(self, inputs: Iterable[Any]) -> Iterator[Any]:
        """Run every item of an iterable and yield the outputs in its order, with a bounded number in flight.

        Reads ahead by at most twice `optimal_requests` items. The first error is raised at its place and ends the
        iteration; what was not dispatched by then is cancelled.
        """
        source, group = iter(inputs), self.optimal_requests
        waiting: deque[Future[Any]] = deque()
        more = True
        try:
            while more or waiting:
                while more and len(waiting) <= group:
                    items = list(itertools.islice(source, group))
                    more = len(items) == group
                    waiting.extend(self._queue_group(items))
                if not more and not self._serve_callers:
                    self.flush()
                if waiting:
                    yield self._result(waiting.popleft())
        finally:
            for future in waiting:
                future.cancel()

    def statistics(self) -> Statistics:
        """Counts and times since the engine was made."""
        return self._pool.statistics()

    def observe(self, observer: Observer | None) -> None:
        """From now on tell `observer` of every execution, or with None nobody; EngineClosed after close().

        The thread that ran the execution calls it before the results go out: executions get slower by its time, and
        fail if it raises.
        """
        self._pool.observe(observer)

    def explain_batching(self) -> BatchPlan:
        """How many rows share an execution, and why not more."""
        return self._sizes.batch

    def memory_plan(self) -> MemoryPlan:
        """The memory at a full batch; extents other than the batch are the largest seen so far, or 1 before any."""
        batch, seen = self._plan.batching.symbol, self._admission.largest
        extents = list(seen or (1,) * len(self._plan.symbols))
        if self._sizes.shared and batch is not None:
            extents[self._plan.symbols.index(batch)] = self.batch
        weights, activations = self._device.memory(self._plan, tuple(extents))
        return MemoryPlan(weights, activations, self._sizes.streams * self._sizes.slots)

    def flush(self) -> None:
        """Run what waits now, without waiting for batches to fill."""
        self._pool.flush()

    def close(self, drain: bool = True, timeout_s: float | None = None) -> None:
        """Refuse new requests; run those that wait, or fail them with EngineClosed; end the threads.

        What has not finished after `timeout_s` seconds fails with EngineClosed. A second close does nothing.
        """
        self._pool.close(drain, timeout_s)
        self._rooms.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=kind is None)

    def _request(self, arrays: Sequence[Array], wrap: Wrap, admitted: Admitted, timeout: float | None) -> Request:
        now, fit, rows, limit = clock(), admitted.fit, admitted.rows, admitted.limit
        deadline = now + _checked_timeout(timeout) if timeout else None
        join = Join(rows, self._plan.batching.outputs, self._rooms) if rows > limit else None
        key = admitted.key or self._admission.key(arrays, admitted)
        return Request(arrays, wrap, fit, rows, limit, key, now, deadline, Future(), join)

    def _queue(self, requests: Sequence[Request], block: bool = False) -> None:
        """Admit requests; those of no rows are done at once."""
        for request in requests:
            if not request.fit.rows:
                self._queue_but_empty(requests, block)
                return
        self._pool.admit(requests, block)

    def _queue_but_empty(self, requests: Sequence[Request], block: bool) -> None:
        empty = [(request, self._admission.empty_outputs(request.fit)) for request in requests]
        self._pool.admit([request for request, outputs in empty if outputs is None], block)
        for request, outputs in empty:
            if outputs is not None:
                request.succeed(request.wrap(outputs))

    def _queue_group(self, items: Sequence[Any]) -> list[Future[Any]]:
        """Admit items as one group; one that is refused fails at its place in the result."""
        futures, good = [], []
        for item in items:
            try:
                request = self._request(*self._admission.admit(item), None)
            except (InputError, OutOfMemory) as error:
                futures.append(Future[Any]())
                futures[-1].set_exception(error)
            else:
                good.append(request)
                futures.append(request.future)
        self._queue(good, block=True)
        return futures

    def _result(self, future: Future[Any]) -> Any:
        """Wait for a request; an interrupted wait cancels it."""
        self._pool.serve_until(future)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


def _sizes(plan: Plan, device: Device, options: Options) -> Sizes:
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


def _checked_timeout(timeout: float) -> float:
    if not timeout > 0:
        raise ValueError(f"timeout must not be negative, given {timeout}")
    return timeout
