"""Results in the order of their inputs, with few in flight."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from gpu_engine.runtime.future import Future


def ordered(
    inputs: Iterable[Any],
    group: int,
    queue: Callable[[Sequence[Any]], list[Future[Any]]],
    flush: Callable[[], None],
    result: Callable[[Future[Any]], Any],
) -> Iterator[Any]:
    """The result of every item of `inputs`, of which `queue` takes up to `group` at a time; twice as many are read
    ahead. `flush` is called when there are no more. What was not dispatched when the iteration ends is cancelled."""
    source = iter(inputs)
    waiting: deque[Future[Any]] = deque()
    more = True
    try:
        while more or waiting:
            while more and len(waiting) <= group:
                items = list(itertools.islice(source, group))
                more = len(items) == group
                waiting.extend(queue(items))
            if not more:
                flush()
            if waiting:
                yield result(waiting.popleft())
    finally:
        for future in waiting:
            future.cancel()
