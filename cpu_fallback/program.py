"""Programs: a plan prepared for binding.

Steps in a row that are native become one call into one walker. What changes with the extents are numbers: each distinct
one is computed once, then gathered into the argument blocks. Array views are made for array steps only, by a function
generated for the purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cpu_fallback.binder import Binder, Call, Maker
from cpu_fallback.calls import Array, ArrayCall, Native, address_of
from cpu_fallback.checks import sunk
from cpu_fallback.jumps import Jump
from cpu_fallback.native import LIBRARY, host
from cpu_fallback.sharing import Traffic, shares_of, traffic_of
from cpu_fallback.team import Team
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import STRING
from gpu_engine.plan.binding import Numbers
from gpu_engine.plan.lower import segments
from gpu_engine.plan.memory import (
    buffer_nbytes,
)
from gpu_engine.plan.plan import Plan, root
from gpu_engine.plan.words import Address, Gather, Word, gather
from gpu_engine.plan.zones import Ints, Zone, new_requirements, segment_of_buffers, zone

TRIALS = 6
"""Runs that are timed after binding; the first of them finds nothing in the caches."""


@dataclass(frozen=True)
class Table:
    """The native steps of a segment: rows of {function, argument block}, how the blocks are filled, and the `jobs`:
    bytes before the first row and number of rows of each run, and two words that are 0.

    `constants` are the addresses of the plan's constants, in the places that `gather` knows them by.
    """

    functions: Ints
    blocks: Ints
    gather: Gather
    constants: Ints
    jobs: Ints


@dataclass(frozen=True)
class Segment:
    """A part of the plan that can be bound at once: everything up to and including a step that binds extents."""

    names: tuple[str, ...]
    numbers: Numbers
    arena: Zone
    ports: Zone
    table: Table
    traffic: Traffic
    make: Maker
    array_steps: tuple[int | None, ...]
    only_native: bool
    straight: bool
    binds: int | None


@dataclass(frozen=True)
class Program:
    """All segments of a plan."""

    segments: tuple[Segment, ...]
    weights_nbytes: int


def with_program(plan: Plan) -> Plan:
    """A plan whose steps are `Native` and `ArrayCall`, prepared; compiles the kernels that are new."""
    return prepared(sunk(plan))


def prepared(plan: Plan) -> Plan:
    """A plan whose steps stay where they are, prepared."""
    return replace(plan, program=_build_program(plan))


def _build_program(plan: Plan) -> Program:
    kernels = {step.kernel.kernel: None for step in plan.steps if isinstance(step.kernel, Native)}
    kernels.pop(Jump(), None)
    addresses = LIBRARY.addresses(kernels, host()) | {Jump(): 0}
    constants = {i: buffer.constant for i, buffer in enumerate(plan.buffers) if buffer.constant is not None}
    unique = {address_of(array): array.nbytes for array in constants.values()}
    homes, cuts = segment_of_buffers(plan), segments(plan)
    built = [_Builder(plan, constants, addresses, homes, cuts, index).segment() for index in range(len(cuts))]
    return Program(tuple(built), sum(unique.values()))


class _Builder:
    """Collects what one segment needs."""

    def __init__(
        self,
        plan: Plan,
        constants: dict[int, Array],
        kernels: dict[Any, int],
        homes: dict[int, int],
        cuts: Sequence[tuple[int, int, tuple[str, ...]]],
        index: int,
    ) -> None:
        first, last, self.names = cuts[index]
        self.plan, self.constants, self.kernels, self.homes, self.index = plan, constants, kernels, homes, index
        self.steps = range(first, last)
        self.numbers = Numbers(self.names)
        self.words: list[Word] = []
        self.places = {buffer: i for i, buffer in enumerate(constants)}
        self.addresses = np.array([address_of(array) for array in constants.values()], np.int64)
        self.sizes: list[list[Dim]] = []

    def segment(self) -> Segment:
        buffers = self.plan.buffers
        outward = {root(buffers, i) for i in (*self.plan.inputs, *self.plan.outputs)}
        owned = [b for b, home in self.homes.items() if home == self.index and buffers[b].dtype != STRING]
        arena = zone(self.plan, [buffer for buffer in owned if buffer not in outward], self.numbers, share=True)
        ports = zone(self.plan, [buffer for buffer in owned if buffer in outward], self.numbers, share=False)
        self.numbers.require(new_requirements(self.plan, self.names, self.index == 0))
        binder = Binder(self.plan, self.constants, self.numbers, arena.owned, ports.owned)
        functions, blocks, array_steps = self._steps(binder)
        binder.expose(self._exposed())
        traffic = traffic_of(self.sizes, self.numbers)
        gathered = gather(self.plan, self.words, self.numbers, arena.owned + ports.owned, self.places)
        self.numbers.compile()
        last = self.plan.steps[self.steps[-1]] if self.steps else None
        jobs = np.array([(16 * start, count, 0, 0) for start, count in binder.runs], np.int64).reshape(-1, 4)
        starts = np.array(blocks, np.int64) * 8
        table = Table(np.array(functions, np.int64), starts, gathered, self.addresses, jobs)
        binds = self.steps[-1] if last is not None and last.binds else None
        return Segment(
            self.names, self.numbers, arena, ports, table, traffic, binder.compile(), tuple(array_steps),
            all(step is None for step in array_steps), self._is_straight(), binds,
        )  # fmt: skip

    def _is_straight(self) -> bool:
        """Whether one native run does the same steps every time."""
        kernels = [self.plan.steps[i].kernel for i in self.steps]
        return all(isinstance(each, Native) and not isinstance(each.kernel, Jump) for each in kernels)

    def _exposed(self) -> list[int]:
        """Buffers whose arrays the slot asks for: inputs, outputs, what the step before this segment gave."""
        inputs = self.plan.inputs if self.index == 0 else self.plan.steps[self.steps.start - 1].outputs
        outputs = [i for i in self.plan.outputs if self.homes.get(root(self.plan.buffers, i), 0) == self.index]
        return [*inputs, *outputs]

    def _steps(self, binder: Binder) -> tuple[list[int], list[int], list[int | None]]:
        """(functions, first words of their blocks, for every call of the bound segment its array step if it is one)."""
        functions: list[int] = []
        blocks: list[int] = []
        calls: list[int | None] = []
        for i in self.steps:
            step = self.plan.steps[i]
            if isinstance(step.kernel, ArrayCall):
                binder.array_call(step)
                calls.append(i)
                continue
            if not calls or calls[-1] is not None:
                calls.append(None)
                binder.native_run(len(functions))
            binder.extend_run()
            listed = {*step.inputs, *step.outputs, *step.scratch}
            addressed = {word.buffer for word in step.kernel.words if isinstance(word, Address)}
            assert addressed <= listed, f"{step.source}: {step.kernel.kernel} reads buffers that its step does not list"
            functions.append(self.kernels[step.kernel.kernel])
            touched = () if isinstance(step.kernel.kernel, Jump) else (*step.inputs, *step.outputs)
            self.sizes.append([buffer_nbytes(self.plan.buffers[i]) for i in touched])
            blocks.append(len(self.words))
            self.words += step.kernel.words
        return functions, blocks, calls


def zone_sizes(segment: Segment, values: Sequence[int]) -> tuple[int, int]:
    """Bytes of (arena, ports) for evaluated numbers."""
    numbers = np.array(values, np.int64)
    return tuple(zone.offsets(numbers)[1] for zone in (segment.arena, segment.ports))  # type: ignore[return-value]


@dataclass(eq=False)
class Bound:
    """A segment with numbers: the calls to make, the arrays that the slot needs, and where its buffers lie.

    `trials` are runs yet to be timed, before it is known whether they take long enough to give the GIL away.
    """

    extents: tuple[int, ...]
    calls: list[Call]
    arrays: dict[int, Array]
    located: dict[int, tuple[Array, int]]
    memory: tuple[Array, Array]
    table: Ints
    shares: list[Array]
    trials: int = 0
    least_s: float = float("inf")


Allocate = Callable[[int, int], tuple[Array, Array]]


def bind(
    segment: Segment,
    extents: tuple[int, ...],
    allocate: Allocate,
    before: Sequence[Bound],
    team: Team | None = None,
) -> Bound:
    """The segment bound to `extents`, in memory from `allocate(bytes of the arena, bytes of the ports)`.

    `before` are the bound segments that ran already, whose buffers this one may read; a `team` helps with long runs of
    native steps. InputError if the extents contradict each other.
    """
    values = segment.numbers.evaluate(extents)
    numbers = np.array(values, np.int64)
    (arena, arena_nbytes), (ports, ports_nbytes) = (zone.offsets(numbers) for zone in (segment.arena, segment.ports))
    memory = allocate(arena_nbytes, ports_nbytes)
    addresses = np.concatenate([arena + address_of(memory[0]), ports + address_of(memory[1])])
    table = _filled(segment.table, numbers, addresses, before)
    jobs = table[len(table) - segment.table.jobs.size :]
    arrays, calls = segment.make(values, arena.tolist(), ports.tolist(), *memory, before, address_of(jobs))
    located: dict[int, tuple[Array, int]] = {}
    if segment.binds is not None:
        for zone, piece, offsets in ((segment.arena, memory[0], arena), (segment.ports, memory[1], ports)):
            located |= {buffer: (piece, start) for buffer, start in zip(zone.owned, offsets.tolist(), strict=True)}
    shares = [] if team is None else _led(segment, numbers, calls, jobs.reshape(-1, 4), team)
    trials = TRIALS if segment.straight and calls and not shares else 0
    return Bound(extents, calls, arrays, located, memory, table, shares, trials)


def _led(segment: Segment, numbers: Ints, calls: list[Call], jobs: Ints, team: Team) -> list[Array]:
    """Have long native runs among the calls led instead of walked; how their steps are shared."""
    places = segment.table.jobs
    shares, worth = shares_of(segment.traffic.nbytes(numbers), places[:, 0] // 16, places[:, 1])
    if not any(worth) or not team.start():
        return []
    native = [i for i, step in enumerate(segment.array_steps) if step is None]
    for i, job, led in zip(native, jobs, worth, strict=True):
        if led:
            calls[i] = (team.lead, calls[i][1])
            job[2:] = address_of(shares) + (job[0] - jobs[0, 0]) // 16, team.address
    return [shares]


def _filled(table: Table, numbers: Ints, addresses: Ints, before: Sequence[Bound]) -> Ints:
    """[function, block] rows, then the blocks, then the jobs, in one array."""
    sources, (shifted, by) = table.gather, table.gather.shifts
    rows, words = len(table.functions), 2 * len(table.functions) + len(sources.places)
    filled = np.empty(words + table.jobs.size, np.int64)
    if not rows:
        return filled
    parts = [numbers, addresses, table.constants, sources.literals]
    if sources.foreign:
        parts.append(np.array([_foreign_address(owner, before) for owner in sources.foreign], np.int64))
    blocks = filled[2 * rows : words]
    np.take(np.concatenate(parts), sources.places, out=blocks, mode="clip")
    if len(shifted):
        blocks[shifted] += numbers[by]
    filled[0 : 2 * rows : 2] = table.functions
    filled[1 : 2 * rows : 2] = table.blocks + (address_of(filled) + 16 * rows)
    filled[words:] = table.jobs.ravel()
    filled[words::4] += address_of(filled)
    return filled


def _foreign_address(owner: int, before: Sequence[Bound]) -> int:
    memory, offset = next(bound.located[owner] for bound in before if owner in bound.located)
    return address_of(memory) + offset
