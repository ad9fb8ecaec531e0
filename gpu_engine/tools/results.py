"""What one scenario gave for one engine, and what makes it doubtful."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpu_engine.tools.environment import Settings
from gpu_engine.tools.load import Taken
from gpu_engine.tools.measures import (
    STEADY_WINDOWS,
    STEADY_WITHIN,
    UNSTEADY_VARIANCE,
    Latency,
    is_steady,
    latency_of,
    percentile,
    variance,
    window_rates,
)
from gpu_engine.tools.scenarios import Scenario, violations

WINDOWS, WINDOW_QUERIES = 10, 10
"""A window holds at least WINDOW_QUERIES times what is in flight, so that whole batches do not make it unsteady."""
ENQUEUE_BOUND, LATE, SERVED = 0.8, 0.1, 0.95


@dataclass(frozen=True)
class Work:
    """What our engine did meanwhile, warm-up included; `submit_s` is the median time of a call of submit()."""

    compile_s: float
    first_s: float
    rows: int
    launches: int
    queue_ns: int
    copy_in_ns: int
    compute_ns: int
    copy_out_ns: int
    submit_s: float | None
    streams: int

    @property
    def mean_batch(self) -> float:
        return self.rows / self.launches if self.launches else 0.0

    @property
    def compute_s(self) -> float:
        """Seconds of computing for one row, all streams at work."""
        return self.compute_ns / 1e9 / self.rows / self.streams if self.rows else 0.0


@dataclass(frozen=True, eq=False)
class Result:
    """`items` are rows; `items_per_s` counts them against wall time. Latencies are those of queries.

    `rate` is what an open loop asked for, in queries a second. `windows` are queries a second. `difference` is how far
    the outputs lie from ours. `violations` keep it from being a valid result under MLPerf's rules.
    """

    scenario: str
    engine: str
    metric: str
    figure: float
    unit: str
    queries: int
    items: int
    seconds: float
    items_per_s: float
    queries_per_s: float
    in_flight: int | None
    rate: float | None
    latency: Latency
    windows: tuple[float, ...]
    steady: bool | None
    variance: float | None
    warnings: tuple[str, ...]
    violations: tuple[str, ...]
    copies: str
    difference: float | None
    work: Work | None
    settings: Settings | None


def result(
    *,
    scenario: Scenario,
    engine: str,
    taken: Taken,
    rows: int,
    in_flight: int,
    rate: float | None,
    percentiles: Sequence[float],
    bound_ms: float | None,
    work: Work | None,
    copies: str,
    difference: float | None,
    settings: Settings | None,
) -> Result:
    """Everything that follows from what a load generator saw; `rows` is what one request holds."""
    queries, seconds = len(taken.finished_s), taken.seconds
    latency = latency_of(taken.latencies_s, percentiles)
    rates = windows_of(taken, in_flight) if scenario.load == "closed" else []
    steady = is_steady(rates) if rates else None
    items_per_s = queries * scenario.size * rows / seconds
    metric, figure, unit = _merit(scenario, latency, items_per_s, rate if bound_ms is not None else None)
    tail = latency.at(scenario.percentile) if scenario.percentile else None
    return Result(
        scenario=scenario.name,
        engine=engine,
        metric=metric,
        figure=figure,
        unit=unit,
        queries=queries,
        items=queries * scenario.size * rows,
        seconds=seconds,
        items_per_s=items_per_s,
        queries_per_s=queries / seconds,
        in_flight=in_flight if scenario.load == "closed" else None,
        rate=rate if scenario.load == "open" else None,
        latency=latency,
        windows=tuple(rates),
        steady=steady,
        variance=variance(rates) if rates else None,
        warnings=tuple(warnings(scenario, taken, rates, latency, rate, work)),
        violations=tuple(violations(scenario, queries, seconds, tail, bound_ms if scenario.load == "open" else None)),
        copies=copies,
        difference=difference,
        work=work,
        settings=settings,
    )


def windows_of(taken: Taken, in_flight: int) -> list[float]:
    """Queries a second in up to WINDOWS windows; none where too few queries finished for three."""
    count = min(WINDOWS, len(taken.finished_s) // (WINDOW_QUERIES * in_flight))
    return window_rates(taken.finished_s, taken.start_s, taken.stop_s, count) if count >= STEADY_WINDOWS else []


def _merit(scenario: Scenario, latency: Latency, items_per_s: float, rate: float | None) -> tuple[str, float, str]:
    """The figure that the scenario is about."""
    if scenario.name == "Server" and rate is not None:
        return scenario.metric, rate, "queries/s"
    if scenario.percentile is not None:
        return f"{scenario.percentile:g}th percentile latency", latency.at(scenario.percentile), "ms"
    return ("throughput", items_per_s, "items/s") if scenario.load != "open" else ("median", latency.at(50.0), "ms")


def warnings(
    scenario: Scenario,
    taken: Taken,
    rates: Sequence[float],
    latency: Latency,
    rate: float | None,
    work: Work | None,
) -> list[str]:
    """What makes a result doubtful."""
    found = []
    if scenario.load == "closed":
        found += _unsteady(rates)
    if scenario.load == "open" and rate is not None:
        found += _behind(taken, latency, rate)
    if work is not None and work.submit_s is not None and work.submit_s > ENQUEUE_BOUND * work.compute_s:
        found.append(
            f"enqueue bound: submit() takes {work.submit_s * 1e6:.1f} us and computing an item "
            f"{work.compute_s * 1e6:.1f} us; put more rows into a request, or use run_many()"
        )
    enough = [percent for percent in latency.percentiles_ms if len(taken.latencies_s) * (100 - percent) >= 100]
    missing = [percent for percent in latency.percentiles_ms if percent not in enough and percent < 100]
    if missing:
        names = ", ".join(f"{percent:g}" for percent in missing)
        found.append(f"{len(taken.latencies_s)} queries are too few for percentile {names}: it is the maximum")
    return found


def _unsteady(rates: Sequence[float]) -> list[str]:
    if not rates:
        return [f"too few queries for {STEADY_WINDOWS} windows: whether it is steady is not known; measure longer"]
    found = []
    if not is_steady(rates):
        found.append(f"not steady: the last {STEADY_WINDOWS} windows differ by more than {STEADY_WITHIN:.0%}")
    if variance(rates) > UNSTEADY_VARIANCE:
        found.append(
            f"coefficient of variance {variance(rates):.1%} between windows, more than {UNSTEADY_VARIANCE:.1%}"
        )
    return found


def _behind(taken: Taken, latency: Latency, rate: float) -> list[str]:
    found = []
    if taken.overloaded:
        found.append("overloaded: the load ended early, too many requests were waiting")
    if taken.unfinished:
        found.append(f"{taken.unfinished} queries were given up: their latencies are lower bounds")
    if len(taken.lag_s):
        late_ms = percentile(taken.lag_s, 99) * 1e3
        if late_ms > LATE * latency.mean_ms:
            found.append(f"the load generator sent late: by {late_ms:.2g} ms at the 99th percentile (it is counted)")
    if len(taken.finished_s) and (taken.finished_s[-1] - taken.stop_s) > (1 - SERVED) * taken.seconds:
        found.append(f"the engine did not keep up with {rate:,.0f} queries/s")
    return found
