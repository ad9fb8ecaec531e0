"""Running the steps of a plan over segments that are bound, and the arrays of their buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from gpu_engine.errors import ExecutionError, GpuEngineError
from gpu_engine.gpu.clocks import StepClocks
from gpu_engine.gpu.control import Body, controls, run_bodies
from gpu_engine.gpu.driver import Copy, Driver, HostArray, Memory, Piece, Touched, host_array
from gpu_engine.gpu.kernel import Kernel
from gpu_engine.gpu.launches import ArrayCall, BodyCall, Launch
from gpu_engine.gpu.program import Bound, Program, Segment, located
from gpu_engine.ir.dtypes import STRING
from gpu_engine.plan.execution import step_failure
from gpu_engine.plan.plan import Plan, Step, constant_of, root


class Shared(Protocol):
    """What all slots of a plan have on the device together: kernels ready to launch, and the memory of constants by
    buffer."""

    @property
    def kernels(self) -> Mapping[Kernel, Any]: ...

    @property
    def memories(self) -> Mapping[int, Memory]: ...


class End(NamedTuple):
    """Arrays of the host for the inputs or outputs of a plan, and the copies between them and the device."""

    arrays: list[HostArray]
    copies: list[Copy]


class Steps:
    """The steps of a plan, for one slot.

    A `chain` are the bound segments that run, in order. With `clocks` every step is timed.
    """

    def __init__(
        self,
        plan: Plan,
        driver: Driver,
        weights: Shared,
        bodies: Mapping[int, Sequence[Body]],
        clocks: StepClocks | None,
    ) -> None:
        self._plan, self._driver, self._weights, self._clocks = plan, driver, weights, clocks
        self._bodies = bodies
        self._program: Program = plan.program

    def run(self, segment: Segment, chain: list[Bound], steps: range) -> Sequence[Any]:
        """Start some steps of one segment."""
        bound = chain[-1]
        results: Sequence[Any] = ()
        for i in steps:
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
        inputs = [self.on_host(buffer, chain) for buffer in step.inputs[:hosted]]
        inputs += [self.array(buffer, chain) for buffer in step.inputs[hosted:]]
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
                    run_bodies(self._driver.xp, op, self._bodies[i], inputs, keep)
                else:
                    keep(call.function(np if call.host else self._driver.xp, op, inputs))
                return kept
        except GpuEngineError:
            raise
        except Exception as error:
            raise step_failure(step, op, inputs, error) from error

    def on_host(self, buffer: int, chain: list[Bound]) -> HostArray:
        """A buffer for the host to read, which waits for the device."""
        dtype, constant = self._plan.buffers[buffer].dtype, constant_of(self._plan, buffer)
        if constant is not None:
            return constant.reshape(self._shape(buffer, chain))  # type: ignore[no-any-return]
        array = self.array(buffer, chain)
        return array if dtype == STRING else self._driver.download(array, dtype)

    def _write_checked(self, step: Step, buffer: int, result: Any, chain: list[Bound]) -> None:
        shape = self._shape(buffer, chain)
        if tuple(result.shape) != shape:
            raise ExecutionError(
                f"{step.source}: a result of shape {list(result.shape)} where {list(shape)} was declared"
            )
        self.write(buffer, result, chain)

    def write(self, buffer: int, source: Any, chain: list[Bound]) -> None:
        """Fill a buffer from an array of the host or the device."""
        target, dtype = self.array(buffer, chain), self._plan.buffers[buffer].dtype
        if dtype == STRING:
            target[...] = source
        elif type(source) is np.ndarray or isinstance(source, np.generic):
            self._driver.upload(target, np.asarray(source).astype(dtype, copy=False))
        else:
            target[...] = source

    def array(self, buffer: int, chain: list[Bound]) -> Any:
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

    def place(self, buffer: int, chain: list[Bound]) -> tuple[Piece, tuple[int, ...]]:
        """Where a buffer lies, and its shape."""
        return self._piece(buffer, chain), self._shape(buffer, chain)

    def end(self, buffers: Sequence[int], chain: list[Bound], staged: Callable[[int], HostArray]) -> End:
        """The host's side of inputs or outputs; `staged` gives the memory that mirrors the ports of a segment."""
        arrays, copies = [], dict[Copy, None]()
        for buffer in buffers:
            owner, constant = root(self._plan.buffers, buffer), constant_of(self._plan, buffer)
            dtype, shape = self._plan.buffers[buffer].dtype, self._shape(buffer, chain)
            if constant is not None or dtype == STRING:
                arrays.append(self.on_host(buffer, chain))
                continue
            index = next(i for i, bound in enumerate(chain) if owner in bound.located)
            memory, offset, _ = chain[index].located[owner]
            array: HostArray = np.ndarray(shape, dtype, staged(index), offset)
            arrays.append(array)
            if array.nbytes:
                address = int(array.__array_interface__["data"][0])
                copies[Copy(address, memory.address + offset, array.nbytes)] = None
        return End(arrays, list(copies))
