"""Scalar expressions: interning, exact constants, substitution, casts and arithmetic at the edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import BFLOAT16, BOOL, FLOAT16, FLOAT32, FLOAT64, INT8, INT32, INT64, UINT8, UINT64

X, Y = expr.arg(0, FLOAT32), expr.arg(1, FLOAT32)


def test_equal_expressions_are_one_object() -> None:
    assert X * 2 + 1 is X * 2.0 + 1.0
    assert expr.sigmoid(X) is expr.sigmoid(expr.arg(0, FLOAT32))
    assert X + 1 is not X + 2 and X + Y is not Y + X
    assert expr.const(0.0, FLOAT32) is not expr.const(-0.0, FLOAT32)
    assert expr.const(np.nan, FLOAT32) is expr.const(np.nan, FLOAT32)


def test_text_spells_everything() -> None:
    root = expr.where(X < 1, expr.exp(X), expr.cast(expr.cast(X, INT8, saturate=True), FLOAT32))
    text = expr.text(root)
    assert text.count(";") == len(expr.walk(root)) - 1
    assert "saturate" not in text and "cast True" in text and "int8" in text
    assert expr.text(X + 0.1) != expr.text(X + np.nextafter(np.float32(0.1), np.float32(1)))
    assert expr.text(X + 0.0) != expr.text(X + -0.0)


def test_constants_fold_and_identities_vanish() -> None:
    assert (expr.const(2, FLOAT32) * 3).op == "const"
    assert X * 1 is X and X / 1 is X and 1 * X is X and X + 0 is not X
    assert expr.where(expr.const(True, BOOL), X, Y) is X
    assert ~~(X < Y) is (X < Y)
    assert expr.power(X, 2) is X * X and expr.power(X, 0.5) is expr.sqrt(X) and expr.power(X, 1) is X


def test_operands_of_different_types_do_not_mix() -> None:
    with pytest.raises(TypeError, match="float32, float64"):
        X + expr.arg(1, FLOAT64)


def test_substitution_keeps_sharing() -> None:
    root = expr.exp(X) + expr.exp(X) * Y
    replaced = expr.substitute(root, {0: Y * 2, 1: X})
    assert replaced is expr.exp(Y * 2) + expr.exp(Y * 2) * X
    assert expr.replace(root, {expr.exp(X): Y}) is Y + Y * Y
    assert expr.arg_count(replaced) == 2 and expr.arg_count(expr.const(1, FLOAT32)) == 0


@given(st.integers(2, 60))
def test_deep_sharing_stays_linear(depth: int) -> None:
    root = X
    for _ in range(depth):
        root = root * root + 1
    assert len(expr.walk(root)) == 2 + 2 * depth
    assert len(expr.walk(expr.substitute(root, {0: Y}))) == 2 + 2 * depth


def test_narrow_floats_compute_in_float32() -> None:
    for dtype in (FLOAT16, BFLOAT16):
        x = expr.arg(0, dtype)
        values = np.array([1.0, 3.0], np.float32).astype(dtype)
        tiny = (x + 2.0**-10) - 1
        assert expr.evaluate(tiny, [values]).astype(np.float32)[0] == np.float32(2.0**-10)


def test_float_to_integer_casts() -> None:
    x = np.array([1.9, -1.9, np.nan, np.inf, -np.inf, 300.5, -129, 2.0**40, 1e30], np.float32)
    assert expr.convert(x, INT8).tolist() == [1, -1, 0, 0, 0, 44, 127, 0, 0]
    assert expr.convert(x, INT32).tolist() == [1, -1, 0, 0, 0, 300, -129, 0, 0]
    low = -(2**63)
    assert expr.convert(x, INT64).tolist() == [1, -1, low, low, low, 300, -129, 2**40, low]
    above = np.array([2.0**63, 1.5 * 2.0**63, 2.0**64, -1.0, np.nan])
    assert expr.convert(above, UINT64).tolist() == [2**63, 3 * 2**62, 2**63, 2**64 - 1, 2**63]


def test_saturating_casts() -> None:
    x = np.array([1.9, -1.9, np.nan, np.inf, -np.inf, 300.5, -129, 2.0**63, 1e30])
    assert expr.convert(x, INT8, True).tolist() == [1, -1, 0, 127, -128, 127, -128, 127, 127]
    assert expr.convert(x, UINT8, True).tolist() == [1, 0, 0, 255, 0, 255, 0, 255, 255]
    high = 2**63 - 1
    assert expr.convert(x, INT64, True).tolist() == [1, -1, 0, high, -high - 1, 300, -129, high, high]
    assert expr.convert(x, UINT64, True).tolist() == [1, 0, 0, 2**64 - 1, 0, 300, 0, 2**63, 2**64 - 1]
    whole = np.array([2**63 - 1, -5, 2**62 + 1])
    assert expr.convert(whole, UINT64, True).tolist() == [2**63 - 1, 0, 2**62 + 1]
    assert expr.convert(whole, INT8, True).tolist() == [127, -5, 127]
    assert expr.convert(np.array([np.inf, -1e39, 1.0]), FLOAT32, True).tolist() == [
        3.4028234663852886e38,
        -3.4028234663852886e38,
        1.0,
    ]


def test_integer_arithmetic_at_the_edges() -> None:
    a, b = (expr.arg(i, INT32) for i in (0, 1))
    low = -(2**31)
    x, y = np.array([7, -7, 7, -7, low, 5], np.int32), np.array([2, 2, -2, -2, -1, 0], np.int32)
    assert expr.evaluate(a / b, [x, y]).tolist() == [3, -3, -3, 3, low, 0]
    assert expr.evaluate(expr.remainder(a, b), [x, y]).tolist() == [1, 1, -1, -1, 0, 0]
    assert expr.evaluate(expr.fmod(a, b), [x, y]).tolist() == [1, -1, 1, -1, 0, 0]


def test_functions_of_the_module_say_what_numpy_says() -> None:
    x = np.array([-2.5, -0.5, 0.0, 0.5, 1.5, 2.5, np.nan], np.float32)
    with np.errstate(all="ignore"):
        for function, plain in (
            (expr.round_even, np.rint),
            (expr.sign, np.sign),
            (expr.floor, np.floor),
            (abs, np.abs),
        ):
            np.testing.assert_array_equal(expr.evaluate(function(X), [x]), plain(x))
        np.testing.assert_array_equal(expr.evaluate(expr.isinf(X * np.inf), [x]), np.isinf(x * np.float32(np.inf)))
    assert np.isnan(expr.evaluate(expr.clip(X, -1, 1), [x])).tolist() == [False] * 6 + [True]
