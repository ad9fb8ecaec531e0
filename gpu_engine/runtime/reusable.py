"""A request object: its inputs, outputs and callback outlive one run, and it can be started again."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

from gpu_engine.errors import EngineClosed, ForkedEngineError, InputError, RequestBusy, RequestCancelled
from gpu_engine.options import suggestion
from gpu_engine.runtime.arrays import Array, Ports
from gpu_engine.runtime.device_tensors import GivenTensor
from gpu_engine.runtime.execution import clock
from gpu_engine.runtime.future import Future
from gpu_engine.runtime.pool import Pool


class RequestState(Enum):
    """IDLE -> BUSY -> IDLE; BUSY -> CANCELLED -> BUSY again; STOP once it or its engine is closed, unless BUSY."""

    IDLE = "IDLE"
    BUSY = "BUSY"
    CANCELLED = "CANCELLED"
    STOP = "STOP"


class TimedFuture(Future[Any]):
    """A future that knows when its request left the queue."""

    started: float | None = None

    def set_running_or_notify_cancel(self) -> bool:
        self.started = clock()
        return super().set_running_or_notify_cancel()


Callback = Callable[["ReusableRequest", Any], object]


class ReusableRequest:
    """Made by `Engine.request()`. Every method may be called from any thread.

    The callback is called as callback(request, userdata) after every run, failed and cancelled ones too, on the thread
    that ended it, before the request is idle. In it outputs may be read, but the request cannot be started. What it
    raises becomes the error of the run. A request that runs is not destroyed: dropping the last reference to it, as
    OpenVINO's destructor does, waits in effect, because the engine holds it until its callback returned.
    """

    def __init__(self, pool: Pool, ports: Ports, submit: Callable[[Future[Any], Any], None]) -> None:
        self.userdata: Any = None
        self.on_idle: Callable[[ReusableRequest, bool], object] | None = None
        self._pool, self._ports, self._submit = pool, ports, submit
        self._inputs: dict[str, Array] = {}
        self._callback: Callback | None = None
        self._state, self._before, self._stopped = RequestState.IDLE, RequestState.IDLE, False
        self._future = TimedFuture()
        self._result: Any = None
        self._error: BaseException | None = None
        self._settled = self._told = True
        self._dropped = False
        self._caller: int | None = None
        self._submitted = self._started = self._ended = clock()
        self._make_lock()

    def __repr__(self) -> str:
        return f"<ReusableRequest: {self.state.value}>"

    @property
    def state(self) -> RequestState:
        if self._state is RequestState.BUSY or not (self._stopped or self._pool.gate.is_shut):
            return self._state
        return RequestState.STOP

    @property
    def error(self) -> BaseException | None:
        """What the last run failed with; None if it did not, and while the request runs."""
        return self._error

    @property
    def outputs(self) -> Any:
        """The outputs of the last run in the form of its inputs, None if there are none; RequestBusy while it runs."""
        self._refuse_if_busy("outputs")
        return self._result

    @property
    def latency_ms(self) -> float:
        """Milliseconds from start to result of the last run; RequestBusy while it runs."""
        return sum(self.profiling_info.values()) / 1e6

    @property
    def profiling_info(self) -> Mapping[str, int]:
        """Nanoseconds of the last run: `queue_ns` until its dispatch, `run_ns` after; RequestBusy while it runs."""
        self._refuse_if_busy("profiling_info")
        return {
            "queue_ns": round((self._started - self._submitted) * 1e9),
            "run_ns": round((self._ended - self._started) * 1e9),
        }

    def set_callback(self, callback: Callback | None) -> None:
        """What is called after each run; RequestBusy while it runs."""
        self._refuse_if_busy("set_callback")
        self._callback = callback

    def set_tensor(self, name: str, array: Array) -> None:
        """An input for this and later runs; RequestBusy while it runs, InputError for an unknown name."""
        self._refuse_if_busy("set_tensor")
        if name not in self._ports.input_names:
            raise InputError(f"the model has no input {name!r}{suggestion(name, self._ports.input_names)}")
        self._inputs[name] = array

    def get_tensor(self, name: str) -> Any:
        """An input as it was set, or an output of the last run; RequestBusy while it runs, InputError for neither."""
        self._refuse_if_busy("get_tensor")
        if name in self._inputs:
            return self._inputs[name]
        names = self._ports.output_names
        if name not in names or self._result is None:
            near = suggestion(name, (*self._ports.input_names, *names)) if name not in names else ""
            raise InputError(f"the request holds no tensor {name!r}{near}")
        if isinstance(self._result, dict):
            return self._result[name]
        return self._result[names.index(name)] if isinstance(self._result, list) else self._result

    def start(self, inputs: Any = None, userdata: Any = None) -> None:
        """Queue a run; without `inputs`, of those that were set or given last.

        RequestBusy while it runs, EngineClosed once it is closed or its engine, and what `Engine.submit` raises; the
        request is then as it was.
        """
        if not self.reserve():
            raise RequestBusy("the request runs: wait() first")
        self.launch(inputs, userdata)

    def run(self, inputs: Any = None) -> Any:
        """`start`, then `wait`: the outputs."""
        self.start(inputs)
        return self.wait()

    def wait(self) -> Any:
        """Wait for the run and its callback, and give its outputs; raises its error, RequestCancelled only once.

        In the request's own callback it gives the outputs at once.
        """
        if self._caller != threading.get_ident():
            self.wait_idle()
        if isinstance(self._error, RequestCancelled):
            if self._told:
                return None
            self._told = True
        if self._error is not None:
            raise self._error
        return self._result

    def wait_for(self, timeout_ms: float) -> bool:
        """Whether the request is idle within so many milliseconds; 0 only looks. ValueError if negative."""
        if not timeout_ms >= 0:
            raise ValueError(f"wait_for takes milliseconds, at least 0, given {timeout_ms}")
        self._settle_after_fork()
        with self._changed:
            return self._changed.wait_for(self._is_idle, min(timeout_ms / 1000, threading.TIMEOUT_MAX))

    def cancel(self) -> bool:
        """Take the request out of the queue: True. Once dispatched it runs to its end and its result is dropped: False.

        Either way `wait` then raises RequestCancelled, unless the result came first: then, as in its callback, and
        while the request is idle, nothing happens.
        """
        with self._changed:
            if self._is_idle() or self._settled:
                return False
            future = self._future
        if future.cancel():
            return True
        with self._changed:
            self._dropped = self._dropped or not self._settled
        return False

    def close(self) -> None:
        """Cancel what runs, wait for it, and refuse to start again; in its own callback nothing is waited for."""
        self._stopped = True
        self.cancel()
        if self._caller != threading.get_ident():
            self.wait_idle()

    def reserve(self) -> bool:
        """Make the request BUSY for a `launch`; False if it is."""
        self._settle_after_fork()
        self._pool.gate.check()
        if self._stopped:
            raise EngineClosed("the request was closed")
        with self._changed:
            if self._state is RequestState.BUSY:
                return False
            self._before = self._state
            self._state = RequestState.BUSY
            return True

    def launch(self, inputs: Any, userdata: Any) -> None:
        """Queue a run of a request that was reserved."""
        future, last = TimedFuture(), (self._future, self._error, self._result)
        try:
            given = self._given(inputs)
            with self._changed:
                self._future, self._submitted, self.userdata = future, clock(), userdata
                self._settled = self._told = self._dropped = False
                self._error = self._result = None
            future.add_done_callback(self.settle)
            self._submit(future, given)
        except BaseException:
            with self._changed:
                self._future, self._error, self._result = last
                self._settled, self._state = True, self._before
                self._changed.notify_all()
            if self.on_idle is not None:
                self.on_idle(self, False)
            raise

    def settle(self, future: concurrent.futures.Future[Any]) -> None:
        """Take the end of a run, once, and call the callback."""
        cancelled = future.cancelled()
        error = None if cancelled else future.exception()
        if isinstance(error, ForkedEngineError):
            self._make_lock()
        with self._changed:
            if self._settled or future is not self._future:
                return
            self._settled, self._ended = True, clock()
            self._started = self._ended if self._future.started is None else self._future.started
            self._future = TimedFuture()
            if cancelled or self._dropped:
                cancelled, error = True, RequestCancelled("the request was cancelled")
            self._error, self._result = error, None if error is not None else future.result()
            self._caller = threading.get_ident()
        self._call_back()
        with self._changed:
            self._caller = None
            self._state = RequestState.CANCELLED if cancelled else RequestState.IDLE
            self._changed.notify_all()
        if self.on_idle is not None:
            self.on_idle(self, True)

    def settle_if_done(self) -> None:
        """For a callback on a thread that would call this request's callback next."""
        if self._future.done():
            self.settle(self._future)

    def wait_idle(self) -> None:
        """Wait for the run and its callback. One of the engine's own threads runs what waits meanwhile."""
        self._settle_after_fork()
        if not self._is_idle() and self._pool.serve_until(self._future.done):
            self.settle_if_done()
        with self._changed:
            self._changed.wait_for(self._is_idle)

    def in_callback(self) -> bool:
        """Whether the calling thread is in the request's callback."""
        return self._caller == threading.get_ident()

    def _call_back(self) -> None:
        if self._callback is None:
            return
        try:
            self._callback(self, self.userdata)
        except BaseException as raised:
            self._error, self._result = raised, None

    def _settle_after_fork(self) -> None:
        """In the child of a fork nobody calls callbacks any more."""
        if self._pool.gate.is_shut and not self._settled:
            self.settle_if_done()

    def _given(self, inputs: Any) -> Any:
        """The inputs of a run, remembered for the next; tensors on a device as they were given, because every run has
        to wait for what was done to them."""
        if inputs is None:
            return dict(self._inputs)
        arrays: Sequence[Array] = self._ports.arrange(inputs)[0]
        named = zip(self._ports.input_names, arrays, strict=True)
        self._inputs = {name: array.source if isinstance(array, GivenTensor) else array for name, array in named}
        return inputs

    def _refuse_if_busy(self, what: str) -> None:
        if self._state is RequestState.BUSY and not (self.in_callback() and what not in ("set_tensor", "set_callback")):
            raise RequestBusy(f"{what}: the request runs: wait() first")

    def _is_idle(self) -> bool:
        return self._state is not RequestState.BUSY

    def _make_lock(self) -> None:
        self._changed = threading.Condition(threading.Lock())
