"""Our future keeps every promise of the standard one."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from typing import Any

import pytest

from gpu_engine.runtime.future import Future


def in_thread(function: Any, *args: Any) -> threading.Thread:
    thread = threading.Thread(target=function, args=args)
    thread.start()
    return thread


def test_a_result_that_is_there() -> None:
    future: Future[int] = Future()
    assert not future.done() and not future.running() and not future.cancelled()
    assert future.set_running_or_notify_cancel() and future.running()
    future.set_result(3)
    assert future.done() and not future.running()
    assert future.result() == 3 and future.exception() is None


def test_an_exception() -> None:
    future: Future[int] = Future()
    future.set_exception(KeyError("x"))
    assert isinstance(future.exception(), KeyError)
    with pytest.raises(KeyError):
        future.result()


def test_waiting_in_another_thread() -> None:
    future: Future[int] = Future()
    found: list[int] = []
    threads = [in_thread(lambda: found.append(future.result(30))) for _ in range(4)]
    future.set_result(7)
    for thread in threads:
        thread.join(30)
    assert found == [7] * 4


def test_timeouts() -> None:
    future: Future[int] = Future()
    with pytest.raises(TimeoutError):
        future.result(0)
    with pytest.raises(TimeoutError):
        future.exception(0.001)
    future.set_result(1)
    assert future.result(0) == 1


def test_a_future_ends_once() -> None:
    for end in (lambda f: f.set_result(1), lambda f: f.set_exception(KeyError()), lambda f: f.cancel()):
        future: Future[int] = Future()
        end(future)
        with pytest.raises(concurrent.futures.InvalidStateError):
            future.set_result(2)
        with pytest.raises(concurrent.futures.InvalidStateError):
            future.set_exception(ValueError())
    with pytest.raises(concurrent.futures.InvalidStateError):
        done: Future[int] = Future()
        done.set_result(1)
        done.set_running_or_notify_cancel()


def test_cancel() -> None:
    future: Future[int] = Future()
    called: list[Any] = []
    future.add_done_callback(called.append)
    assert future.cancel() and future.cancel() and future.cancelled() and future.done()
    assert called == [future]
    assert not future.set_running_or_notify_cancel()
    assert future.cancel() and future.cancelled()
    with pytest.raises(concurrent.futures.CancelledError):
        future.result()
    running: Future[int] = Future()
    running.set_running_or_notify_cancel()
    assert not running.cancel()
    running.set_result(1)
    assert not running.cancel()


def test_callbacks_before_and_after() -> None:
    future: Future[int] = Future()
    called: list[str] = []
    future.add_done_callback(lambda f: called.append("first"))
    future.add_done_callback(lambda f: called.append("second"))
    future.set_result(1)
    future.add_done_callback(lambda f: called.append("late"))
    assert called == ["first", "second", "late"]


def test_a_callback_that_raises_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    future: Future[int] = Future()
    called: list[int] = []

    def leave(_: object) -> None:
        raise SystemExit

    future.add_done_callback(leave)
    future.add_done_callback(lambda f: called.append(f.result()))
    with caplog.at_level(logging.ERROR):
        future.set_result(1)
    assert called == [1] and "exception calling callback" in caplog.text


def test_wait_and_as_completed() -> None:
    futures: list[Future[int]] = [Future() for _ in range(4)]
    futures[0].set_result(0)
    done, waiting = concurrent.futures.wait(futures, 0)
    assert done == {futures[0]} and waiting == set(futures[1:])
    order: list[Any] = []
    thread = in_thread(lambda: order.extend(concurrent.futures.as_completed(futures, 30)))
    futures[2].set_result(2)
    futures[1].set_exception(KeyError())
    futures[3].cancel()
    futures[3].set_running_or_notify_cancel()
    thread.join(30)
    assert set(order) == set(futures)
    assert concurrent.futures.wait(futures, 30).not_done == set()
    assert concurrent.futures.wait(futures, 30, concurrent.futures.FIRST_EXCEPTION).done == set(futures)


def test_await() -> None:
    async def main() -> list[Any]:
        futures: list[Future[int]] = [Future() for _ in range(3)]
        futures[0].set_result(0)
        thread = in_thread(futures[1].set_result, 1)
        first, second = await futures[0], await asyncio.wrap_future(futures[1])
        thread.join()
        task = asyncio.ensure_future(asyncio.wait_for(asyncio.wrap_future(futures[2]), 30))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return [first, second, futures[2].cancelled()]

    assert asyncio.run(main()) == [0, 1, True]


def test_waiters_race_with_the_result() -> None:
    for _ in range(300):
        future: Future[int] = Future()
        start = threading.Barrier(3)
        found: list[Any] = []

        def wait(future: Future[int] = future, start: threading.Barrier = start, found: list[Any] = found) -> None:
            start.wait()
            found.append(future.result(30))

        def call(future: Future[int] = future, start: threading.Barrier = start, found: list[Any] = found) -> None:
            start.wait()
            future.add_done_callback(lambda f: found.append(f.result()))

        threads = [in_thread(wait), in_thread(call)]
        start.wait()
        future.set_result(1)
        for thread in threads:
            thread.join(30)
        assert found == [1, 1]


def test_repr() -> None:
    future: Future[int] = Future()
    assert "pending" in repr(future)
    future.set_result(1)
    assert "finished returned int" in repr(future)
