"""A concurrent.futures.Future that is cheap until somebody waits for it."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from collections.abc import Awaitable, Callable, Generator, Sequence
from concurrent.futures import _base
from typing import Any, TypeVar

from gpu_engine.runtime.late import WRAP_FUTURE, load

T = TypeVar("T")
_LOGGER = logging.getLogger(__name__)
_DONE = (_base.CANCELLED, _base.CANCELLED_AND_NOTIFIED, _base.FINISHED)


class Future(concurrent.futures.Future[T]):
    """A future with all the semantics of the standard one, and `await`able.

    The standard class makes a condition and two lists for every future. This one makes a lock; the rest is made around
    that lock when a method of the standard class asks for the condition: when somebody adds a callback, or waits for
    several futures. Who waits for this one alone sleeps on a lock of its own, and wakes without needing another.
    """

    _state = _base.PENDING
    _result: T | None = None
    _exception: BaseException | None = None
    _made_condition: threading.Condition | None = None
    _sleepers: tuple[threading.Lock, ...] = ()
    _waiters: Sequence[Any] = ()  # type: ignore[assignment]
    _done_callbacks: Sequence[Callable[[Any], object]] = ()
    on_cancel: Callable[[], object] | None = None
    """Called once the future was cancelled, before its callbacks; for a queue that counts its places."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    @property
    def _condition(self) -> threading.Condition:  # type: ignore[override]
        with self._lock:
            if self._made_condition is None:
                self._waiters, self._done_callbacks = [], []
                self._made_condition = threading.Condition(self._lock)
            return self._made_condition

    def __await__(self) -> Generator[Any, None, T]:
        awaitable: Awaitable[T] = load(WRAP_FUTURE)(self)
        return awaitable.__await__()

    def result(self, timeout: float | None = None) -> T:
        if self._state not in _DONE:
            self._sleep(timeout)
        if self._state == _base.FINISHED and self._exception is None:
            return self._result  # type: ignore[return-value]
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        if self._state not in _DONE:
            self._sleep(timeout)
        return super().exception(0)

    def done(self) -> bool:
        return self._state in _DONE

    def running(self) -> bool:
        return self._state == _base.RUNNING

    def cancelled(self) -> bool:
        return self._state in (_base.CANCELLED, _base.CANCELLED_AND_NOTIFIED)

    def forget_lock(self) -> None:
        """For the child of a fork, where a thread that held the lock does not exist any more."""
        self._lock, self._made_condition = threading.RLock(), None

    def cancel(self) -> bool:
        with self._lock:
            if self._state in (_base.RUNNING, _base.FINISHED):
                return False
            if self._state in _DONE:
                return True
            self._state = _base.CANCELLED
            self._wake()
            if self._made_condition is not None:
                self._made_condition.notify_all()
        if self.on_cancel is not None:
            self.on_cancel()
        self.run_callbacks()
        return True

    def set_running_or_notify_cancel(self) -> bool:
        with self._lock:
            if self._state == _base.PENDING:
                self._state = _base.RUNNING
                return True
            if self._state == _base.CANCELLED:
                self._state = _base.CANCELLED_AND_NOTIFIED
                for waiter in self._waiters:
                    waiter.add_cancelled(self)
                return False
            raise concurrent.futures.InvalidStateError(f"{self._state}: {self!r}")

    def set_result(self, result: T) -> None:
        if self.put_result(result):
            self.run_callbacks()

    def put_result(self, result: T) -> bool:
        """Half of `set_result`: waiters wake; True if `run_callbacks` is to follow."""
        with self._lock:
            if self._state in _DONE:
                raise concurrent.futures.InvalidStateError(f"{self._state}: {self!r}")
            self._result = result
            self._state = _base.FINISHED
            self._wake()
            if self._made_condition is None:
                return False
            for waiter in self._waiters:
                waiter.add_result(self)
            self._made_condition.notify_all()
        return True

    def set_exception(self, exception: BaseException | None) -> None:
        with self._lock:
            if self._state in _DONE:
                raise concurrent.futures.InvalidStateError(f"{self._state}: {self!r}")
            self._exception = exception
            self._state = _base.FINISHED
            self._wake()
            if self._made_condition is None:
                return
            for waiter in self._waiters:
                waiter.add_exception(self)
            self._made_condition.notify_all()
        self.run_callbacks()

    def _sleep(self, timeout: float | None) -> None:
        """Until the future has ended, or for so many seconds."""
        sleeper = threading.Lock()
        sleeper.acquire()
        with self._lock:
            if self._state in _DONE:
                return
            self._sleepers = (*self._sleepers, sleeper)
        if timeout is None:
            sleeper.acquire()
        elif not sleeper.acquire(timeout=min(max(timeout, 0), threading.TIMEOUT_MAX)):
            with self._lock:
                self._sleepers = tuple(each for each in self._sleepers if each is not sleeper)

    def _wake(self) -> None:
        """The future has ended; its lock is held."""
        for sleeper in self._sleepers:
            sleeper.release()
        self._sleepers = ()

    def run_callbacks(self) -> None:
        """Run the callbacks; whatever they raise is logged, so that it ends neither a worker nor other requests."""
        for callback in self._done_callbacks:
            try:
                callback(self)
            except BaseException:
                _LOGGER.exception("exception calling callback for %r", self)
