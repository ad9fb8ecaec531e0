"""What happens to inputs before they may wait in the queue: names, dtypes, shapes and memory are checked once."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpu_engine.errors import InputError, OutOfMemory
from gpu_engine.ir.dtypes import STRING
from gpu_engine.options import OutputPlace, output_place
from gpu_engine.plan.plan import Plan
from gpu_engine.plan.signature import Family, Fit, Signature
from gpu_engine.runtime.arrays import Array, Ports, Wrap
from gpu_engine.runtime.device import Device
from gpu_engine.runtime.device_tensors import GivenTensor
from gpu_engine.runtime.memory import Budget
from gpu_engine.runtime.requests import Placed, Request, array_rows
from gpu_engine.runtime.sizing import Sizes, memory_cap

_LOGGER = logging.getLogger(__name__)
_REMEMBERED = 4096
_SMALL_NBYTES = 64


@dataclass(frozen=True, slots=True, eq=False)
class Admitted:
    """Inputs of known shapes: `rows` for the scheduler, at most `limit` of them per execution.

    `reason` is why an execution of these inputs alone is closed, "" if they must queue. Requests of equal `key`
    may share an execution; None: ask `Admission.key`. `placed` is None where everything is arrays of the host.
    """

    fit: Fit
    rows: int
    limit: int
    reason: str
    key: Hashable
    placed: Placed | None = None


class Admission:
    """Checks inputs against a plan; what it found out about a set of shapes and dtypes is remembered."""

    def __init__(
        self, plan: Plan, device: Device, sizes: Sizes, budget: Budget, outputs: OutputPlace = OutputPlace.host
    ) -> None:
        ports = plan.input_ports, plan.output_ports, plan.output_structures
        self.ports = Ports(*ports, device.name, device.intake)
        self._outputs = outputs
        self._plan, self._device, self._sizes, self._budget = plan, device, sizes, budget
        self._signature = Signature(plan)
        self._known: dict[Hashable, Admitted] = {}
        self._limits: dict[tuple[int, ...], int] = {}
        self._empty_outputs = all(plan.batching.outputs)
        strings = [port.name for port in plan.output_ports if port.dtype == STRING]
        self._host_outputs = ", ".join([name for name, _ in plan.output_structures] or strings)
        self._shares_inputs = sizes.shared and not all(plan.batching.inputs)
        self._proven_nbytes = 0
        self.largest: tuple[int, ...] | None = None

    def admit(self, inputs: Any, outputs: str | None = None) -> tuple[Sequence[Array], Wrap, Admitted]:
        """The inputs in order, what gives outputs the caller's form, and what their shapes mean.

        InputError for whatever does not fit the model; OutOfMemory if the device has not the memory to run it.
        `outputs` is "host" or "device", for these inputs alone; ValueError for anything else.
        """
        arrays, wrap = self.ports.arrange(inputs)
        if len(arrays) == 1:
            array = arrays[0]
            shapes: Hashable = (array.shape, array.dtype)
        else:
            shapes = tuple([(array.shape, array.dtype) for array in arrays])
        if outputs is not None:
            shapes = shapes, outputs
        admitted = self._known.get(shapes)
        if admitted is None:
            admitted = self._placed(self._admit_shapes(arrays), arrays, outputs)
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
                self._limits.clear()
            self._known[shapes] = admitted
        return arrays, wrap, admitted

    def key(self, arrays: Sequence[Array], admitted: Admitted) -> Hashable:
        """For inputs whose `admitted.key` is None: requests with equal keys may share an execution, because all extents
        but the rows agree, and all inputs without rows are the same arrays, or equal small ones."""
        family = admitted.fit.family
        return (
            family.key,
            admitted.placed,
            *(_identity(a) for a, block in zip(arrays, family.blocks, strict=True) if not block),
        )

    def adopt(self, sizes: Sizes) -> None:
        """From now on admit for these sizes."""
        self._sizes = sizes
        self._shares_inputs = sizes.shared and not all(self._plan.batching.inputs)
        self._known.clear()

    def limit(self, family: Family, rows: int) -> None:
        """From now on at most so many rows of a family share an execution."""
        self._limits[family.key] = rows

    def shorten(self, family: Family, rows: int) -> None:
        """Memory ran out under so many rows of a family: from now on fewer of them share an execution."""
        fewer = max(1, rows // 2)
        if fewer < self._limits.get(family.key, self._sizes.batch.batch):
            _LOGGER.warning(
                "memory ran out on %s with %d rows of %s: from now on at most %d share an execution",
                self._device.name, rows, self.describe(family), fewer,
            )  # fmt: skip
            self._limits[family.key] = fewer
            self._known.clear()

    def limit_at(self, extents: tuple[int, ...]) -> int:
        """The most rows that share an execution at these extents."""
        place = self._signature.place
        key = extents if place is None else (*extents[:place], *extents[place + 1 :])
        return self._limits.get(key, self._sizes.batch.batch)

    def rows(self, inputs: Any) -> tuple[Fit, list[list[Array]]]:
        """What inputs mean, and what each of their rows brings; InputError as `admit`, and for tensors on a device."""
        arrays, _, admitted = self.admit(inputs, OutputPlace.host)
        if admitted.placed is not None:
            raise InputError("warm-up takes arrays of the host")
        blocks = admitted.fit.family.blocks
        each = [
            [array_rows(a, i, i + 1, b) for a, b in zip(arrays, blocks, strict=True)] for i in range(admitted.fit.rows)
        ]
        return admitted.fit, each

    def fit_of_one(self) -> Fit:
        """What one row is to a plan whose only extent is the batch."""
        return self._signature.fit(self._signature.input_shapes((1,)))

    def input_shapes(self, family: Family) -> tuple[tuple[int, ...], ...]:
        """The inputs' shapes for one row of a family."""
        return self._signature.input_shapes(family.extents(1))

    def describe(self, family: Family) -> str:
        """The inputs of one row, for people."""
        return ", ".join(map(str, map(list, self.input_shapes(family))))

    def empty_outputs(self, request: Request) -> list[Array] | None:
        """Outputs of no rows, which need no launch; None if the request has rows, where an output does not carry the
        batch, and where outputs are to lie on the device."""
        fit, placed = request.fit, request.placed
        if fit.rows or (placed is not None and placed.outputs):
            return None
        if not self._empty_outputs or fit.family.output_shapes is None:
            return None
        ports = zip(fit.family.output_shapes, self._plan.output_ports, strict=True)
        return [np.empty((0, *shape[1:]), port.dtype) for shape, port in ports]

    def _placed(self, admitted: Admitted, arrays: Sequence[Array], outputs: str | None) -> Admitted:
        """The same for what lies in the device's memory: it shares executions with what lies alike, with nothing else.

        ValueError for outputs that cannot lie there.
        """
        place = self._outputs if outputs is None else output_place(outputs)
        inputs = tuple([isinstance(array, GivenTensor) for array in arrays])
        on_device = place is OutputPlace.device and self._device.intake is not None
        if on_device and self._host_outputs:
            raise ValueError(f"outputs cannot lie on the device: {self._host_outputs} are no tensors of numbers")
        if not on_device and True not in inputs:
            return admitted
        placed = Placed(inputs, on_device)
        return replace(admitted, key=admitted.key and (admitted.key, placed), placed=placed)

    def _admit_shapes(self, arrays: Sequence[Array]) -> Admitted:
        self.ports.check_dtypes(arrays)
        fit = self._signature.fit([array.shape for array in arrays])
        if not fit.rows:
            return Admitted(fit, rows=1, limit=1, reason="", key="no rows")
        if not self._sizes.shared:
            self._check_memory(fit.extents)
            return Admitted(fit, rows=1, limit=1, reason="full", key="as it is")
        limit = self._limits.get(fit.family.key)
        if limit is None:
            limit = self._limits[fit.family.key] = self.row_limit(fit.family, self._sizes.batch.batch)
        reason = "idle" if fit.rows < limit else "full" if fit.rows == limit else ""
        return Admitted(fit, fit.rows, limit, reason, None if self._shares_inputs else (fit.family.key,))

    def _check_memory(self, extents: tuple[int, ...]) -> None:
        """OutOfMemory if one execution does not fit the memory."""
        weights, nbytes = self._device.memory(self._plan, extents)
        if nbytes <= self._proven_nbytes:
            return
        free = self._device.free_memory()
        if nbytes > (most := self._budget.whole.room(free, weights, loaded=True)):
            limit = "" if most == free else f" and memory_limit leaves {max(0, most):,}"
            extents_text = ", ".join(f"{name} = {n}" for name, n in zip(self._plan.symbols, extents, strict=True))
            raise OutOfMemory(
                f"an execution at {extents_text or 'its fixed shape'} needs {nbytes:,} bytes, "
                f"but {self._device.name} has {free:,} free{limit}"
            )
        self._proven_nbytes, self.largest = nbytes, extents

    def row_limit(self, family: Family, batch: int) -> int:
        """`batch`, or fewer rows where all slots together would not fit the free memory."""
        full = family.extents(batch)
        if self._device.memory(self._plan, full)[1] > self._proven_nbytes:
            one_row = family.extents(1)
            weights, row_nbytes = self._device.memory(self._plan, one_row)
            self._check_memory(one_row)
            room = self._budget.room(self._device.free_memory(), weights, loaded=True)
            cap = memory_cap(room, 0, row_nbytes, self._sizes.slots_per_device)
            batch = batch if cap is None else min(batch, cap)
            self._check_memory(family.extents(batch))
        return batch


def _identity(array: Array) -> Hashable:
    if isinstance(array, GivenTensor):
        return array.identity
    if array.nbytes <= _SMALL_NBYTES and array.dtype != STRING:
        return array.tobytes()
    return id(array)
