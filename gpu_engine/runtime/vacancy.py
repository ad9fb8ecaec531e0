"""Where those wait who find a bounded queue full: threads, and event loops, which must not block."""

from __future__ import annotations

import threading
from collections.abc import Callable

from gpu_engine.runtime.future import Future


class Vacancy:
    """Tells whoever waits that there may be room. All calls are made with the mutex held."""

    def __init__(self, mutex: threading.Lock) -> None:
        self._condition = threading.Condition(mutex)
        self._promises: list[Future[None]] = []
        self.threads = 0

    def wait_for(self, found: Callable[[], bool], timeout_s: float | None) -> bool:
        """Block the thread, and let the mutex go, until `found`; False if it did not come true in time."""
        self.threads += 1
        try:
            return self._condition.wait_for(found, timeout_s)
        finally:
            self.threads -= 1

    def promise(self) -> Future[None]:
        """A future that the next announcement ends."""
        self._promises.append(Future())
        return self._promises[-1]

    def announce(self) -> None:
        """There may be room, or a reason to give up."""
        self._condition.notify_all()
        promises, self._promises = self._promises, []
        for promise in promises:
            if promise.set_running_or_notify_cancel():
                promise.set_result(None)
