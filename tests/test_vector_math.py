"""The stated error bounds of the vector functions, against float64, on every target that runs here."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_fallback.native import Target
from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import FLOAT32, FLOAT64
from tests.kernel_runner import run_map, targets

Array = NDArray[Any]
X, Y = expr.arg(0, FLOAT32), expr.arg(1, FLOAT32)
GENERATOR = np.random.default_rng(0)
SPECIAL = np.array(
    [0.0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1.1754944e-38, 3.4e38, -3.4e38, 88.7, 88.8, -87.4,
     -103.9, -104.1, 47999.9, 48000.1, 1e30], np.float32,
)  # fmt: skip


def every_scale(count: int) -> Array:
    """Random bit patterns: every exponent, denormals, infinities and NaN alike."""
    bits = GENERATOR.integers(0, 2**32, count, dtype=np.uint32).view(np.float32)
    return np.concatenate([SPECIAL, bits])


def spread(low: float, high: float, count: int = 40_000) -> Array:
    return np.concatenate([np.linspace(low, high, count).astype(np.float32), every_scale(count)])


erf = np.vectorize(math.erf, otypes=[np.float64])
CASES: dict[str, tuple[Any, Any, Array, float]] = {
    "exp": (expr.exp, np.exp, spread(-105, 90), 1.0),
    "log": (expr.log, np.log, np.abs(spread(-4, 4)), 1.0),
    "log of negatives": (expr.log, np.log, spread(-4, -1), 1.0),
    "tanh": (expr.tanh, np.tanh, spread(-11, 11), 3.0),
    "erf": (expr.erf, erf, spread(-5, 5, 20_000), 2.0),
    "sin": (expr.sin, np.sin, spread(-100, 100), 2.0),
    "cos": (expr.cos, np.cos, spread(-100, 100), 2.0),
    "large sin": (expr.sin, np.sin, spread(-60_000, 60_000), 2.0),
    "sigmoid": (expr.sigmoid, lambda x: 1 / (1 + np.exp(-x)), np.maximum(spread(-30, 100), -87), 3.0),
}


def ulps(actual: Array, exact: Array) -> Array:
    """The distance in units of the last place of the float32 nearest to `exact`; 0 where both are NaN or equal."""
    rounded = exact.astype(np.float32)
    with np.errstate(all="ignore"):
        distance = np.abs(actual.astype(np.float64) - exact) / np.spacing(np.abs(rounded)).astype(np.float64)
    same = (actual == rounded) | (np.isnan(actual) & np.isnan(rounded))
    return np.where(same, 0, np.where(np.isnan(distance), np.inf, distance))


@pytest.mark.parametrize("target", targets(), ids=lambda target: f"{target.vector_nbytes * 8} bits")
@pytest.mark.parametrize("name", CASES)
def test_float32_within_its_bound(name: str, target: Target) -> None:
    function, exact, x, bound = CASES[name]
    actual = run_map(function(X), [x], target)
    with np.errstate(all="ignore"):
        wrong = ulps(actual, exact(x.astype(np.float64)))
    worst = int(wrong.argmax())
    assert wrong[worst] <= bound, f"{name}({x[worst]!r}) = {actual[worst]!r}, off by {wrong[worst]:.2f} ulp"


@pytest.mark.parametrize("target", targets(), ids=lambda target: f"{target.vector_nbytes * 8} bits")
def test_pow_within_its_bound(target: Target) -> None:
    edges = np.array([0.0, -0.0, 1, -1, 2, -2, 0.5, -0.5, 3, -3, 1e9, np.inf, -np.inf, np.nan], np.float32)
    grid = np.stack([*map(np.ravel, np.meshgrid(edges, edges))])
    x = np.concatenate([grid[0], np.exp(GENERATOR.uniform(-30, 30, 40_000)).astype(np.float32), every_scale(20_000)])
    rest = len(x) - len(grid[1])
    y = np.concatenate([grid[1], GENERATOR.uniform(-8, 8, rest).astype(np.float32)])
    actual = run_map(expr.apply("pow", X, Y), [x, y], target)
    with np.errstate(all="ignore"):
        wrong = ulps(actual, np.power(x.astype(np.float64), y.astype(np.float64)))
    worst = int(wrong.argmax())
    assert wrong[worst] <= 1, f"pow({x[worst]!r}, {y[worst]!r}) = {actual[worst]!r}, off by {wrong[worst]:.2f} ulp"


@pytest.mark.parametrize(
    "name",
    ["exp", "log", "tanh", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh"],
)
def test_the_library_serves_every_lane(name: str) -> None:
    x64 = np.concatenate([GENERATOR.uniform(-3, 3, 101), [0.0, np.inf, -np.inf, np.nan, 1e300]])
    numpy_name = {"asin": "arcsin", "acos": "arccos", "atan": "arctan"}.get(name, name.replace("a", "arc", 1))
    function = getattr(np, numpy_name if name.startswith("a") else name)
    with np.errstate(all="ignore"):
        for dtype, tolerance in ((FLOAT64, 1e-14), (FLOAT32, 3e-7)):
            x = x64.astype(dtype)
            actual = run_map(expr.apply(name, expr.arg(0, dtype)), [x], targets()[0])
            np.testing.assert_allclose(
                actual, function(x.astype(np.float64)).astype(dtype), rtol=tolerance, atol=1e-300
            )


@pytest.mark.parametrize("target", targets(), ids=lambda target: f"{target.vector_nbytes * 8} bits")
def test_division_by_a_known_number_is_division(target: Target) -> None:
    """Bit for bit, infinities and NaN too, where the quotient is no denormal number."""
    generator = np.random.default_rng(3)
    x = np.concatenate([every_scale(20_000), np.arange(-3000, 3000, dtype=np.float32)])
    for divisor in (3.0, 6.0, -7.0, 49.0, 0.1, 8.0, -0.5, 255.0, 2.0**60, *generator.uniform(-1e3, 1e3, 20)):
        known = np.float32(divisor)
        with np.errstate(all="ignore"):
            exact = x / known
        found = run_map(X / expr.const(known, FLOAT32), [x], target)
        normal = ~(np.abs(exact) < np.finfo(np.float32).tiny)
        np.testing.assert_array_equal(found[normal], exact[normal], f"{known}")
        np.testing.assert_allclose(found[~normal], exact[~normal], rtol=0, atol=3e-45)
