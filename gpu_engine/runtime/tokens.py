"""What a thread sleeps on until another one has something for it, or until a time."""

from __future__ import annotations

import contextlib
import threading


class Tokens:
    """Given by any number of threads and taken by one; what is given before it is taken counts as one token.

    A lock that no one holds is a token. `SimpleQueue.get(timeout)` will not do: CPython 3.11's sleeps for ever if the
    timeout has passed by the time that it would sleep, as a short one may on a busy machine.
    """

    __slots__ = ("_none",)

    def __init__(self) -> None:
        self._none = threading.Lock()
        self._none.acquire()

    def put(self) -> None:
        """Give a token; takes no other lock and waits for nothing, so that a garbage collector may call it."""
        with contextlib.suppress(RuntimeError):
            self._none.release()

    def get(self, timeout_s: float | None = None) -> bool:
        """Take the token, waiting for it up to so many seconds, or for ever; whether there was one."""
        return self._none.acquire(timeout=-1 if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX))
