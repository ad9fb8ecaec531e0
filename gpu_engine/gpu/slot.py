"""Streams and slots on a GPU: memory with fixed addresses, bindings of the shapes seen last, and running them.

Every slot has its own arena and ports, so that two batches of one stream can be in flight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from gpu_engine.gpu.areas import Area
from gpu_engine.gpu.clocks import StepClocks
from gpu_engine.gpu.control import Body
from gpu_engine.gpu.driver import Driver, HostArray, Memory, Replay
from gpu_engine.gpu.exchange import Exchange, Place, Result
from gpu_engine.gpu.graphs import Graphs, Habit
from gpu_engine.gpu.launches import BodyCall
from gpu_engine.gpu.program import Bound, Program, Segment, bind, rebased
from gpu_engine.gpu.steps import End, Steps
from gpu_engine.plan.execution import extents_after
from gpu_engine.plan.plan import Plan, root
from gpu_engine.plan.zones import Ints
from gpu_engine.runtime.device import StepTimes

CACHED_BINDINGS = 32
CACHED_ADDRESSES = 16
"""Sets of addresses of callers' tensors, of one shape."""


class Weights:
    """A plan's constants on the device, once for all streams, its kernels ready to launch, and the same of the bodies
    that its steps run, by step."""

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
        self.inner = {
            i: [(body, Weights(body, driver)) for body in step.kernel.bodies]
            for i, step in enumerate(plan.steps)
            if isinstance(step.kernel, BodyCall)
        }
        self.addresses: Ints = np.array([self.memories[index].address for index in program.constants], np.int64)


def bodies_of(weights: Weights, driver: Driver) -> dict[int, list[Body]]:
    """The bodies that steps run, for one stream: its slots run them one after the other."""
    return {i: [_body(plan, driver, inner) for plan, inner in found] for i, found in weights.inner.items()}


def _body(plan: Plan, driver: Driver, weights: Weights) -> Body:
    bodies = bodies_of(weights, driver)
    return Body(plan, lambda: GpuSlot(plan, driver, weights, bodies))


@dataclass(eq=False)
class Known:
    """What a slot keeps of a shape. `ends` are those of inputs and outputs, once it was staged; `elsewhere` is the same
    with inputs where callers have them, by their addresses, None where these were seen once."""

    bound: Bound
    ends: tuple[End, End] | None = None
    habit: Habit = field(default_factory=Habit)
    elsewhere: dict[tuple[int, ...], Known | None] = field(default_factory=dict)


class GpuSlot:
    """Room for one batch in flight. See `runtime.device.Slot`."""

    def __init__(
        self,
        plan: Plan,
        driver: Driver,
        weights: Weights,
        bodies: Mapping[int, Sequence[Body]],
        timed: bool = False,
        place: Place | None = None,
    ) -> None:
        self._plan, self._driver, self._weights = plan, driver, weights
        self._clocks = StepClocks(driver, len(plan.steps)) if timed else None
        self._steps = Steps(plan, driver, weights, bodies, self._clocks)
        self._program: Program = plan.program
        self._areas = [[Area(driver, zeroed=zeroed) for zeroed in (False, False, True)] for _ in self._program.segments]
        self._passage, self._graphs = driver.passage(), Graphs(plan, driver, wanted=not timed)
        self._exchange = Exchange(driver, place)
        self.read, self.give, self.given = self._exchange.read, self._exchange.give, self._exchange.given
        self._cache: dict[tuple[int, ...], Known] = {}
        self._known: Known | None = None
        self._outputs: Sequence[HostArray] = ()
        self._error: BaseException | None = None
        self._failed = self._in_flight = False

    def run(self, extents: tuple[int, ...], inputs: Sequence[Any]) -> list[Any]:
        """See `control.BodySlot`."""
        known = self._recall(extents)
        chain = [known.bound]
        for buffer, source in zip(self._plan.inputs, inputs, strict=True):
            self._steps.write(buffer, source, chain)
        self._start(known, chain)
        return [self._steps.array(buffer, chain) for buffer in self._plan.outputs]

    def stage(self, extents: tuple[int, ...]) -> Sequence[HostArray]:
        """See `runtime.device.Slot`. InputError if the extents contradict each other inside the model."""
        if self._in_flight:
            self._settle()
        self._exchange.stage()
        known = self._known
        if known is None or known.bound.extents != extents:
            self._known = None
            with self._driver.active():
                known = self._recall(extents)
                if known.ends is None:
                    known.ends = self._ends(known.bound)
            self._known = known
        assert known.ends is not None
        return known.ends[0].arrays

    def launch(self) -> None:
        """Copy the inputs to the device, start every step, and copy the outputs back; an error is kept for `wait`."""
        assert self._known is not None and self._known.ends is not None, "launch without stage"
        self._error, self._in_flight = None, True
        known, exchange = self._known, self._exchange
        sent = self._known.ends[0]
        try:
            with self._driver.active():
                if exchange.tensors:
                    self._passage.send(exchange.others(sent))
                    known = self._with_tensors(known)
                else:
                    self._passage.send(sent.copies)
                chain = [known.bound]
                self._start(known, chain)
                if exchange.cuts:
                    exchange.copy_out(self._results(chain))
                fetched = End([], []) if exchange.cuts else self._fetched(self._known, chain)
                self._passage.fetch(fetched.copies)
                self._outputs = fetched.arrays
        except BaseException as error:
            self._error = error
            if not isinstance(error, Exception):
                raise

    def wait(self) -> Sequence[HostArray]:
        """See `runtime.device.Slot`. Sleeps in the driver, on what belongs to this slot alone."""
        if self._error is not None:
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error  # its traceback holds this frame
        self._failed = True
        self._passage.wait()
        if self._clocks is not None:
            self._clocks.finish()
        self._failed = self._in_flight = False
        self._exchange.ended()
        return self._outputs

    def _settle(self) -> None:
        """End a launch that failed, or that nobody waited for: its copies may still be reading and writing."""
        with suppress(Exception), self._driver.active():
            self._driver.finish()
        self._in_flight = False
        self._exchange.ended()

    def step_times(self) -> StepTimes | None:
        """See `runtime.device.Slot`."""
        return None if self._clocks is None else self._clocks.times

    def _start(self, known: Known, chain: list[Bound]) -> None:
        """Start every step; segments bound on the way join the chain. What a failed execution left in counters is
        cleared first."""
        if self._failed:
            for area in (area for areas in self._areas for area in areas):
                area.clear()
        self._failed = True
        if self._clocks is not None:
            self._clocks.begin()
        self._graphs.prepare(known.habit, partial(self._steps.run, self._program.segments[0], chain))
        for index, segment in enumerate(self._program.segments):
            results = self._run_all(segment, chain, known.habit.graphs if not index else {})
            if segment.binds is not None:
                step = self._plan.steps[segment.binds]
                names, following = segment.names, self._program.segments[index + 1].names
                extents = extents_after(self._plan, step, results, names, chain[index].extents, following)
                chain.append(self._bind(index + 1, extents, chain))
                for buffer, result in zip(step.outputs, results, strict=True):
                    self._steps.write(buffer, result, chain)
        known.habit.launched += 1
        self._failed = False

    def _run_all(self, segment: Segment, chain: list[Bound], graphs: Mapping[int, Replay]) -> Sequence[Any]:
        """Start the steps of one segment, by graphs where there are; what the last one gives if it binds extents."""
        if not graphs:
            return self._steps.run(segment, chain, segment.steps)
        results: Sequence[Any] = ()
        for steps in self._graphs.runs:
            replay = graphs.get(steps.start)
            if replay is None:
                results = self._steps.run(segment, chain, steps)
            else:
                replay()
        return results

    def _with_tensors(self, known: Known) -> Known:
        """The shape with callers' tensors as its inputs: read where they lie if possible, else copied.

        Where launches are captured, addresses are worth it that come again: others are copied to those of the slot,
        for which there is, or will be, a graph.
        """
        exchange, inputs = self._exchange, self._plan.inputs
        exchange.wait_for_producers()
        in_place = exchange.in_place()
        addresses = tuple(in_place.get(position, 0) for position in range(len(inputs)))
        new = addresses not in known.elsewhere
        found = known.elsewhere.pop(addresses, None)
        if in_place and found is None and not (new and self._driver.captures):
            found = Known(self._rebased(known.bound, in_place))
        if in_place:
            known.elsewhere[addresses] = found
        if len(known.elsewhere) > CACHED_ADDRESSES:
            self._forget(known.elsewhere.pop(next(iter(known.elsewhere))))
        for position in exchange.tensors:
            if found is None or position not in in_place:
                exchange.copy_in(position, self._steps.place(inputs[position], [known.bound])[0])
        return known if found is None else found

    def _rebased(self, bound: Bound, in_place: Mapping[int, int]) -> Bound:
        owners = {root(self._plan.buffers, self._plan.inputs[i]): address for i, address in in_place.items()}
        memories = {owner: self._driver.view(address, bound.located[owner][2]) for owner, address in owners.items()}
        return rebased(self._plan, self._program.segments[0], bound, memories)

    def _fetched(self, known: Known, chain: list[Bound]) -> End:
        """The host's side of the outputs. One that is an input comes from where the input was read."""
        assert known.ends is not None
        end = known.ends[1]
        if len(chain) > 1:
            end = self._steps.end(self._plan.outputs, [known.bound, *chain[1:]], self._staged)
        if chain[0] is known.bound:
            return end
        places = [[self._steps.place(i, [bound])[0][0] for i in self._plan.inputs] for bound in (known.bound, chain[0])]
        moved = dict(zip(*places, strict=True))
        return End(end.arrays, [copy._replace(device=moved.get(copy.device, copy.device)) for copy in end.copies])

    def _results(self, chain: list[Bound]) -> list[Result]:
        """The outputs, for `Exchange.copy_out`."""
        plan = self._plan
        return [
            Result(*self._steps.place(buffer, chain), plan.buffers[buffer].dtype, carries)
            for buffer, carries in zip(plan.outputs, plan.batching.outputs, strict=True)
        ]

    def _recall(self, extents: tuple[int, ...]) -> Known:
        """The first segment bound to `extents`, from the cache or new."""
        known = self._cache.pop(extents, None)
        if known is None:
            known = Known(self._bind(0, extents, []))
            if len(self._cache) >= CACHED_BINDINGS:
                self._forget(self._cache.pop(next(iter(self._cache))))
        self._cache[extents] = known
        return known

    def _forget(self, known: Known | None) -> None:
        """Give up the graphs of a shape, at all addresses."""
        if known is not None:
            self._graphs.forget(known.habit)
            for other in known.elsewhere.values():
                self._forget(other)

    def _bind(self, index: int, extents: tuple[int, ...], chain: list[Bound]) -> Bound:
        areas = self._areas[index]

        def reserve(sizes: Sequence[int]) -> list[Memory]:
            """Where an area grows, what was bound and captured is void, and keeps what it leaves no longer."""
            if not index and any(size > area.memory.nbytes for area, size in zip(areas, sizes, strict=True)):
                self._known = None
                self._cache.clear()
                self._graphs.clear()
            return [area.reserve(size) for area, size in zip(areas, sizes, strict=True)]

        return bind(self._program.segments[index], extents, reserve, self._weights.addresses, chain)

    def _staged(self, index: int) -> HostArray:
        """The host's mirror of a segment's ports."""
        return self._areas[index][1].staged()

    def _ends(self, bound: Bound) -> tuple[End, End]:
        """Of inputs, and of outputs if they are known before the launch."""
        outputs = self._plan.outputs if len(self._program.segments) == 1 else ()
        given = self._steps.end(self._plan.inputs, [bound], self._staged)
        return given, self._steps.end(outputs, [bound], self._staged)


class GpuStream:
    """One lane: its slots share weights and nothing else. See `runtime.device.Stream`."""

    threads = 1

    def __init__(
        self, plan: Plan, slots: int, driver: Driver, weights: Weights, timed: bool = False, place: Place | None = None
    ) -> None:
        self._driver: Driver | None = driver
        with driver.active():
            bodies = bodies_of(weights, driver)
            self.slots = [GpuSlot(plan, driver, weights, bodies, timed, place) for _ in range(slots)]

    def enter(self) -> None:
        """No thread of a GPU's stream is tied to a core, but it has its current device."""
        if self._driver is not None:
            self._driver.enter()

    def close(self) -> None:
        """Wait for what is still running; give up the slots with their memory, and the device's stream."""
        driver, self._driver = self._driver, None
        if driver is not None:
            with suppress(Exception), driver.active():
                driver.finish()
        self.slots = []
