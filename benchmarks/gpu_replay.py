"""The launches of an engine's plan over inputs that stay on the device: what a GPU computes, without any copies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.inputs import Array
from gpu_engine.gpu.driver import Touched
from gpu_engine.gpu.launches import Launch
from gpu_engine.gpu.program import Bound, Program, bind
from gpu_engine.gpu.slot import Weights
from gpu_engine.ir import dims
from gpu_engine.plan.plan import Plan, Step, constant_of, root
from gpu_engine.plan.signature import Signature


class NotReplayable(Exception):
    """A plan that is more than launches whose extents are known; the message says what else."""


@dataclass(frozen=True)
class Replay:
    """Bound launches with their memory; `loaded` are kernels with their grids and packed parameters, in order."""

    plan: Plan
    driver: Any
    weights: Weights
    bound: Bound
    extents: Mapping[str, int]
    loaded: tuple[tuple[Step, Any, tuple[int, int, int], Any], ...]

    def run(self) -> None:
        """Start every launch; to be called while the driver is active."""
        for step, kernel, grid, packed in self.loaded:
            self.driver.launch(kernel, grid, packed, lambda step=step: self._touched(step))

    def outputs(self) -> list[Array]:
        """In the host's memory, once everything has run."""
        return [self._download(index) for index in self.plan.outputs]

    def _download(self, index: int) -> Array:
        constant = constant_of(self.plan, index)
        if constant is not None:
            return np.asarray(constant)
        buffer = self.plan.buffers[index]
        memory, offset, _ = self.bound.located[root(self.plan.buffers, index)]
        shape = tuple(dims.number(dims.substitute(extent, dict(self.extents))) for extent in buffer.shape)
        found: Array = self.driver.download(self.driver.array(memory, offset, shape, buffer.dtype), buffer.dtype)
        return found

    def _touched(self, step: Step) -> Touched:
        kinds = step.inputs, (*step.outputs, *step.scratch), step.kernel.zeroed
        return Touched(*([self._piece(buffer) for buffer in buffers] for buffers in kinds))

    def _piece(self, buffer: int) -> tuple[int, int]:
        owner = root(self.plan.buffers, buffer)
        memory = self.weights.memories.get(owner)
        if memory is not None:
            return memory.address, memory.nbytes
        memory, offset, nbytes = self.bound.located[owner]
        return memory.address + offset, nbytes


def replay(plan: Plan, driver: Any, feed: Mapping[str, Array]) -> Replay:
    """A plan bound to the shapes of `feed`, whose arrays are uploaded; to be called while the driver is active.
    `NotReplayable` where the host has a part in it."""
    program: Program = plan.program
    others = [step.source for step in plan.steps if not isinstance(step.kernel, Launch)]
    if others or len(program.segments) != 1:
        raise NotReplayable(f"the host has a part in it: {', '.join(others) or 'extents that only running tells'}")
    weights, segment = Weights(plan, driver), program.segments[0]
    fit = Signature(plan).fit([feed[port.name].shape for port in plan.input_ports])
    bound = bind(
        segment, fit.extents, lambda sizes: [_zeros(driver, nbytes) for nbytes in sizes], weights.addresses, []
    )
    for port, index in zip(plan.input_ports, plan.inputs, strict=True):
        array, dtype = feed[port.name], plan.buffers[index].dtype
        memory, offset, _ = bound.located[root(plan.buffers, index)]
        driver.upload(driver.array(memory, offset, array.shape, dtype), array.astype(dtype, copy=False))
    loaded = []
    for i in segment.steps:
        step, (x, y, z) = plan.steps[i], (bound.values[place] for place in segment.grids[i])
        if x * y * z:
            kernel, first = weights.kernels[step.kernel.kernel], segment.firsts[i]
            words = bound.words[first : first + len(step.kernel.words)]
            loaded.append((step, kernel, (x, y, z), driver.pack(kernel, words, (x, y, z))))
    return Replay(plan, driver, weights, bound, dict(zip(plan.symbols, fit.extents, strict=True)), tuple(loaded))


def _zeros(driver: Any, nbytes: int) -> Any:
    """Memory full of zeros: counters have to start so."""
    memory = driver.allocate(nbytes)
    if nbytes:
        zeros = np.zeros(nbytes, np.uint8)
        driver.upload(driver.array(memory, 0, zeros.shape, zeros.dtype), zeros)
    return memory
