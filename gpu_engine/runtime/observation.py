"""What an observer is told of each execution. Nobody observes unless a profile asks for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from gpu_engine.runtime.device import Slot, StepTimes
from gpu_engine.runtime.requests import Part, Request

_NUMBERS = itertools.count()


@dataclass(frozen=True, slots=True)
class ObservedPart:
    """Rows `start` to `stop` of a request; `number` tells requests apart, `arrival_s` is when it was submitted."""

    number: int
    arrival_s: float
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Moments:
    """Seconds of `time.monotonic`: the batch was taken, its rows were staged, results were there, and were copied."""

    taken_s: float
    staged_s: float
    computed_s: float
    copied_s: float


@dataclass(frozen=True, slots=True)
class Execution:
    """An execution that succeeded, by its place: `slot` of `stream`; `steps` if the device is timed."""

    stream: int
    slot: int
    parts: tuple[ObservedPart, ...]
    rows: int
    extents: tuple[int, ...]
    moments: Moments
    steps: StepTimes | None


Observer = Callable[[Execution], None]
"""Called by the thread that ran the execution, before its requests are answered: it must be quick and not raise."""
Watch = Callable[[Sequence[Part] | None, int, tuple[int, ...], Moments], None]
"""watch(parts, rows, extents, moments) of one slot; no parts for a caller of run() that was served at once."""


def watch(observer: Observer, stream: int, place: int, slot: Slot) -> Watch:
    """What a worker calls for its slot."""
    return partial(_tell, observer, stream, place, slot)


def _tell(
    observer: Observer,
    stream: int,
    place: int,
    slot: Slot,
    parts: Sequence[Part] | None,
    rows: int,
    extents: tuple[int, ...],
    moments: Moments,
) -> None:
    if parts is None:
        observed: tuple[ObservedPart, ...] = (ObservedPart(next(_NUMBERS), moments.taken_s, 0, rows),)
    else:
        observed = tuple(ObservedPart(_number(part[0]), part[0].arrival, *part[1:]) for part in parts)
    observer(Execution(stream, place, observed, rows, extents, moments, slot.step_times()))


def _number(request: Request) -> int:
    """The request's, given when a part of it is first seen; parts of one request may run at the same time."""
    if request.number is None:
        request.number = next(_NUMBERS)
    return request.number
