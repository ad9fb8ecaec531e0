"""Where `benchmarks.gpu` measures: a GPU, or for rehearsals this machine, whose clock then says nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gpu_engine.compiler import open_device
from gpu_engine.gpu.interpret import Interpreter
from gpu_engine.options import parse_device
from gpu_engine.runtime.device import Device
from gpu_engine.runtime.late import load

Run = Callable[[], Any]


@dataclass(frozen=True)
class Activity:
    """A kernel, or a copy, on a device's timeline in seconds."""

    name: str
    start_s: float
    end_s: float
    copy: bool = False


@dataclass(frozen=True)
class Effort:
    """How long a figure is measured, after so many runs that do not count."""

    seconds: float
    least_runs: int
    most_runs: int
    warm_runs: int


class Place(Protocol):
    """A device for the engine and one for PyTorch, with a clock for what they do."""

    @property
    def engine(self) -> str:
        """Its name for `compile`."""
        ...

    @property
    def kernels(self) -> str:
        """The name of the device whose plans are replayed."""
        ...

    @property
    def torch(self) -> str:
        """Its name for PyTorch."""
        ...

    @property
    def effort(self) -> Effort: ...

    @property
    def scale(self) -> int:
        """How large the arrays are that ceilings are measured on: see `gpu_ceilings`."""
        ...

    def driver(self, arch: int) -> Any:
        """See `gpu.driver.Driver`."""
        ...

    def replayable(self, driver: Any, run: Run) -> Run:
        """The launches that `run` starts, all at a time where the device can."""
        ...

    def engine_times(self, driver: Any, run: Run) -> list[float]:
        """Seconds that the device takes for each of many runs, warm."""
        ...

    def torch_times(self, run: Run) -> list[float]:
        """As `engine_times`, of what PyTorch starts."""
        ...

    def activities(self, run: Run) -> list[Activity]:
        """What the device did while `run` ran, in the order of time; nothing where that cannot be seen."""
        ...


class Host:
    """The GPU's kernels interpreted, engines and PyTorch on the CPU."""

    engine, kernels, torch, scale = "cpu", "interpret", "cpu", 1 << 7
    effort = Effort(0.0, 2, 2, 1)

    def driver(self, arch: int) -> Interpreter:
        return Interpreter()

    def replayable(self, driver: Interpreter, run: Run) -> Run:
        return run

    def engine_times(self, driver: Interpreter, run: Run) -> list[float]:
        with driver.active():
            return self.torch_times(run)

    def torch_times(self, run: Run) -> list[float]:
        return wall_times(run, self.effort)

    def activities(self, run: Run) -> list[Activity]:
        """Everything as one kernel behind a copy of no length."""
        started_s = time.perf_counter()
        run()
        ended_s = time.perf_counter()
        return [Activity("upload", started_s, started_s, True), Activity("everything", started_s, ended_s)]


PLACES = {"host": Host, "cuda": "benchmarks.gpu_cuda_place:CudaPlace"}


def place(name: str) -> Place:
    """ "cuda" or "host"."""
    found = PLACES[name]
    made: Place = (load(found) if isinstance(found, str) else found)()
    return made


def opened(name: str, precision: str) -> Device:
    """A device by its name for `compile`; DeviceError with the reason."""
    return open_device(parse_device(name), None, precision)[0]


def wall_times(run: Run, effort: Effort) -> list[float]:
    """Seconds of each of many runs that return when they are done."""
    for _ in range(effort.warm_runs):
        run()
    times: list[float] = []
    ended_s = time.perf_counter() + effort.seconds
    while len(times) < effort.least_runs or (time.perf_counter() < ended_s and len(times) < effort.most_runs):
        started_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - started_s)
    return times


def event_times(
    run: Run, effort: Effort, make: Callable[[], Any], finish: Callable[[], Any], seconds: Callable[[Any, Any], float]
) -> list[float]:
    """Seconds between events around each of many runs on the current stream, which are started without waiting for
    each other."""
    for _ in range(effort.warm_runs):
        run()
    finish()
    once_s = _batch(run, 1, make, finish, seconds)[0]
    runs = int(min(effort.most_runs, max(effort.least_runs, effort.seconds / max(once_s, 1e-6))))
    return _batch(run, runs, make, finish, seconds)


def _batch(
    run: Run, runs: int, make: Callable[[], Any], finish: Callable[[], Any], seconds: Callable[[Any, Any], float]
) -> list[float]:
    events: Sequence[Any] = [make() for _ in range(2 * runs)]
    for first, last in zip(events[::2], events[1::2], strict=True):
        first.record()
        run()
        last.record()
    finish()
    return [seconds(first, last) for first, last in zip(events[::2], events[1::2], strict=True)]
