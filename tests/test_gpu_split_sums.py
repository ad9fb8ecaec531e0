"""Products whose sums several programs share: counters, what a failure leaves, the order of memory accesses."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from gpu_engine.errors import ExecutionError
from gpu_engine.gpu import gemm, interpret
from gpu_engine.gpu.interpret import InterpretDevice
from gpu_engine.gpu.interpreter import AccessError
from gpu_engine.gpu.kernel import TritonKernel
from gpu_engine.gpu.launches import Launch
from gpu_engine.gpu.offline import compiled, problems, resources
from gpu_engine.gpu.program import with_program
from gpu_engine.gpu.tiles import Choice, GemmTile
from gpu_engine.ir.dtypes import FLOAT16, FLOAT32, DType
from gpu_engine.ir.graph import TensorType
from gpu_engine.ir.ops import MatMul
from gpu_engine.plan.plan import Plan, Step
from tests.gpu_runner import execute, graph_of, kernels, lowered

A = np.random.default_rng(0).standard_normal((20, 96), np.float32)
B = np.random.default_rng(1).standard_normal((96, 24), np.float32)
PARTS = 3


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A [20, 96] times B in three parts."""
    return product_in_parts(monkeypatch, FLOAT32, GemmTile(16, 16, 32, 4, 2))


def product_in_parts(monkeypatch: pytest.MonkeyPatch, dtype: DType, tile: GemmTile) -> Plan:
    monkeypatch.setattr(gemm, "choose", lambda *args, **options: (Choice(1, None, tile, PARTS),))
    types = [TensorType(dtype, A.shape), TensorType(dtype, B.shape)]
    return lowered(graph_of(MatMul(), types, {1: B.astype(dtype)}))


def changed(plan: Plan, change: Callable[[Step], Step]) -> Plan:
    return with_program(dataclasses.replace(plan, steps=tuple(map(change, plan.steps)), program=None))


def test_counters_are_scratch_that_starts_and_ends_at_zero(plan: Plan) -> None:
    (step,) = plan.steps
    (counters,) = step.kernel.zeroed
    assert counters in step.scratch and plan.buffers[counters].shape == (4,)
    (stream,) = InterpretDevice().open(plan, 1, 1, None)
    (slot,) = stream.slots
    for _ in range(2):
        slot.stage(())[0][...] = A
        slot.launch()
        np.testing.assert_allclose(slot.wait()[0], A @ B, 1e-4, 1e-4)


def without_reset(step: Step) -> Step:
    launch: Launch = step.kernel
    assert isinstance(launch.kernel, TritonKernel)
    text = launch.kernel.text.replace("tl.store(counter, 0)", "pass")
    assert text != launch.kernel.text
    kernel = dataclasses.replace(launch.kernel, text=text)
    return dataclasses.replace(step, kernel=dataclasses.replace(launch, kernel=kernel))


def test_counters_that_are_left_behind_are_found(plan: Plan) -> None:
    with pytest.raises(AccessError, match="leaves counters that are not zero"):
        execute(changed(plan, without_reset), [A])


def test_counters_must_be_declared(plan: Plan) -> None:
    def undeclared(step: Step) -> Step:
        parts, counters = step.scratch
        return dataclasses.replace(step, inputs=(*step.inputs, counters), scratch=(parts,))

    with pytest.raises(AccessError, match="atomic outside the declared buffers"):
        execute(changed(plan, undeclared), [A])


def test_what_a_failed_launch_counted_is_forgotten(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch ends after some of the programs; the next one finds zeros, and gives the right sums."""
    (stream,) = InterpretDevice().open(plan, 1, 1, None)
    (slot,) = stream.slots

    def failing(kernel: Any, grid: tuple[int, int, int], *rest: Any) -> None:
        interpret_all(kernel, (grid[0], PARTS - 1, 1), *rest)
        raise ExecutionError("half of it")

    interpret_all = interpret.interpret
    for function in (failing, interpret_all):
        monkeypatch.setattr(interpret, "interpret", function)
        slot.stage(())[0][...] = A
        slot.launch()
        if function is failing:
            with pytest.raises(ExecutionError, match="half of it"):
                slot.wait()
        else:
            np.testing.assert_allclose(slot.wait()[0], A @ B, 1e-4, 1e-4)


def test_order_of_memory_accesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are stored, a barrier, one thread counts, a barrier, parts are loaded from L2: all 16 bytes at a time."""
    (kernel,) = kernels(product_in_parts(monkeypatch, FLOAT16, GemmTile(64, 64, 32, 4, 3)))
    binary = compiled(kernel, 90)
    used = resources(binary)
    assert not problems(kernel, binary, used, 90)
    order = ["st.global.v4", "bar.sync", "atom.global.gpu.acq_rel.add", "bar.sync", "ld.global.cg.v4", "st.global"]
    assert re.search(".*?".join(map(re.escape, order)), binary.asm["ptx"], re.DOTALL)
    assert used.count("MEMBAR") and used.count("CCTL.IVALL")
