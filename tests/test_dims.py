"""Symbolic extents compute what integers compute, and equal extents are equal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_engine.errors import InvalidModel
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim

N, M = dims.symbol("N"), dims.symbol("M")
Pair = tuple[Dim, Callable[[int, int], int]]


def joined(name: str, left: Pair, right: Pair) -> Pair:
    a, b = left[0], right[0]
    f, g = left[1], right[1]
    match name:
        case "+":
            return a + b, lambda n, m: f(n, m) + g(n, m)
        case "-":
            return a - b, lambda n, m: f(n, m) - g(n, m)
        case "*":
            return a * b, lambda n, m: f(n, m) * g(n, m)
        case "min":
            return dims.minimum(a, b), lambda n, m: min(f(n, m), g(n, m))
        case "max":
            return dims.maximum(a, b), lambda n, m: max(f(n, m), g(n, m))
    raise AssertionError(name)


def divided(name: str, pair: Pair, by: int) -> Pair:
    function, inner = getattr(dims, name), pair[1]
    match name:
        case "floor_div":
            return function(pair[0], by), lambda n, m: inner(n, m) // by
        case "ceil_div":
            return function(pair[0], by), lambda n, m: -(-inner(n, m) // by)
    return function(pair[0], by), lambda n, m: inner(n, m) % by


LEAVES: st.SearchStrategy[Pair] = st.one_of(
    st.just((N, lambda n, m: n)), st.just((M, lambda n, m: m)), st.integers(-9, 9).map(lambda c: (c, lambda n, m: c))
)
ARITHMETIC: st.SearchStrategy[Pair] = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(joined, st.sampled_from(("+", "-", "*", "min", "max")), inner, inner),
        st.builds(divided, st.sampled_from(("floor_div", "ceil_div", "modulo")), inner, st.integers(1, 12)),
    ),
    max_leaves=6,
)


@given(ARITHMETIC, st.integers(1, 60), st.integers(1, 60))
def test_symbols_compute_what_integers_compute(pair: Pair, n: int, m: int) -> None:
    dim, function = pair
    value = function(n, m)
    assert dims.substitute(dim, {"N": n, "M": m}) == value
    low, high = dims.bounds(dim)
    assert (low is None or low <= value) and (high is None or high >= value)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(-9, 9)), min_size=1, max_size=5), st.integers(1, 300))
def test_nested_floors_are_one(steps: list[tuple[int, int]], n: int) -> None:
    dim: Dim = N
    value = n
    for by, offset in steps:
        dim, value = dims.floor_div(dim + offset, by), (value + offset) // by
    assert dims.substitute(dim, {"N": n}) == value
    assert str(dim).count("floordiv") <= 1


EQUAL: list[tuple[Dim, Dim]] = [
    ((N + 1) * 2, 2 * N + 2),
    (dims.floor_div(12 * N * M, 4 * M), 3 * N),
    (dims.floor_div(dims.floor_div(N + 1, 2) + 1, 2), dims.floor_div(N + 3, 4)),
    (dims.broadcast(dims.minimum(512, N), N), N),
    (dims.broadcast(dims.broadcast(N, M), M), dims.broadcast(M, N)),
    (dims.broadcast(1, N), N),
    (dims.broadcast(N, 7), 7),
]


@pytest.mark.parametrize("index", range(len(EQUAL)))
def test_normal_form(index: int) -> None:
    left, right = EQUAL[index]
    assert left == right


def test_extents_that_never_broadcast() -> None:
    with pytest.raises(InvalidModel, match="2 and 3"):
        dims.broadcast(2, 3)
