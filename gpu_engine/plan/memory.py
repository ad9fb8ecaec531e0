"""Memory planning: buffers whose lifetimes do not meet share a region of one arena.

Which buffers share is decided once, with representative sizes; how large a region is and where it starts is arithmetic
at every binding: the greatest of its members, and a running sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpu_engine.errors import OutOfMemory
from gpu_engine.ir import dims
from gpu_engine.ir.evaluation import evaluator
from gpu_engine.plan.plan import LARGEST, Buffer, Plan, root

ALIGNMENT = 64
Sizes = NDArray[np.int64]


@dataclass(frozen=True)
class Lifetime:
    """A buffer is written first in step `first` and read or written last in step `last`; `nbytes` is typical."""

    first: int
    last: int
    nbytes: int


class Layout:
    """Regions of an arena: `regions[i]` is the region of buffer i."""

    def __init__(self, regions: Sequence[int]) -> None:
        self.regions = np.asarray(regions, np.int64)
        self._order = np.argsort(self.regions, kind="stable")
        _, self._starts = np.unique(self.regions[self._order], return_index=True)

    def offsets(self, sizes: Sizes) -> tuple[Sizes, int]:
        """(byte offset of every buffer, bytes of the arena) for buffers of `sizes` bytes; offsets are aligned.

        OutOfMemory for a buffer so large that offsets would not add up.
        """
        if not len(self.regions):
            return sizes, 0
        greatest = np.maximum.reduceat(sizes[self._order], self._starts)
        if greatest.max() > LARGEST:
            raise OutOfMemory(f"no machine holds a tensor of {greatest.max():,} bytes")
        ends = ((greatest + (ALIGNMENT - 1)) & -ALIGNMENT).cumsum()
        starts = np.empty_like(ends)
        starts[0], starts[1:] = 0, ends[:-1]
        return starts[self.regions], int(ends[-1])


def assign_regions(lifetimes: Sequence[Lifetime], joined: Sequence[tuple[int, int]] = ()) -> list[int]:
    """A region for every lifetime, so that no two in one region overlap but those that `joined` puts together.

    `joined` are pairs (dying, born): the second takes over the first's memory in the step that ends it. Greedy, large
    ones first, each into the free region whose size is nearest.
    """
    groups = _groups(len(lifetimes), joined)
    spans = {
        group: Lifetime(
            min(lifetimes[i].first for i in members),
            max(lifetimes[i].last for i in members),
            max(lifetimes[i].nbytes for i in members),
        )
        for group, members in groups.items()
    }
    regions: list[list[Lifetime]] = []
    assigned = [0] * len(lifetimes)
    for group in sorted(spans, key=lambda group: (-spans[group].nbytes, spans[group].first)):
        place = _best_region(regions, spans[group])
        if place == len(regions):
            regions.append([])
        regions[place].append(spans[group])
        for member in groups[group]:
            assigned[member] = place
    return assigned


def _best_region(regions: list[list[Lifetime]], span: Lifetime) -> int:
    """The free region with the least size that holds `span`: as groups come by falling size, any free one does."""
    free = [i for i, taken in enumerate(regions) if all(span.last < t.first or t.last < span.first for t in taken)]
    return min(free, key=lambda i: regions[i][0].nbytes, default=len(regions))


def _groups(count: int, joined: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
    leader = list(range(count))

    def find(i: int) -> int:
        while leader[i] != i:
            i = leader[i]
        return i

    for dying, born in joined:
        leader[find(born)] = find(dying)
    groups: dict[int, list[int]] = {}
    for i in range(count):
        groups.setdefault(find(i), []).append(i)
    return groups


def lifetimes(plan: Plan, owned: Sequence[int], nbytes: Sequence[int]) -> list[Lifetime]:
    """The lifetimes of the root buffers `owned`, aliases included, in steps of the plan."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for i, step in enumerate(plan.steps):
        for index in (*step.inputs, *step.outputs, *step.scratch):
            buffer = root(plan.buffers, index)
            first.setdefault(buffer, i)
            last[buffer] = i
    return [Lifetime(first[b], last[b], size) for b, size in zip(owned, nbytes, strict=True)]


def in_place_pairs(plan: Plan, owned: Sequence[int], spans: Sequence[Lifetime]) -> list[tuple[int, int]]:
    """(dying, born) positions in `owned` for every step whose output may take over an input that dies there."""
    place = {buffer: i for i, buffer in enumerate(owned)}
    pairs = []
    for i, step in enumerate(plan.steps):
        if not step.outputs:
            continue
        born = root(plan.buffers, step.outputs[0])
        if born not in place or spans[place[born]].first != i:
            continue
        others = [root(plan.buffers, index) for index in step.inputs]
        for position in step.in_place:
            dying = others[position]
            if (
                dying in place
                and spans[place[dying]].last == i
                and others.count(dying) == 1
                and _same(plan, dying, born)
            ):
                pairs.append((place[dying], place[born]))
                break
    return pairs


def _same(plan: Plan, a: int, b: int) -> bool:
    return buffer_nbytes(plan.buffers[a]) == buffer_nbytes(plan.buffers[b])


def buffer_nbytes(buffer: Buffer) -> dims.Dim:
    """The size of a buffer, symbolic where its shape is."""
    return dims.product(buffer.shape) * buffer.dtype.itemsize


def typical_nbytes(buffers: Sequence[Buffer], symbol: str | None) -> list[int]:
    """Sizes to plan with: the batch extent `symbol` counts 4, every other unknown extent 256."""
    sizes = [buffer_nbytes(buffer) for buffer in buffers]
    names = sorted(set().union(*map(dims.symbols, sizes)))
    values = [4 if name == symbol else 256 for name in names]
    try:
        return list(evaluator(sizes, names)(*values))
    except (ValueError, ZeroDivisionError):
        return [_typical(size, names, values) for size in sizes]


def _typical(size: dims.Dim, names: Sequence[str], values: Sequence[int]) -> int:
    try:
        return evaluator([size], names)(*values)[0]
    except (ValueError, ZeroDivisionError):
        return 1 << 20
