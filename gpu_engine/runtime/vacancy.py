"""The room in a bounded queue, and where those wait who find none: threads, and event loops, which must not block."""

from __future__ import annotations

import threading

from gpu_engine.errors import RequestTimeout
from gpu_engine.runtime.endings import EXPIRED
from gpu_engine.runtime.execution import seconds_left
from gpu_engine.runtime.future import Future
from gpu_engine.runtime.gate import Gate
from gpu_engine.runtime.requests import Request
from gpu_engine.runtime.scheduler import Batcher


class Vacancy:
    """Tells whoever waits that there may be room. All calls are made with the mutex held."""

    def __init__(self, mutex: threading.Lock, batcher: Batcher[Request], gate: Gate) -> None:
        self._condition, self._batcher, self._gate = threading.Condition(mutex), batcher, gate
        self._promises: list[Future[None]] = []
        self.threads = self._leavers = 0

    def has_room(self) -> bool:
        """Whether the queue can take a request, once those left that were cancelled."""
        if self._leavers and self._batcher.full():
            self._leavers = 0
            self._batcher.drop_cancelled()
        return not self._batcher.full()

    def wait(self, request: Request) -> None:
        """Block the thread, and let the mutex go, until there is room or a reason to give up; RequestTimeout."""
        self.threads += 1
        try:
            found = self._condition.wait_for(
                lambda: self._gate.is_shut or self.has_room(), seconds_left(request.deadline)
            )
        finally:
            self.threads -= 1
        if not found:
            raise RequestTimeout(f"{EXPIRED} while the queue was full")

    def promise(self) -> Future[None]:
        """A future that the next announcement ends."""
        self._promises.append(Future())
        return self._promises[-1]

    def leave(self) -> None:
        """A request that waits was cancelled."""
        self._leavers += 1
        self.announce()

    def announce(self) -> None:
        """There may be room, or a reason to give up."""
        self._condition.notify_all()
        promises, self._promises = self._promises, []
        for promise in promises:
            if promise.set_running_or_notify_cancel():
                promise.set_result(None)
