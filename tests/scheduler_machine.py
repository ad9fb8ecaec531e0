"""The batcher as a state machine, with time as a number: `python -m tests.scheduler_machine --steps 10000`.

Requests of three keys and three priorities arrive, are cancelled, fail half-way and expire, while streams with two
slots each take batches, with and without a timeout that may change. After every step the promises are checked: nothing
is lost or run twice, the order inside a key and priority is that of arrival, no stream has more than two executions,
deadlines are kept, and only what is larger than a batch is cut.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Hashable
from dataclasses import dataclass

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from gpu_engine.errors import QueueFull
from gpu_engine.runtime.scheduler import Batch, Batcher

LIMITS = {"a": 2, "b": 4, "c": 8}
SLOTS_PER_STREAM = 2
LEVELS = 3
ARRIVALS = st.tuples(
    st.integers(0, 2),
    st.sampled_from([1, 1, 1, 2, 3, 11]),
    st.integers(0, LEVELS - 1),
    st.sampled_from([None, 1, 2, 3, 9]),
)


@dataclass(eq=False)
class Item:
    """A request: `ended` when it was cancelled or, after a part ran, failed; `asked` is the level it came with."""

    name: int
    rows: int
    key: str
    arrival: float
    deadline: float | None
    asked: int
    level: int
    gone: int = 0
    place: int = -1
    ended: bool = False
    flushed: bool = False
    expired: bool = False

    @property
    def limit(self) -> int:
        return LIMITS[self.key]

    def cancelled(self) -> bool:
        return self.ended

    def claim(self) -> bool:
        return not self.ended


class SchedulerMachine(RuleBasedStateMachine):
    """`items` are all requests so far, `parts` what ran of each, `slots` how many executions each stream has."""

    @initialize(
        timeout_s=st.sampled_from([0.0, 3.0, 6.0]),
        max_size=st.sampled_from([0, 0, 6]),
        levels=st.sampled_from([1, LEVELS]),
        delays=st.booleans(),
        streams=st.integers(1, 2),
        keys=st.sampled_from(["abc", "c", "b"]),
    )
    def open(self, timeout_s: float, max_size: int, levels: int, delays: bool, streams: int, keys: str) -> None:
        self.batcher: Batcher[Item] = Batcher(timeout_s, max_size, levels, delays)
        self.levels, self.delays, self.keys, self.now = levels, delays, keys, 0.0
        self.items: list[Item] = []
        self.parts: dict[Item, list[tuple[int, int]]] = defaultdict(list)
        self.first_of: dict[tuple[Hashable, int], int] = {}
        self.slots = [0] * streams

    @rule(arrivals=st.lists(ARRIVALS, min_size=1, max_size=3))
    def add(self, arrivals: list[tuple[int, int, int, int | None]]) -> None:
        for number, rows, level, patience in arrivals:
            key, level = self.keys[number % len(self.keys)], min(level, self.levels - 1)
            ends = None if patience is None else self.now + patience
            item = Item(len(self.items), rows, key, self.now, ends, level, level)
            try:
                self.batcher.add(item)
            except QueueFull:
                assert self.batcher.full() and self.batcher.size == self.batcher.max_size
            else:
                assert not self.batcher.max_size or self.batcher.size <= self.batcher.max_size
                self.items.append(item)

    @rule(stream=st.integers(0, 1), batches=st.integers(1, 6))
    def take(self, stream: int, batches: int) -> None:
        """The slots of a stream take batches, in turn; one that is in flight has to end first."""
        stream %= len(self.slots)
        for _ in range(batches):
            self.slots[stream] -= self.slots[stream] == SLOTS_PER_STREAM
            self.slots[stream] += self.take_and_check() is not None

    @precondition(lambda self: self.items)
    @rule(number=st.integers(0, 999))
    def end(self, number: int) -> None:
        """Cancel a request that waits, or fail one of which a part ran."""
        waiting = self.waiting()
        if waiting:
            waiting[number % len(waiting)].ended = True

    @rule(seconds=st.integers(1, 2))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule(what=st.sampled_from(["flush", "drop", "timeout"]), timeout_s=st.sampled_from([0.0, 1.0, 4.0]))
    def disturb(self, what: str, timeout_s: float) -> None:
        if what == "flush":
            self.flush()
        elif what == "timeout":
            self.batcher.timeout_s = timeout_s
        else:
            self.batcher.drop_cancelled()
            assert not any(item.ended and item.gone < item.rows for item in self.items)

    def flush(self) -> None:
        self.batcher.flush()
        for item in self.waiting():
            item.flushed = True

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "items"):
            return
        TALLY["steps"] += 1
        left = [item for item in self.items if item.gone < item.rows]
        assert self.batcher.size == len(left)
        assert self.batcher.rows == sum(item.rows - item.gone for item in left)
        assert all(count <= SLOTS_PER_STREAM for count in self.slots)

    def teardown(self) -> None:
        """What is left runs, and every request has had exactly one end."""
        if not hasattr(self, "items"):
            return
        self.flush()
        while self.take_and_check() is not None:
            pass
        assert self.batcher.size == self.batcher.rows == 0
        for item in self.items:
            ran = self.parts[item]
            assert [start for start, _ in ran] == [0, *(stop for _, stop in ran)][: len(ran)]
            assert len(ran) <= 1 or item.rows > item.limit
            complete = bool(ran) and ran[-1][1] == item.rows
            assert complete + item.ended + item.expired == 1, "lost, or ended twice"
            assert not (item.expired and ran)
        expired, cancelled = self.batcher.expired, self.batcher.cancelled
        assert expired == sum(item.expired for item in self.items)
        assert cancelled == sum(item.ended and not self.parts[item] for item in self.items)
        batches = self.batcher.reasons.total()
        TALLY.update(requests=len(self.items), batches=batches, expired=expired, cancelled=cancelled)
        TALLY.update(delayed=self.batcher.delayed, cut=sum(len(ran) > 1 for ran in self.parts.values()))

    def waiting(self) -> list[Item]:
        """Requests that are queued and that somebody waits for."""
        return [item for item in self.items if item.gone < item.rows and not item.ended]

    def is_due(self, item: Item) -> bool:
        """Whether the request is past its deadline and no part of it ran."""
        return item.deadline is not None and self.now >= item.deadline and not self.parts[item]

    def take_and_check(self) -> Batch[Item] | None:
        waiting = self.waiting()
        due = [item for item in waiting if self.is_due(item)]
        patient = [item for item in waiting if item not in due and item.level == item.asked]
        batch = self.batcher.take(self.now)
        for item in self.batcher.pop_expired():
            assert item in due and not self.delays
            item.expired = True
        if batch is None:
            self.check_that_nothing_closes([item for item in waiting if not item.expired])
        else:
            self.check_batch(batch, patient, due)
        return batch

    def check_that_nothing_closes(self, waiting: list[Item]) -> None:
        """A slot got nothing: nothing waits, or one key collects that is neither full, nor old, nor flushed."""
        if not waiting:
            return
        assert self.batcher.timeout_s and len({item.key for item in waiting}) == 1
        assert sum(item.rows - item.gone for item in waiting) < waiting[0].limit
        assert all(self.now < item.arrival + self.batcher.timeout_s and not item.flushed for item in waiting)
        assert self.batcher.closes_at() == min(item.arrival for item in waiting) + self.batcher.timeout_s

    def check_batch(self, batch: Batch[Item], patient: list[Item], due: list[Item]) -> None:
        members = [item for item, _, _ in batch.parts]
        (key,) = {item.key for item in members}
        assert 0 < batch.rows == sum(stop - start for _, start, stop in batch.parts) <= LIMITS[key]
        assert len(set(members)) == len(members) and not any(item.ended for item in members)
        levels = [item.level for item in members]
        assert levels == sorted(levels), "a lower priority went first"
        if patient:
            assert members[0] in patient and levels[0] == min(item.level for item in patient)
        assert all(self.delays and item.level == self.levels for item in members if item in due), (
            "a deadline was missed"
        )
        self.check_reason(batch, members)
        for item, start, stop in batch.parts:
            assert start == sum(end - begin for begin, end in self.parts[item])
            self.parts[item].append((start, stop))
            if not start and item.level == item.asked:
                line = (item.key, item.asked)
                assert self.first_of.get(line, -1) < item.name, "overtaken"
                self.first_of[line] = item.name

    def check_reason(self, batch: Batch[Item], members: list[Item]) -> None:
        left = [item for item in self.items if item.gone < item.rows]
        limit = members[0].limit
        same = sorted([item for item in left if item.key == members[0].key], key=lambda item: (item.level, item.place))
        match batch.reason:
            case "full":
                room = limit - batch.rows
                delayed = bool(same) and same[0].level == self.levels
                heads = same if delayed else same[:1]
                assert not room or any(room < item.rows <= limit for item in heads), "more rows fit"
            case "shape":
                assert left and not same
            case "flush":
                assert any(item.flushed for item in members) and not left
            case "timeout":
                assert self.batcher.timeout_s and not left
                assert self.now >= min(item.arrival for item in members) + self.batcher.timeout_s
            case reason:
                assert reason == "idle" and not self.batcher.timeout_s and not left


TALLY: Counter[str] = Counter()


def run(examples: int, steps: int, derandomize: bool = True) -> None:
    """Run `examples` sequences of up to `steps` steps."""
    run_state_machine_as_test(
        SchedulerMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=derandomize,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000, help="at least so many in all")
    steps = parser.parse_args().steps
    while TALLY["steps"] < steps:
        run(examples=100, steps=100, derandomize=False)
    print(", ".join(f"{count:,} {name}" for name, count in TALLY.items()))


if __name__ == "__main__":
    main()
