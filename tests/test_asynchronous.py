"""asyncio: awaited requests, streams of results, and what a cancelled task gives back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any

import numpy as np
import pytest

from gpu_engine.errors import EngineClosed, ExecutionError, InputError, QueueFull, RequestTimeout
from tests.recording_device import MakeEngine, RecordingDevice, double, occupy, poisoned, rows
from tests.recording_device import until as until_in_thread

F32 = np.float32


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine within half a minute."""
    return asyncio.run(asyncio.wait_for(main, 30))


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_run_async(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=2, batch=4, priority_levels=2)

    async def main() -> list[Any]:
        calls = [engine.run_async({"x": rows(i)}, priority=1 + i % 2, timeout=60) for i in range(40)]
        return [result["y"][0, 0] for result in await asyncio.gather(*calls)]

    assert run(main()) == [2 * i + 1 for i in range(40)]


def test_await(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=2, batch=4)

    async def main() -> list[Any]:
        return list(await asyncio.gather(*(asyncio.wrap_future(engine.submit(rows(i))) for i in range(20))))

    async def direct() -> Any:
        return await engine.submit(rows(3))

    assert [result[0, 0] for result in asyncio.run(main())] == [i * 2 + 1 for i in range(20)]
    assert asyncio.run(direct())[0, 0] == 7


def test_errors_are_raised_where_awaited(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    recorder.model = poisoned(double)
    engine = make_engine(recorder, streams=1)

    async def main() -> None:
        with pytest.raises(ExecutionError):
            await engine.run_async(rows(np.nan))
        with pytest.raises(InputError):
            await engine.run_async(np.zeros(3, F32))
        engine.close()
        with pytest.raises(EngineClosed):
            await engine.run_async(rows(1))

    run(main())


def test_the_loop_is_not_blocked(make_engine: MakeEngine) -> None:
    recorder = RecordingDevice(double)
    engine = make_engine(recorder, streams=1)

    async def main() -> Any:
        recorder.hold()
        call = asyncio.create_task(engine.run_async(rows(1)))
        await until(lambda: recorder.launches)
        recorder.release()
        return await call

    assert run(main())[0, 0] == 3


def test_a_cancelled_task_frees_its_place(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=1, batch=1, max_queue_size=1)
    occupy(engine, recorder, rows(0))

    async def main() -> Any:
        waits = asyncio.create_task(engine.run_async(rows(1)))
        await until(lambda: engine.statistics().waiting == 1)
        with pytest.raises(QueueFull):
            await engine.run_async(rows(2))
        second = asyncio.create_task(engine.run_async(rows(2), block=True))
        await asyncio.sleep(0.02)
        assert not second.done()
        waits.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waits
        await until(lambda: not engine._pool._vacancy._promises)
        third = asyncio.create_task(engine.run_async(rows(3), block=True))
        await asyncio.sleep(0.02)
        third.cancel()
        recorder.release()
        return (await second)[0, 0]

    assert run(main()) == 5
    assert engine.statistics().cancelled == 1 and engine.run(rows(4))[0, 0] == 9


def test_cancelling_what_was_dispatched_drops_its_result(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=1)
    recorder.hold()

    async def main() -> None:
        task = asyncio.create_task(engine.run_async(rows(1)))
        await until(lambda: recorder.launches)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())
    recorder.release()
    assert engine.run(rows(1))[0, 0] == 3


def test_waiting_for_room_is_bounded_by_the_timeout(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=1, batch=1, max_queue_size=1)
    occupy(engine, recorder, rows(0))
    engine.submit(rows(1))

    async def main() -> None:
        with pytest.raises(RequestTimeout, match="while the queue was full"):
            await engine.run_async(rows(2), block=True, timeout=0.02)
        waits = asyncio.create_task(engine.run_async(rows(2), block=True))
        await asyncio.sleep(0.02)
        recorder.release()
        await asyncio.to_thread(engine.close)
        (ended,) = await asyncio.gather(waits, return_exceptions=True)
        assert isinstance(ended, EngineClosed) or ended[0, 0] == 5

    run(main())


def counting(read: list[int], count: int) -> Iterator[Any]:
    for i in range(count):
        read.append(i)
        yield rows(i)


async def counting_async(read: list[int], count: int, pause_s: float = 0.0) -> AsyncIterator[Any]:
    for item in counting(read, count):
        await asyncio.sleep(pause_s)
        yield item


@pytest.mark.parametrize("source", [counting, counting_async])
@pytest.mark.parametrize("options", [{}, {"max_queue_size": 2}, {"batch_timeout_ms": 60_000.0}])
def test_stream_keeps_the_order_and_reads_ahead_a_little(
    recorder: RecordingDevice, make_engine: MakeEngine, source: Any, options: dict[str, Any]
) -> None:
    engine = make_engine(recorder, streams=2, batch=2, **options)
    read: list[int] = []

    async def main() -> list[float]:
        found = []
        async for result in engine.stream(source(read, 99)):
            assert len(read) - len(found) <= 2 * engine.optimal_requests + 1
            found.append(result[0, 0])
        return found

    assert run(main()) == [2 * i + 1 for i in range(99)]


def test_stream_yields_while_a_live_source_is_silent(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=2, batch=4)

    async def main() -> list[float]:
        asked, found = asyncio.Semaphore(1), []

        async def live() -> AsyncIterator[Any]:
            for i in range(5):
                await asked.acquire()
                yield rows(i)

        async for result in engine.stream(live()):
            found.append(result[0, 0])
            asked.release()
        return found

    assert run(main()) == [1, 3, 5, 7, 9]


@pytest.mark.parametrize("bad", [np.full((1, 4), np.nan, F32), np.zeros(3, F32)])
@pytest.mark.parametrize("asynchronous_source", [False, True])
def test_stream_raises_at_the_place_of_the_error(
    recorder: RecordingDevice, make_engine: MakeEngine, bad: Any, asynchronous_source: bool
) -> None:
    recorder.model = poisoned(double)
    engine = make_engine(recorder, streams=2, batch=2)
    items = [rows(1), rows(2), bad, rows(3)]

    async def again() -> AsyncIterator[Any]:
        for item in items:
            yield item

    async def main() -> None:
        results = engine.stream(again() if asynchronous_source else items)
        assert [(await anext(results))[0, 0] for _ in range(2)] == [3, 5]
        with pytest.raises((ExecutionError, InputError)):
            await anext(results)
        assert [item async for item in results] == []

    run(main())
    until_in_thread(lambda: engine.statistics().waiting == 0)


def test_an_error_of_the_source_comes_after_the_results_before_it(
    recorder: RecordingDevice, make_engine: MakeEngine
) -> None:
    engine = make_engine(recorder, streams=1)

    async def source() -> AsyncIterator[Any]:
        yield rows(1)
        yield rows(2)
        raise KeyError("camera")

    async def main() -> None:
        found = []
        with pytest.raises(KeyError, match="camera"):
            async for result in engine.stream(source()):
                found.append(result[0, 0])
        assert found == [3, 5]

    run(main())


@pytest.mark.parametrize("source", [counting, counting_async])
def test_a_cancelled_stream_frees_its_places(recorder: RecordingDevice, make_engine: MakeEngine, source: Any) -> None:
    engine = make_engine(recorder, streams=1, batch=1)
    recorder.hold()

    async def main() -> None:
        async def consume() -> None:
            async for _ in engine.stream(source([], 100)):
                raise AssertionError("nothing can be there")

        task = asyncio.create_task(consume())
        await until(lambda: engine.statistics().waiting >= 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())
    recorder.release()
    assert engine.run(rows(1))[0, 0] == 3
    until_in_thread(lambda: engine.statistics().waiting == 0)
    counts = engine.statistics()
    assert counts.cancelled >= 2
    assert counts.inference_count <= 3


def test_leaving_a_stream_early_frees_its_places(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=1, batch=1)

    async def main() -> None:
        results = engine.stream(counting_async([], 100))
        assert (await anext(results))[0, 0] == 1
        await results.aclose()  # type: ignore[attr-defined]

    run(main())
    engine.close()
    assert engine.statistics().inference_count <= 2 * engine.optimal_requests + 1
