"""Worker processes that compile and run fuzz cases under limits: address space, time, and files they may open."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import re
import resource
import signal
import tempfile
import time
import traceback
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

import gpu_engine
from gpu_engine.runtime.engine import Engine
from tests.fuzz_cases import FuzzCase, fuzz_case, inputs_for
from tests.fuzz_folder import CANARY, Watch, prepare
from tests.fuzz_reference import Reference, disagreement

HEADROOM_NBYTES = 2 << 30
CASES_PER_PROCESS = 250
LOOK_AFTER_S, ENDLESS_ITERATIONS = 3.0, 500
START_LIMIT_S = 60.0
Ran = tuple[Mapping[str, Any], Mapping[str, Any]]
AGREES, SPECIFIED, RUNS, LARGE, ENDLESS = (
    "runs as ONNX Runtime does",
    "runs as onnx's evaluator does, ONNX Runtime otherwise",
    "runs, with nothing to compare",
    "compiles, wants large inputs",
    "a loop of the model's own without an end",
)


@dataclass(frozen=True)
class Outcome:
    """What became of a case: it ran, a typed error and its stage, or `failure`: what must not happen.

    `seconds` are of the processor, so that other processes do not count; a worker that sleeps is a hang all the same.
    """

    number: int
    kind: str
    seconds: float
    nbytes: int = 0
    failure: str = ""


class TimeUp(BaseException):
    """Raised by the alarm."""


class Endless(BaseException):
    """Raised by the alarm inside a Loop that has run for many iterations: what the model asks for."""


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    connection: Connection
    number: int
    since: float
    served: int = 1


def run_numbers(numbers: Sequence[int], first_seed: int, jobs: int, limit_s: float) -> Iterator[Outcome]:
    """The outcome of every case, as they come."""
    waiting = deque(numbers)
    workers: dict[Connection, _Worker] = {}
    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                worker = _start(waiting.popleft(), first_seed, limit_s)
                workers[worker.connection] = worker
            for connection, worker in list(workers.items()):
                outcome = _outcome(worker, limit_s)
                if outcome is None:
                    continue
                yield outcome
                if (
                    worker.process.is_alive()
                    and not _is_stuck(outcome)
                    and waiting
                    and worker.served < CASES_PER_PROCESS
                ):
                    worker.number, worker.since, worker.served = waiting.popleft(), time.monotonic(), worker.served + 1
                    connection.send(worker.number)
                else:
                    del workers[connection]
                    _stop(worker)
            wait(list(workers), timeout=0.5)
    finally:
        for worker in workers.values():
            _stop(worker)


def _is_stuck(outcome: Outcome) -> bool:
    return outcome.kind in ("hang", "crash")


def _outcome(worker: _Worker, limit_s: float) -> Outcome | None:
    """What the worker says, or what its silence means; None while it may still answer."""
    seconds = time.monotonic() - worker.since
    if worker.connection.poll():
        try:
            outcome: Outcome = worker.connection.recv()
            return outcome
        except (EOFError, ConnectionResetError):
            worker.process.join(10)
            return Outcome(worker.number, "crash", seconds, failure=f"exit code {worker.process.exitcode}")
    allowed_s = 10 * limit_s + START_LIMIT_S * (worker.served == 1)
    if seconds > allowed_s:
        return Outcome(worker.number, "hang", seconds, failure="does not answer")
    return None


def _start(number: int, first_seed: int, limit_s: float) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, first_seed, limit_s), daemon=True)
    process.start()
    theirs.close()
    ours.send(number)
    return _Worker(process, ours, number, time.monotonic())


def _stop(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.connection.close()


def _serve(connection: Connection, first_seed: int, limit_s: float) -> None:
    warnings.simplefilter("ignore")
    logging.disable()
    with tempfile.TemporaryDirectory() as root:
        folder, watch, reference = prepare(Path(root).resolve()), Watch(), Reference()
        warm_up()
        limit_memory()
        while True:
            try:
                number = connection.recv()
            except EOFError:
                return
            connection.send(measured(fuzz_case(first_seed, number), folder, watch, limit_s, reference))


def warm_up() -> None:
    """Make the process as large as it gets by itself, so that its limit counts what a case adds."""
    for number in itertools.islice(itertools.count(), 3):
        run_case(fuzz_case(0, number), None)


def limit_memory() -> None:
    """No more than HEADROOM_NBYTES of address space beyond what there is."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + HEADROOM_NBYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def measured(case: FuzzCase, folder: Path, watch: Watch, limit_s: float, reference: Reference) -> Outcome:
    """The outcome of one case within `limit_s`, with its time and the memory it took at most."""
    path = folder / "m.onnx"
    path.write_bytes(case.model)
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    started, ran = time.process_time(), None
    look_s = min(LOOK_AFTER_S, limit_s)
    signal.signal(signal.SIGPROF, _Alarm())
    signal.setitimer(signal.ITIMER_PROF, look_s, max(limit_s - look_s, 0.1))
    watch.folder = folder
    try:
        kind, failure, ran = run_case(case, path if case.from_file else None)
    except TimeUp as error:
        kind, failure = "hang", f"takes more than {limit_s:g} s {_place(error)}"
    except Endless:
        kind, failure = ENDLESS, ""
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        watch.folder = None
    if watch.found:
        kind, failure = "reads outside the model's folder", ", ".join(watch.found)
        watch.found.clear()
    seconds, nbytes = time.process_time() - started, max(0, _memory("VmHWM") - before)
    if ran is not None and not failure:
        kind, failure = compared(case, ran, reference)
    return Outcome(case.number, kind, seconds, nbytes, failure)


def compared(case: FuzzCase, ran: Ran, reference: Reference) -> tuple[str, str]:
    """(the outcome's kind, how the results differ from ONNX Runtime's or "")."""
    inputs, outputs = ran
    expected = reference.outputs(case.model, inputs)
    if expected is None:
        return RUNS, ""
    found = disagreement(case.model, outputs, expected)
    if not found:
        return AGREES, ""
    specified = reference.outputs(case.model, inputs, judge=True)
    if specified is not None and not disagreement(case.model, outputs, specified):
        return SPECIFIED, ""
    return "differs from ONNX Runtime", found


def run_case(case: FuzzCase, path: Path | None) -> tuple[str, str, Ran | None]:
    """(the outcome's kind, what is wrong with it or "", inputs and outputs if both are plain arrays by name)."""
    stage = "compile"
    try:
        with gpu_engine.compile(case.model if path is None else path, device="cpu") as engine:
            values = inputs_for(engine, case)
            if values is None:
                return LARGE, "", None
            stage = "run"
            inputs = dict(zip(engine.input_names, values, strict=True))
            outputs = engine.run(inputs)
    except gpu_engine.GpuEngineError as error:
        return f"{type(error).__name__} ({stage})", "", None
    except Exception as error:
        return f"{type(error).__name__} ({stage}), untyped", f"{_first_line(error)} {_place(error)}", None
    if _holds_canary(list(outputs.values())):
        return "leak", "an output holds what lies outside the folder", None
    return RUNS, "", (inputs, outputs) if isinstance(engine, Engine) else None


def _holds_canary(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_holds_canary, value))
    return isinstance(value, np.ndarray) and value.dtype == np.float32 and bool((value == np.float32(CANARY)).any())


class _Alarm:
    """Looks at what runs when it rings first, and ends it when it rings again."""

    def __init__(self) -> None:
        self.rang = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_name == "run_loop" and frame.f_locals.get("iteration", 0) > ENDLESS_ITERATIONS:
                raise Endless
            if frame.f_code.co_name == "_call" and frame.f_code.co_filename.endswith("stream.py"):
                raise Endless  # only loops among native steps have signals handled
            frame = frame.f_back
        if self.rang:
            raise TimeUp
        self.rang = True


def _memory(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _place(error: BaseException) -> str:
    """Where in our packages the error was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/gpu_engine/" in frame.filename or "/cpu_fallback/" in frame.filename]
    places = [f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}" for frame in ours]
    return f"({' < '.join(reversed(places[-2:]))})" if places else ""
