"""For callers with an event loop: room in the queue, and results in a source's order, without blocking the loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import Future
from itertools import islice
from typing import Any

from gpu_engine.errors import RequestTimeout
from gpu_engine.runtime.endings import EXPIRED
from gpu_engine.runtime.execution import seconds_left
from gpu_engine.runtime.pool import Pool
from gpu_engine.runtime.requests import Request

Submit = Callable[[Any], Awaitable["Future[Any]"]]


async def admit(pool: Pool, request: Request) -> None:
    """Queue a request, waiting for room up to its deadline; RequestTimeout, or EngineClosed after close()."""
    while (promise := pool.admit_or_promise(request)) is not None:
        try:
            await asyncio.wait_for(asyncio.wrap_future(promise), seconds_left(request.deadline))
        except TimeoutError:
            raise RequestTimeout(f"{EXPIRED} while the queue was full") from None


def stream(
    submit: Submit, flush: Callable[[], None], source: Iterable[Any] | AsyncIterable[Any], limit: int
) -> AsyncIterator[Any]:
    """The results of every item of a source, in its order, with at most `limit` items read ahead of what was yielded.

    `submit` gives a future for an item, a failed one for an item that is refused. `flush` is called when the source
    ends. What was not dispatched when the iteration ends is cancelled.
    """
    if isinstance(source, AsyncIterable):
        return _of_async_iterable(submit, flush, source, limit)
    return _of_iterable(submit, flush, source, limit)


async def _of_iterable(
    submit: Submit, flush: Callable[[], None], source: Iterable[Any], limit: int
) -> AsyncIterator[Any]:
    items, more = iter(source), True
    waiting: deque[asyncio.Future[Any]] = deque()
    try:
        while more or waiting:
            while more and len(waiting) < limit:
                more = False
                for item in islice(items, 1):
                    waiting.append(asyncio.wrap_future(await submit(item)))
                    more = True
                if waiting and waiting[0].done():
                    break
            if not more:
                flush()
            if waiting:
                yield await waiting.popleft()
    finally:
        _drop(waiting)


async def _of_async_iterable(
    submit: Submit, flush: Callable[[], None], source: AsyncIterable[Any], limit: int
) -> AsyncIterator[Any]:
    """Results are yielded while the source is waited for."""
    items, more = aiter(source), True
    waiting: deque[asyncio.Future[Any]] = deque()
    reading: asyncio.Future[Any] | None = None
    try:
        while more or waiting:
            if more and reading is None and len(waiting) < limit:
                reading = asyncio.ensure_future(anext(items))
            coming = [future for future in (reading, waiting[0] if waiting else None) if future is not None]
            await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            if reading is not None and reading.done():
                read, reading = reading, None
                more = not isinstance(read.exception(), StopAsyncIteration)
                if not more:
                    flush()
                elif read.exception() is not None:
                    more = False
                    waiting.append(read)
                else:
                    waiting.append(asyncio.wrap_future(await submit(read.result())))
            if waiting and waiting[0].done():
                yield waiting.popleft().result()
    finally:
        _drop(waiting)
        if reading is not None:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


def _drop(waiting: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel futures; the errors of those that failed count as seen."""
    for future in waiting:
        if not future.cancel() and not future.cancelled():
            future.exception()
