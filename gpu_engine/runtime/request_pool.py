"""A fixed number of request objects with one callback, for producers that hand over inputs as fast as they go."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gpu_engine.errors import ForkedEngineError, RequestBusy, RequestCancelled
from gpu_engine.runtime.engine import Engine
from gpu_engine.runtime.reusable import Callback, RequestState, ReusableRequest

REMEMBERED = 1024


class RequestPool:
    """`jobs` request objects over an engine; 0: as many as keep it busy.

    `start` takes an idle one, waiting while there is none, and `callback(request, userdata)` is called for every end of
    a run, its error on the request. Any number of threads may start and wait. The requests may also be used on their
    own, at any time. `exceptions` holds the errors that the last `wait_all` found.
    """

    def __init__(self, engine: Engine, jobs: int = 0) -> None:
        if isinstance(jobs, bool) or not isinstance(jobs, int):
            raise TypeError(f"jobs must be an integer, given {type(jobs).__name__}")
        if jobs < 0:
            raise ValueError(f"jobs must not be negative, given {jobs}")
        self._engine = engine
        self._requests = [engine.request() for _ in range(jobs or engine.optimal_requests)]
        self._idle = dict.fromkeys(self._requests)
        self._pending: list[BaseException] = []
        self.exceptions: tuple[BaseException, ...] = ()
        self._make_lock()
        for request in self._requests:
            request.on_idle = functools.partial(_give_back, weakref.ref(self))

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, index: int) -> ReusableRequest:
        return self._requests[index]

    def __iter__(self) -> Iterator[ReusableRequest]:
        return iter(self._requests)

    def __repr__(self) -> str:
        return f"<RequestPool: {len(self)} jobs>"

    @property
    def userdata(self) -> list[Any]:
        """What the last run of each request was started with."""
        return [request.userdata for request in self._requests]

    def set_callback(self, callback: Callback | None) -> None:
        """What is called after each run; RequestBusy while one runs."""
        for request in self._requests:
            request.set_callback(callback)

    def is_ready(self) -> bool:
        """Whether at least one request is idle."""
        return any(request.state is not RequestState.BUSY for request in self._requests)

    def start(self, inputs: Any = None, userdata: Any = None, share_inputs: bool = False) -> ReusableRequest:
        """Start an idle request, waiting until there is one, and return it.

        The inputs are copied, so that the caller may change them at once, but for tensors on a device; with
        `share_inputs` they are read when the request runs. Raises what `ReusableRequest.start` raises, and RequestBusy
        in a callback if all are busy.
        """
        given = inputs if share_inputs else _copied(inputs)
        request = self._claim()
        request.launch(given, userdata)
        return request

    def wait_all(self) -> None:
        """Wait until all requests are idle and all callbacks returned; raises the first error since the last call.

        Cancelled requests are no errors. The first REMEMBERED errors are then in `exceptions`. RequestBusy
        in a callback, which would wait for itself.
        """
        if any(request.in_callback() for request in self._requests):
            raise RequestBusy("wait_all() in a callback would wait for itself")
        for request in self._requests:
            request.wait_idle()
        with self._changed:
            self.exceptions = tuple(self._pending)
            self._pending.clear()
        if self.exceptions:
            raise self.exceptions[0]

    def _claim(self) -> ReusableRequest:
        """An idle request, reserved."""
        while True:
            self._engine.check_open()
            with self._changed:
                found = self._reserved()
            if found is None and self._engine.serve_until(lambda: bool(self._idle)):
                found = self._settled()
            if found is not None:
                return found
            with self._changed:
                self._changed.wait_for(lambda: bool(self._idle))

    def _settled(self) -> ReusableRequest:
        """For a callback: a request whose run has ended although its own callback was not called yet."""
        for request in self._requests:
            request.settle_if_done()
        with self._changed:
            found = self._reserved()
        if found is None:
            raise RequestBusy(f"all {len(self)} requests are busy, and a callback cannot wait for them")
        return found

    def _reserved(self) -> ReusableRequest | None:
        while self._idle:
            request = next(iter(self._idle))
            del self._idle[request]
            if request.reserve():
                return request
        return None

    def _take_back(self, request: ReusableRequest, ran: bool) -> None:
        if isinstance(request.error, ForkedEngineError):
            self._make_lock()
        with self._changed:
            error = request.error if ran and not isinstance(request.error, RequestCancelled) else None
            if error is not None and len(self._pending) < REMEMBERED:
                self._pending.append(error)
            self._idle[request] = None
            self._changed.notify()

    def _make_lock(self) -> None:
        self._changed = threading.Condition(threading.Lock())


def _give_back(pool: weakref.ref[RequestPool], request: ReusableRequest, ran: bool) -> None:
    """A request is idle; without a cycle of references, which would keep the engine until they are collected."""
    alive = pool()
    if alive is not None:
        alive._take_back(request, ran)


def _copied(inputs: Any) -> Any:
    """The inputs with their arrays copied."""
    if isinstance(inputs, np.ndarray):
        return inputs.copy()
    if isinstance(inputs, Mapping):
        return {name: _copied(value) for name, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return [_copied(value) for value in inputs]
    return inputs
