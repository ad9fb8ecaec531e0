"""Several devices of one kind as one device: one plan, streams on each, weights and kernels once on each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any

from gpu_engine.errors import DeviceError
from gpu_engine.ir.graph import Graph
from gpu_engine.plan.plan import Batching, Plan
from gpu_engine.runtime.device import Device, Stream
from gpu_engine.runtime.device_tensors import Intake, SeveralIntakes


class SeveralDevices:
    """See `runtime.device.Device`. DeviceError unless all have one architecture: a plan is made for one.

    Requests wait in one queue, so that a device that is faster, or has less to do, takes more of them. Tensors on one
    are copied to the one that runs; outputs that stay on a device lie where the request ran.
    """

    def __init__(self, members: Sequence[Device]) -> None:
        self._members, self._first = tuple(members), members[0]
        self.asynchronous, self.batch_limit = self._first.asynchronous, self._first.batch_limit
        self.bucketed, self.own_memory = self._first.bucketed, self._first.own_memory
        self.stream_limit, self.devices = self._first.stream_limit, len(self._members)
        architectures: dict[str, list[str]] = {}
        for member in self._members:
            architectures.setdefault(member.properties()["DEVICE_ARCHITECTURE"], []).append(member.name)
        if len(architectures) > 1:
            found = "; ".join(f"{', '.join(names)}: {arch}" for arch, names in architectures.items())
            raise DeviceError(f"devices of one engine must have one architecture, and these have several ({found})")

    @property
    def name(self) -> str:
        """ "cuda:0,2" """
        kind = self._first.name.split(":")[0]
        return f"{kind}:{','.join(member.name.split(':')[-1] for member in self._members)}"

    @property
    def reason(self) -> str:
        return "; ".join(f"{member.name}: {member.reason}" for member in self._members)

    def properties(self) -> Mapping[str, Any]:
        """What the first says, for all are alike."""
        return {**self._first.properties(), "EXECUTION_DEVICES": tuple(member.name for member in self._members)}

    @property
    def intake(self) -> Intake | None:
        """See `runtime.device.Device`."""
        found = [intake for member in self._members if (intake := member.intake) is not None]
        return SeveralIntakes(found) if found else None

    def auto_streams(self) -> int:
        """On each."""
        return self._first.auto_streams()

    def timed(self) -> SeveralDevices:
        """See `runtime.device.Device`."""
        return SeveralDevices([member.timed() for member in self._members])

    def lower(self, graph: Graph, batching: Batching) -> Plan:
        return self._first.lower(graph, batching)

    def open(self, plan: Plan, streams: int, slots: int, threads: int | None) -> Sequence[Stream]:
        """The streams, from one device after another; devices behind the last stream have none, and no weights."""
        shares = [len(range(i, streams, self.devices)) for i in range(self.devices)]
        opened: list[Sequence[Stream]] = []
        try:
            for member, share in zip(self._members, shares, strict=True):
                opened.append(member.open(plan, share, slots, threads) if share else ())
        except BaseException:
            for stream in chain(*opened):
                stream.close()
            raise
        return [stream for row in zip_longest(*opened) for stream in row if stream is not None]

    def memory(self, plan: Plan, extents: tuple[int, ...]) -> tuple[int, int]:
        return self._first.memory(plan, extents)

    def captured_nbytes(self, plan: Plan) -> int:
        """See `runtime.device.Device`."""
        return self._first.captured_nbytes(plan)

    def staging_nbytes(self, plan: Plan, extents: tuple[int, ...]) -> int:
        """See `runtime.device.Device`."""
        return self._first.staging_nbytes(plan, extents)

    def same_bits(self, plan: Plan) -> bool:
        return all(member.same_bits(plan) for member in self._members)

    def free_memory(self) -> int:
        return min(member.free_memory() for member in self._members)
