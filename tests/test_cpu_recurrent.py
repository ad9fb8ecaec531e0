"""Recurrent layers as native kernels: what they compute is what the operation's `evaluate` says, in every form."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_fallback import recurrent_products
from cpu_fallback.calls import Native
from cpu_fallback.native import LIBRARY, Target, host
from cpu_fallback.recurrent_kernels import RecurrentKernel
from gpu_engine.errors import InputError, InvalidModel
from gpu_engine.frontend.operators.recurrent import ACTIVATIONS, DEFAULTS
from gpu_engine.ir import dims
from gpu_engine.ir.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, INT8, UINT8, DType
from gpu_engine.ir.ops.recurrent import GATES
from tests.cpu_execution import DEVICE, check_op, is_native, lowered, op_graph, run_slot
from tests.kernel_runner import targets
from tests.recurrent_cases import (
    EXACT,
    FULL,
    TOLERANCE,
    Case,
    assert_near,
    cases,
    expected_of,
    native_plan,
    quantised_cases,
    run_recurrent,
)
from tests.reference import graph_of

by_target = pytest.mark.parametrize("target", targets(), ids=lambda target: f"{target.vector_nbytes * 8} bits")


@settings(max_examples=40, deadline=None)
@given(case=cases(), target=st.sampled_from(targets()), threads=st.sampled_from((1, 1, 2, 3, 7)))
def test_any_layer(case: Case, target: Target, threads: int) -> None:
    arrays = case.arrays()
    found = run_recurrent(case.op(), arrays, target, threads)
    assert_near(found, expected_of(case, arrays), TOLERANCE[case.dtype])


@by_target
@pytest.mark.parametrize("kind", sorted(GATES))
def test_everything_at_once(kind: str, target: Target) -> None:
    case = Case(kind, 5, 7, 35, 2, present=FULL[kind], clip=2.0, linear_before_reset=kind == "gru")
    arrays = case.arrays()
    assert_near(run_recurrent(case.op(), arrays, target, 2), expected_of(case, arrays), 2e-5)


@pytest.mark.parametrize("hidden", [*range(1, 34), 48, 64, 100])
def test_any_hidden_size(hidden: int) -> None:
    case = Case(("lstm", "gru", "rnn")[hidden % 3], 3, 1 + hidden % 9, hidden)
    arrays = case.arrays()
    assert_near(run_recurrent(case.op(), arrays, host()), expected_of(case, arrays), 2e-5)


@by_target
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 9, 12, 25, 40])
def test_any_number_of_rows(rows: int, target: Target) -> None:
    """Rows do not depend on each other, so the products of any number of them together are those of each alone."""
    case = Case("lstm", 2, rows, 33)
    arrays = case.arrays()
    found = run_recurrent(case.op(), arrays, target)
    assert_near(found, expected_of(case, arrays), 2e-5)
    for threads in (2, 5):
        again = run_recurrent(case.op(), arrays, target, threads)
        assert_near(again, found, 1e-6)


@by_target
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64, FLOAT16, BFLOAT16])
@pytest.mark.parametrize("hidden", [1, 5, 17, 33])
def test_a_last_vector_of_one_lane(hidden: int, dtype: DType, target: Target) -> None:
    """Nothing beyond it is written, however narrow an element is."""
    case = Case("rnn", 1, 2, hidden, present=("lengths",), dtype=dtype)
    arrays = case.arrays()
    assert_near(run_recurrent(case.op(), arrays, target), expected_of(case, arrays), TOLERANCE[dtype])


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("kind", sorted(GATES))
def test_every_activation(kind: str, name: str) -> None:
    case = Case(kind, 2, 3, 21, names=(name,) * len(DEFAULTS[kind]), clip=1.5)
    arrays = case.arrays()
    assert_near(run_recurrent(case.op(), arrays, host()), expected_of(case, arrays), 2e-5)


def test_each_direction_has_its_own_activations() -> None:
    case = Case("lstm", 4, 3, 20, 2, names=("sigmoid", "tanh", "softsign", "hardsigmoid", "elu", "tanh"))
    arrays = case.arrays()
    assert_near(run_recurrent(case.op(), arrays, host()), expected_of(case, arrays), 2e-5)


@settings(max_examples=40, deadline=None)
@given(case=quantised_cases(), target=st.sampled_from(targets()))
def test_quantised_states_are_exact(case: Case, target: Target) -> None:
    """Weights at the ends of their range make sums that an instruction which saturates would get wrong."""
    arrays = case.arrays()
    found = run_recurrent(case.op(), arrays, target)
    for actual, wanted in zip(found, case.op().evaluate(np, *arrays), strict=True):
        np.testing.assert_array_equal(actual, wanted)


def test_every_form_of_a_quantised_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dot instructions of 512 and 256 bits where there are any, products of 16-bit pairs, and what any machine has."""
    narrow = Target("haswell", "", 32, masked=False, halves=True)
    case = Case("lstm", 3, 3, 45, names=EXACT, weights=UINT8, per_column=True)
    arrays = case.arrays()
    expected = case.op().evaluate(np, *arrays)
    forms = [host(), narrow]
    if "+avxvnni" in host().features.split(","):
        forms.append(dataclasses.replace(narrow, features="+avxvnni"))
    found = [run_recurrent(case.op(), arrays, target) for target in forms]
    monkeypatch.setattr(recurrent_products, "X86", False)
    found.append(run_recurrent(case.op(), arrays, dataclasses.replace(narrow, features="+avx2")))
    for results in found:
        for actual, wanted in zip(results, expected, strict=True):
            np.testing.assert_array_equal(actual, wanted)


@by_target
@pytest.mark.parametrize("weights", [INT8, UINT8])
def test_extreme_bytes_do_not_saturate(weights: DType, target: Target) -> None:
    """All weights and all bytes of the state at the end of their range, and a long sum."""
    case = Case("rnn", 2, 3, 700, names=("relu",), present=("initial_h",), weights=weights)
    x, r, h, scale, zero = case.arrays()
    x[...], h[...], r[...], zero[...] = 0, 1, np.iinfo(weights).max, np.iinfo(weights).min
    h[0, 1, ::2] = 0
    arrays = [x, r, h, scale, zero]
    for actual, wanted in zip(run_recurrent(case.op(), arrays, target), case.op().evaluate(np, *arrays), strict=True):
        np.testing.assert_array_equal(actual, wanted)


def test_quantised_states_with_smooth_activations() -> None:
    """A last bit may move a byte by one, and that no more than a weight."""
    case = Case("lstm", 6, 3, 64, 2, present=("initial_h", "initial_c"), weights=INT8)
    arrays = case.arrays()
    assert_near(run_recurrent(case.op(), arrays, host()), case.op().evaluate(np, *arrays), 1e-2)


@by_target
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38, 1e-44])
@pytest.mark.parametrize("weights", [None, INT8])
def test_what_is_not_finite(value: float, weights: DType | None, target: Target) -> None:
    """Without quantisation it stays in its row; with it, it goes wherever the reference takes it."""
    case = Case("rnn", 3, 4, 19, names=("relu",), present=("initial_h",), weights=weights)
    arrays = case.arrays()
    arrays[0][1, 2, 7] = value
    arrays[2][0, 0, 3] = value if weights is None or value != value else 0.5
    with np.errstate(all="ignore"):
        expected = case.op().evaluate(np, *arrays)
    found = run_recurrent(case.op(), arrays, target)
    for actual, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.isnan(actual), np.isnan(wanted))
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)
    if weights is None:
        assert np.isfinite(found[0][:, :, 1]).all()


@by_target
def test_an_infinite_cell_state(target: Target) -> None:
    """Without peepholes it enters no gate."""
    case = Case("lstm", 2, 1, 6, present=("initial_c",))
    arrays = case.arrays()
    arrays[2][0, 0, 1] = np.inf
    assert_near(run_recurrent(case.op(), arrays, target), expected_of(case, arrays), 2e-5)


def test_lengths_beyond_the_sequence_and_below_zero() -> None:
    case = Case("gru", 4, 4, 9, 2, present=("lengths", "initial_h"))
    arrays = case.arrays()
    arrays[2][...] = (-3, 99, 0, 4)
    assert_near(run_recurrent(case.op(), arrays, host()), expected_of(case, arrays), 2e-5)


@pytest.mark.parametrize("weights", [None, INT8])
def test_any_extents_through_one_plan(weights: DType | None) -> None:
    """Steps and rows are numbers of a binding: nothing compiles for new ones."""
    case = Case("lstm", 3, 2, 20, present=("initial_h", "initial_c"), weights=weights, names=EXACT)
    _, r, _, _, *rest = case.arrays()
    op = case.op()
    t, b = dims.symbol("t"), dims.symbol("b")
    kinds = {"x": (FLOAT32, (t, b, 80)), "h": (FLOAT32, (1, b, 20)), "c": (FLOAT32, (1, b, 20))}
    graph = graph_of(
        kinds,
        lambda builder, *v: builder.emit_all(op, v[0], builder.constant(r), *v[1:], *map(builder.constant, rest)),
    )
    plan = lowered(graph)
    assert is_native(plan)
    (stream,) = DEVICE.open(plan, 1, 1, 1)
    known = len(LIBRARY._addresses)
    try:
        for steps, rows in ((3, 2), (1, 1), (7, 1), (2, 9), (5, 30), (0, 3), (2, 0), (3, 2)):
            own = dataclasses.replace(case, steps=steps, rows=rows, seed=steps).arrays()
            arrays = [own[0], r, own[2], own[3], *rest]
            found = run_slot(stream.slots[0], plan, [own[0], own[2], own[3]])
            assert_near(found, op.evaluate(np, *arrays), 2e-5)
    finally:
        stream.close()
    assert len(LIBRARY._addresses) == known


@pytest.mark.parametrize("weights", [None, INT8])
def test_weights_that_only_running_gives(weights: DType | None) -> None:
    case = Case("lstm", 3, 4, 18, 2, present=("lengths", "peepholes"), weights=weights, names=EXACT * 2)
    arrays = case.arrays()
    plan = native_plan(case.op(), arrays, host(), constant=False)
    assert [isinstance(step.kernel, Native) for step in plan.steps] == [False, True]
    check_op(case.op(), arrays, 2e-5, native=False)


def test_equal_layers_share_a_kernel() -> None:
    plans = [native_plan(Case(seed=seed).op(), Case(seed=seed).arrays(), host()) for seed in range(2)]
    first, second = (plan.steps[0].kernel.kernel for plan in plans)
    assert isinstance(first, RecurrentKernel)
    assert first == second
    assert hash(first) == hash(second)


def test_a_layer_with_operands_of_two_types_runs_its_reference() -> None:
    case = Case(present=("initial_h",))
    arrays = case.arrays()
    arrays[2] = arrays[2].astype(np.float64)
    assert not is_native(lowered(op_graph(case.op(), arrays)))
    check_op(case.op(), arrays, 1e-6, native=False)


def test_operands_must_agree_in_their_extents() -> None:
    case = Case(rows=3, present=("initial_h",))
    x, r, h = case.arrays()
    b, other = dims.symbol("b"), dims.symbol("other")
    shapes: list[Sequence[Any]] = [(3, b, 20), r.shape, (1, other, 5)]
    plan = lowered(op_graph(case.op(), [x, r, h], shapes))
    (stream,) = DEVICE.open(plan, 1, 1, 1)
    try:
        with pytest.raises(InputError, match="Recurrent"):
            run_slot(stream.slots[0], plan, [x, r, h[:, :2]])
    finally:
        stream.close()
    with pytest.raises(InvalidModel, match="initial_h"):
        op_graph(case.op(), [x, r, h[0]])
