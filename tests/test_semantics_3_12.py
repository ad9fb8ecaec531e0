"""Section 3.12 of the specification: the queue's policy."""

from __future__ import annotations

import concurrent.futures
import threading
from typing import Any

import pytest

from gpu_engine.errors import QueueFull, RequestTimeout
from gpu_engine.options import TimeoutAction, validated
from gpu_engine.runtime.policy import queue_policy
from gpu_engine.runtime.scheduler import Batcher
from tests import scheduler_machine
from tests.recording_device import MakeEngine, RecordingDevice, double, occupy, rows, until
from tests.test_scheduler import Item, filled, names, taken


def test_3_12_the_state_machine() -> None:
    """A short run; `python -m tests.scheduler_machine --steps 10000` is a long one."""
    scheduler_machine.run(examples=80, steps=30)


def ranked(*items: Item, timeout_s: float = 0.0, delays: bool = False) -> Batcher[Item]:
    batcher: Batcher[Item] = Batcher(timeout_s, levels=3, delays=delays)
    for item in items:
        batcher.add(item)
    return batcher


def test_3_12_priority_orders_a_batch_and_levels_are_first_in_first_out() -> None:
    batcher = ranked(Item(1, level=2), Item(2, level=1), Item(3, level=0), Item(4, level=1), Item(5, level=0))
    assert taken(batcher) == ([(3, 0, 1), (5, 0, 1), (2, 0, 1), (4, 0, 1)], "full")
    assert taken(batcher) == ([(1, 0, 1)], "idle")


def test_3_12_priority_goes_before_the_place_of_a_key() -> None:
    batcher = ranked(Item(1, key="a", level=2), Item(2, key="b", level=1), Item(3, key="a", level=1))
    assert taken(batcher) == ([(2, 0, 1)], "shape")
    assert taken(batcher) == ([(3, 0, 1), (1, 0, 1)], "idle")


def test_3_12_priority_overtakes_the_rest_of_a_large_request() -> None:
    batcher = ranked(Item(1, rows=9, level=2))
    assert taken(batcher) == ([(1, 0, 4)], "full")
    batcher.add(Item(2, rows=3, level=0))
    assert taken(batcher) == ([(2, 0, 3), (1, 4, 5)], "full")
    assert taken(batcher) == ([(1, 5, 9)], "full")


def test_3_12_priority_does_not_reset_the_age_of_a_collecting_batch() -> None:
    batcher = ranked(Item(1, level=2, arrival=10.0), Item(2, level=0, arrival=10.9), timeout_s=1.0)
    assert batcher.closes_at() == 11.0 and taken(batcher, 10.95) is None
    assert taken(batcher, 11.0) == ([(2, 0, 1), (1, 0, 1)], "timeout")
    batcher = ranked(Item(1, level=2), timeout_s=1.0)
    batcher.flush()
    batcher.add(Item(2, level=0))
    assert taken(batcher) == ([(2, 0, 1), (1, 0, 1)], "flush")


def test_3_12_priority_leaves_nothing_behind_when_low_levels_starve() -> None:
    """Requests that ran as a lower level's fill are forgotten, although what heads that level still waits."""
    batcher = ranked(Item(-1, key="b", level=2))
    for i in range(5000):
        batcher.add(Item(i, level=0))
        batcher.add(Item(i, level=2))
        assert names(batcher) == [i, i]
    assert batcher.size == 1 and len(batcher._order) < 200


@pytest.mark.parametrize(("levels", "default"), [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (5, 2)])
def test_3_12_priority_numbers(levels: int, default: int) -> None:
    policy = queue_policy(validated(priority_levels=levels))
    assert policy.level == default
    assert [policy.level_of(priority) for priority in range(1, levels + 1)] == list(range(levels))
    for wrong in (0, -1, levels + 1):
        with pytest.raises(ValueError, match="priority"):
            policy.level_of(wrong)
    with pytest.raises(TypeError, match="priority"):
        policy.level_of(True)


def test_3_12_priority_of_submit(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    order: list[float] = []

    def told(x: Any) -> list[Any]:
        order.append(float(x[0, 0]))
        return double(x)

    recorder.model = told
    engine = make_engine(recorder, streams=1, batch=1, priority_levels=3)
    futures = occupy(engine, recorder, rows(0))
    for value, priority in ((1, 3), (2, None), (3, 1), (4, 3), (5, 1)):
        futures.append(engine.submit(rows(value), priority=priority))
    recorder.release()
    concurrent.futures.wait(futures, 30)
    assert [launch.rows for launch in recorder.launches] == [1] * len(futures)
    ran = [value for value in order if value]
    assert ran == [3, 5, 2, 1, 4] if not recorder.asynchronous else sorted(ran[:2]) == [3, 5]
    with pytest.raises(ValueError, match="from 1, the highest, to 3"):
        engine.submit(rows(1), priority=4)


def test_3_12_a_priority_without_levels(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    with pytest.raises(ValueError, match="without priority_levels="):
        make_engine(recorder).submit(rows(1), priority=1)


@pytest.mark.parametrize(
    ("default", "asked", "override", "expected"),
    [
        (0.0, 2.0, False, 2.0),
        (0.0, 0.0, False, 0.0),
        (5.0, 2.0, False, 2.0),
        (5.0, 9.0, False, 5.0),
        (5.0, 0.0, False, 5.0),
        (5.0, 2.0, True, 2.0),
        (5.0, 9.0, True, 9.0),
        (5.0, 0.0, True, 0.0),
    ],
)
def test_3_12_timeouts_only_shorten_the_default(default: float, asked: float, override: bool, expected: float) -> None:
    policy = queue_policy(validated(default_timeout=default, allow_override=override))
    assert policy.timeout_s == default and policy.timeout(asked) == expected


def test_3_12_bad_settings() -> None:
    for name, value in (("default_timeout", -1), ("priority_levels", -1), ("timeout_action", "DROP")):
        with pytest.raises(ValueError, match=name):
            validated(**{name: value})  # type: ignore[arg-type]
    for name, value in (("default_timeout", "1"), ("priority_levels", 1.5), ("timeout_action", 1)):
        with pytest.raises(TypeError, match=name):
            validated(**{name: value})  # type: ignore[arg-type]
    assert validated(timeout_action="delay").timeout_action is TimeoutAction.DELAY


def test_3_12_the_default_timeout_holds_for_every_call(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=1, batch=1, default_timeout=0.3)
    first = occupy(engine, recorder, rows(0))
    errors: list[BaseException | None] = []
    calls = (engine.run, engine.run_many, lambda x: next(engine.map([x])))

    def call(function: Any) -> None:
        try:
            function(rows(1))
        except RequestTimeout as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(function,)) for function in calls]
    for thread in threads:
        thread.start()
    future = engine.submit(rows(1), timeout=60)
    until(lambda: engine.statistics().waiting == 4)
    threading.Event().wait(0.31)
    recorder.release()
    for thread in threads:
        thread.join(30)
    assert [str(error) for error in errors] == ["Request timeout expired"] * 3
    assert isinstance(future.exception(30), RequestTimeout), "a request may only shorten the default"
    assert all(each.result(30) is not None for each in first) and engine.statistics().expired == 4


def test_3_12_delayed_requests_run_behind_all_others() -> None:
    late = [Item(i, key=key, deadline=1.0) for i, key in ((1, "a"), (2, "b"))]
    batcher: Batcher[Item] = Batcher(delays=True)
    for item in (*late, Item(3, key="b"), Item(4, key="c"), Item(5, key="a", deadline=9.0)):
        batcher.add(item)
    assert taken(batcher, 2.0) == ([(3, 0, 1), (2, 0, 1)], "shape")
    assert taken(batcher, 2.0) == ([(4, 0, 1)], "shape")
    assert taken(batcher, 2.0) == ([(5, 0, 1), (1, 0, 1)], "idle")
    assert batcher.delayed == 2 and batcher.expired == 0 and batcher.pop_expired() == []


def test_3_12_delay_in_an_engine(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=1, batch=1, timeout_action="DELAY")
    occupy(engine, recorder, rows(0))
    late, patient = engine.submit(rows(8), timeout=1e-9), engine.submit(rows(9))
    order: list[int] = []
    late.add_done_callback(lambda _: order.append(8))
    patient.add_done_callback(lambda _: order.append(9))
    recorder.release()
    assert late.result(30)[0, 0] == 17 and patient.result(30)[0, 0] == 19
    until(lambda: len(order) == 2)
    assert order == [9, 8] or recorder.asynchronous
    counts = engine.statistics()
    assert (counts.delayed, counts.expired, counts.failed) == (1, 0, 0)


def test_3_12_what_leaves_does_not_count_as_rows() -> None:
    """A cancelled request that would not fit closes nothing, and neither does an expired one."""
    for gone in (Item(2, rows=3, ended=True), Item(2, rows=3, deadline=1.0)):
        batcher = filled(Item(1, rows=2), gone, Item(3, rows=2))
        assert taken(batcher, 5.0) == ([(1, 0, 2), (3, 0, 2)], "full")
    both = filled(Item(1, deadline=1.0, ended=True))
    assert both.take(5.0) is None and (both.cancelled, both.expired) == (1, 0)


def test_3_12_a_cancelled_request_frees_its_place_at_once(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=1, batch=1, max_queue_size=2)
    occupy(engine, recorder, rows(0))
    waiting = [engine.submit(rows(i)) for i in (1, 2)]
    assert waiting[0].cancel()
    waiting.append(engine.submit(rows(3)))
    with pytest.raises(QueueFull):
        engine.submit(rows(4))
    blocked: list[Any] = []
    thread = threading.Thread(target=lambda: blocked.append(engine.submit(rows(5), block=True)))
    thread.start()
    until(lambda: engine._pool._vacancy.threads == 1)
    assert waiting[2].cancel()
    thread.join(30)
    recorder.release()
    assert waiting[1].result(30)[0, 0] == 5 and blocked[0].result(30)[0, 0] == 11
    assert engine.statistics().cancelled == 2


def test_3_12_one_clock_for_admission_and_queue(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    """A request that waited for room has only the rest of its timeout left in the queue."""
    engine = make_engine(recorder, streams=1, batch=1, max_queue_size=1)
    occupy(engine, recorder, rows(0))
    place = engine.submit(rows(1))
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(engine.submit(rows(2), block=True, timeout=0.2)))
    thread.start()
    until(lambda: engine._pool._vacancy.threads == 1)
    threading.Event().wait(0.1)
    assert place.cancel()
    thread.join(30)
    request = engine._pool.batcher._order[-1]
    assert request.deadline is not None and request.deadline - request.arrival == pytest.approx(0.2)
    threading.Event().wait(0.15)
    recorder.release()
    assert isinstance(found[0].exception(30), RequestTimeout)
    with pytest.raises(RequestTimeout, match="while the queue was full"):
        recorder.hold()
        occupy(engine, recorder, rows(0))
        engine.submit(rows(1))
        engine.submit(rows(2), block=True, timeout=0.01)


def test_3_12_a_timeout_may_be_longer_than_any_lock_waits(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=1, batch=1, max_queue_size=1)
    futures = [*occupy(engine, recorder, rows(7)), engine.submit(rows(7), timeout=1e300)]
    thread = threading.Thread(target=lambda: futures.append(engine.submit(rows(7), block=True, timeout=1e300)))
    thread.start()
    until(lambda: engine._pool._vacancy.threads == 1)
    recorder.release()
    thread.join(30)
    assert [future.result(1e300)[0, 0] for future in futures] == [15] * (4 if recorder.asynchronous else 3)
    request = engine.request()
    request.start(rows(1))
    assert request.wait_for(1e300)
    engine.close(timeout_s=1e300)


def test_3_12_map_reports_a_full_queue_at_its_place(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=1, batch=1, max_queue_size=2, default_timeout=0.3)
    occupy(engine, recorder, rows(0))
    results = engine.map(rows(i) for i in range(20))
    threading.Timer(0.5, recorder.release).start()
    with pytest.raises(RequestTimeout):
        next(results)
    until(lambda: engine.statistics().waiting == 0)


def test_3_12_a_full_queue_refuses_or_blocks(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=1, batch=1, max_queue_size=2)
    futures = occupy(engine, recorder, rows(7))
    futures += [engine.submit(rows(7)) for _ in range(2)]
    with pytest.raises(QueueFull, match="Exceeds maximum queue size"):
        engine.submit(rows(9))
    with pytest.raises(RequestTimeout, match="while the queue was full"):
        engine.submit(rows(9), block=True, timeout=0.01)
    assert engine.statistics().rejected == 1
    thread = threading.Thread(target=lambda: futures.append(engine.submit(rows(7), block=True)))
    thread.start()
    recorder.release()
    thread.join(30)
    assert len(futures) == (5 if recorder.asynchronous else 4)
    assert all(future.result(30)[0, 0] == 15 for future in futures)


def test_3_12_map_and_a_bounded_queue(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=2, batch=4, max_queue_size=3)
    assert [result[0, 0] for result in engine.map(rows(i) for i in range(50))] == [i * 2 + 1 for i in range(50)]


def test_3_12_requests_expire_in_the_queue(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=1, batch=1)
    first = occupy(engine, recorder, rows(0))
    late, patient = engine.submit(rows(8), timeout=1e-9), engine.submit(rows(9), timeout=60)
    recorder.release()
    with pytest.raises(RequestTimeout, match="Request timeout expired"):
        late.result(30)
    assert patient.result(30)[0, 0] == 19 and all(future.result(30) is not None for future in first)
    assert engine.statistics().expired == 1
    with pytest.raises(ValueError, match="timeout"):
        engine.submit(rows(1), timeout=-1)


def test_3_12_cancel_before_dispatch_and_after(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=1, batch=4)
    running = occupy(engine, recorder, rows(0))
    waiting = [engine.submit(rows(i)) for i in range(4)]
    assert waiting[1].cancel() and waiting[1].cancelled() and not running[0].cancel()
    recorder.release()
    assert [waiting[i].result(30)[0, 0] for i in (0, 2, 3)] == [1, 5, 7]
    assert running[0].result(30)[0, 0] == 1
    assert concurrent.futures.wait(waiting, 30).not_done == set()
    assert engine.statistics().cancelled == 1 and recorder.launches[-1].rows == 3
