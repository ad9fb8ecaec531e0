"""Load generators against a server in virtual time."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

import numpy as np
import pytest

from gpu_engine.tools import load
from gpu_engine.tools.load import Course, Done, Grouped, all_at_once, closed_loop, joined, open_loop, poisson_gaps
from gpu_engine.tools.measures import percentile


class Server:
    """`lanes` requests at a time in the order in which they came, each of `cost(number of requests so far)` seconds;
    `sending_s` is how long sending takes the caller."""

    def __init__(self, lanes: int, cost: Callable[[int], float], sending_s: float = 0.0) -> None:
        self.time, self.sending_s = 100.0, sending_s
        self.cost, self.count = cost, itertools.count()
        self.free = [self.time] * lanes
        self.done: list[tuple[float, int]] = []
        self.most_in_flight = 0

    def now(self) -> float:
        return self.time

    def send(self, number: int) -> None:
        self.time += self.sending_s
        begin = max(self.time, heapq.heappop(self.free))
        end = begin + self.cost(next(self.count))
        heapq.heappush(self.free, end)
        heapq.heappush(self.done, (end, number))
        self.most_in_flight = max(self.most_in_flight, len(self.done))

    def receive(self, until: float | None = None) -> Done | None:
        if self.done and (until is None or self.done[0][0] <= until):
            at, number = heapq.heappop(self.done)
            self.time = max(self.time, at)
            return number, at
        assert until is not None, "nothing is in flight"
        self.time = max(self.time, until)
        return None


def test_a_closed_loop_keeps_what_it_is_told_in_flight() -> None:
    server = Server(2, lambda _: 0.01)
    taken = closed_loop(server, 8, Course(1.0))
    assert server.most_in_flight == 8 and server.done == []
    assert len(taken.finished_s) % 8 == 0
    assert len(taken.finished_s) / taken.seconds == pytest.approx(200, rel=0.05)
    assert percentile(taken.latencies_s, 90) == pytest.approx(0.04, rel=0.05)


@pytest.mark.parametrize(("asked", "measured"), [(1, 4), (4, 4), (9, 12)])
def test_iterations_round_up_to_a_multiple_of_what_is_in_flight(asked: int, measured: int) -> None:
    taken = closed_loop(Server(1, lambda _: 1.0), 4, Course(0.1, queries=asked))
    assert len(taken.finished_s) == measured and taken.seconds == pytest.approx(measured)


def test_a_slow_request_is_measured_all_the_same() -> None:
    taken = closed_loop(Server(1, lambda _: 50.0), 1, Course(1.0, least=3))
    assert len(taken.finished_s) == 3 and taken.latencies_s == pytest.approx([50.0] * 3)


def test_the_warm_up_lasts_until_windows_are_steady() -> None:
    server = Server(1, lambda number: max(0.001, 0.05 * 0.985**number))
    taken = closed_loop(server, 1, Course(5.0, warmup_s=0.1))
    assert taken.warm and max(taken.latencies_s) == pytest.approx(0.001)
    assert taken.start_s >= 103.0


def test_a_warm_up_that_never_gets_steady_ends_and_says_so() -> None:
    pace = itertools.cycle([0.01] * 30 + [0.001] * 300)
    taken = closed_loop(Server(1, lambda _: next(pace)), 1, Course(2.0, warmup_s=0.5))
    assert not taken.warm and taken.start_s <= 100 + 2 * 2.5


def test_a_warm_up_ends_in_time_however_few_have_finished() -> None:
    taken = closed_loop(Server(1, lambda _: 1.0), 10, Course(1.0, warmup_s=20.0, least=1))
    assert not taken.warm and taken.start_s == pytest.approx(130.0)


def test_errors_end_the_load_after_what_is_in_flight() -> None:
    class Failing(Server):
        def receive(self, until: float | None = None) -> Done | None:
            done = super().receive(until)
            if done is not None and done[1] > 101:
                raise RuntimeError("broken")
            return done

    with pytest.raises(RuntimeError, match="broken"):
        closed_loop(Failing(1, lambda _: 0.1), 2, Course(5.0))


def test_open_loop_latency_counts_from_the_intended_send_time() -> None:
    """A server that stalls for a second: a closed loop sees one slow request, an open one all that were due."""
    stalled = Server(1, lambda number: 1.0 if number == 200 else 0.001)
    open_taken = open_loop(stalled, itertools.repeat(0.01), Course(4.0))
    closed_taken = closed_loop(Server(1, lambda number: 1.0 if number == 200 else 0.001), 1, Course(4.0))
    assert sum(closed_taken.latencies_s > 0.1) == 1
    assert 85 <= sum(open_taken.latencies_s > 0.1) <= 110
    assert percentile(open_taken.latencies_s, 99) > 0.9


def test_a_late_generator_hides_nothing() -> None:
    """Sending takes longer than the gaps: what is late counts as latency, and is told."""
    taken = open_loop(Server(1, lambda _: 0.0, sending_s=0.02), itertools.repeat(0.01), Course(2.0))
    assert max(taken.latencies_s) == pytest.approx(2.0, rel=0.1) and max(taken.lag_s) > 1.5


def test_only_what_was_due_after_the_warm_up_is_counted() -> None:
    taken = open_loop(Server(1, lambda _: 0.001), itertools.repeat(0.1), Course(3.0, warmup_s=2.0))
    assert taken.start_s == 102.0 and len(taken.latencies_s) == 30 and taken.seconds == pytest.approx(3.0, abs=0.11)


def test_at_least_one_query_is_counted() -> None:
    taken = open_loop(Server(1, lambda _: 0.001), itertools.repeat(7.0), Course(1.0, warmup_s=8.0))
    assert len(taken.latencies_s) == 1 and taken.stop_s == 114.0


def test_unfinished_requests_count_as_waiting_so_far() -> None:
    taken = open_loop(Server(1, lambda _: 1.0), itertools.repeat(0.101), Course(2.0))
    assert taken.unfinished > 10 and len(taken.latencies_s) == 19
    assert max(taken.latencies_s) >= 3.0 and not taken.overloaded


def test_too_many_waiting_requests_end_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "MOST_WAITING", 50)
    server = Server(1, lambda _: 10.0)
    taken = open_loop(server, itertools.repeat(0.001), Course(5.0))
    assert taken.overloaded and len(taken.latencies_s) == 50 and server.most_in_flight == 50


def test_poisson_arrivals_have_their_rate_and_their_spread() -> None:
    gaps = np.array(list(itertools.islice(poisson_gaps(50.0, 7), 20_000)))
    assert gaps.mean() == pytest.approx(0.02, rel=0.03) and gaps.std() == pytest.approx(0.02, rel=0.05)
    assert list(itertools.islice(poisson_gaps(50.0, 7), 3)) == list(gaps[:3])
    with pytest.raises(ValueError, match="above 0"):
        next(poisson_gaps(0.0, 1))


def test_a_query_is_finished_with_the_last_of_its_samples() -> None:
    server = Server(4, lambda _: 0.01)
    taken = closed_loop(Grouped(server, 8), 1, Course(1.0))
    assert server.most_in_flight == 8 and percentile(taken.latencies_s, 99) == pytest.approx(0.02, rel=0.01)
    assert len(taken.finished_s) / taken.seconds == pytest.approx(50, rel=0.02)


def test_all_at_once_ends_with_the_last() -> None:
    server = Server(2, lambda _: 0.01)
    taken = all_at_once(server, 10)
    assert server.most_in_flight == 10 and taken.seconds == pytest.approx(0.05)
    assert sorted(taken.latencies_s) == pytest.approx([0.01, 0.01, 0.02, 0.02, 0.03, 0.03, 0.04, 0.04, 0.05, 0.05])


def test_rounds_join_without_the_time_between_them() -> None:
    server = Server(1, lambda _: 0.01)
    first = closed_loop(server, 1, Course(1.0))
    server.time += 500
    both = joined([first, closed_loop(server, 1, Course(1.0))])
    assert both.seconds == pytest.approx(2 * first.seconds, rel=0.02) and len(both.latencies_s) == len(both.finished_s)
    assert (np.diff(both.finished_s) >= 0).all() and both.finished_s[-1] <= both.stop_s + 1e-9
