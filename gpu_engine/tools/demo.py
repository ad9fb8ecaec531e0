"""The demo: a trained digit network over its held-out images, one by one and in one call, and what batching does for
callers at the same time, on a network whose cost is its weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gpu_engine
from gpu_engine.tools.load import Course, closed_loop
from gpu_engine.tools.targets import Called

FOLDER = Path(__file__).parent / "demo_data"
CALIBRATION_S = 0.3
TURNS = 4

Array = NDArray[Any]
Advance = Callable[[int], None]
Start = Callable[[str, int], Advance]


@dataclass(frozen=True)
class Digits:
    """The network and its held-out images: float32 [n, 1, 8, 8] between 0 and 1, labels [n]."""

    model: Path
    images: Array
    labels: Array


@dataclass(frozen=True)
class Pass:
    """One way of running the images: how many items went by in how many seconds, and every answer."""

    items: int
    seconds: float
    guesses: Array

    @property
    def items_per_s(self) -> float:
        return self.items / self.seconds


@dataclass(frozen=True)
class Callers:
    """What `count` callers got, each with one request at a time, without and with batching: the medians of turns, in
    which the two took turns. `difference` is the greatest between the answers of both."""

    count: int
    alone_per_s: float
    shared_per_s: float
    mean_batch: float
    difference: float


@dataclass(frozen=True)
class Report:
    """What the demo measured."""

    device: str
    single: Pass
    batched: Pass
    labels: Array
    streams: int
    batch: int
    batch_reason: str
    limiting_factor: str
    callers: Callers

    @property
    def right(self) -> int:
        """How many of the images the batched pass read right, each counted once."""
        return int((self.batched.guesses[: len(self.labels)] == self.labels).sum())


def load_digits() -> Digits:
    """The embedded model and its images; benchmarks/train_digits.py makes both."""
    data = np.load(FOLDER / "digits.npz")
    images = (data["images"][:, None] / np.float32(16)).astype(np.float32)
    return Digits(FOLDER / "digits.onnx", images, data["labels"])


def run_demo(device: str, streams: int, requests: int, seconds: float, start: Start) -> Report:
    """All passes, each of about `seconds`; `start(title, items)` returns what is told about items done."""
    digits = load_digits()
    with _engine(digits.model, device=device, hint="latency") as engine:
        single = _measure("one by one", digits, seconds, start, lambda images: _one_by_one(engine, images))
    with _engine(digits.model, device=device, streams=streams, requests=requests) as engine:
        batched = _measure("in one call", digits, seconds, start, lambda images: _in_one_call(engine, images))
        plan = engine.explain_batching()
        return Report(
            device=str(engine.device),
            single=single,
            batched=batched,
            labels=digits.labels,
            streams=streams,
            batch=plan.batch,
            batch_reason=plan.reason,
            limiting_factor=plan.limiting_factor,
            callers=run_callers(device, streams, requests, seconds, start),
        )


def run_callers(device: str, streams: int, callers: int, seconds: float, start: Start) -> Callers:
    """What so many callers of the wide network (benchmarks/wide_network.py makes it) get without and with batching."""
    random = np.random.default_rng(0)
    feeds = [random.random((1, 2048), np.float32) for _ in range(callers)]
    rates: tuple[list[float], list[float]] = ([], [])
    answers: tuple[list[Array], list[Array]] = ([*feeds], [*feeds])
    advance = start(f"{callers} callers", 2 * TURNS)
    with (
        _engine(FOLDER / "wide.onnx", device=device, streams=streams, auto_batching=False) as alone,
        _engine(FOLDER / "wide.onnx", device=device, streams=streams) as shared,
    ):
        for _ in range(TURNS):
            for engine, mine, found in zip((alone, shared), rates, answers, strict=True):
                mine.append(_call(engine, feeds, found, seconds / TURNS))
                advance(1)
        counts = shared.statistics()
    return Callers(
        count=callers,
        alone_per_s=statistics.median(rates[0]),
        shared_per_s=statistics.median(rates[1]),
        mean_batch=counts.mean_batch,
        difference=_difference(*answers),
    )


def _call(engine: gpu_engine.Engine, feeds: list[Array], answers: list[Array], seconds: float) -> float:
    """Have a thread for each feed call the engine, at least once for each: calls a second."""
    numbers = count()

    def call() -> None:
        number = next(numbers) % len(feeds)
        answers[number] = engine.run(feeds[number])

    target = Called(call, len(feeds))
    taken = closed_loop(target, len(feeds), Course(seconds, least=len(feeds)))
    target.close()
    return len(taken.finished_s) / taken.seconds


def _engine(model: Path, **options: Any) -> gpu_engine.Engine:
    engine = gpu_engine.compile(model, **options)
    assert isinstance(engine, gpu_engine.Engine)
    return engine


def _difference(found: list[Array], others: list[Array]) -> float:
    """The greatest between answers to the same feed, as a share of the greatest answer."""
    return float(np.abs(np.stack(found) - np.stack(others)).max() / np.abs(others).max())


def _measure(title: str, digits: Digits, seconds: float, start: Start, run: Callable[[Any], Iterator[int]]) -> Pass:
    items = _calibrate(digits, seconds, run)
    advance = start(title, items)
    guesses = np.empty(items, np.int64)
    began = time.perf_counter()
    for done, guess in enumerate(run(islice(cycle(digits.images), items))):
        guesses[done] = guess
        if done % 64 == 63:
            advance(64)
    elapsed = time.perf_counter() - began
    advance(items % 64)
    return Pass(items, elapsed, guesses)


def _calibrate(digits: Digits, seconds: float, run: Callable[[Any], Iterator[int]]) -> int:
    """How many items take about `seconds`: whole rounds over the images, at least one."""
    began, done = time.perf_counter(), 0
    for _ in run(cycle(digits.images)):
        done += 1
        if time.perf_counter() - began > CALIBRATION_S:
            break
    rate = done / (time.perf_counter() - began)
    return len(digits.images) * max(1, round(rate * seconds / len(digits.images)))


def _one_by_one(engine: gpu_engine.Engine, images: Iterator[Array]) -> Iterator[int]:
    for image in images:
        yield int(engine.run(image[None]).argmax())


def _in_one_call(engine: gpu_engine.Engine, images: Iterator[Array]) -> Iterator[int]:
    """Answers in the images' order, of thousands of rows at a time."""
    while several := list(islice(images, 2048)):
        yield from engine.run_many(np.stack(several)).argmax(1).tolist()
