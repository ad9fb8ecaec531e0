"""Streams and slots: memory, cached bindings, and running them.

The slots of a stream share its arenas, because one of them runs at a time; inputs and outputs belong to the slot, so
that one slot can be filled, and another one's results read, while a third runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import perf_counter

import numpy as np

from cpu_fallback.calls import Array
from cpu_fallback.cores import free_memory
from cpu_fallback.interruption import raise_pending
from cpu_fallback.native import LIBRARY
from cpu_fallback.program import Bound, Program, Segment, bind
from cpu_fallback.team import Team, can_have_teams
from gpu_engine.errors import GpuEngineError, OutOfMemory
from gpu_engine.plan.execution import extents_after, step_failure
from gpu_engine.plan.memory import ALIGNMENT
from gpu_engine.plan.plan import Plan
from gpu_engine.runtime.device import StepTimes

CACHED_BINDINGS = 32
CHECKED_NBYTES = 1 << 20
TRIED_S, HELD_S = 200e-6, 5e-6
"""What a run may take for the next one to be tried with the GIL held, and what for the GIL to stay held: less than two
threads need to hand it over (`benchmarks.peers --only throughput --model sklearn_forest`)."""


class Area:
    """A piece of memory that grows on demand; `moves` counts how often pieces of its kind have moved."""

    def __init__(self, moves: list[int]) -> None:
        self.array: Array = np.empty(0, np.uint8)
        self._moves = moves

    def reserve(self, nbytes: int) -> Array:
        """At least `nbytes`, aligned; OutOfMemory before allocating what cannot fit."""
        if nbytes > self.array.nbytes:
            self.array = allocate(max(nbytes, min(nbytes * 5 // 4, nbytes + CHECKED_NBYTES)))
            self._moves[0] += 1
        return self.array


def allocate(nbytes: int) -> Array:
    """Uninitialised aligned bytes."""
    if nbytes > CHECKED_NBYTES and nbytes > (free := free_memory()):
        raise OutOfMemory(f"an arena of {nbytes:,} bytes is needed, {free:,} are free")
    try:
        raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    except MemoryError as error:
        raise OutOfMemory(f"an arena of {nbytes:,} bytes could not be allocated") from error
    start = -int(raw.__array_interface__["data"][0]) % ALIGNMENT
    return raw[start : start + nbytes]


class CpuSlot:
    """Room for one batch in flight: staged inputs, results, and bindings of the shapes seen last."""

    def __init__(self, plan: Plan, arenas: Sequence[Area], arena_moves: list[int], team: Team | None) -> None:
        self._plan, self._arenas, self._arena_moves, self._team = plan, arenas, arena_moves, team
        self._program: Program = plan.program
        self._port_moves = [0]
        self._ports = [Area(self._port_moves) for _ in arenas]
        self._moves = 0
        self._cache: dict[tuple[int, tuple[int, ...]], Bound] = {}
        self._bound: Bound | None = None
        self._inputs: list[Array] = []
        self._outputs: list[Array] = []
        self._error: BaseException | None = None

    def stage(self, extents: tuple[int, ...]) -> Sequence[Array]:
        """See `runtime.device.Slot`. InputError if the extents contradict each other inside the model."""
        bound = self._bound
        if bound is None or bound.extents != extents or self._moved():
            self._bound = None
            self._bound = bound = self._bind(0, extents, [])
            self._inputs = [bound.arrays[i] for i in self._plan.inputs]
            if len(self._program.segments) == 1:
                self._outputs = self._results([bound])
        return self._inputs

    def launch(self) -> None:
        """Run to completion; `wait` gives the results or raises the error."""
        assert self._bound is not None, "launch without stage"
        self._error = None
        try:
            if len(self._program.segments) == 1:
                self._call(self._program.segments[0], self._bound)
                if self._bound.shares and self._team is not None:
                    self._team.settle()
            else:
                self._run(self._bound)
                if self._team is not None:
                    self._team.settle()
        except BaseException as error:
            self._error = error
            if not isinstance(error, Exception):
                raise

    def wait(self) -> Sequence[Array]:
        if self._error is not None:
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error  # its traceback holds this frame
        return self._outputs

    def step_times(self) -> StepTimes | None:
        """See `runtime.device.Slot`: this plan has no clocks."""
        return None

    def _run(self, bound: Bound) -> None:
        """Segment after segment: what one gives binds the next."""
        chain = [bound]
        for index, segment in enumerate(self._program.segments):
            results = self._call(segment, chain[index])
            if segment.binds is None:
                continue
            step = self._plan.steps[segment.binds]
            assert isinstance(results, tuple)
            names, unknown = segment.names, self._program.segments[index + 1].names
            extents = extents_after(self._plan, step, results, names, chain[index].extents, unknown)
            following = self._bind(index + 1, extents, chain)
            for buffer, result in zip(step.outputs, results, strict=True):
                np.copyto(following.arrays[buffer], result, casting="unsafe")
            chain.append(following)
        self._outputs = self._results(chain)

    def _call(self, segment: Segment, bound: Bound) -> object:
        """Make the calls of one segment; what the last one gives."""
        if segment.only_native:
            if bound.trials:
                _time(bound)
            else:
                for function, arguments in bound.calls:
                    function(*arguments)
            raise_pending()
            return None
        done, result = 0, None
        try:
            with np.errstate(all="ignore"):
                for function, arguments in bound.calls:
                    result = function(*arguments)
                    raise_pending()
                    done += 1
        except GpuEngineError:
            raise
        except Exception as error:
            position = segment.array_steps[done]
            assert position is not None, "native code does not raise"
            step = self._plan.steps[position]
            raise step_failure(step, step.kernel.op, bound.calls[done][1][1], error) from error
        return result

    def _bind(self, index: int, extents: tuple[int, ...], chain: list[Bound]) -> Bound:
        """From the cache, or new; whatever moves makes all older bindings void."""
        if self._moved():
            self._cache.clear()
        bound = self._cache.pop((index, extents), None)
        if bound is None:
            bound = bind(self._program.segments[index], extents, self._reserving(index), chain, self._team)
            self._drop(index, extents)
        self._moves = self._arena_moves[0] + self._port_moves[0]
        self._cache[index, extents] = bound
        return bound

    def _drop(self, index: int, extents: tuple[int, ...]) -> None:
        """Forget what the new binding voids, and the one not used for longest if there are too many."""
        if self._moved():
            self._cache.clear()
        for key in [key for key in self._cache if key[0] > index and key[1][: len(extents)] == extents]:
            del self._cache[key]
        if len(self._cache) >= CACHED_BINDINGS * len(self._ports):
            del self._cache[next(iter(self._cache))]

    def _reserving(self, index: int) -> Callable[[int, int], tuple[Array, Array]]:
        return lambda arena, ports: (self._arenas[index].reserve(arena), self._ports[index].reserve(ports))

    def _moved(self) -> bool:
        return self._moves != self._arena_moves[0] + self._port_moves[0]

    def _results(self, chain: list[Bound]) -> list[Array]:
        return [next(bound.arrays[i] for bound in reversed(chain) if i in bound.arrays) for i in self._plan.outputs]


def _time(bound: Bound) -> None:
    """Run once. After the last trial the GIL is held from then on if all else would take longer.

    Only a run that holds it tells how long it takes itself; so that none holds it for long, the first does not.
    """
    walk = LIBRARY.holding_walker() if bound.least_s < TRIED_S else LIBRARY.walker()
    ((_, arguments),) = bound.calls
    started = perf_counter()
    walk(*arguments)
    bound.least_s = min(bound.least_s, perf_counter() - started)
    bound.trials = bound.trials - 1 if bound.least_s < TRIED_S else 0
    if not bound.trials and bound.least_s < HELD_S:
        bound.calls = [(walk, arguments)]


class CpuStream:
    """One lane: its slots take turns in its arenas, on its cores.

    A run is shared by `threads` threads: the one that launches it, and workers that the first long run makes. Without
    `cores` they all run wherever the system likes.
    """

    def __init__(
        self, plan: Plan, slots: int, cores: Sequence[int], threads: int, release: Callable[[], None] = lambda: None
    ) -> None:
        self.cores = tuple(cores)
        self.threads = threads if can_have_teams() else 1
        self._team = Team(self.threads, self.cores) if self.threads > 1 else None
        moves = [0]
        arenas = [Area(moves) for _ in plan.program.segments]
        self.slots = [CpuSlot(plan, arenas, moves, self._team) for _ in range(slots)]
        self._release = release

    def enter(self) -> None:
        """Pin the calling thread to the stream's cores, where the system lets a thread choose."""
        if self.cores and hasattr(os, "sched_setaffinity"):
            with suppress(OSError):
                os.sched_setaffinity(0, self.cores)

    def close(self) -> None:
        self._release()
        self.slots = []
        if self._team is not None:
            self._team.close()
