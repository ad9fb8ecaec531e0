"""Where each byte of a plan goes: the buffers of a slot's arena and ports, and the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from gpu_engine.plan.binding import Numbers
from gpu_engine.plan.memory import lifetimes
from gpu_engine.plan.plan import Buffer, Plan, root
from gpu_engine.plan.zones import Zone
from gpu_engine.tools.stages import Extents, short


class BoundTogether(Protocol):
    """A part of a device's program, as every device has it."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def numbers(self) -> Numbers: ...
    @property
    def arena(self) -> Zone: ...
    @property
    def ports(self) -> Zone: ...


def memory_facts(plan: Plan, extents: Extents) -> dict[str, Any]:
    """Bytes of one slot at `extents`, buffer by buffer, and of the weights that all slots share. Parts whose extents
    only running tells are named, not counted, unless `extents` has them."""
    buffers: list[dict[str, Any]] = []
    zones = {"arena": 0, "ports": 0}
    unknown: list[str] = []
    segments: Sequence[BoundTogether] = plan.program.segments
    for place, segment in enumerate(segments):
        missing = [name for name in segment.names if name not in extents]
        if missing:
            unknown += [name for name in missing if name not in unknown]
            continue
        values = np.array(segment.numbers.evaluate([extents[name] for name in segment.names]), np.int64)
        for kind, zone in (("arena", segment.arena), ("ports", segment.ports)):
            offsets, nbytes = zone.offsets(values)
            zones[kind] += nbytes
            buffers += _zone_rows(plan, zone, values, offsets.tolist(), f"{kind} {place}" if place else kind)
    weights = weight_rows(plan)
    return {
        "arena_nbytes": zones["arena"],
        "ports_nbytes": zones["ports"],
        "arena_nbytes_without_sharing": sum(row["nbytes"] for row in buffers if row["zone"].startswith("arena")),
        "weights_nbytes": plan.program.weights_nbytes,
        "unknown_extents": unknown,
        "buffers": sorted(buffers, key=lambda row: -row["nbytes"]),
        "weights": weights,
    }


def _zone_rows(plan: Plan, zone: Zone, values: Any, offsets: Sequence[int], kind: str) -> list[dict[str, Any]]:
    """A row for every buffer of a zone: where it lies, when it lives, whom it shares its memory with."""
    sizes = values[zone.sizes].tolist()
    used = _used(plan, zone.owned)
    lives = dict(zip(used, lifetimes(plan, used, [0] * len(used)), strict=True))
    regions = zone.layout.regions.tolist()
    writers: dict[int, str] = {}
    for step in plan.steps:
        for index in (*step.outputs, *step.scratch):
            writers.setdefault(root(plan.buffers, index), short(step.source))
    rows = []
    for place, index in enumerate(zone.owned):
        life = lives.get(index)
        rows.append(
            {
                "buffer": index,
                "type": _type(plan.buffers[index]),
                "nbytes": sizes[place],
                "zone": kind,
                "offset": offsets[place],
                "first_step": None if life is None else life.first,
                "last_step": None if life is None else life.last,
                "shares_with": regions.count(regions[place]) - 1,
                "made_by": writers.get(index) or _port(plan, index),
            }
        )
    return rows


def _used(plan: Plan, owned: Sequence[int]) -> list[int]:
    """The buffers that some step uses; an input may have no use."""
    used = {root(plan.buffers, index) for step in plan.steps for index in (*step.inputs, *step.outputs, *step.scratch)}
    return [index for index in owned if index in used]


def _port(plan: Plan, index: int) -> str:
    for place, each in enumerate(plan.inputs):
        if root(plan.buffers, each) == index:
            return f"input {plan.input_ports[place].name!r}"
    return ""


def weight_rows(plan: Plan) -> list[dict[str, Any]]:
    """Constants, the largest first; those that lie at one address are one weight."""
    readers: dict[int, list[str]] = {}
    for step in plan.steps:
        for index in dict.fromkeys(root(plan.buffers, each) for each in step.inputs):
            readers.setdefault(index, []).append(short(step.source))
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for index, buffer in enumerate(plan.buffers):
        array = buffer.constant
        if array is None or array.dtype.hasobject:
            continue
        row = rows.setdefault(
            (array.__array_interface__["data"][0], array.nbytes),
            {"type": _type(buffer), "nbytes": array.nbytes, "buffers": 0, "read_by": []},
        )
        row["buffers"] += 1
        row["read_by"] += [name for name in readers.get(index, ()) if name not in row["read_by"]]
    return sorted(rows.values(), key=lambda row: -row["nbytes"])


def _type(buffer: Buffer) -> str:
    return f"{buffer.dtype}[{', '.join(map(str, buffer.shape))}]"
