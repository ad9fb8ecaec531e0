"""Recurrent layers as kernels for the GPU: what they compute is what the operation's `evaluate` says, in every form."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

pytest.importorskip("triton")

from gpu_engine.gpu.launches import Launch
from gpu_engine.gpu.offline import compiled, problems, resources
from gpu_engine.ir import dims
from gpu_engine.ir.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, INT8, DType
from gpu_engine.ir.graph import TensorType
from gpu_engine.ir.ops.recurrent import GATES
from tests.gpu_runner import array_steps, execute, graph_of, kernels, lowered
from tests.recurrent_cases import FULL, TOLERANCE, Case, assert_near, cases, expected_of

Array = NDArray[Any]
T, B = dims.symbol("T"), dims.symbol("B")


def run(case: Case, arrays: Sequence[Array], *, constant: bool = True, seed: int = 0) -> list[Array]:
    known = {i: array for i, array in enumerate(arrays) if constant and i == 1}
    plan = lowered(graph_of(case.op(), [TensorType(array.dtype, array.shape) for array in arrays], known))
    assert not array_steps(plan)
    return execute(plan, [array for i, array in enumerate(arrays) if i not in known], seed)


def check(case: Case, *, constant: bool = True, seed: int = 0) -> None:
    arrays = case.arrays()
    assert_near(run(case, arrays, constant=constant, seed=seed), expected_of(case, arrays), TOLERANCE[case.dtype])


@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_any_layer(case: Case) -> None:
    check(case, constant=case.seed % 2 == 0, seed=case.seed)


@pytest.mark.parametrize("rows", (1, 3, 18))
@pytest.mark.parametrize("linear", (False, True))
@pytest.mark.parametrize("kind", sorted(GATES))
def test_everything_at_once(kind: str, linear: bool, rows: int) -> None:
    if linear and kind != "gru":
        return
    present = tuple(name for name in FULL[kind] if name != "bias" or linear)
    case = Case(kind, 4, rows, 35, 2, present=present, clip=2.0, linear_before_reset=linear)
    check(case, seed=1)


@pytest.mark.parametrize("dtype", (FLOAT32, FLOAT16, BFLOAT16, FLOAT64), ids=str)
@pytest.mark.parametrize("rows", (2, 20))
def test_any_type(rows: int, dtype: DType) -> None:
    check(Case("lstm", 3, rows, 40 if dtype == FLOAT64 else 130, dtype=dtype))


@pytest.mark.parametrize("rows", (1, 17))
def test_directions_with_functions_of_their_own(rows: int) -> None:
    check(Case("rnn", 3, rows, 9, 2, names=("tanh", "relu")))
    check(Case("lstm", 3, rows, 9, 2, names=("sigmoid", "tanh", "tanh", "hardsigmoid", "softsign", "tanh")))


def test_backwards_and_input_forget() -> None:
    check(Case("lstm", 4, 2, 8, backwards=True, input_forget=True, present=FULL["lstm"]))


@pytest.mark.parametrize("kind", sorted(GATES))
def test_one_plan_for_any_number_of_steps_and_rows(kind: str) -> None:
    case = Case(kind, 1, 1, 20, 2)
    width = GATES[kind] * 20
    kinds = [TensorType(FLOAT32, (T, B, 2 * width)), TensorType(FLOAT32, (2, width, 20))]
    weights = case.arrays()[1]
    plan = lowered(graph_of(case.op(), kinds, {1: weights}))
    assert not array_steps(plan)
    for seed, (steps, rows) in enumerate([(1, 1), (3, 4), (2, 5), (4, 33)]):
        own = dataclasses.replace(case, steps=steps, rows=rows)
        arrays = [own.arrays()[0], weights]
        assert_near(execute(plan, arrays[:1], seed), expected_of(own, arrays), 2e-5)


def test_nan_stays_in_its_row() -> None:
    case = Case("lstm", 3, 18, 24)
    arrays = case.arrays()
    arrays[0][1, 7] = np.nan
    found = run(case, arrays)
    assert np.isnan(found[0][1:, 0, 7]).all() and np.isnan(found[1][0, 7]).all()
    others = [row for row in range(18) if row != 7]
    assert np.isfinite(found[0][:, :, others]).all() and np.isfinite(found[0][0]).all()


def test_quantised_weights_are_left_to_the_reference() -> None:
    case = Case("lstm", 2, 2, 8, weights=INT8)
    arrays = case.arrays()
    assert array_steps(lowered(graph_of(case.op(), [TensorType(array.dtype, array.shape) for array in arrays])))


@pytest.mark.parametrize(
    ("kind", "hidden", "dtype"), [("lstm", 128, FLOAT32), ("lstm", 256, FLOAT16), ("gru", 256, FLOAT32)]
)
def test_machine_code(kind: str, hidden: int, dtype: DType) -> None:
    case = Case(kind, 2, 2, hidden, 2, dtype=dtype)
    width = GATES[kind] * hidden
    kinds = [TensorType(dtype, (T, B, 2 * width)), TensorType(dtype, (2, width, hidden))]
    plan = lowered(graph_of(case.op(), kinds, {1: case.arrays()[1]}))
    assert all(isinstance(step.kernel, Launch) for step in plan.steps)
    row, tiled = kernels(plan)
    for kernel in (row, tiled):
        binary = compiled(kernel, 90)
        used = resources(binary)
        assert problems(kernel, binary, used, 90) == []
        if kernel is row:
            assert used.load_bits == 128
