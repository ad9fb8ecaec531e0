"""A device whose model is a Python function: it records every launch and can be held, for tests of the runtime."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpu_engine.errors import ExecutionError
from gpu_engine.ir.dim_text import parse
from gpu_engine.ir.dims import Dim, symbols
from gpu_engine.ir.evaluation import evaluator
from gpu_engine.ir.graph import Graph
from gpu_engine.plan.plan import Batching, Plan, Port
from gpu_engine.runtime.engine import Engine

Model = Callable[..., Sequence[Any]]
MakeEngine = Callable[..., Engine]
F32 = np.float32


@dataclass
class Launch:
    """One execution: where, of how many rows (axis 0 of the first input), and when."""

    stream: int
    slot: int
    rows: int
    extents: tuple[int, ...]
    thread: str
    started_s: float
    ended_s: float = 0.0


@dataclass
class RecordingDevice:
    """Runs `model(*inputs)` per launch; `gate` cleared holds every execution at its start, `began` counts the starts.

    Every stage overwrites the outputs of the launch before it, as a real arena would.
    """

    model: Model
    asynchronous: bool = False
    batch_limit: int | None = None
    bucketed: bool = False
    devices: int = 1
    own_memory: bool = True
    captured: int = 0
    bits: bool = True
    stream_limit: int | None = None
    intake: None = None
    free_nbytes: int = 1 << 40
    row_nbytes: int = 1
    name: str = "recording"
    reason: str = "a test"
    launches: list[Launch] = field(default_factory=list)
    entered: list[str] = field(default_factory=list)
    closed: list[int] = field(default_factory=list)
    opened: tuple[int, int, int | None] | None = None
    most_in_flight: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.began = threading.Semaphore(0)

    def auto_streams(self) -> int:
        return 2

    def properties(self) -> dict[str, Any]:
        return {
            "FULL_DEVICE_NAME": "Recording device",
            "DEVICE_ARCHITECTURE": "none",
            "DEVICE_UUID": "0",
            "OPTIMIZATION_CAPABILITIES": ("FP32",),
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,
            "CACHE_DIR": "",
            "LOADED_FROM_CACHE": False,
            "USES_THREADS": True,
        }

    def timed(self) -> RecordingDevice:
        return self

    def lower(self, graph: Graph, batching: Batching) -> Plan:
        raise NotImplementedError("tests write plans by hand")

    def open(self, plan: Plan, streams: int, slots: int, threads: int | None) -> Sequence[RecordingStream]:
        self.opened = (streams, slots, threads)
        return [RecordingStream(self, plan, i, slots, threads or 1) for i in range(streams)]

    def memory(self, plan: Plan, extents: tuple[int, ...]) -> tuple[int, int]:
        activations = self.row_nbytes
        for extent in extents:
            activations *= extent
        return 1000, activations

    def captured_nbytes(self, plan: Plan) -> int:
        return self.captured

    def staging_nbytes(self, plan: Plan, extents: tuple[int, ...]) -> int:
        return 7 * extents[0]

    def same_bits(self, plan: Plan) -> bool:
        return self.bits

    def free_memory(self) -> int:
        return self.free_nbytes

    def hold(self) -> None:
        """Let no execution end until `release`."""
        self.gate.clear()

    def release(self) -> None:
        self.gate.set()

    def wait_begun(self, count: int = 1) -> None:
        """Wait until `count` more executions have begun."""
        for _ in range(count):
            assert self.began.acquire(timeout=30), "no execution began"


class RecordingStream:
    def __init__(self, device: RecordingDevice, plan: Plan, index: int, slots: int, threads: int) -> None:
        self.device, self.index, self.in_flight, self.threads = device, index, 0, threads
        self.lock = threading.Lock()
        self.slots = [RecordingSlot(self, plan, i) for i in range(slots)]
        self.work: queue.SimpleQueue[RecordingSlot | None] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None
        if device.asynchronous:
            self.thread = threading.Thread(target=self._execute, name=f"recording stream {index}", daemon=True)
            self.thread.start()

    def enter(self) -> None:
        self.device.entered.append(threading.current_thread().name)

    def close(self) -> None:
        self.device.closed.append(self.index)
        if self.thread is not None:
            self.work.put(None)
            self.thread.join()

    def _execute(self) -> None:
        while (slot := self.work.get()) is not None:
            slot.execute()


class RecordingSlot:
    def __init__(self, stream: RecordingStream, plan: Plan, index: int) -> None:
        self.stream, self.plan, self.index = stream, plan, index
        self.shapes = [evaluator(port.shape, plan.symbols) for port in plan.input_ports]
        self.inputs: list[Any] = []
        self.outputs: Sequence[Any] = []
        self.error: Exception | None = None
        self.finished = threading.Event()

    def stage(self, extents: tuple[int, ...]) -> Sequence[Any]:
        for output in self.outputs:
            output.fill(77)
        self.extents = extents
        ports = zip(self.plan.input_ports, self.shapes, strict=True)
        self.inputs = [np.full(shape(*extents), 99).astype(port.dtype) for port, shape in ports]
        return self.inputs

    def launch(self) -> None:
        stream = self.stream
        self.finished.clear()
        with stream.lock:
            stream.in_flight += 1
            most = stream.device.most_in_flight
            most[stream.index] = max(most.get(stream.index, 0), stream.in_flight)
        if stream.thread is not None:
            stream.work.put(self)
        else:
            self.execute()

    def execute(self) -> None:
        device, stream = self.stream.device, self.stream
        rows = len(self.inputs[0]) if self.inputs and self.inputs[0].ndim else 1
        name = threading.current_thread().name
        launch = Launch(stream.index, self.index, rows, self.extents, name, time.monotonic())
        device.launches.append(launch)
        device.began.release()
        assert device.gate.wait(timeout=60), "the test never released the device"
        try:
            self.error, self.outputs = None, [np.array(output) for output in device.model(*self.inputs)]
            assert [output.dtype for output in self.outputs] == [port.dtype for port in self.plan.output_ports]
        except Exception as error:
            self.error = error
        launch.ended_s = time.monotonic()
        with stream.lock:
            stream.in_flight -= 1
        self.finished.set()

    def wait(self) -> Sequence[Any]:
        assert self.finished.wait(timeout=60), "the launch never finished"
        if self.error is not None:
            raise self.error
        return self.outputs

    def step_times(self) -> None:
        """Made-up models have no steps."""


def plan_of(
    inputs: dict[str, tuple[Any, tuple[int | str, ...]]],
    outputs: dict[str, tuple[Any, tuple[int | str, ...]]],
    batch: str | None = "N",
    refused: str = "",
) -> Plan:
    """A plan without steps: ports as {name: (dtype, shape)}, extents as in dim_param ("N", "8*h"); a port carries the
    batch if its first extent names it."""
    ports = [
        [Port(name, np.dtype(dtype), _dims(shape)) for name, (dtype, shape) in side.items()]
        for side in (inputs, outputs)
    ]
    carries = [
        tuple(bool(port.shape) and batch is not None and batch in symbols(port.shape[0]) for port in side)
        for side in ports
    ]
    names = dict.fromkeys(name for port in ports[0] for dim in port.shape for name in sorted(symbols(dim)))
    return Plan(
        steps=(),
        buffers=(),
        inputs=tuple(range(len(inputs))),
        outputs=tuple(range(len(inputs), len(inputs) + len(outputs))),
        input_ports=tuple(ports[0]),
        output_ports=tuple(ports[1]),
        symbols=tuple(names),
        batching=Batching(None if refused else batch, carries[0], carries[1], refused),
    )


def double(x: Any) -> list[Any]:
    """The model of `plain` plans: y = 2 x + 1."""
    return [x * 2 + 1]


def plain(**rest: Any) -> Plan:
    """x: float32[N, 4] -> y: float32[N, 4]."""
    return plan_of({"x": (F32, ("N", 4))}, {"y": (F32, ("N", 4))}, **rest)


def rows(*values: float) -> Any:
    """One row of 4 equal numbers for each value."""
    return np.repeat(np.array(values, F32)[:, None], 4, axis=1)


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do."""
    ends = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < ends, "it never happened"
        time.sleep(0.0005)


def occupy(engine: Engine, device: RecordingDevice, inputs: Any) -> list[Any]:
    """Hold the device and fill the slots of its only stream, one request each."""
    device.hold()
    futures = []
    for _ in range(2 if device.asynchronous else 1):
        futures.append(engine.submit(inputs))
        until(lambda: engine.statistics().waiting == 0)
    return futures


def poisoned(model: Model) -> Model:
    """The model, failing as a whole if any value of its first input is NaN."""

    def run(first: Any, *rest: Any) -> Sequence[Any]:
        if np.isnan(first).any():
            raise ExecutionError("Poison 'p': a NaN came in")
        return model(first, *rest)

    return run


def _dims(shape: tuple[int | str, ...]) -> tuple[Dim, ...]:
    parsed = [dim if isinstance(dim, int) else parse(dim) for dim in shape]
    assert None not in parsed
    return tuple(dim for dim in parsed if dim is not None)
