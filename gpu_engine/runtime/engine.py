"""The engine: what a caller holds after compile()."""

from __future__ import annotations

import logging
import weakref
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any

from gpu_engine.errors import GpuEngineError, InputError, OutOfMemory, RequestTimeout
from gpu_engine.options import Options, Partial
from gpu_engine.plan.plan import Plan, Port
from gpu_engine.runtime.admission import Admission
from gpu_engine.runtime.description import Description, describe
from gpu_engine.runtime.device import Device
from gpu_engine.runtime.entry import Entry
from gpu_engine.runtime.execution import clock, run_alone
from gpu_engine.runtime.future import Future
from gpu_engine.runtime.late import ADMIT_ASYNC, STREAM, load
from gpu_engine.runtime.memory import MemoryPlan, budget_of, memory_plan
from gpu_engine.runtime.observation import Observer
from gpu_engine.runtime.ordered import ordered
from gpu_engine.runtime.policy import new_batcher
from gpu_engine.runtime.pool import Pool
from gpu_engine.runtime.properties import Facts, checked_change, read_property
from gpu_engine.runtime.requests import Request, fail_all
from gpu_engine.runtime.reusable import ReusableRequest
from gpu_engine.runtime.sizing import BatchPlan, Sizes, threads_of
from gpu_engine.runtime.statistics import Statistics
from gpu_engine.runtime.tuning import Tuner, sizes_of

_LOGGER = logging.getLogger(__name__)


class Engine:
    """A compiled model with its streams, slots and queue. Every method may be called from any thread.

    Inputs are an array (for a model of one input), a list in the order of the inputs, or a dict by name; outputs come
    back in the same form: an array (a list if the model has several outputs), a list, a dict. Output arrays belong to
    the caller: fresh, writable and C-contiguous. Input arrays are read when the request runs, so they must not be
    changed before its future is done. Nested lists and scalars are converted to the input's dtype, arrays never are.

    On a GPU, tensors in its memory that speak DLPack or `__cuda_array_interface__` are read where they lie, behind what
    their owners' streams were given before; with outputs="device" a DeviceTensor comes back instead of an array. Both
    are complete, and inputs may be changed, when `run` returns or the future is done.

    Leaving a `with` block closes the engine and runs what waits; dropping the last reference fails what waits.
    """

    def __init__(
        self, plan: Plan, device: Device, options: Options | None = None, reason: str = "", name: str = ""
    ) -> None:
        options = options or Options()
        self._plan, self._device, self._options, self._name = plan, device, options, name
        self._reason = reason or device.reason
        sizes = sizes_of(plan, device, options)
        self._admission = Admission(plan, device, sizes, budget_of(options), options.outputs)
        self._tuner = Tuner(plan, device, options, sizes, self._admission)
        self._serve_callers = options.batch_timeout_ms == 0 or not self._sizes.shared
        streams = device.open(plan, sizes.streams, sizes.slots, threads_of(options, sizes.streams))
        self._buckets = self._tuner.bucketed(streams)
        outputs, shorten = plan.batching.outputs, self._admission.shorten
        self._pool = Pool(self._buckets or streams, new_batcher(options), sizes.batch.batch, outputs, shorten)
        self._pool.rounds.individual = options.partial is Partial.individual
        self._entry = Entry(self._admission, options, plan.batching.outputs, self._pool.leave)
        weakref.finalize(self, self._pool.abandon).atexit = False
        if options.warmup and self._tuner.useful and not self._warmed():
            self._pool.rounds.may_share = self._tuner.may_share
        if not self.healthy:
            self.close(drain=False)
            self.check_open()

    @property
    def _sizes(self) -> Sizes:
        return self._tuner.sizes

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

    def run(self, inputs: Any, *, outputs: str | None = None) -> Any:
        """Run one request and return its outputs; on the calling thread if a slot is idle and nothing waits.

        `outputs`, here and elsewhere, is "host" or "device", and overrides the option. Raises InputError, OutOfMemory,
        QueueFull, EngineClosed, and what the device raises for these inputs.
        """
        started = clock()
        arrays, wrap, admitted = self._admission.admit(inputs, outputs)
        reason = admitted.reason
        if reason and (self._serve_callers or reason == "full"):
            worker = self._pool.borrow(started)
            if worker is not None:
                try:
                    return wrap(run_alone(worker, arrays, admitted.fit, started, reason, admitted.placed))
                except OutOfMemory:
                    if admitted.rows == 1:
                        raise
                    worker.counters.failed -= 1  # the queue runs it in parts
                finally:
                    self._pool.give_back(worker)
        request = self._entry.admitted(arrays, wrap, admitted)
        self._queue((request,))
        return self._result(request.future)

    def run_many(self, inputs: Any, *, outputs: str | None = None) -> Any:
        """Run one large set of rows: cut along the batch axis over the slots of all streams, joined in order.

        Like `run` of many rows, but the last of them do not wait for a batch to fill. Where batching is not proven the
        inputs run as they are.
        """
        request = self._entry.request(inputs, outputs=outputs)
        self._queue((request,))
        if not self._serve_callers:
            self.flush()
        return self._result(request.future)

    def submit(
        self,
        inputs: Any,
        *,
        timeout: float | None = None,
        priority: int | None = None,
        block: bool = False,
        outputs: str | None = None,
    ) -> Future[Any]:
        """Queue one request; the future is a concurrent.futures.Future and may be awaited.

        `timeout` is how many seconds the request may wait in the queue (None: `default_timeout`, 0: for ever; it only
        shortens the default, unless `allow_override`); then it fails with RequestTimeout, or goes behind all others
        where the `timeout_action` is DELAY. `priority` is a number from 1, the highest, to `priority_levels`. If the
        queue holds `max_queue_size` requests: QueueFull, or with `block` wait for room within the same timeout. Inputs
        are checked first, so InputError and OutOfMemory are raised here.
        """
        request = self._entry.request(inputs, timeout, priority, outputs)
        if request.fit.rows:
            self._pool.admit((request,), block)
        else:
            self._queue((request,), block)
        return request.future

    async def run_async(
        self,
        inputs: Any,
        *,
        timeout: float | None = None,
        priority: int | None = None,
        block: bool = False,
        outputs: str | None = None,
    ) -> Any:
        """`submit`, and its outputs, for an event loop, which nothing here blocks. Cancelling the task cancels the
        request, which leaves the queue; what was dispatched runs, and its result is dropped."""
        request = self._entry.request(inputs, timeout, priority, outputs)
        await self._queue_async(request, block)
        return await request.future

    def stream(self, source: Iterable[Any] | AsyncIterable[Any], *, outputs: str | None = None) -> AsyncIterator[Any]:
        """`map` for an event loop, over an iterable or an asynchronous one, which is waited for without holding back
        results that are there. An iterable must not block."""
        stream: AsyncIterator[Any] = load(STREAM)(
            partial(self._submit_async, outputs=outputs), self._flush_last, source, 2 * self.optimal_requests
        )
        return stream

    def request(self, *, outputs: str | None = None) -> ReusableRequest:
        """A request object, idle, which can be started any number of times; it keeps the engine alive."""
        return ReusableRequest(self._pool, self._admission.ports, partial(self._submit_into, outputs=outputs))

    def map(self, inputs: Iterable[Any], *, outputs: str | None = None) -> Iterator[Any]:
        """Run every item of an iterable and yield the outputs in its order, with a bounded number in flight.

        Reads ahead by at most twice `optimal_requests` items. The first error is raised at its place and ends the
        iteration; what was not dispatched by then is cancelled.
        """
        queue_group = partial(self._queue_group, outputs=outputs)
        return ordered(inputs, self.optimal_requests, queue_group, self._flush_last, self._result)

    def warmup(self, inputs: Any = None) -> BatchPlan:
        """Run rows singly and together, and time batches of 1, 2, 4, ... rows: what `explain_batching` then says.

        Rows that differ beyond rounding switch batching off; unless `batch=` was given, the times decide how many rows
        share an execution. `inputs`, of one row or several, stand for those to come; without them inputs are made up,
        which takes a model of which only the batch is an open extent: others are measured as requests come. Waits for
        a slot; raises what running the inputs raises.
        """
        tuner = self._tuner
        if tuner.useful and (inputs is not None or tuner.known_extents):
            fit, rows = (None, []) if inputs is None else self._admission.rows(inputs)
            with self._pool.slot() as worker:
                tuner.warm(worker, fit, rows)
            if tuner.known_extents:
                self._pool.resize(self.batch)
        return self.explain_batching()

    def _warmed(self) -> bool:
        """Whether made-up inputs could warm the model up, and quickly; else the first requests will do."""
        try:
            with self._pool.slot() as worker:
                early = self._tuner.warms_early(worker)
            if early:
                self.warmup()
                self._tuner.prepare(self._buckets)
            return early
        except GpuEngineError as error:
            _LOGGER.info("made-up inputs do not warm up the model: %s", error)
            return False

    def statistics(self) -> Statistics:
        """Counts and times since the engine was made."""
        found = self._pool.statistics()
        padded = sum(stream.padded_rows for stream in self._buckets)
        return replace(found, padded_rows=padded) if padded else found

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
        """The memory at a full batch; extents other than the batch are the largest seen so far, or 1 before any, which
        is an InputError where it contradicts the model.

        Weights do not depend on the number of streams; activations grow with the number of slots.
        """
        return memory_plan(self._sizes, self._plan, self._device, self._admission.largest)

    @property
    def healthy(self) -> bool:
        """False once the device has failed for good: then every request fails with DeviceLost, here and in any other
        engine of this process on that device. See `describe`."""
        return not self._pool.gate.lost

    def describe(self) -> Description:
        """The state of the engine, ready or not and why, with all that was decided for it."""
        return describe(self._pool.gate, self.device, self._sizes, self.memory_plan)

    def get_property(self, name: str) -> Any:
        """The value in effect of a property by OpenVINO's name; "SUPPORTED_PROPERTIES" lists the names.

        ValueError for an unknown one, with the closest match.
        """
        timeout_ms, threads = self._pool.batcher.timeout_s * 1000, self._pool.threads
        facts = Facts(self._options, self._sizes, self._device, self._plan, timeout_ms, threads, self._name)
        return read_property(name, facts)

    def set_property(self, name: str | Mapping[str, Any], value: Any = None) -> None:
        """Change a property, or several from a dict, of the engine as it runs: "AUTO_BATCH_TIMEOUT" is the only one.

        ValueError for another, or for a value that it cannot have.
        """
        changes = name if isinstance(name, Mapping) else {name: value}
        for milliseconds in [checked_change(*change) for change in changes.items()]:
            self._pool.collect_for(milliseconds / 1000)
            self._serve_callers = milliseconds == 0 or not self._sizes.shared

    def flush(self) -> None:
        """Run what waits now, without waiting for batches to fill."""
        self._pool.flush()

    def close(self, drain: bool = True, timeout_s: float | None = None) -> None:
        """Refuse new requests; run those that wait, or fail them with EngineClosed; end the threads.

        What has not finished after `timeout_s` seconds fails with EngineClosed. A second close does nothing.
        """
        self._pool.close(drain, timeout_s)
        self._entry.close()

    def check_open(self) -> None:
        """EngineClosed once requests are refused, ForkedEngineError in the child of a fork; DeviceLost if unhealthy."""
        self._pool.gate.check()

    def serve_until(self, done: Callable[[], bool]) -> bool:
        """For a callback that is about to wait, see `Pool.serve_until`."""
        return self._pool.serve_until(done)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=kind is None)

    def _submit_into(self, future: Future[Any], inputs: Any, outputs: str | None) -> None:
        """`submit` with `block`, for a future that is there."""
        self._queue((self._entry.request(inputs, outputs=outputs, future=future),), block=True)

    async def _submit_async(self, inputs: Any, outputs: str | None) -> Future[Any]:
        """`submit` with `block` for an event loop; what is refused is an error of the future."""
        future = Future[Any]()
        try:
            await self._queue_async(self._entry.request(inputs, outputs=outputs, future=future), block=True)
        except GpuEngineError as error:
            future.set_exception(error)
        return future

    async def _queue_async(self, request: Request, block: bool) -> None:
        if block and self._entry.bounded and request.fit.rows:
            await load(ADMIT_ASYNC)(self._pool, request)
        else:
            self._queue((request,))

    def _flush_last(self) -> None:
        """A source has ended: its last requests need not wait for more."""
        if not self._serve_callers:
            self.flush()

    def _queue(self, requests: Sequence[Request], block: bool = False) -> None:
        """Admit requests; those of no rows are done at once."""
        for request in requests:
            if not request.fit.rows:
                self._queue_but_empty(requests, block)
                return
        self._pool.admit(requests, block)

    def _queue_but_empty(self, requests: Sequence[Request], block: bool) -> None:
        empty = [(request, self._admission.empty_outputs(request)) for request in requests]
        self._pool.admit([request for request, outputs in empty if outputs is None], block)
        for request, outputs in empty:
            if outputs is not None and request.succeed(request.wrap(outputs)):
                request.future.run_callbacks()

    def _queue_group(self, items: Sequence[Any], outputs: str | None) -> list[Future[Any]]:
        """Admit items as one group; one that is refused fails at its place in the result."""
        futures, good = [], []
        for item in items:
            try:
                request = self._entry.request(item, outputs=outputs)
            except (InputError, OutOfMemory) as error:
                futures.append(Future[Any]())
                futures[-1].set_exception(error)
            else:
                good.append(request)
                futures.append(request.future)
        try:
            self._queue(good, block=True)
        except RequestTimeout as error:
            fail_all([request for request in good if request.place < 0 and request.fit.rows], error)
        return futures

    def _result(self, future: Future[Any]) -> Any:
        """Wait for a request; an interrupted wait cancels it."""
        self._pool.serve_until(future.done)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise
