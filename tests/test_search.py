"""The search of `gpu-engine tune`, on processors that are formulas."""

from __future__ import annotations

import pytest

from gpu_engine.tools.search import Found, best, exhaustive, keeps, reasons, search, space
from tests.tuning import Costs

MACHINES = [
    Costs(call_ms=4, row_ms=2),
    Costs(call_ms=0.1, row_ms=10, waits=0.0),
    Costs(call_ms=20, row_ms=0.1, waits=0.5),
    Costs(call_ms=1, row_ms=1, waits=0.9),
    Costs(call_ms=4, row_ms=2, noise=(0.0, 0.01, -0.01, 0.005, -0.008)),
]


def searched(costs: Costs, cores: int | None, bound_ms: float | None) -> tuple[Found, Found, Costs]:
    """(what the search found, what all points give, the costs with what the search measured)."""
    where = space(cores, 32)
    fresh = Costs(costs.call_ms, costs.row_ms, costs.waits, costs.noise)
    exact = Costs(costs.call_ms, costs.row_ms, costs.waits)
    return search(where, fresh, bound_ms), exhaustive(where, exact, bound_ms), fresh


@pytest.mark.parametrize("bound_ms", [None, 25.0, 80.0, 400.0])
@pytest.mark.parametrize("cores", [1, 2, 4, 6, 16, 64])
@pytest.mark.parametrize("costs", MACHINES, ids=range(len(MACHINES)))
def test_it_finds_a_point_close_to_the_best_with_fewer_measurements(
    costs: Costs, cores: int, bound_ms: float | None
) -> None:
    found, every, fresh = searched(costs, cores, bound_ms)
    assert len(fresh.points) == found.measurements
    assert found.measurements < every.measurements or cores == 1
    assert found.within_bound == every.within_bound
    if every.within_bound:
        exact = fresh.exact(found.chosen.point)
        assert exact.items_per_s >= 0.95 * every.chosen.items_per_s
        assert keeps(exact, None if bound_ms is None else bound_ms * 1.01)


@pytest.mark.parametrize("bound_ms", [None, 80.0])
def test_a_device_that_divides_itself_has_no_threads(bound_ms: float | None) -> None:
    found, every, _ = searched(MACHINES[0], None, bound_ms)
    assert found.chosen.point.threads is None and found.chosen.items_per_s >= 0.95 * every.chosen.items_per_s


def test_many_cores_need_a_small_part_of_the_space() -> None:
    found, every, _ = searched(MACHINES[0], 64, 80.0)
    assert found.measurements < every.measurements / 4


def test_the_space_divides_the_cores() -> None:
    where = space(6, 4)
    assert where.full == ((1, 6), (2, 3), (4, 1), (6, 1))
    assert where.partial == ((1, 4), (1, 2), (1, 1), (2, 2), (2, 1))
    assert [(point.batch, point.in_flight) for point in where.ladder((2, 3))] == [(1, 2), (1, 4), (2, 8), (4, 16)]
    assert len(set(where.points)) == len(where.points) or 1 in where.batches
    assert space(1, 1).lanes == ((1, 1),) and space(None, 8).full == ((1, None), (2, None), (4, None))


def test_without_a_point_within_the_bound_it_names_the_closest() -> None:
    found, every, _ = searched(MACHINES[0], 8, 0.1)
    assert not found.within_bound and found.chosen.tail_ms == best(every.measured, 0.1).tail_ms
    assert "No point keeps the bound of 0.1 ms" in reasons(found)[0]


def test_reasons_name_the_rival_and_the_end_of_the_climb() -> None:
    found, _, _ = searched(MACHINES[0], 8, 60.0)
    text = " ".join(reasons(found))
    assert "measured points within 60 ms" in text and "less" in text
    assert "misses the bound" in text or "stopped growing" in text or "largest batch" in text


def test_close_points_are_measured_again() -> None:
    found, _, costs = searched(Costs(call_ms=0.1, row_ms=10, waits=0.0), 2, None)
    assert found.measurements == len(costs.points) > len({*costs.points})
