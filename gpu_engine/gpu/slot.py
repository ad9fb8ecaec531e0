"""Streams and slots on a GPU: memory with fixed addresses, bindings of the shapes seen last, and running them.

Every slot has its own arena and ports, so that two batches of one stream can be in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpu_engine.errors import ExecutionError, GpuEngineError
from gpu_engine.gpu.clocks import StepClocks
from gpu_engine.gpu.control import Body, controls, run_bodies
from gpu_engine.gpu.driver import Driver, HostArray, Memory, Piece, Touched, host_array
from gpu_engine.gpu.exchange import Exchange, Place
from gpu_engine.gpu.launches import ArrayCall, BodyCall, Launch
from gpu_engine.gpu.program import Bound, Program, Segment, bind, located, rebased
from gpu_engine.ir.dtypes import STRING, DType
from gpu_engine.plan.execution import extents_after, step_failure
from gpu_engine.plan.plan import Plan, Step, constant_of, root
from gpu_engine.plan.zones import Ints
from gpu_engine.runtime.device import Cut, StepTimes
from gpu_engine.runtime.device_tensors import DeviceTensor, GivenTensor

CACHED_BINDINGS = 32
CACHED_ADDRESSES = 8
"""Sets of addresses of callers' tensors for each binding."""


class Weights:
    """A plan's constants on the device, once for all streams, its kernels ready to launch, and the bodies that its
    steps run, by step."""

    def __init__(self, plan: Plan, driver: Driver) -> None:
        program: Program = plan.program
        self.kernels = {kernel: driver.load(kernel) for kernel in program.kernels}
        self.memories: dict[int, Memory] = {}
        shared: dict[tuple[int, int], Memory] = {}
        for index in program.constants:
            array = plan.buffers[index].constant
            key = (array.__array_interface__["data"][0], array.nbytes)
            if key not in shared:
                shared[key] = driver.allocate(array.nbytes)
                driver.upload(driver.array(shared[key], 0, array.shape, array.dtype), array)
            self.memories[index] = shared[key]
        self.bodies = {
            i: [_body(body, driver) for body in step.kernel.bodies]
            for i, step in enumerate(plan.steps)
            if isinstance(step.kernel, BodyCall)
        }
        self.addresses: Ints = np.array([self.memories[index].address for index in program.constants], np.int64)


def _body(plan: Plan, driver: Driver) -> Body:
    weights = Weights(plan, driver)
    return Body(plan, lambda: GpuSlot(plan, driver, weights))


class Area:
    """A piece of device memory that grows on demand; `moves` counts how often pieces of its kind have moved. With
    `zeroed` it starts full of zeros."""

    def __init__(self, driver: Driver, moves: list[int], *, zeroed: bool = False) -> None:
        self._driver, self._moves, self._zeroed = driver, moves, zeroed
        self.memory = driver.allocate(0)

    def reserve(self, nbytes: int) -> Memory:
        """At least `nbytes`."""
        if nbytes > self.memory.nbytes:
            self.memory = self._driver.allocate(nbytes)
            self._moves[0] += 1
            self.clear()
        return self.memory

    def clear(self) -> None:
        """Fill what has to be full of zeros."""
        if self._zeroed and self.memory.nbytes:
            zeros = np.zeros(self.memory.nbytes, np.uint8)
            self._driver.upload(self._driver.array(self.memory, 0, zeros.shape, zeros.dtype), zeros)


class GpuSlot:
    """Room for one batch in flight. See `runtime.device.Slot`."""

    def __init__(
        self, plan: Plan, driver: Driver, weights: Weights, timed: bool = False, place: Place | None = None
    ) -> None:
        self._plan, self._driver, self._weights = plan, driver, weights
        self._exchange = None if place is None else Exchange(driver, place)
        self._clocks = StepClocks(driver, len(plan.steps)) if timed else None
        self._program: Program = plan.program
        self._moves, self._seen = [0], 0
        self._areas = [
            [Area(driver, self._moves, zeroed=zeroed) for zeroed in (False, False, True)]
            for _ in self._program.segments
        ]
        self._cache: dict[tuple[int, tuple[int, ...]], Bound] = {}
        self._bound: Bound | None = None
        self._inputs: list[HostArray] = []
        self._chain: list[Bound] = []
        self._error: BaseException | None = None
        self._failed = False

    def run(self, extents: tuple[int, ...], inputs: Sequence[Any]) -> list[Any]:
        """See `control.BodySlot`."""
        self._start(self._bind(0, extents, []), inputs)
        return [self._array(buffer, self._chain) for buffer in self._plan.outputs]

    def stage(self, extents: tuple[int, ...]) -> Sequence[HostArray]:
        """See `runtime.device.Slot`. InputError if the extents contradict each other inside the model."""
        bound = self._bound
        if self._exchange is not None:
            self._exchange.stage()
        if bound is None or bound.extents != extents or self._seen != self._moves[0]:
            self._bound = None
            with self._driver.active():
                self._bound = bound = self._bind(0, extents, [])
            shapes = self._program.segments[0].shapes
            buffers = self._plan.buffers
            self._inputs = [
                host_array(tuple(bound.values[place] for place in shapes[i]), buffers[i].dtype)
                for i in self._plan.inputs
            ]
        return self._inputs

    def read(self, position: int, tensors: Sequence[GivenTensor]) -> None:
        """See `runtime.device.TensorSlot`."""
        assert self._exchange is not None
        self._exchange.read[position] = tensors

    def give(self, rows: int, cuts: Sequence[Cut]) -> None:
        """See `runtime.device.TensorSlot`."""
        assert self._exchange is not None
        self._exchange.give(rows, cuts)

    def given(self) -> Sequence[Sequence[DeviceTensor]]:
        """See `runtime.device.TensorSlot`."""
        assert self._exchange is not None
        return self._exchange.outputs

    def launch(self) -> None:
        """Copy the inputs to the device and start every step; an error is kept for `wait`."""
        assert self._bound is not None, "launch without stage"
        self._error, self._chain = None, []
        try:
            with self._driver.active():
                self._start(self._bound, self._inputs)
        except BaseException as error:
            self._error = error
            if not isinstance(error, Exception):
                raise

    def wait(self) -> Sequence[HostArray]:
        if self._error is not None:
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error  # its traceback holds this frame
        self._failed = True
        with self._driver.active():
            if self._clocks is not None:
                self._clocks.finish()
            if self._exchange is not None and self._exchange.cuts:
                self._driver.finish()
                outputs = []
            else:
                outputs = [self.output(i) for i in range(len(self._plan.outputs))]
        if self._exchange is not None:
            self._exchange.ended()
        self._failed = False
        return outputs

    def step_times(self) -> StepTimes | None:
        """See `runtime.device.Slot`."""
        return None if self._clocks is None else self._clocks.times

    def output(self, position: int) -> HostArray:
        """An output of the last launch, in the host's memory."""
        return self._on_host(self._plan.outputs[position], self._chain)

    def _start(self, bound: Bound, inputs: Sequence[Any]) -> None:
        """Start every step. What a failed execution left in counters is cleared first."""
        if self._failed:
            for area in (area for areas in self._areas for area in areas):
                area.clear()
        self._failed = True
        chain = [self._with_tensors(bound)]
        for position, (buffer, source) in enumerate(zip(self._plan.inputs, inputs, strict=True)):
            if self._exchange is None or position not in self._exchange.read:
                self._write(buffer, source, chain)
        if self._clocks is not None:
            self._clocks.begin()
        for index, segment in enumerate(self._program.segments):
            results = self._run(segment, chain)
            if segment.binds is not None:
                step = self._plan.steps[segment.binds]
                names, following = segment.names, self._program.segments[index + 1].names
                extents = extents_after(self._plan, step, results, names, chain[index].extents, following)
                chain.append(self._bind(index + 1, extents, chain))
                for buffer, result in zip(step.outputs, results, strict=True):
                    self._write(buffer, result, chain)
        if self._exchange is not None and self._exchange.cuts:
            self._exchange.copy_out([self._result(i, chain) for i in range(len(self._plan.outputs))])
        self._failed, self._chain = False, chain

    def _with_tensors(self, bound: Bound) -> Bound:
        """Bound to the tensors of callers that kernels can read where they lie; others are copied."""
        exchange = self._exchange
        if exchange is None or not exchange.read:
            return bound
        exchange.wait_for_producers()
        in_place, inputs = exchange.in_place(), self._plan.inputs
        for position in exchange.read:
            if position not in in_place:
                exchange.copy_in(position, self._piece(inputs[position], [bound]))
        if not in_place:
            return bound
        addresses = tuple(in_place.get(position, 0) for position in range(len(inputs)))
        found = bound.elsewhere.pop(addresses, None)
        if found is None:
            owners = {root(self._plan.buffers, inputs[position]): address for position, address in in_place.items()}
            memories = {owner: self._driver.view(address, bound.located[owner][2]) for owner, address in owners.items()}
            found = rebased(self._plan, self._program.segments[0], bound, memories)
            if len(bound.elsewhere) >= CACHED_ADDRESSES:
                del bound.elsewhere[next(iter(bound.elsewhere))]
        bound.elsewhere[addresses] = found
        return found

    def _result(self, position: int, chain: list[Bound]) -> tuple[Piece, tuple[int, ...], DType, bool]:
        """An output for `Exchange.copy_out`."""
        buffer, carries = self._plan.outputs[position], self._plan.batching.outputs[position]
        return self._piece(buffer, chain), self._shape(buffer, chain), self._plan.buffers[buffer].dtype, carries

    def _run(self, segment: Segment, chain: list[Bound]) -> Sequence[Any]:
        """Start the steps of one segment; what the last one gives if it binds extents."""
        bound = chain[-1]
        results: Sequence[Any] = ()
        for i in segment.steps:
            step = self._plan.steps[i]
            if isinstance(step.kernel, Launch):
                self._launch(segment, i, step, step.kernel, chain)
            else:
                results = self._call(segment, i, step, step.kernel, chain)
            if self._clocks is not None:
                self._clocks.ended(i)
            for buffer in segment.dying[i]:
                memory, offset, nbytes = bound.located[buffer]
                self._driver.discard((memory.address + offset, nbytes))
        return results

    def _launch(self, segment: Segment, i: int, step: Step, launch: Launch, chain: list[Bound]) -> None:
        bound = chain[-1]
        x, y, z = (bound.values[place] for place in segment.grids[i])
        if not x * y * z:
            return
        loaded = self._weights.kernels[launch.kernel]
        packed = bound.packed.get(i)
        if packed is None:
            first = segment.firsts[i]
            words = bound.words[first : first + len(launch.words)]
            packed = bound.packed[i] = self._driver.pack(loaded, words, (x, y, z))

        def touched() -> Touched:
            kinds = step.inputs, (*step.outputs, *step.scratch), launch.zeroed
            return Touched(*([self._piece(buffer, chain) for buffer in buffers] for buffers in kinds))

        try:
            self._driver.launch(loaded, (x, y, z), packed, touched)
        except GpuEngineError as error:
            raise type(error)(f"{step.source}: {error}") from error

    def _call(
        self, segment: Segment, i: int, step: Step, call: ArrayCall | BodyCall, chain: list[Bound]
    ) -> Sequence[Any]:
        """Run a step over arrays; its results if extents depend on them, else nothing: they are written."""
        resolve = segment.resolvers[i]
        op: Any = call.op if resolve is None else resolve(chain[-1].values)
        bodies = isinstance(call, BodyCall)
        hosted = controls(op) if isinstance(call, BodyCall) else len(step.inputs) if call.host else 0
        inputs = [self._on_host(buffer, chain) for buffer in step.inputs[:hosted]]
        inputs += [self._array(buffer, chain) for buffer in step.inputs[hosted:]]
        kept: list[Any] = []

        def keep(results: Sequence[Any]) -> None:
            if step.binds:
                kept.extend(result.copy() if bodies else result for result in results)
                return
            for buffer, result in zip(step.outputs, results, strict=True):
                self._write_checked(step, buffer, result, chain)

        try:
            with np.errstate(all="ignore"):
                if isinstance(call, BodyCall):
                    run_bodies(self._driver.xp, op, self._weights.bodies[i], inputs, keep)
                else:
                    keep(call.function(np if call.host else self._driver.xp, op, inputs))
                return kept
        except GpuEngineError:
            raise
        except Exception as error:
            raise step_failure(step, op, inputs, error) from error

    def _on_host(self, buffer: int, chain: list[Bound]) -> HostArray:
        dtype, constant = self._plan.buffers[buffer].dtype, constant_of(self._plan, buffer)
        if constant is not None:
            return constant.reshape(self._shape(buffer, chain))  # type: ignore[no-any-return]
        array = self._array(buffer, chain)
        return array if dtype == STRING else self._driver.download(array, dtype)

    def _write_checked(self, step: Step, buffer: int, result: Any, chain: list[Bound]) -> None:
        shape = self._shape(buffer, chain)
        if tuple(result.shape) != shape:
            raise ExecutionError(
                f"{step.source}: a result of shape {list(result.shape)} where {list(shape)} was declared"
            )
        self._write(buffer, result, chain)

    def _write(self, buffer: int, source: Any, chain: list[Bound]) -> None:
        """Fill a buffer from an array of the host or the device."""
        target, dtype = self._array(buffer, chain), self._plan.buffers[buffer].dtype
        if dtype == STRING:
            target[...] = source
        elif type(source) is np.ndarray or isinstance(source, np.generic):
            self._driver.upload(target, np.asarray(source).astype(dtype, copy=False))
        else:
            target[...] = source

    def _array(self, buffer: int, chain: list[Bound]) -> Any:
        owner, constant = root(self._plan.buffers, buffer), constant_of(self._plan, buffer)
        dtype, shape = self._plan.buffers[buffer].dtype, self._shape(buffer, chain)
        if dtype == STRING:
            if constant is not None:
                return constant.reshape(shape)
            found = next((bound.hosted[owner] for bound in chain if owner in bound.hosted), None)
            if found is None:
                found = chain[-1].hosted[owner] = host_array(shape, dtype)
            return found.reshape(shape)
        if constant is not None:
            return self._driver.array(self._weights.memories[owner], 0, shape, dtype)
        memory, offset, _ = located(owner, chain)
        return self._driver.array(memory, offset, shape, dtype)

    def _shape(self, buffer: int, chain: list[Bound]) -> tuple[int, ...]:
        for segment, bound in zip(self._program.segments, chain, strict=False):
            places = segment.shapes.get(buffer)
            if places is not None:
                return tuple(bound.values[place] for place in places)
        raise AssertionError(f"buffer {buffer} has no array in the segments that ran")

    def _piece(self, buffer: int, chain: list[Bound]) -> Piece:
        owner = root(self._plan.buffers, buffer)
        memory = self._weights.memories.get(owner)
        if memory is not None:
            return memory.address, memory.nbytes
        memory, offset, nbytes = located(owner, chain)
        return memory.address + offset, nbytes

    def _bind(self, index: int, extents: tuple[int, ...], chain: list[Bound]) -> Bound:
        """From the cache, or new; whatever moves makes all older bindings void."""
        if self._seen != self._moves[0]:
            self._cache.clear()
        bound = self._cache.pop((index, extents), None)
        if bound is None or index:
            segment = self._program.segments[index]
            bound = bind(segment, extents, self._reserving(index), self._weights.addresses, chain)
            if self._seen != self._moves[0]:
                self._cache.clear()
        self._seen = self._moves[0]
        if not index:
            if len(self._cache) >= CACHED_BINDINGS:
                del self._cache[next(iter(self._cache))]
            self._cache[index, extents] = bound
        return bound

    def _reserving(self, index: int) -> Callable[[Sequence[int]], Sequence[Memory]]:
        areas = self._areas[index]
        return lambda sizes: [area.reserve(nbytes) for area, nbytes in zip(areas, sizes, strict=True)]


class GpuStream:
    """One lane: its slots share weights and nothing else. See `runtime.device.Stream`."""

    threads = 1

    def __init__(
        self, plan: Plan, slots: int, driver: Driver, weights: Weights, timed: bool = False, place: Place | None = None
    ) -> None:
        self.slots = [GpuSlot(plan, driver, weights, timed, place) for _ in range(slots)]

    def enter(self) -> None:
        """No thread of a GPU's stream is tied to a core."""

    def close(self) -> None:
        self.slots = []
