"""Programs: a plan prepared for binding on a GPU.

What changes with the extents are numbers: each distinct one is computed once, then gathered into the arguments of all
launches at a time, eight bytes for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpu_engine.errors import OutOfMemory
from gpu_engine.gpu.driver import Memory
from gpu_engine.gpu.kernel import Kernel
from gpu_engine.gpu.launches import ArrayCall, BodyCall, Launch
from gpu_engine.ir.dims import product
from gpu_engine.ir.dtypes import STRING
from gpu_engine.plan.binding import Numbers, op_resolver
from gpu_engine.plan.lower import segments
from gpu_engine.plan.plan import Plan, Step, root
from gpu_engine.plan.words import Gather, Word, gather
from gpu_engine.plan.zones import Ints, Zone, new_requirements, overlaid_zone, segment_of_buffers, zone

MOST_ELEMENTS = (1 << 31) - 1
"""Kernels index with 32 bits."""


@dataclass(frozen=True)
class Segment:
    """A part of the plan that can be bound at once: `steps` up to and including one that binds extents.

    `gather` says where each argument of a launch comes from. `firsts[i]` is the first argument of step i's launch and
    `grids[i]` where its extents stand; `elements` are the sizes of tensors that kernels index. `resolvers` give the
    operations of array steps their extents. `counters` are what launches find and leave full of zeros, all in one
    place. `dying` are the arena's buffers that a step is the last to use; what gives
    results may still read them.
    """

    names: tuple[str, ...]
    numbers: Numbers
    arena: Zone
    ports: Zone
    counters: Zone
    steps: range
    gather: Gather
    firsts: dict[int, int]
    grids: dict[int, tuple[int, ...]]
    shapes: dict[int, tuple[int, ...]]
    elements: Ints
    resolvers: dict[int, Any]
    dying: dict[int, tuple[int, ...]]
    binds: int | None


@dataclass(frozen=True)
class Program:
    """All segments of a plan, its distinct kernels, and the buffers that hold constants.

    `inner` are the kernels of the bodies that its steps run; `weights_nbytes` counts the bodies' constants too.
    """

    segments: tuple[Segment, ...]
    kernels: tuple[Kernel, ...]
    constants: tuple[int, ...]
    weights_nbytes: int
    inner: tuple[Kernel, ...] = ()


def with_program(plan: Plan) -> Plan:
    """A plan whose steps are `Launch` and `ArrayCall`, prepared."""
    kernels = dict.fromkeys(step.kernel.kernel for step in plan.steps if isinstance(step.kernel, Launch))
    bodies = [body.program for step in plan.steps if isinstance(step.kernel, BodyCall) for body in step.kernel.bodies]
    inner = dict.fromkeys(kernel for program in bodies for kernel in (*program.kernels, *program.inner))
    constants = tuple(i for i, b in enumerate(plan.buffers) if b.constant is not None and b.dtype != STRING)
    nbytes = sum(plan.buffers[i].constant.nbytes for i in constants)
    nbytes += sum(program.weights_nbytes for program in bodies)
    homes = segment_of_buffers(plan)
    parts = [_Builder(plan, constants, homes, index, *cut).segment() for index, cut in enumerate(segments(plan))]
    return replace(plan, program=Program(tuple(parts), tuple(kernels), constants, nbytes, tuple(inner)))


class _Builder:
    """Collects what one segment needs."""

    def __init__(
        self,
        plan: Plan,
        constants: tuple[int, ...],
        homes: dict[int, int],
        index: int,
        first: int,
        last: int,
        names: tuple[str, ...],
    ) -> None:
        self.plan, self.constants, self.homes, self.index = plan, constants, homes, index
        self.steps, self.names, self.numbers = range(first, last), names, Numbers(names)
        self.words: list[Word] = []

    def segment(self) -> Segment:
        buffers = self.plan.buffers
        outward = {root(buffers, i) for i in (*self.plan.inputs, *self.plan.outputs)}
        owned = [b for b, home in self.homes.items() if home == self.index and buffers[b].dtype != STRING]
        launches = {i: self.plan.steps[i].kernel for i in self.steps if isinstance(self.plan.steps[i].kernel, Launch)}
        zeroed = {buffer for launch in launches.values() for buffer in launch.zeroed}
        plain = [buffer for buffer in owned if buffer not in outward | zeroed]
        arena = zone(self.plan, plain, self.numbers, share=True)
        ports = zone(self.plan, [buffer for buffer in owned if buffer in outward], self.numbers, share=False)
        counters = overlaid_zone(self.plan, sorted(zeroed), self.numbers)
        self.numbers.require(new_requirements(self.plan, self.names, self.index == 0))
        firsts = {i: self._first(launch) for i, launch in launches.items()}
        grids = {i: tuple(map(self.numbers.place, launch.grid)) for i, launch in launches.items()}
        touched = {b for i in launches for b in _touched(self.plan.steps[i])}
        elements = [self.numbers.place(product(buffers[b].shape)) for b in sorted(touched)]
        calls = [i for i in self.steps if isinstance(self.plan.steps[i].kernel, ArrayCall | BodyCall)]
        resolvers = {i: op_resolver(self.plan.steps[i].kernel.op, self.numbers) for i in calls}
        shapes = self._shapes(calls)
        constants = {buffer: i for i, buffer in enumerate(self.constants)}
        gathered = gather(self.plan, self.words, self.numbers, arena.owned + ports.owned + counters.owned, constants)
        self.numbers.compile()
        last = self.plan.steps[self.steps[-1]] if self.steps else None
        return Segment(
            self.names, self.numbers, arena, ports, counters, self.steps, gathered, firsts, grids,
            shapes, np.array(elements, np.intp), resolvers, self._dying(arena),
            self.steps[-1] if last is not None and last.binds else None,
        )  # fmt: skip

    def _first(self, launch: Launch) -> int:
        first = len(self.words)
        self.words += launch.words
        return first

    def _shapes(self, calls: Sequence[int]) -> dict[int, tuple[int, ...]]:
        """Where the extents stand of every buffer whose array somebody asks for."""
        plan = self.plan
        wanted = {b for i in calls for b in _touched(plan.steps[i])}
        if self.index == 0:
            wanted |= set(plan.inputs)
        elif self.steps.start:
            wanted |= set(plan.steps[self.steps.start - 1].outputs)
        wanted |= {i for i in plan.outputs if self.homes.get(root(plan.buffers, i), 0) == self.index}
        if calls and plan.steps[calls[-1]].binds:
            wanted -= set(plan.steps[calls[-1]].outputs)
        return {b: tuple(map(self.numbers.place, plan.buffers[b].shape)) for b in sorted(wanted)}

    def _dying(self, arena: Zone) -> dict[int, tuple[int, ...]]:
        last = {root(self.plan.buffers, b): i for i, step in enumerate(self.plan.steps) for b in _touched(step)}
        dying = {i: tuple(b for b in arena.owned if last[b] == i and not self.plan.steps[i].binds) for i in self.steps}
        return {i: tuple(b for b in found if not self._taken_over(arena, i, b)) for i, found in dying.items()}

    def _taken_over(self, arena: Zone, i: int, buffer: int) -> bool:
        """Whether what the step writes lies where the buffer lay."""
        regions = dict(zip(arena.owned, arena.layout.regions.tolist(), strict=True))
        step = self.plan.steps[i]
        written = {root(self.plan.buffers, b) for b in (*step.outputs, *step.scratch)} - {buffer}
        return any(regions.get(b) == regions[buffer] for b in written)


def _touched(step: Step) -> tuple[int, ...]:
    return (*step.inputs, *step.outputs, *step.scratch)


@dataclass(eq=False)
class Bound:
    """A segment with numbers: the arguments of its launches and where its buffers lie.

    `located` are (memory, offset, bytes) by root buffer. `hosted` are arrays of objects, which have no address.
    Some of the `packed` arguments may point into `shared`, the words of a segment bound before.
    """

    extents: tuple[int, ...]
    values: tuple[int, ...]
    words: Ints
    packed: dict[int, Any]
    located: dict[int, tuple[Any, int, int]]
    hosted: dict[int, Any]
    shared: Ints | None = None


def bind(
    segment: Segment,
    extents: tuple[int, ...],
    allocate: Callable[[Sequence[int]], Sequence[Any]],
    weights: Ints,
    before: Sequence[Bound],
) -> Bound:
    """The segment bound to `extents`, in memory from `allocate([bytes of the arena, of the ports, of the counters])`.

    `weights` are the addresses of the program's constants; `before` are the bound segments that ran already, whose
    buffers this one may read. InputError if the extents contradict each other, OutOfMemory where kernels cannot index
    a tensor.
    """
    values = segment.numbers.evaluate(extents)
    numbers = np.array(values, np.int64)
    if len(segment.elements) and (most := int(numbers[segment.elements].max())) > MOST_ELEMENTS:
        raise OutOfMemory(f"a tensor of {most:,} elements: kernels index up to {MOST_ELEMENTS:,}; use smaller batches")
    zones = (segment.arena, segment.ports, segment.counters)
    laid = [zone.offsets(numbers) for zone in zones]
    memories = allocate([nbytes for _, nbytes in laid])
    located = {
        buffer: (piece, offset, size)
        for zone, (offsets, _), piece in zip(zones, laid, memories, strict=True)
        for buffer, offset, size in zip(zone.owned, offsets.tolist(), numbers[zone.sizes].tolist(), strict=True)
    }
    sources, (shifted, by) = segment.gather, segment.gather.shifts
    own = [offsets + piece.address for (offsets, _), piece in zip(laid, memories, strict=True)]
    parts = [numbers, *own, weights, sources.literals]
    if sources.foreign:
        parts.append(np.array([_foreign_address(owner, before) for owner in sources.foreign], np.int64))
    words = np.take(np.concatenate(parts), sources.places)
    if len(shifted):
        words[shifted] += numbers[by]
    return Bound(extents, values, words, {}, located, {})


def rebased(plan: Plan, segment: Segment, bound: Bound, memories: Mapping[int, Memory]) -> Bound:
    """The bound segment with some of its own root buffers elsewhere: only launches that use them are packed anew."""
    owned = segment.arena.owned + segment.ports.owned + segment.counters.owned
    words, places = bound.words.copy(), segment.gather.places
    for buffer, memory in memories.items():
        old, offset, _ = bound.located[buffer]
        moved = places == len(segment.numbers) + owned.index(buffer)
        words[moved] += memory.address - old.address - offset
    changed = np.flatnonzero(words != bound.words)
    packed = {
        i: ready
        for i, ready in bound.packed.items()
        if not np.any((changed >= segment.firsts[i]) & (changed < segment.firsts[i] + len(plan.steps[i].kernel.words)))
    }
    located = {**bound.located, **{buffer: (memory, 0, memory.nbytes) for buffer, memory in memories.items()}}
    return Bound(bound.extents, bound.values, words, packed, located, bound.hosted, shared=bound.words)


def _foreign_address(owner: int, before: Sequence[Bound]) -> int:
    memory, offset, _ = next(bound.located[owner] for bound in before if owner in bound.located)
    return int(memory.address) + int(offset)


def located(owner: int, chain: Sequence[Bound]) -> tuple[Any, int, int]:
    """Where a root buffer lies that one of the bound segments owns."""
    return next(bound.located[owner] for bound in reversed(chain) if owner in bound.located)


def zone_nbytes(segment: Segment, extents: Sequence[int]) -> int:
    """Bytes of a segment's memory."""
    values = np.array(segment.numbers.evaluate(tuple(extents)), np.int64)
    return sum(zone.offsets(values)[1] for zone in (segment.arena, segment.ports, segment.counters))


def launched(segment: Segment, extents: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """{step: grid} of what a segment launches at `extents`: of the kernels for different extents of a product, one has
    programs."""
    values = segment.numbers.evaluate(tuple(extents))
    grids = {step: tuple(values[place] for place in places) for step, places in segment.grids.items()}
    return {step: grid for step, grid in grids.items() if all(grid)}
