"""The protocol of a device: lower a graph, then open streams whose slots stage, launch and wait.

A slot is the unit of memory: one arena, one staging area for inputs. A stream is the unit of concurrency: launches
of one stream run in order, launches of different streams run at the same time. One thread at a time stages and
launches on a stream, and one owns a slot from `stage` to `wait`, so nothing here locks; but `wait` for one slot may
run while another thread stages and launches another slot of the same stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gpu_engine.ir.graph import Graph
from gpu_engine.plan.plan import Batching, Plan
from gpu_engine.runtime.device_tensors import DeviceTensor, GivenTensor, Intake

Array = NDArray[np.generic]


@dataclass(frozen=True, slots=True, eq=False)
class StepTimes:
    """What the steps of a launch took.

    `seconds` and `runs` [steps] are the totals of each. Of the runs that were kept, in order, `step` [runs] says which
    step it was; each began at `bounds_s[i]` and ended at `bounds_s[i + 1]`, in seconds of `time.monotonic`.
    """

    seconds: NDArray[np.float64]
    runs: NDArray[np.int64]
    step: NDArray[np.int64]
    bounds_s: NDArray[np.float64]


class Slot(Protocol):
    """Room for one batch in flight."""

    def stage(self, extents: tuple[int, ...]) -> Sequence[Array]:
        """Bind to `extents` (the values of `plan.symbols`) and return one writable array per input, to be filled.

        Cheap where the slot was bound to the same extents before; otherwise arithmetic only: nothing is compiled. A
        launch that failed, or that nobody waited for because the wait was interrupted, leaves the slot usable.
        """
        ...

    def launch(self) -> None:
        """Start the staged execution. An asynchronous device returns before it has finished."""
        ...

    def wait(self) -> Sequence[Array]:
        """Wait for the launch and return one array per output, valid until the next `stage`; raises its error."""
        ...

    def step_times(self) -> StepTimes | None:
        """Of the launch that was waited for last, until the next `stage`; None unless the device is `timed`."""
        ...


@dataclass(frozen=True, slots=True)
class Cut:
    """Rows `start` to `stop` of an execution, which are one request's; from row `first` on of `whole`, where it was cut
    into parts."""

    start: int
    stop: int
    first: int = 0
    whole: Whole | None = None


class Whole(Protocol):
    """The outputs of a request that was cut into parts, which come from several executions."""

    @property
    def rows(self) -> int: ...

    def output(self, position: int, make: Callable[[], DeviceTensor]) -> DeviceTensor:
        """One of them, made by whoever asks first."""
        ...


class TensorSlot(Slot, Protocol):
    """A slot of a device with an `intake`. Between `stage` and `launch` it is told what lies in the device's memory."""

    def read(self, position: int, tensors: Sequence[GivenTensor]) -> None:
        """Instead of filling a staged array: the input is these, one behind the other along axis 0.

        A contiguous one of the whole shape is read where it lies; others are copied on the device. The slot holds them
        until the launch has ended.
        """
        ...

    def give(self, rows: int, cuts: Sequence[Cut]) -> None:
        """Of an execution of so many `rows`, the outputs of each cut stay on the device, in memory of their own."""
        ...

    def given(self) -> Sequence[Sequence[DeviceTensor]]:
        """Behind a `wait`, which then copied no output to the host: for each cut its outputs, once."""
        ...


class Stream(Protocol):
    """One lane of execution over one plan."""

    @property
    def slots(self) -> Sequence[Slot]: ...

    @property
    def threads(self) -> int:
        """Threads of the host that an execution uses."""
        ...

    def enter(self) -> None:
        """Called once by each thread that will serve this stream for long: pins it to the stream's cores."""
        ...

    def close(self) -> None: ...


class Device(Protocol):
    """A place where plans run."""

    @property
    def name(self) -> str:
        """ "cpu", "cuda:0", ..."""
        ...

    @property
    def reason(self) -> str:
        """Why this device was chosen or what it is, for people."""
        ...

    @property
    def asynchronous(self) -> bool:
        """Whether `launch` returns early, so that a stream keeps two launches in flight."""
        ...

    @property
    def batch_limit(self) -> int | None:
        """The most rows that the batch formula may choose here (8 on the CPU), None for no limit."""
        ...

    @property
    def devices(self) -> int:
        """Of how many devices it is made: streams are opened on each of them, and weights lie once on each."""
        ...

    @property
    def own_memory(self) -> bool:
        """Whether it has a memory of its own, into which `open` copies the weights."""
        ...

    @property
    def bucketed(self) -> bool:
        """Whether executions should have few sizes, because each is prepared by itself: see `runtime.buckets`."""
        ...

    def same_bits(self, plan: Plan) -> bool:
        """Whether a row's bits are known to be the same in executions of any number of rows."""
        ...

    @property
    def stream_limit(self) -> int | None:
        """The most streams worth opening (the cores of a CPU), None for no limit."""
        ...

    @property
    def intake(self) -> Intake | None:
        """How tensors in the device's memory come in, where it has its own: then its slots are `TensorSlot`s."""
        ...

    def auto_streams(self) -> int:
        """How many streams "auto" means."""
        ...

    def properties(self) -> Mapping[str, Any]:
        """What OpenVINO's properties say of the device: EXECUTION_DEVICES if it is several, FULL_DEVICE_NAME,
        DEVICE_ARCHITECTURE, DEVICE_UUID, OPTIMIZATION_CAPABILITIES, INFERENCE_PRECISION_HINT, ENABLE_CPU_PINNING,
        CACHE_DIR, LOADED_FROM_CACHE (of what was lowered last), and USES_THREADS, whether it computes with threads of
        the host."""
        ...

    def timed(self) -> Device:
        """The same device, but slots that it opens tell what each step took. For profiles: steps are slower."""
        ...

    def lower(self, graph: Graph, batching: Batching) -> Plan: ...

    def open(self, plan: Plan, streams: int, slots: int, threads: int | None) -> Sequence[Stream]:
        """Streams over one plan that share its weights, each with `slots` slots; `threads` cores per stream."""
        ...

    def memory(self, plan: Plan, extents: tuple[int, ...]) -> tuple[int, int]:
        """(weights, activations of one slot) in bytes while bound to `extents`, on each of the devices."""
        ...

    def captured_nbytes(self, plan: Plan) -> int:
        """Bytes that a slot keeps, beside its arena, for each size that it prepared: 0 where nothing is captured."""
        ...

    def staging_nbytes(self, plan: Plan, extents: tuple[int, ...]) -> int:
        """Bytes of the host in which a slot keeps inputs and outputs on their way; 0 where they lie in the arena."""
        ...

    def free_memory(self) -> int:
        """Bytes that a new allocation may still take, on the fullest of the devices."""
        ...
