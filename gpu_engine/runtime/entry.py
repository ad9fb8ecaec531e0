"""The way in: from a caller's inputs to a request that may wait in the queue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gpu_engine.options import Options
from gpu_engine.runtime.admission import Admission, Admitted
from gpu_engine.runtime.arrays import Array, Wrap
from gpu_engine.runtime.execution import clock
from gpu_engine.runtime.future import Future
from gpu_engine.runtime.policy import queue_policy
from gpu_engine.runtime.requests import Join, Request
from gpu_engine.runtime.rooms import Rooms


class Entry:
    """Makes requests. `left` is called when one that may be in a queue with a limit is cancelled."""

    def __init__(
        self, admission: Admission, options: Options, batched_outputs: Sequence[bool], left: Callable[[], None]
    ) -> None:
        self._admission, self._batched_outputs, self._left = admission, batched_outputs, left
        self._policy, self.bounded = queue_policy(options), options.max_queue_size > 0
        self._usual = self._policy.timeout_s, self._policy.level
        self._rooms = Rooms()

    def request(
        self,
        inputs: Any,
        timeout: float | None = None,
        priority: int | None = None,
        outputs: str | None = None,
        future: Future[Any] | None = None,
    ) -> Request:
        """A request for these inputs; raises what `Admission.admit` raises, and ValueError for its options."""
        arrays, wrap, admitted = self._admission.admit(inputs, outputs)
        return self.admitted(arrays, wrap, admitted, timeout, priority, future)

    def admitted(
        self,
        arrays: Sequence[Array],
        wrap: Wrap,
        admitted: Admitted,
        timeout: float | None = None,
        priority: int | None = None,
        future: Future[Any] | None = None,
    ) -> Request:
        """A request for inputs that were admitted."""
        now, fit, rows, limit = clock(), admitted.fit, admitted.rows, admitted.limit
        timeout_s, level = self._usual
        if timeout is not None:
            timeout_s = self._policy.timeout(timeout)
        if priority is not None:
            level = self._policy.level_of(priority)
        deadline = now + timeout_s if timeout_s else None
        join = Join(rows, self._batched_outputs, self._rooms) if rows > limit else None
        key = admitted.key or self._admission.key(arrays, admitted)
        if future is None:
            future = Future()
        if self.bounded:
            future.on_cancel = self._left
        return Request(arrays, wrap, fit, rows, limit, key, now, deadline, future, join, level, admitted.placed)

    def close(self) -> None:
        """Keep no memory for results any more."""
        self._rooms.close()
