"""Input shapes are solved for a plan's symbols, or refused with the input, the axis and the reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_engine.errors import InputError
from gpu_engine.ir.dims import symbol
from gpu_engine.plan.plan import Requirement
from gpu_engine.plan.signature import Signature
from tests.recording_device import plan_of

F32 = np.float32


def signature(
    inputs: dict[str, tuple[int | str, ...]], output: tuple[int | str, ...] = ("N", 3), **rest: Any
) -> Signature:
    return Signature(plan_of({name: (F32, shape) for name, shape in inputs.items()}, {"y": (F32, output)}, **rest))


def test_rows_and_family() -> None:
    fit = signature({"x": ("N", 3, "h")}).fit([(5, 3, 7)])
    assert (fit.rows, fit.extents, fit.family.key) == (5, (5, 7), (7,))
    assert fit.family.extents(2) == (2, 7)
    assert fit.family.blocks == (1,) and fit.family.output_shapes == ((1, 3),)


def test_the_batch_symbol_may_stand_anywhere_among_the_extents() -> None:
    fit = signature({"mask": ("h", "w"), "x": ("N", "h")}).fit([(7, 9), (5, 7)])
    assert (fit.rows, fit.extents, fit.family.key) == (5, (7, 9, 5), (7, 9))
    assert fit.family.extents(2) == (7, 9, 2)
    assert fit.family.blocks == (0, 1)


def test_a_row_may_own_several_places_of_axis_0() -> None:
    fit = signature({"x": ("N", "h"), "heads": ("2*h*N", 3)}).fit([(4, 5), (40, 3)])
    assert fit.rows == 4 and fit.family.blocks == (1, 10)


def test_refused_batching_gives_one_row() -> None:
    fit = signature({"x": ("N", 3)}, refused="because").fit([(5, 3)])
    assert (fit.rows, fit.extents, fit.family.extents(1), fit.family.blocks) == (1, (5,), (5,), (0,))


@given(h=st.integers(0, 50), w=st.integers(0, 50), n=st.integers(0, 9))
def test_arithmetic_is_solved(h: int, w: int, n: int) -> None:
    solver = signature({"x": ("N", "8*h", "w+3", "h*w")})
    assert solver.fit([(n, 8 * h, w + 3, h * w)]).extents == (n, h, w)


def test_products_are_solved_once_their_factors_are_known() -> None:
    solver = signature({"packed": ("a*b", "a*a*b"), "x": ("N", "a")})
    assert dict(zip(solver.plan.symbols, solver.fit([(15, 75), (2, 5)]).extents, strict=True)) == {
        "a": 5,
        "b": 3,
        "N": 2,
    }


@pytest.mark.parametrize(
    ("inputs", "shapes", "message"),
    [
        ({"x": ("N", 3)}, [(5, 4)], "input 'x', axis 1: the extent is 4, but the model takes 3"),
        ({"x": ("N", 3)}, [(5,)], r"input 'x' has rank 1 \(shape \[5\]\), but the model takes x: float32\[N, 3\]"),
        ({"x": ("N", 3)}, [()], "has rank 0"),
        ({"x": ("N", "8*h")}, [(5, 12)], r"axis 1: the extent is 12, but the model takes 8\*h, and no whole h"),
        ({"x": ("N", "h+3")}, [(5, 2)], "no whole h"),
        ({"x": ("N", "h"), "z": ("N", "h")}, [(5, 2), (4, 2)], "makes N = 4, but input 'x', axis 0 makes it 5"),
        ({"x": ("N", "h", "h*h")}, [(5, 2, 5)], "axis 2: the extent is 5, but the model takes 4"),
        ({"x": ("N", "a*b")}, [(5, 6)], "do not determine"),
    ],
)
def test_refusals(inputs: dict[str, tuple[int | str, ...]], shapes: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        signature(inputs).fit(shapes)


def test_requirements_of_the_plan_are_checked_before_it_is_bound() -> None:
    plan = plan_of({"x": (F32, ("N", "a")), "z": (F32, ("N", "b"))}, {"y": (F32, ("N", "a"))})
    wants = Requirement(symbol("a"), symbol("b"), True, "Add 'sum' (opset 17)", "Map")
    checked = Signature(replace(plan, requirements=(wants,)))
    assert checked.fit([(2, 3), (2, 3)]).rows == 2 == checked.fit([(2, 1), (2, 3)]).rows
    with pytest.raises(InputError, match="Add 'sum'"):
        checked.fit([(2, 4), (2, 3)])


def test_outputs_that_depend_on_data_have_no_shape_beforehand() -> None:
    assert signature({"x": ("N", 3)}, output=("N", "found")).fit([(2, 3)]).family.output_shapes is None


def test_no_inputs() -> None:
    fit = signature({}, output=(2, 3), batch=None).fit([])
    assert fit.extents == () and fit.rows == 1
