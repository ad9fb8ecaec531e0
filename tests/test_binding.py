"""Binding: arithmetic turns extents into numbers, wrong ones are named, and extents found while running are bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_engine.errors import ExecutionError, InputError
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import FLOAT32, INT64
from gpu_engine.ir.evaluation import evaluator
from gpu_engine.ir.graph import Builder, TensorType, Value
from gpu_engine.ir.ops import Attention, Concat, Map, MatMul, Pad, Reshape, Slice
from gpu_engine.ir.ops.array import Array
from gpu_engine.plan.binding import Numbers, op_resolver, solve_binds
from gpu_engine.plan.lower import segments
from gpu_engine.plan.plan import Requirement
from tests.cpu_execution import DEVICE, lowered, run_graph, run_slot
from tests.reference import graph_of

N, M, U = (dims.symbol(name) for name in ("N", "M", "u1"))
X = expr.arg(0, FLOAT32)

LEAVES: st.SearchStrategy[Dim] = st.one_of(st.just(N), st.just(M), st.integers(-6, 6))
DIMS: st.SearchStrategy[Dim] = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(lambda a, b: a + b, inner, inner),
        st.builds(lambda a, b: a * b, inner, inner),
        st.builds(dims.minimum, inner, inner),
        st.builds(dims.maximum, inner, inner),
        st.builds(dims.floor_div, inner, st.integers(1, 9)),
        st.builds(dims.modulo, inner, st.integers(1, 9)),
        st.builds(dims.many, inner),
    ),
    max_leaves=6,
)


@given(st.lists(DIMS, max_size=6), st.integers(1, 40), st.integers(1, 40))
def test_generated_arithmetic_agrees_with_substitution(found: list[Dim], n: int, m: int) -> None:
    values = evaluator(found, ("N", "M"))(n, m)
    exact = [dims.substitute(dim, {"N": n, "M": m}) for dim in found]
    assert list(values) == [e if isinstance(d, int) else max(0, int(e)) for d, e in zip(found, exact, strict=True)]  # type: ignore[arg-type]


def requirement(left: Dim, right: Dim, broadcast: bool) -> Requirement:
    return Requirement(left, right, broadcast, "Add 'a' (opset 1)", "Map of float32[N], float32[M]")


def test_each_dim_has_one_place() -> None:
    numbers = Numbers(("N", "M"))
    places = [numbers.place(dim) for dim in (N, 2 * N, M + N, N, 7)]
    numbers.compile()
    assert places == [0, 1, 2, 0, 3] and numbers.evaluate((5, 3)) == (5, 10, 8, 7)


def test_requirements_hold_or_are_named() -> None:
    numbers = Numbers(("N", "M"))
    numbers.require([requirement(N, M, True), requirement(2 * N, 4, False)])
    numbers.compile()
    assert numbers.evaluate((2, 2))[:2] == (2, 2)
    with pytest.raises(InputError, match=r"Add 'a'.*extent 2 \(N\) does not broadcast to 3 \(M\) with N=2, M=3"):
        numbers.evaluate((2, 3))
    with pytest.raises(InputError, match=r"extent 2 \(2\*N\) should be 4"):
        numbers.evaluate((1, 3))


def test_broadcasts_that_cannot_be_are_named() -> None:
    numbers = Numbers(("N", "M"))
    numbers.require([requirement(N, dims.broadcast(N, M), True)])
    numbers.compile()
    assert numbers.evaluate((1, 7)) == (1, 7)
    with pytest.raises(InputError, match=r"Add 'a' \(opset 1\).*extents 3 and 2 do not broadcast.*N=2, M=3"):
        numbers.evaluate((2, 3))


@dataclass(frozen=True)
class Nested:
    shape: tuple[Any, ...]
    other: Any = 3


def test_operations_are_resolved() -> None:
    numbers = Numbers(("N",))
    assert op_resolver(Slice((0,), (1,), (4,)), numbers) is None
    resolve = op_resolver(Pad((N, 0), (1, 2 * N)), numbers)
    nested = op_resolver(Nested(((N, 1), (2, N + 1)), N), numbers)  # type: ignore[arg-type]
    numbers.compile()
    values = numbers.evaluate((5,))
    assert resolve is not None and resolve(values) == Pad((5, 0), (1, 10))
    assert nested is not None and nested(values) == Nested(((5, 1), (2, 6)), 5)


def test_extents_read_off_results() -> None:
    assert solve_binds([(U, 3), (2 * U,)], [(4, 3), (8,)], {"N": 1}) == {"u1": 4}
    assert solve_binds([(U, N)], [(0, 1)], {"N": 1}) == {"u1": 0}
    for shapes in ([(4, 5), (8,)], [(4, 3), (9,)], [(4, 3, 1), (8,)]):
        with pytest.raises(ValueError):
            solve_binds([(U, 3), (2 * U,)], shapes, {})


def nonzero(xp: Any, x: Any) -> Any:
    return xp.stack(xp.nonzero(x)) if x.ndim else xp.zeros((0, 1), np.int64)


def positive_part(builder: Builder, x: Value) -> tuple[Value, ...]:
    """Where x is not 0, doubled; then joined with itself; x + 1 is made before and used after."""
    early = builder.emit(Map(X + 1), x)
    where = Array(nonzero, (TensorType(INT64, (1, U)),), binds=("u1",))
    places = builder.emit(where, x)
    index = expr.arg(0, INT64)
    doubled = builder.emit(Map(index * 2), places)
    return builder.emit(Concat(1), doubled, places), builder.emit(Map(X * 3), early)


def test_extents_known_only_while_running() -> None:
    graph = graph_of({"x": (N,)}, positive_part)
    plan = lowered(graph)
    assert [(first, last) for first, last, _ in segments(plan)] == [(0, 2), (2, len(plan.steps))]
    (stream,) = DEVICE.open(plan, 1, 2, 1)
    for values in ([0, 1, 2, 0, 3], [0, 0], [5], [1, 1, 1, 1, 1], [0, 1, 2, 0, 3], [0] * 5):
        for slot in stream.slots:
            x = np.array(values, np.float32)
            found, later = run_slot(slot, plan, [x])
            (places,) = np.nonzero(x)
            assert found.tolist() == [[*(places * 2), *places]]
            np.testing.assert_array_equal(later, (x + 1) * 3)
    stream.close()


def test_results_that_break_their_promise_are_an_error() -> None:
    def build(builder: Builder, x: Value) -> Value:
        op = Array(nonzero, (TensorType(INT64, (2, U)),), binds=("u1",))
        return builder.emit(Map(expr.arg(0, INT64) + 1), builder.emit(op, x))

    with pytest.raises(ExecutionError, match=r"Test 'node'.*declared"):
        run_graph(graph_of({"x": (N,)}, build), {"x": np.ones(3, np.float32)})


CONTRADICTIONS = {
    "map": ({"x": (N,), "y": (M,)}, lambda b, x, y: b.emit(Map(X + expr.arg(1, FLOAT32)), x, y), (2,), (3,)),
    "constant": ({"x": (N,), "y": (4,)}, lambda b, x, y: b.emit(Map(X + expr.arg(1, FLOAT32)), x, y), (2,), (4,)),
    "product": ({"x": (2, N), "y": (M, 3)}, lambda b, x, y: b.emit(MatMul(), x, y), (2, 2), (3, 3)),
    "attention": (
        {"x": (2, N, 4), "y": (2, M, 4)}, lambda b, x, y: b.emit(Attention(1.0), x, x, y), (2, 3, 4), (2, 5, 4)
    ),
    "join": ({"x": (2, N), "y": (2, M)}, lambda b, x, y: b.emit(Concat(0), x, y), (2, 2), (2, 3)),
    "reshape": (
        {"x": (N, 2), "y": (M, 3)}, lambda b, x, y: b.emit(Concat(0), b.emit(Reshape((M, 3)), x), y), (5, 2), (3, 3)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradicting_extents_are_an_input_error(name: str) -> None:
    shapes, build, left, right = CONTRADICTIONS[name]
    graph = graph_of(shapes, build)
    with pytest.raises(InputError, match="Test 'node'"):
        run_graph(graph, {"x": np.zeros(left, np.float32), "y": np.zeros(right, np.float32)})
