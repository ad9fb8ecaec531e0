"""Executions as a trace that Perfetto and chrome://tracing open.

Every stream is a process and every slot of it a thread, so that they show side by side. A batch is a slice on its slot,
with copy-in, compute and copy-out inside it and the steps inside compute. Requests wait in a process of their own, each
on a thread that no other needs at the time; an arrow (a flow event) leads from there to the batch that took it.

https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU (Trace Event Format)
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_engine.runtime.observation import Execution, ObservedPart

QUEUE = 1
"""The process of waiting requests; streams are those behind it."""
Event = dict[str, Any]


def trace_events(executions: Sequence[Execution], steps: Sequence[tuple[str, str]]) -> list[Event]:
    """Events in order of time, in microseconds from the first; `steps` are the name and the kernel of each step."""
    ordered = sorted(executions, key=lambda one: one.moments.taken_s)
    if not ordered:
        return []
    zero_s = min([part.arrival_s for one in ordered for part in one.parts] + [ordered[0].moments.taken_s])
    taken: dict[int, float] = {}
    for one in ordered:
        for part in one.parts:
            taken.setdefault(part.number, one.moments.taken_s)
    lanes = _waiting_lanes({part.number: part for one in ordered for part in one.parts}, taken)
    numbers = {number: place for place, number in enumerate(lanes)}
    events: list[Event] = []
    for number, (lane, arrival_s) in lanes.items():
        events += _waiting(numbers[number], lane, arrival_s - zero_s, taken[number] - zero_s)
    for one in ordered:
        events += _batch(one, numbers, zero_s, steps)
    events.sort(key=lambda event: (event["ts"], -event.get("dur", 0.0)))
    return [*_names(ordered, max((lane for lane, _ in lanes.values()), default=-1) + 1), *events]


def write_trace(path: Path, events: Sequence[Event], facts: Mapping[str, str]) -> None:
    """A file for ui.perfetto.dev; `facts` are shown with it."""
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ns", "otherData": dict(facts)}))


def _waiting_lanes(parts: Mapping[int, ObservedPart], taken: Mapping[int, float]) -> dict[int, tuple[int, float]]:
    """For every request, in order of arrival, a lane in which no other waits at the time, and its arrival."""
    busy: list[tuple[float, int]] = []
    free: list[int] = []
    found, count = {}, 0
    for number, part in sorted(parts.items(), key=lambda item: (item[1].arrival_s, item[0])):
        while busy and busy[0][0] <= part.arrival_s:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if free:
            lane = heapq.heappop(free)
        else:
            lane, count = count, count + 1
        found[number] = (lane, part.arrival_s)
        heapq.heappush(busy, (max(taken[number], part.arrival_s), lane))
    return found


def _waiting(number: int, lane: int, arrival_s: float, taken_s: float) -> Iterator[Event]:
    slice_ = _slice(f"request {number}", "queue", QUEUE, lane, arrival_s, max(taken_s, arrival_s))
    yield slice_ | {"args": {"request": number}}
    yield _flow("s", number, QUEUE, lane, arrival_s)


def _batch(one: Execution, numbers: Mapping[int, int], zero_s: float, steps: Sequence[tuple[str, str]]) -> list[Event]:
    process, thread = QUEUE + 1 + one.stream, one.slot
    taken, staged, computed, copied = (
        at - zero_s for at in (one.moments.taken_s, one.moments.staged_s, one.moments.computed_s, one.moments.copied_s)
    )
    requests = [numbers[part.number] for part in one.parts]
    rows = [f"{numbers[part.number]}: {part.start} to {part.stop}" for part in one.parts]
    name = f"{one.rows} row{'s' * (one.rows != 1)}"
    args = {"requests": requests, "rows": rows, "extents": list(one.extents)}
    events = [_slice(name, "batch", process, thread, taken, copied) | {"args": args}]
    for stage, start, stop in (
        ("copy in", taken, staged),
        ("compute", staged, computed),
        ("copy out", computed, copied),
    ):
        events.append(_slice(stage, "stage", process, thread, start, stop))
    for part in one.parts:
        if not part.start:
            events.append(_flow("f", numbers[part.number], process, thread, taken) | {"bp": "e"})
    if one.steps is not None:
        bounds = [min(max(at - zero_s, staged), computed) for at in one.steps.bounds_s.tolist()]
        for step, start, stop in zip(one.steps.step.tolist(), bounds, bounds[1:], strict=False):
            text, kernel = steps[step]
            details = {"step": step, "kernel": kernel}
            events.append(_slice(text, "step", process, thread, start, stop) | {"args": details})
    return events


def _slice(name: str, category: str, process: int, thread: int, start_s: float, stop_s: float) -> Event:
    """A complete event. Both ends are rounded, so that slices that touch still nest."""
    start, stop = round(start_s * 1e6, 3), round(stop_s * 1e6, 3)
    return {
        "name": name, "cat": category, "ph": "X", "ts": start, "dur": round(stop - start, 3), "pid": process,
        "tid": thread,
    }  # fmt: skip


def _flow(phase: str, number: int, process: int, thread: int, at_s: float) -> Event:
    return {
        "name": "request", "cat": "request", "ph": phase, "id": number, "ts": round(at_s * 1e6, 3), "pid": process,
        "tid": thread,
    }  # fmt: skip


def _names(executions: Iterable[Execution], lanes: int) -> list[Event]:
    """Metadata: what processes and threads are called, and their order."""
    slots = sorted({(one.stream, one.slot) for one in executions})
    events = [_name("process_name", QUEUE, 0, "name", "waiting requests")]
    events.append(_name("process_sort_index", QUEUE, 0, "sort_index", QUEUE))
    events += [_name("thread_name", QUEUE, lane, "name", f"waiting {lane}") for lane in range(lanes)]
    for stream in sorted({stream for stream, _ in slots}):
        events.append(_name("process_name", QUEUE + 1 + stream, 0, "name", f"stream {stream}"))
        events.append(_name("process_sort_index", QUEUE + 1 + stream, 0, "sort_index", QUEUE + 1 + stream))
    for stream, slot in slots:
        events.append(_name("thread_name", QUEUE + 1 + stream, slot, "name", f"slot {slot}"))
    return events


def _name(kind: str, process: int, thread: int, key: str, value: str | int) -> Event:
    return {"name": kind, "ph": "M", "ts": 0, "pid": process, "tid": thread, "args": {key: value}}
