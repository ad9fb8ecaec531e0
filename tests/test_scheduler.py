"""The batcher, with time as a number: what it promises for every sequence of arrivals, and each rule on its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_engine.errors import QueueFull
from gpu_engine.runtime.scheduler import Batch, Batcher


@dataclass(eq=False)
class Item:
    """A request as the batcher sees it."""

    name: int
    rows: int = 1
    key: Hashable = "a"
    limit: int = 4
    arrival: float = 0.0
    deadline: float | None = None
    level: int = 0
    gone: int = 0
    place: int = -1
    ended: bool = False
    claims: int = 0

    def cancelled(self) -> bool:
        return self.ended

    def claim(self) -> bool:
        if not self.ended:
            self.claims += 1
        return not self.ended


def filled(*items: Item, timeout_s: float = 0.0) -> Batcher[Item]:
    batcher: Batcher[Item] = Batcher(timeout_s)
    for item in items:
        batcher.add(item)
    return batcher


def taken(batcher: Batcher[Item], now: float = 0.0) -> tuple[list[tuple[int, int, int]], str] | None:
    """The next batch as ([(name, start, stop)], reason)."""
    batch = batcher.take(now)
    return batch and ([(item.name, start, stop) for item, start, stop in batch.parts], batch.reason)


def names(batcher: Batcher[Item], now: float = 0.0) -> list[int] | None:
    batch = batcher.take(now)
    return batch and [item.name for item, _, _ in batch.parts]


def test_sixteen_requests_form_batches_of_four() -> None:
    batcher = filled(*(Item(i) for i in range(16)))
    batches = [batcher.take(0.0) for _ in range(4)]
    assert [(batch.rows, batch.reason) for batch in batches if batch] == [(4, "full")] * 4
    assert batcher.take(0.0) is None and batcher.size == batcher.rows == 0


def test_a_free_slot_takes_what_is_there() -> None:
    batcher = filled(Item(1), Item(2))
    assert taken(batcher) == ([(1, 0, 1), (2, 0, 1)], "idle")


def test_other_keys_head_the_next_batch_and_keep_their_place() -> None:
    batcher = filled(Item(1), Item(2, key="b"), Item(3), Item(4, key="c"), Item(5, key="b"))
    assert taken(batcher) == ([(1, 0, 1), (3, 0, 1)], "shape")
    assert taken(batcher) == ([(2, 0, 1), (5, 0, 1)], "shape")
    assert taken(batcher) == ([(4, 0, 1)], "idle")


def test_requests_of_several_rows_count_their_rows() -> None:
    batcher = filled(Item(1, rows=3), Item(2, rows=2), Item(3, rows=2))
    assert taken(batcher) == ([(1, 0, 3)], "full")
    assert taken(batcher) == ([(2, 0, 2), (3, 0, 2)], "full")


def test_large_requests_are_cut_in_order_and_their_rest_is_shared() -> None:
    batcher = filled(Item(1), Item(2, rows=9), Item(3))
    assert taken(batcher) == ([(1, 0, 1), (2, 0, 3)], "full")
    assert taken(batcher) == ([(2, 3, 7)], "full")
    assert batcher.rows == 3 and batcher.size == 2
    assert taken(batcher) == ([(2, 7, 9), (3, 0, 1)], "idle")
    assert batcher.rows == batcher.size == 0


def test_the_rest_of_a_failed_request_leaves_the_queue() -> None:
    item = Item(1, rows=9)
    batcher = filled(item, Item(2))
    assert taken(batcher) == ([(1, 0, 4)], "full")
    item.ended = True
    assert taken(batcher) == ([(2, 0, 1)], "idle")
    assert batcher.cancelled == 0 and batcher.rows == 0


def test_a_batch_waits_for_its_oldest_request() -> None:
    batcher = filled(Item(1, arrival=10.0), Item(2, arrival=10.5), timeout_s=1.0)
    assert taken(batcher, 10.9) is None and not batcher.ready(10.9)
    assert batcher.closes_at() == 11.0
    assert batcher.ready(11.0)
    assert taken(batcher, 11.0) == ([(1, 0, 1), (2, 0, 1)], "timeout")
    assert batcher.closes_at() is None


@pytest.mark.parametrize("reason", ["full", "shape", "flush"])
def test_a_batch_closes_before_its_timeout(reason: str) -> None:
    batcher = filled(Item(1), timeout_s=1.0)
    if reason == "full":
        for i in range(3):
            batcher.add(Item(i))
    elif reason == "shape":
        batcher.add(Item(2, key="b"))
    else:
        batcher.flush()
    assert batcher.ready(0.5)
    batch = batcher.take(0.5)
    assert batch is not None and batch.reason == reason


def test_a_flush_ends_with_what_was_there() -> None:
    batcher = filled(Item(1), timeout_s=1.0)
    batcher.flush()
    batcher.add(Item(2, key="b"))
    assert names(batcher) == [1]
    assert names(batcher) is None and batcher.size == 1


def test_reasons_are_counted_and_ranked() -> None:
    batcher = filled(*(Item(i) for i in range(4)), Item(9, key="b"), timeout_s=1.0)
    batcher.flush()
    reasons = [batch.reason for batch in (batcher.take(5.0), batcher.take(5.0)) if batch]
    assert reasons == ["full", "flush"]
    assert dict(batcher.reasons) == {"full": 1, "flush": 1}


def test_cancelled_requests_leave_before_rows_are_counted() -> None:
    items = [Item(i) for i in range(5)]
    items[1].ended = items[2].ended = True
    batcher = filled(*items)
    assert taken(batcher) == ([(0, 0, 1), (3, 0, 1), (4, 0, 1)], "idle")
    assert batcher.cancelled == 2 and batcher.size == 0


def test_a_collecting_batch_is_not_full_of_cancelled_requests() -> None:
    items = [Item(i) for i in range(4)]
    items[0].ended = items[3].ended = True
    batcher = filled(*items, timeout_s=1.0)
    assert batcher.take(0.5) is None
    assert batcher.size == 2 and batcher.cancelled == 2
    batcher.add(Item(4, arrival=0.5)), batcher.add(Item(5, arrival=0.5))
    assert names(batcher, 0.6) == [1, 2, 4, 5]


def test_only_cancelled_requests() -> None:
    batcher = filled(Item(1, ended=True), Item(2, ended=True, key="b"), timeout_s=1.0)
    assert batcher.take(9.0) is None and batcher.size == 0 and batcher.cancelled == 2


def test_expired_requests_leave_and_are_handed_out() -> None:
    batcher = filled(Item(1, deadline=1.0), Item(2), Item(3, deadline=5.0), Item(4, deadline=2.0))
    assert names(batcher, 2.0) == [2, 3]
    assert [item.name for item in batcher.pop_expired()] == [1, 4] and batcher.pop_expired() == []
    assert batcher.expired == 2 and batcher.size == 0


def test_a_request_of_which_a_part_ran_does_not_expire() -> None:
    batcher = filled(Item(1, rows=6, deadline=1.0))
    assert taken(batcher, 0.5) == ([(1, 0, 4)], "full")
    assert taken(batcher, 9.0) == ([(1, 4, 6)], "idle")


def test_the_queue_is_bounded() -> None:
    batcher: Batcher[Item] = Batcher(max_size=2)
    batcher.add(Item(1)), batcher.add(Item(2))
    assert batcher.full()
    with pytest.raises(QueueFull, match="Exceeds maximum queue size"):
        batcher.add(Item(3))
    assert batcher.rejected == 1 and names(batcher) == [1, 2] and not batcher.full()


def test_clear() -> None:
    batcher = filled(Item(1), Item(2, key="b"), Item(3))
    assert sorted(item.name for item in batcher.clear()) == [1, 2, 3]
    assert batcher.size == batcher.rows == 0 and batcher.take(0.0) is None


actions = st.one_of(
    st.tuples(st.just("add"), st.sampled_from("abc"), st.integers(1, 11), st.one_of(st.none(), st.integers(1, 9))),
    st.tuples(st.just("take")),
    st.tuples(st.just("cancel"), st.integers(0, 99)),
    st.tuples(st.just("wait"), st.integers(1, 5)),
    st.tuples(st.just("flush")),
)
LIMITS = {"a": 1, "b": 4, "c": 8}


@given(st.lists(actions, max_size=60), st.sampled_from([0.0, 3.0]))
def test_nothing_is_lost_doubled_or_overtaken(script: list[tuple[object, ...]], timeout_s: float) -> None:
    batcher: Batcher[Item] = Batcher(timeout_s)
    items: list[Item] = []
    batches: list[Batch[Item]] = []
    expired: list[Item] = []
    now = 0.0
    for step in script:
        match step:
            case "add", str(key), int(rows), deadline:
                ends = now + deadline if isinstance(deadline, int) else None
                items.append(Item(len(items), rows, key, LIMITS[key], now, ends))
                batcher.add(items[-1])
            case ("take",):
                batches += filter(None, [batcher.take(now)])
            case "cancel", int(number) if items:
                chosen = items[number % len(items)]
                chosen.ended = not chosen.claims
            case "wait", int(seconds):
                now += seconds
            case ("flush",):
                batcher.flush()
        expired += batcher.pop_expired()
    batcher.flush()
    while (batch := batcher.take(now)) is not None:
        batches.append(batch)
    expired += batcher.pop_expired()
    check_batches(batches)
    check_items(items, batches, expired)
    assert batcher.size == batcher.rows == 0
    assert batcher.cancelled == sum(item.ended for item in items) - sum(item.ended for item in expired)


def check_batches(batches: list[Batch[Item]]) -> None:
    """Every batch is within its limit, of one key, and not empty."""
    for batch in batches:
        (key,) = {item.key for item, _, _ in batch.parts}
        assert 0 < batch.rows == sum(stop - start for _, start, stop in batch.parts) <= LIMITS[str(key)]
        assert batch.reason != "full" or batch.rows == LIMITS[str(key)] or key != "a"


def check_items(items: list[Item], batches: list[Batch[Item]], expired: list[Item]) -> None:
    """Every request ran whole, once and in order, or was cancelled or expired; keys are first in, first out."""
    parts: dict[int, list[tuple[int, int]]] = defaultdict(list)
    order: dict[Hashable, list[int]] = defaultdict(list)
    for batch in batches:
        for item, start, stop in batch.parts:
            parts[item.name].append((start, stop))
            order[item.key].append(item.name)
    for item in items:
        if item.ended or item in expired:
            assert item.name not in parts
            continue
        starts, stops = zip(*parts[item.name], strict=True)
        assert starts == (0, *stops[:-1]) and stops[-1] == item.rows
        assert len(starts) == 1 or item.rows > item.limit
    assert all(found == sorted(found) for found in order.values())


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=30))
def test_no_key_starves(keys: list[str]) -> None:
    """The oldest waiting request is always in the next batch."""
    batcher = filled(*(Item(i, key=key) for i, key in enumerate(keys)))
    waiting = list(range(len(keys)))
    while (found := names(batcher)) is not None:
        assert found[0] == waiting[0]
        waiting = [name for name in waiting if name not in found]
    assert not waiting
