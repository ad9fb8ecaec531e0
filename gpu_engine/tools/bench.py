"""`gpu-engine bench`: a model under the loads of scenarios, alone or in turns with its peers."""

from __future__ import annotations

import statistics as arithmetic
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cpu_fallback.cores import usable_cores
from gpu_engine.configuration import read_configuration
from gpu_engine.runtime.statistics import Statistics
from gpu_engine.tools.environment import settings
from gpu_engine.tools.feeds import Request
from gpu_engine.tools.heap import frozen_heap
from gpu_engine.tools.load import (
    Course,
    Grouped,
    Taken,
    Target,
    all_at_once,
    closed_loop,
    joined,
    open_loop,
    poisson_gaps,
)
from gpu_engine.tools.measures import PERCENTILES, percentile
from gpu_engine.tools.peers import Contender, Mode, peer
from gpu_engine.tools.results import Result, Work, result
from gpu_engine.tools.scenarios import OPEN_LOOP_SHARE, Scenario, find_peak
from gpu_engine.tools.subject import OURS, Subject, open_subject
from gpu_engine.tools.targets import Awaited, Submitted

ROUNDS = 3
"""Turns that each contender gets where there are several."""
SHORT_S = 1.0
"""How long it is measured what a load is to be computed from."""
SPOKEN = ("streams", "requests", "batch", "hint", "scheduler", "auto_batching")

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Bench:
    """What is to be measured.

    `options` are those of compile(). `in_flight` requests are kept in flight by a closed loop (None: what keeps the
    engine busy), an open loop sends `rate` a second (None: see measure_all), `bound_ms` is the Server scenario's.
    """

    model: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    request: Request = field(default_factory=Request)
    course: Course = field(default_factory=lambda: Course(10.0, 1.0))
    in_flight: int | None = None
    rate: float | None = None
    bound_ms: float | None = None
    percentiles: Sequence[float] = PERCENTILES
    peers: Sequence[str] = ()

    def percentiles_of(self, scenario: Scenario) -> list[float]:
        """Those asked for, the median, and the scenario's own."""
        return sorted({50.0, *self.percentiles, *([scenario.percentile] if scenario.percentile else [])})


def measure_all(bench: Bench, scenarios: Sequence[Scenario], tell: Tell) -> Iterator[Result]:
    """The results of each scenario, ours first; `tell` is told what is measured next.

    An open loop without a rate goes at OPEN_LOOP_SHARE of what the slowest contender reached in the closed loop.
    """
    for name in bench.peers:
        peer(name)
    reached: float | None = None
    for scenario in scenarios:
        rate = bench.rate
        if scenario.load == "open" and rate is None:
            reached = reached or _reached(bench, tell)
            rate = OPEN_LOOP_SHARE * reached
        results = measure(bench, scenario, rate, tell)
        if scenario.name == "closed":
            reached = min(each.queries_per_s for each in results)
        yield from results


def _reached(bench: Bench, tell: Tell) -> float:
    """Requests a second of the slowest contender in a short closed loop."""
    course = Course(min(SHORT_S, bench.course.seconds), min(SHORT_S, bench.course.warmup_s))
    scenario = Scenario("capacity", "closed", "", mlperf=False)
    return min(each.queries_per_s for each in measure(replace(bench, course=course), scenario, None, tell))


def measure(bench: Bench, scenario: Scenario, rate: float | None, tell: Tell) -> list[Result]:
    """One scenario for all contenders, in turns if there are several."""
    with ExitStack() as opened:
        alone = scenario.in_flight == 1 and scenario.size == 1
        subject = open_subject(bench.model, options_for(bench, alone), bench.request)
        opened.callback(subject.close)
        in_flight = scenario.in_flight or _in_flight(bench, subject)
        mode = Mode(len(usable_cores().numbers), in_flight * scenario.size, scenario.load != "closed")
        contenders = [subject.contender(mode)]
        for name in bench.peers:
            tell(f"{name}: loading the model")
            contenders.append(peer(name)(bench.model, subject.feed, mode))
            opened.callback(contenders[-1].close)
        opened.enter_context(frozen_heap())
        return _race(bench, scenario, rate, contenders, subject, in_flight, tell)


def _in_flight(bench: Bench, subject: Subject) -> int:
    """As given, or as a configuration says, or what keeps every slot busy."""
    stored = read_configuration(bench.options.get("config") or {})
    return bench.in_flight or stored.get("requests") or max(1, subject.engine.optimal_requests // subject.rows)


def options_for(bench: Bench, alone: bool) -> dict[str, Any]:
    """Options of compile() as given; where nothing was said, a load of several requests asks for throughput."""
    given = {name: value for name, value in bench.options.items() if value is not None}
    if alone:
        return given
    if bench.in_flight:
        return {"requests": bench.in_flight, **given}
    said = {*given, *read_configuration(given.get("config", {}))}
    return given if said & {*SPOKEN} else {**given, "hint": "THROUGHPUT"}


def _race(
    bench: Bench,
    scenario: Scenario,
    rate: float | None,
    contenders: Sequence[Contender],
    subject: Subject,
    in_flight: int,
    tell: Tell,
) -> list[Result]:
    differences = _differences(contenders)
    before, rounds = subject.engine.statistics(), ROUNDS if len(contenders) > 1 else 1
    parts: dict[str, list[Taken]] = {each.name: [] for each in contenders}
    rates: dict[str, float | None] = dict.fromkeys(parts, rate)
    for turn in range(rounds):
        for each in contenders:
            tell(f"{scenario.name}: {each.name}" + (f", round {turn + 1} of {rounds}" if rounds > 1 else ""))
            if scenario.name == "Server" and bench.rate is None and bench.bound_ms is not None and not turn:
                rates[each.name] = _peak(bench, scenario, each, rate or 1.0) or rate
            parts[each.name].append(_take(bench, scenario, each, rates[each.name], in_flight, rounds))
    work, facts = _work(subject, before, contenders[0]), settings(subject.engine, in_flight, subject.rows)
    return [
        result(
            scenario=scenario,
            engine=each.name,
            taken=joined(parts[each.name]),
            rows=subject.rows,
            in_flight=in_flight,
            rate=rates[each.name],
            percentiles=bench.percentiles_of(scenario),
            bound_ms=bench.bound_ms,
            work=work if each.name == OURS else None,
            copies=each.copies,
            difference=differences[each.name],
            settings=facts if each.name == OURS else None,
        )
        for each in contenders
    ]


def _take(
    bench: Bench, scenario: Scenario, contender: Contender, rate: float | None, in_flight: int, rounds: int
) -> Taken:
    course = replace(bench.course, seconds=bench.course.seconds / rounds)
    target = Grouped(contender.target, scenario.size) if scenario.size > 1 else contender.target
    match scenario.load:
        case "closed":
            return closed_loop(target, in_flight, course)
        case "open":
            assert rate is not None
            return open_loop(target, poisson_gaps(rate, bench.request.seed), course)
        case _:
            return all_at_once(target, _offline_queries(target, in_flight, course))


def _offline_queries(target: Target, in_flight: int, course: Course) -> int:
    """As many samples as take about the time asked for, by a short closed loop, which warms up too."""
    short = Course(min(SHORT_S, course.seconds), min(SHORT_S, course.warmup_s))
    taken = closed_loop(target, in_flight, short)
    return course.queries or max(in_flight, round(len(taken.finished_s) / taken.seconds * course.seconds))


def _peak(bench: Bench, scenario: Scenario, contender: Contender, guess: float) -> float:
    """The highest rate that keeps the bound, by shorter measurements than the one that then confirms it."""
    course = Course(bench.course.seconds / 4, bench.course.warmup_s / 4)
    percent, bound_ms = scenario.percentile or 99.0, bench.bound_ms or 0.0

    def keeps_bound(rate: float) -> bool:
        return keeps(open_loop(contender.target, poisson_gaps(rate, bench.request.seed), course), percent, bound_ms)

    return find_peak(keeps_bound, guess)


def keeps(taken: Taken, percent: float, bound_ms: float) -> bool:
    """Whether an open loop was served in time: nothing given up, and the percentile within the bound."""
    served = not (taken.overloaded or taken.unfinished) and len(taken.latencies_s) > 0
    return served and percentile(taken.latencies_s, percent) * 1e3 <= bound_ms


def _work(subject: Subject, before: Statistics, contender: Contender) -> Work:
    after, target = subject.engine.statistics(), contender.target
    sending = target.sending_s if isinstance(target, Submitted | Awaited) else []
    return Work(
        compile_s=subject.compile_s,
        first_s=subject.first_s,
        rows=after.inference_count - before.inference_count,
        launches=after.execution_count - before.execution_count,
        queue_ns=after.queue_ns - before.queue_ns,
        copy_in_ns=after.copy_in_ns - before.copy_in_ns,
        compute_ns=after.compute_ns - before.compute_ns,
        copy_out_ns=after.copy_out_ns - before.copy_out_ns,
        submit_s=arithmetic.median(sending) if sending else None,
        streams=subject.engine.streams,
    )


def _differences(contenders: Sequence[Contender]) -> dict[str, float | None]:
    """How far the outputs of each lie from ours, in shares of ours' largest number; None for other than numbers."""
    if len(contenders) == 1:
        return {contenders[0].name: None}
    expected = contenders[0].infer()
    return {each.name: difference(each.infer(), expected) for each in contenders}


def difference(found: Sequence[Any], expected: Sequence[Any]) -> float | None:
    """The largest gap between two lists of outputs, in shares of the largest number of each expected output."""
    worst = 0.0
    for one, other in zip(map(np.asarray, found), map(np.asarray, expected), strict=True):
        if one.dtype.kind not in "fiub" or one.shape != other.shape:
            return None
        wanted = other.astype(np.float64)
        gap = np.abs(one.astype(np.float64) - wanted).max(initial=0.0)
        worst = max(worst, float(gap / (np.abs(wanted).max(initial=0.0) or 1.0)))
    return worst
