"""What load generators send to: an engine's queue, a callback's queue, or a function on threads of its own."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any

from gpu_engine.runtime.tokens import Tokens
from gpu_engine.tools.load import Done

clock = time.perf_counter
TIMED = 10_000
"""So many calls of submit() are timed."""
Outcome = tuple[int, float, BaseException | None]


class Arrivals:
    """What has finished, put by whichever threads see it and got by one."""

    def __init__(self) -> None:
        self._done: deque[Outcome] = deque()
        self._tokens = Tokens()

    def put(self, number: int, error: BaseException | None = None) -> None:
        """Note that a request finished now."""
        self._done.append((number, clock(), error))
        self._tokens.put()

    def get(self, until: float | None) -> Done | None:
        """The next one, None if there is none at `until`; raises its error."""
        while not self._done:
            if not self._tokens.get(None if until is None else max(0.0, until - clock())):
                return None
        number, at, error = self._done.popleft()
        if error is not None:
            raise error
        return number, at


class Submitted:
    """A target that submits `feed` and is told by the futures; `sending_s` is how long each call of submit() took."""

    def __init__(self, submit: Callable[[Any], Future[Any]], feed: Any) -> None:
        self._submit, self._feed = submit, feed
        self._arrivals = Arrivals()
        self.sending_s: list[float] = []

    def now(self) -> float:
        return clock()

    def send(self, number: int) -> None:
        begun = clock()
        future = self._submit(self._feed)
        self.sending_s.append(clock() - begun)
        future.add_done_callback(partial(self._finish, number))

    def receive(self, until: float | None = None) -> Done | None:
        return self._arrivals.get(until)

    def close(self) -> None:
        """Nothing to end."""

    def _finish(self, number: int, future: Future[Any]) -> None:
        self._arrivals.put(number, future.exception())


class Awaited:
    """A target that submits `feed` and waits for the futures in their order, as a short program does.

    For requests so quick that a callback for each would be seen in their throughput, in closed loops only.
    """

    def __init__(self, submit: Callable[[Any], Future[Any]], feed: Any) -> None:
        self._submit, self._feed = submit, feed
        self._flying: deque[tuple[int, Future[Any]]] = deque()
        self.sending_s: list[float] = []
        self.now = clock

    def send(self, number: int) -> None:
        if len(self.sending_s) < TIMED:
            begun = clock()
            self._flying.append((number, self._submit(self._feed)))
            self.sending_s.append(clock() - begun)
        else:
            self._flying.append((number, self._submit(self._feed)))

    def receive(self, until: float | None = None) -> Done | None:
        number, future = self._flying.popleft()
        future.result(None if until is None else max(0.0, until - clock()))
        return number, clock()

    def close(self) -> None:
        """Nothing to end."""


class Called:
    """A target that calls a function: on the thread that sends if `threads` is 0, else on threads of its own."""

    def __init__(self, call: Callable[[], Any], threads: int) -> None:
        self._call, self._arrivals = call, Arrivals()
        self._wanted: SimpleQueue[int | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def now(self) -> float:
        return clock()

    def send(self, number: int) -> None:
        if self._threads:
            self._wanted.put(number)
        else:
            self._call()
            self._arrivals.put(number)

    def receive(self, until: float | None = None) -> Done | None:
        return self._arrivals.get(until)

    def close(self) -> None:
        """End the threads after what was sent."""
        for _ in self._threads:
            self._wanted.put(None)
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        while (number := self._wanted.get()) is not None:
            try:
                self._call()
            except BaseException as error:
                self._arrivals.put(number, error)
            else:
                self._arrivals.put(number)


class Notified:
    """A target whose `start(number, finished)` begins a request and has `finished(number)` called at its end."""

    def __init__(self, start: Callable[[int, Callable[[int], None]], None]) -> None:
        self._start, self._arrivals = start, Arrivals()

    def now(self) -> float:
        return clock()

    def send(self, number: int) -> None:
        self._start(number, self._arrivals.put)

    def receive(self, until: float | None = None) -> Done | None:
        return self._arrivals.get(until)

    def close(self) -> None:
        """Nothing to end."""
