"""The scheduler in virtual time: what it says of small loads, that it notices broken promises, and that the engine with
its threads forms the same batches."""

from __future__ import annotations

import json
import math
import random
import threading
from collections import Counter
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from gpu_engine.runtime.scheduler import Batch, Batcher
from gpu_engine.tools.cli import app
from gpu_engine.tools.simulation import Traffic, load_of, parse_cost
from gpu_engine.tools.virtual_time import Cost, Costs, Launch, Load, Outcome, Queue, percentile, simulate
from tests.recording_device import F32, MakeEngine, RecordingDevice, plan_of, until

SECOND = Costs(Cost(1.0))


def run(load: Load, queue: Queue, costs: Costs = SECOND) -> tuple[Outcome, list[Launch]]:
    log: list[Launch] = []
    return simulate(load, queue, costs, log), log


def names(log: list[Launch]) -> list[list[int]]:
    return [[number for number, _, _ in launch.parts] for launch in log]


def test_a_free_slot_takes_what_is_there() -> None:
    outcome, log = run(Load([0.0, 0.1, 0.2, 0.3]), Queue(1, 1, 2))
    assert names(log) == [[0], [1, 2], [3]]
    assert outcome.latencies == pytest.approx([1.0, 1.9, 1.8, 2.7])
    assert outcome.reasons == {"idle": 2, "full": 1} and outcome.seconds == 3.0
    assert outcome.busy == (1.0,) and outcome.max_in_flight == (1,) and outcome.batches == {1: 2, 2: 1}


def test_two_slots_copy_while_one_computes() -> None:
    costs = Costs(Cost(1.0), copy_in=Cost(0.5), copy_out=Cost(0.25))
    outcome, _ = run(Load([0.0] * 4), Queue(1, 2, 1), costs)
    assert outcome.latencies == pytest.approx([1.75, 2.75, 3.75, 4.75])
    assert outcome.max_in_flight == (2,)
    alone, _ = run(Load([0.0] * 4), Queue(1, 1, 1), costs)
    assert alone.latencies == pytest.approx([1.75, 3.5, 5.25, 7.0])


def test_the_host_forms_one_batch_at_a_time() -> None:
    outcome, _ = run(Load([0.0] * 4), Queue(4, 1, 1), Costs(Cost(1.0), host=Cost(0.5, 0.5)))
    assert outcome.latencies == pytest.approx([2.0, 3.0, 4.0, 5.0])


def test_costs_grow_with_rows() -> None:
    outcome, log = run(Load([0.0], rows=[5]), Queue(1, 1, 2), Costs(Cost(1.0, 0.1)))
    assert [launch.parts for launch in log] == [((0, 0, 2),), ((0, 2, 4),), ((0, 4, 5),)]
    assert outcome.latencies == pytest.approx([1.2 + 1.2 + 1.1]) and outcome.rows == 5


def test_a_batch_waits_until_its_oldest_request_is_old_enough() -> None:
    outcome, log = run(Load([0.0, 0.5, 2.0]), Queue(1, 1, 4, timeout_s=1.0), Costs(Cost(0.1)))
    assert names(log) == [[0, 1], [2]] and outcome.reasons == {"timeout": 2}
    assert [launch.formed_s for launch in log] == [1.0, 3.0]


def test_requests_that_expire_are_cancelled_or_find_no_room() -> None:
    outcome, log = run(Load([0.0, 0.1, 0.2], timeout_s=0.5), Queue(1, 1, 1))
    assert names(log) == [[0]] and outcome.expired == 2
    outcome, log = run(Load([0.0, 0.1, 0.2], leaves_s=[math.inf, 0.3, math.inf]), Queue(1, 1, 1))
    assert names(log) == [[0], [2]] and outcome.cancelled == 1
    outcome, log = run(Load([0.0, 0.1, 0.2], timeout_s=9.0), Queue(1, 1, 1, max_size=1))
    assert names(log) == [[0], [1]] and outcome.rejected == 1


def test_clients_wait_for_their_answers() -> None:
    outcome, log = run(Load([0.0] * 10, clients=3), Queue(1, 1, 8))
    assert names(log) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert outcome.completed == 10 and outcome.seconds == 4.0


loads = st.builds(
    Traffic,
    requests=st.integers(0, 120),
    rate=st.sampled_from([0.0, 1.0, 10.0]),
    clients=st.integers(1, 40),
    rows=st.integers(1, 9),
    shapes=st.integers(1, 3),
    timeout_s=st.sampled_from([0.0, 2.0]),
    cancelled_percent=st.sampled_from([0.0, 20.0]),
    patience_s=st.floats(0, 3),
)
queues = st.builds(
    Queue, st.integers(1, 4), st.integers(1, 2), st.integers(1, 6), st.sampled_from([0.0, 0.7]), st.sampled_from([0, 5])
)


@given(loads, queues, st.integers(0, 3))
def test_every_request_ends_once_whatever_the_load(traffic: Traffic, queue: Queue, seed: int) -> None:
    load = load_of(traffic, seed)
    outcome, log = run(load, queue, Costs(Cost(0.3, 0.05), Cost(0.1), Cost(0.1), Cost(0.01)))
    assert outcome.submitted == traffic.requests
    ran = Counter(number for launch in log for number, _, _ in launch.parts)
    assert len(ran) == outcome.completed
    rows = {number: load.rows[number] if load.rows else 1 for number in ran}
    assert sum(rows.values()) == outcome.rows == sum(size * count for size, count in outcome.batches.items())
    assert max(outcome.max_in_flight, default=0) <= queue.slots and max(outcome.batches, default=0) <= queue.batch


def losing(batch: Batch[Any]) -> None:
    batch.parts.pop()


def doubling(batch: Batch[Any]) -> None:
    batch.parts.append(batch.parts[-1])


def turning(batch: Batch[Any]) -> None:
    batch.parts.reverse()


@pytest.mark.parametrize("breaking", [losing, doubling, turning])
def test_broken_promises_are_noticed(breaking: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    take = Batcher.take

    def broken(self: Batcher[Any], now: float) -> Batch[Any] | None:
        batch = take(self, now)
        if batch is not None and batch.rows > 2:
            breaking(batch)
        return batch

    monkeypatch.setattr(Batcher, "take", broken)
    with pytest.raises(AssertionError):
        run(Load([0.0, 0.1, 0.2, 0.3, 0.4]), Queue(1, 1, 4))


class Replay:
    """The events of a simulation, made to happen to an engine with threads in the same order."""

    def __init__(self, load: Load, queue: Queue, log: list[Launch], asynchronous: bool, make: MakeEngine) -> None:
        self.load, self.log = load, log
        self.gates = [threading.Event() for _ in log]
        self.places = {launch.parts[0][:2]: place for place, launch in enumerate(log)}
        self.ran: list[list[tuple[int, int]]] = []
        self.device = RecordingDevice(self.model, asynchronous=asynchronous)
        plan = plan_of({"x": (F32, ("N", "L"))}, {"y": (F32, ("N", "L"))})
        self.engine = make(self.device, plan, streams=queue.streams, batch=queue.batch, hint="THROUGHPUT")

    def model(self, x: Any) -> list[Any]:
        """Held until the simulation's launch of the same first row is done."""
        found = [(int(number), int(row)) for number, row in x[:, :2]]
        self.ran.append(found)
        place = self.places.get(found[0])
        assert place is not None and self.gates[place].wait(30)
        return [x]

    def run(self) -> list[list[tuple[int, int]]]:
        """The rows of every launch, as (request, row)."""
        happens = [(at, 1, number) for number, at in enumerate(self.load.arrivals)]
        happens += [(launch.done_s, 0, place) for place, launch in enumerate(self.log)]
        futures = []
        for at, group in groupby(sorted(happens), key=itemgetter(0)):
            for _, arrives, number in group:
                if arrives:
                    futures.append(self.engine.submit(self.inputs(number)))
                else:
                    self.gates[number].set()
            self.settle(at)
        for number, future in enumerate(futures):
            np.testing.assert_array_equal(future.result(30), self.inputs(number))
        return self.ran

    def inputs(self, number: int) -> Any:
        """Rows that say which they are; the key is their length."""
        rows, key = self.load.rows[number], self.load.keys[number]
        x = np.zeros((rows, 2 + key), F32)
        x[:, 0], x[:, 1] = number, np.arange(rows)
        return x

    def settle(self, at: float) -> None:
        """Wait until as many requests wait and slots are free as in the simulation."""
        formed = [launch for launch in self.log if launch.formed_s <= at]
        taken = Counter({number: 0 for number, arrival in enumerate(self.load.arrivals) if arrival <= at})
        for number, start, stop in (part for launch in formed for part in launch.parts):
            taken[number] += stop - start
        waiting = sum(taken[number] < self.load.rows[number] for number in taken)
        flying = sum(launch.done_s > at for launch in formed)
        pool = self.engine._pool
        until(lambda: pool.batcher.size == waiting and len(pool._workers) - len(pool._idle) == flying)


@pytest.mark.parametrize(
    ("streams", "slots", "seed"), [(1, 1, 0), (1, 1, 1), (2, 1, 2), (3, 1, 3), (1, 2, 4), (1, 2, 5)]
)
def test_the_engine_forms_the_same_batches(streams: int, slots: int, seed: int, make_engine: MakeEngine) -> None:
    numbers = random.Random(seed)
    count = 40
    load = Load(
        sorted(numbers.uniform(0, 9) for _ in range(count)),
        [numbers.choice([1, 1, 2, 3, 9]) for _ in range(count)],
        [numbers.choice([0, 0, 1, 2]) for _ in range(count)],
    )
    queue = Queue(streams, slots, 4)
    outcome, log = run(load, queue, Costs(Cost(0.31, 0.053)))
    assert {"full", "idle", "shape"} <= set(outcome.reasons)
    replay = Replay(load, queue, log, slots == 2, make_engine)
    expected = [[(number, row) for number, start, stop in launch.parts for row in range(start, stop)] for launch in log]
    assert sorted(replay.run()) == sorted(expected)
    assert replay.engine.statistics().close_reasons == dict(outcome.reasons)


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(value) for value in range(1, 11)]
    assert [percentile(values, p) for p in (1, 10, 11, 50, 99, 100)] == [1, 1, 2, 5, 10, 10]
    assert math.isnan(percentile([], 50))


def test_costs_are_parsed() -> None:
    assert parse_cost("2ms+50us") == Cost(2e-3, 50e-6) and parse_cost(".5s") == Cost(0.5)
    for text in ("", "2", "2ms+", "1s+1s+1s", "-1ms", "ms"):
        with pytest.raises(ValueError, match="2ms"):
            parse_cost(text)


def test_the_command_reports_what_it_simulated() -> None:
    arguments = "simulate --requests 20000 --rate 100000 --gpus 2 --streams 2 --rows 3 --shapes 2 --cancelled 1 --json"
    result = CliRunner().invoke(app, [*arguments.split(), "--in-flight", "64"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert (facts["streams"], facts["slots"], facts["batch"]) == (4, 2, 8)
    assert facts["completed"] + facts["cancelled"] == 20000 == facts["requests"]
    assert sum(facts["batches"].values()) == facts["executions"] == sum(facts["close_reasons"].values())
    assert list(facts["latency_ms"].values()) == sorted(facts["latency_ms"].values())
    text = CliRunner().invoke(app, ["simulate", "--requests", "500", "--clients", "40"])
    assert text.exit_code == 0 and "500 completed" in text.stdout and "32 streams x 2 slots" in text.stdout
