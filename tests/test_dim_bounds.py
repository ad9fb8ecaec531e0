"""What simplification of symbolic extents believes about their values holds for every value."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim, Undecided

NAMES = ("a", "b", "u7")


def expressions() -> Any:
    leaves = st.integers(-4, 6) | st.sampled_from(NAMES).map(dims.symbol)
    pairs = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "min": dims.minimum,
        "max": dims.maximum,
        "floordiv": lambda a, b: dims.floor_div(a, b if isinstance(b, int) and b > 0 else 3),
        "mod": lambda a, b: dims.modulo(a, b if isinstance(b, int) and b > 0 else 2),
    }

    def grow(inner: Any) -> Any:
        return st.tuples(st.sampled_from(sorted(pairs)), inner, inner).map(
            lambda node: pairs[node[0]](node[1], node[2])
        )

    return st.recursive(leaves, grow, max_leaves=6)


values = st.fixed_dictionaries({"a": st.integers(1, 9), "b": st.integers(1, 9), "u7": st.integers(0, 9)})


def value(dim: Dim, at: dict[str, int]) -> int:
    found = dims.substitute(dim, at)
    assert isinstance(found, int)
    return found


@settings(max_examples=300)
@given(dim=expressions(), at=values)
def test_bounds_hold(dim: Dim, at: dict[str, int]) -> None:
    low, high = dims.bounds(dim)
    assert low is None or low <= value(dim, at)
    assert high is None or value(dim, at) <= high


@settings(max_examples=300)
@given(a=expressions(), b=expressions(), at=values)
def test_comparisons_hold(a: Dim, b: Dim, at: dict[str, int]) -> None:
    for decide, expected in (
        (dims.less_equal, value(a, at) <= value(b, at)),
        (dims.equal, value(a, at) == value(b, at)),
    ):
        try:
            assert decide(a, b) == expected
        except Undecided:
            continue
    assert value(dims.minimum(a, b), at) == min(value(a, at), value(b, at))
    assert value(dims.maximum(a, b), at) == max(value(a, at), value(b, at))
    assert value(a * b - b, at) == value(a, at) * value(b, at) - value(b, at)


def test_an_extent_that_a_step_tells_may_be_nothing() -> None:
    assert dims.bounds(dims.symbol("u1")) == (0, None)
    assert dims.minimum(1, dims.symbol("n")) == 1
    assert str(dims.minimum(1, dims.symbol("u1"))) == "min(1, u1)"
