"""Callers that each wait for their own answer before they ask again, as the threads of a server do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

Found = list[tuple[int, Any]]


def closed_loop(run: Callable[[Any], Any], feeds: Sequence[Any], seconds: float) -> tuple[float, Found]:
    """Every feed from a thread of its own, again and again, but once at least: calls a second, and all outputs by the
    feed's number.

    Raises the first error of a call, after all threads have ended.
    """
    found: list[Found] = [[] for _ in feeds]
    errors: list[BaseException] = []
    start = threading.Barrier(len(feeds) + 1)
    ends = [0.0]

    def call(number: int) -> None:
        feed, mine = feeds[number], found[number]
        start.wait()
        try:
            while not mine or time.perf_counter() < ends[0]:
                mine.append((number, run(feed)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(feeds))]
    for thread in threads:
        thread.start()
    started = time.perf_counter()
    ends[0] = started + seconds
    start.wait()
    for thread in threads:
        thread.join()
    took_s = time.perf_counter() - started
    if errors:
        raise errors[0]
    everything = [item for mine in found for item in mine]
    return len(everything) / took_s, everything
