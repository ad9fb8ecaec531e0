"""The demo: a trained digit network over its held-out images, one by one and then through streams and the batcher."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gpu_engine

FOLDER = Path(__file__).parent / "demo_data"
CALIBRATION_S = 0.3

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
class Report:
    """What the demo measured."""

    device: str
    single: Pass
    batched: Pass
    labels: Array
    streams: int
    requests: int
    batch: int
    batch_reason: str
    limiting_factor: str
    mean_batch: float

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
    """Both passes, each of about `seconds`; `start(title, items)` returns what is told about items done."""
    digits = load_digits()
    with _engine(digits, device=device, streams=1, requests=1, batch=1) as engine:
        single = _measure("one by one", digits, seconds, start, lambda images: _one_by_one(engine, images))
    with _engine(digits, device=device, streams=streams, requests=requests) as engine:
        title = f"{requests} requests in flight"
        batched = _measure(title, digits, seconds, start, lambda images: _in_flight(engine, images, requests))
        plan, counts = engine.explain_batching(), engine.statistics()
        return Report(
            device=str(engine.device),
            single=single,
            batched=batched,
            labels=digits.labels,
            streams=streams,
            requests=requests,
            batch=plan.batch,
            batch_reason=plan.reason,
            limiting_factor=plan.limiting_factor,
            mean_batch=counts.mean_batch,
        )


def _engine(digits: Digits, device: str, streams: int, requests: int, batch: int | None = None) -> gpu_engine.Engine:
    engine = gpu_engine.compile(digits.model, device=device, streams=streams, requests=requests, batch=batch)
    assert isinstance(engine, gpu_engine.Engine)
    return engine


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


def _in_flight(engine: gpu_engine.Engine, images: Iterator[Array], requests: int) -> Iterator[int]:
    """Answers in the images' order, with `requests` of them submitted and not yet answered at any time."""
    flying = deque(engine.submit(image[None]) for image in islice(images, requests))
    while flying:
        yield int(flying.popleft().result().argmax())
        flying.extend(engine.submit(image[None]) for image in islice(images, 1))
