"""Which part of a plan gives each buffer its memory, and how the buffers of a part lie in one piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpu_engine.ir import dims
from gpu_engine.plan.binding import Numbers
from gpu_engine.plan.lower import segments
from gpu_engine.plan.memory import (
    Layout,
    assign_regions,
    buffer_nbytes,
    in_place_pairs,
    lifetimes,
    typical_nbytes,
)
from gpu_engine.plan.plan import Plan, Requirement, root

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Zone:
    """Buffers that lie in one piece of memory: their numbers, where their sizes stand, how they are laid out."""

    owned: tuple[int, ...]
    sizes: Ints
    layout: Layout

    def offsets(self, numbers: Ints) -> tuple[Ints, int]:
        """(byte offset of every buffer, bytes of the whole) for evaluated numbers."""
        return self.layout.offsets(numbers[self.sizes])


def segment_of_buffers(plan: Plan) -> dict[int, int]:
    """The segment whose binding gives each root buffer its memory; results of a binding step belong to the next."""
    homes = dict.fromkeys((root(plan.buffers, i) for i in plan.inputs), 0)
    for index, (first, last, _) in enumerate(segments(plan)):
        for step in plan.steps[first:last]:
            for buffer in (*step.outputs, *step.scratch):
                homes.setdefault(root(plan.buffers, buffer), index + bool(step.binds))
    return homes


def zone(plan: Plan, owned: Sequence[int], numbers: Numbers, *, share: bool) -> Zone:
    """A zone of the root buffers `owned`; with `share` those whose lives do not meet share memory."""
    places = [numbers.place(buffer_nbytes(plan.buffers[buffer])) for buffer in owned]
    regions = list(range(len(owned)))
    if share:
        typical = typical_nbytes([plan.buffers[b] for b in owned], plan.batching.symbol)
        spans = lifetimes(plan, owned, typical)
        regions = assign_regions(spans, in_place_pairs(plan, owned, spans))
    return Zone(tuple(owned), np.array(places, np.intp), Layout(regions))


def overlaid_zone(plan: Plan, owned: Sequence[int], numbers: Numbers) -> Zone:
    """A zone whose root buffers all begin at its start: what one step leaves in them is what the next one finds."""
    places = [numbers.place(buffer_nbytes(plan.buffers[buffer])) for buffer in owned]
    return Zone(tuple(owned), np.array(places, np.intp), Layout([0] * len(owned)))


def new_requirements(plan: Plan, names: Sequence[str], first: bool) -> list[Requirement]:
    """Those that a segment is the first to know all extents of, by the `names` that it knows."""
    known, before = set(names), set() if first else set(plan.symbols)
    found = []
    for requirement in plan.requirements:
        needed = dims.symbols(requirement.left) | dims.symbols(requirement.right)
        if needed <= known and (first or not needed <= before):
            found.append(requirement)
    return found
