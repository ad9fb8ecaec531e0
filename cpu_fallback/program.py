"""Programs: a plan prepared for binding, and bound to extents as a short list of calls.

Steps in a row that are native become one call into one walker. What changes with the extents are numbers: each distinct
one is computed once, then gathered into the argument blocks. Array views are made for array steps only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_fallback.calls import Address, Array, ArrayCall, Native
from cpu_fallback.native import LIBRARY, host, walker
from gpu_engine.ir import dims
from gpu_engine.ir.dtypes import STRING
from gpu_engine.plan.binding import Numbers, Resolver, op_resolver
from gpu_engine.plan.lower import segments
from gpu_engine.plan.memory import (
    Layout,
    assign_regions,
    buffer_nbytes,
    in_place_pairs,
    lifetimes,
    typical_nbytes,
)
from gpu_engine.plan.plan import Buffer, Plan, Requirement, root

ARENA, PORTS = 0, 1
Run = Callable[[], object]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Zone:
    """Buffers that lie in one piece of memory: their numbers, where their sizes stand, how they are laid out."""

    owned: tuple[int, ...]
    sizes: Ints
    layout: Layout


@dataclass(frozen=True)
class View:
    """How to make the array of a buffer: its shape from the numbers, its memory from its root's zone."""

    buffer: int
    owner: int
    dtype: np.dtype[Any]
    shape: Callable[[Sequence[int]], tuple[int, ...]]


@dataclass(frozen=True)
class Part:
    """A run of native steps [first, last), rows of the segment's table, or one array step."""

    first: int
    last: int
    call: ArrayCall | None = None
    resolve: Resolver | None = None
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    scratch: tuple[int, ...] = ()


@dataclass(frozen=True)
class Segment:
    """A part of the plan that can be bound at once: everything up to and including a step that binds extents.

    `gather` maps words of the argument blocks to places in the vector [numbers, addresses of owned buffers, statics].
    """

    names: tuple[str, ...]
    numbers: Numbers
    zones: tuple[Zone, Zone]
    views: tuple[View, ...]
    parts: tuple[Part, ...]
    statics: Ints
    gather: Ints
    shifts: tuple[Ints, Ints]
    functions: Ints
    blocks: Ints
    addressed: tuple[int, ...]
    binds: int | None


@dataclass(frozen=True)
class Program:
    """All segments of a plan; `constants` are the arrays of constant buffers by number."""

    segments: tuple[Segment, ...]
    constants: dict[int, Array]
    weights_nbytes: int


def build_program(plan: Plan) -> Program:
    """Prepare a plan whose steps are `Native` and `ArrayCall`; compiles the kernels that are new."""
    kernels = [step.kernel.kernel for step in plan.steps if isinstance(step.kernel, Native)]
    addresses = LIBRARY.addresses(kernels, host()) if kernels else {}
    constants = {i: buffer.constant for i, buffer in enumerate(plan.buffers) if buffer.constant is not None}
    unique = {address_of(array): array.nbytes for array in constants.values()}
    built = [
        _Builder(plan, constants, addresses, homes, first, last, names, index).segment()
        for homes in [_segment_of_buffers(plan)]
        for index, (first, last, names) in enumerate(segments(plan))
    ]
    return Program(tuple(built), constants, sum(unique.values()))


def _segment_of_buffers(plan: Plan) -> dict[int, int]:
    """The segment whose binding gives each root buffer its memory; results of a binding step belong to the next."""
    homes = dict.fromkeys((root(plan.buffers, i) for i in plan.inputs), 0)
    for index, (first, last, _) in enumerate(segments(plan)):
        for step in plan.steps[first:last]:
            for buffer in (*step.outputs, *step.scratch):
                homes.setdefault(root(plan.buffers, buffer), index + bool(step.binds))
    return homes


def address_of(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


class _Builder:
    """Collects what one segment needs."""

    def __init__(
        self,
        plan: Plan,
        constants: dict[int, Array],
        kernels: dict[Any, int],
        homes: dict[int, int],
        first: int,
        last: int,
        names: tuple[str, ...],
        index: int,
    ) -> None:
        self.plan, self.constants, self.kernels, self.homes = plan, constants, kernels, homes
        self.steps, self.names, self.index = range(first, last), names, index
        self.numbers = Numbers(names)
        self.views: dict[int, View] = {}
        self.statics: dict[int, int] = {}
        self.words: list[Any] = []

    def segment(self) -> Segment:
        outward = {root(self.plan.buffers, i) for i in (*self.plan.inputs, *self.plan.outputs)}
        owned = [buffer for buffer, home in self.homes.items() if home == self.index]
        zones = (
            self._zone([buffer for buffer in owned if buffer not in outward], share=True),
            self._zone([buffer for buffer in owned if buffer in outward], share=False),
        )
        self.numbers.require(self._requirements())
        parts, functions, blocks = self._parts()
        if self.index == 0:
            self._use_views(self.plan.inputs)
        self._use_views([i for i in self.plan.outputs if self._home(i) == self.index])
        last = self.plan.steps[self.steps[-1]] if self.steps else None
        binds = self.steps[-1] if last is not None and last.binds else None
        if self.index:
            self._use_views(self._bound_before())
        gather, shifts, addressed = self._gather()
        self.numbers.compile()
        return Segment(
            self.names, self.numbers, zones, tuple(self.views.values()), tuple(parts),
            np.array(list(self.statics), np.int64), gather, shifts, np.array(functions, np.int64),
            np.array(blocks, np.int64) * 8, addressed, binds,
        )  # fmt: skip

    def _home(self, buffer: int) -> int:
        return self.homes.get(root(self.plan.buffers, buffer), 0)

    def _bound_before(self) -> tuple[int, ...]:
        """The results of the step that ended the segment before: they are copied here."""
        return self.plan.steps[self.steps.start - 1].outputs

    def _zone(self, owned: list[int], *, share: bool) -> Zone:
        owned = [buffer for buffer in owned if self.plan.buffers[buffer].dtype != STRING]
        places = [self.numbers.place(buffer_nbytes(self.plan.buffers[buffer])) for buffer in owned]
        regions = list(range(len(owned)))
        if share:
            typical = [typical_nbytes(self.plan.buffers[b], self.plan.batching.symbol) for b in owned]
            spans = lifetimes(self.plan, owned, typical)
            regions = assign_regions(spans, in_place_pairs(self.plan, owned, spans))
        return Zone(tuple(owned), np.array(places, np.intp), Layout(regions))

    def _requirements(self) -> list[Requirement]:
        known, before = set(self.names), set(self.plan.symbols) if self.index else None
        found = []
        for requirement in self.plan.requirements:
            needed = dims.symbols(requirement.left) | dims.symbols(requirement.right)
            if needed <= known and (before is None or not needed <= before):
                found.append(requirement)
        return found

    def _parts(self) -> tuple[list[Part], list[int], list[int]]:
        parts: list[Part] = []
        functions: list[int] = []
        blocks: list[int] = []
        for i in self.steps:
            step = self.plan.steps[i]
            if isinstance(step.kernel, Native):
                rows = len(functions)
                functions.append(self.kernels[step.kernel.kernel])
                blocks.append(len(self.words))
                self.words += step.kernel.words
                if parts and parts[-1].call is None:
                    parts[-1] = Part(parts[-1].first, rows + 1)
                else:
                    parts.append(Part(rows, rows + 1))
                continue
            call: ArrayCall = step.kernel
            outputs = () if step.binds else step.outputs
            self._use_views((*step.inputs, *outputs, *step.scratch))
            resolve = op_resolver(call.op, self.numbers)
            parts.append(Part(i, i + 1, call, resolve, step.inputs, outputs, step.scratch))
        return parts, functions, blocks

    def _use_views(self, buffers: Sequence[int]) -> None:
        for index in buffers:
            buffer = self.plan.buffers[index]
            self.views.setdefault(index, View(index, root(self.plan.buffers, index), buffer.dtype, self._shape(buffer)))

    def _shape(self, buffer: Buffer) -> Callable[[Sequence[int]], tuple[int, ...]]:
        if all(isinstance(extent, int) for extent in buffer.shape):
            fixed = tuple(int(extent) for extent in buffer.shape)  # type: ignore[arg-type]
            return lambda _: fixed
        places = [self.numbers.place(extent) for extent in buffer.shape]
        if len(places) == 1:
            return lambda values: (values[places[0]],)
        return itemgetter(*places)  # type: ignore[return-value]

    def _gather(self) -> tuple[Ints, tuple[Ints, Ints], tuple[int, ...]]:
        """Places of all words; where offsets must be added to addresses; the roots whose addresses are needed."""
        addressed: dict[int, int] = {}
        kinds: list[tuple[int, int]] = []
        shifts: list[tuple[int, int]] = []
        for i, word in enumerate(self.words):
            if isinstance(word, Address):
                owner = root(self.plan.buffers, word.buffer)
                if owner in self.constants:
                    kinds.append((2, self._static(address_of(self.constants[owner]))))
                else:
                    kinds.append((1, addressed.setdefault(owner, len(addressed))))
                if word.offset != 0:
                    shifts.append((i, self.numbers.place(word.offset)))
            elif isinstance(word, int):
                kinds.append((2, self._static(word)))
            else:
                kinds.append((0, self.numbers.place(word)))
        starts = (0, len(self.numbers), len(self.numbers) + len(addressed))
        gather = np.array([starts[kind] + place for kind, place in kinds], np.intp)
        columns = np.array(shifts, np.intp).reshape(-1, 2)
        return gather, (columns[:, 0].copy(), columns[:, 1].copy()), tuple(addressed)

    def _static(self, value: int) -> int:
        return self.statics.setdefault(value, len(self.statics))


@dataclass(eq=False)
class Bound:
    """A segment with numbers: the calls to make, and the arrays of its buffers."""

    extents: tuple[int, ...]
    runs: list[Run]
    arrays: dict[int, Array]
    offsets: dict[int, tuple[int, int]]
    memory: tuple[Array, Array]
    keep: tuple[Any, ...]


def zone_sizes(segment: Segment, values: Sequence[int]) -> tuple[int, int]:
    """Bytes of (arena, ports) for evaluated numbers."""
    numbers = np.array(values, np.int64)
    arena, ports = (zone.layout.offsets(numbers[zone.sizes])[1] for zone in segment.zones)
    return arena, ports


def bind(
    segment: Segment,
    extents: tuple[int, ...],
    constants: dict[int, Array],
    allocate: Callable[[int, int], tuple[Array, Array]],
    before: Sequence[Bound],
) -> Bound:
    """The segment bound to `extents`, in memory from `allocate(bytes of the arena, bytes of the ports)`.

    `before` are the bound segments that ran already, whose buffers this one may read.
    """
    values = segment.numbers.evaluate(extents)
    numbers = np.array(values, np.int64)
    layouts = [zone.layout.offsets(numbers[zone.sizes]) for zone in segment.zones]
    memory = allocate(layouts[0][1], layouts[1][1])
    bases = [address_of(piece) for piece in memory]
    offsets: dict[int, tuple[int, int]] = {}
    for kind, (zone, (starts, _)) in enumerate(zip(segment.zones, layouts, strict=True)):
        offsets.update(zip(zone.owned, [(kind, start) for start in starts.tolist()], strict=True))
    arrays = _make_views(segment, values, offsets, memory, constants, before)
    table = _make_table(segment, numbers, offsets, bases, before)
    runs = _make_runs(segment, values, arrays, table)
    return Bound(extents, runs, arrays, offsets, memory, (table,))


def _find(owner: int, offsets: dict[int, tuple[int, int]], before: Sequence[Bound]) -> Bound | None:
    """The earlier segment that owns the buffer; None for this one."""
    return None if owner in offsets else next((bound for bound in before if owner in bound.offsets), None)


def _make_views(
    segment: Segment,
    values: Sequence[int],
    offsets: dict[int, tuple[int, int]],
    memory: tuple[Array, Array],
    constants: dict[int, Array],
    before: Sequence[Bound],
) -> dict[int, Array]:
    arrays: dict[int, Array] = {}
    for view in segment.views:
        place = offsets.get(view.owner)
        if place is not None:
            arrays[view.buffer] = np.ndarray(view.shape(values), view.dtype, memory[place[0]], place[1])
        elif view.owner in constants:
            arrays[view.buffer] = constants[view.owner].reshape(view.shape(values))
        elif view.dtype == STRING:
            arrays[view.buffer] = _host_array(view, values, arrays, before)
        else:
            bound = _find(view.owner, offsets, before)
            assert bound is not None
            kind, start = bound.offsets[view.owner]
            arrays[view.buffer] = np.ndarray(view.shape(values), view.dtype, bound.memory[kind], start)
    return arrays


def _host_array(view: View, values: Sequence[int], arrays: dict[int, Array], before: Sequence[Bound]) -> Array:
    """Objects live in an array of their own, which the aliases of a buffer share."""
    for known in (arrays, *(bound.arrays for bound in before)):
        if view.owner in known:
            return known[view.owner].reshape(view.shape(values))
    owned = np.full(view.shape(values), "", object)
    return arrays.setdefault(view.owner, owned).reshape(view.shape(values))


def _make_table(
    segment: Segment, numbers: Ints, offsets: dict[int, tuple[int, int]], bases: list[int], before: Sequence[Bound]
) -> Ints:
    """[function, block] rows, then the blocks, in one array."""
    rows = len(segment.functions)
    table = np.empty(2 * rows + len(segment.gather), np.int64)
    if not rows:
        return table
    addresses = []
    for owner in segment.addressed:
        bound = _find(owner, offsets, before)
        kind, start = offsets[owner] if bound is None else bound.offsets[owner]
        addresses.append(start + (bases[kind] if bound is None else address_of(bound.memory[kind])))
    pool = np.concatenate([numbers, np.array(addresses, np.int64), segment.statics])
    blocks = table[2 * rows :]
    np.take(pool, segment.gather, out=blocks, mode="clip")
    blocks[segment.shifts[0]] += numbers[segment.shifts[1]]
    table[0 : 2 * rows : 2] = segment.functions
    table[1 : 2 * rows : 2] = segment.blocks + (address_of(table) + 16 * rows)
    return table


def _make_runs(segment: Segment, values: Sequence[int], arrays: dict[int, Array], table: Ints) -> list[Run]:
    walk, base = walker(), address_of(table)
    runs: list[Run] = []
    for part in segment.parts:
        if part.call is None:
            runs.append(partial(walk, base + 16 * part.first, part.last - part.first, 0, 1))
            continue
        op = part.call.op if part.resolve is None else part.resolve(values)
        inputs, outputs, scratch = (
            [arrays[i] for i in buffers] for buffers in (part.inputs, part.outputs, part.scratch)
        )
        runs.append(partial(part.call.function, op, inputs, outputs, scratch))
    return runs
