"""Matrix products of the CPU device against float64: every form, shape, target and number of threads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_fallback.gemm import emit_product
from cpu_fallback.native import Target
from cpu_fallback.packing import pack_panels, panel_widths
from cpu_fallback.tiles import TileShape, tile_shape
from gpu_engine.ir import expr
from gpu_engine.ir.dims import Dim, symbol
from gpu_engine.ir.dtypes import FLOAT16, FLOAT32, FLOAT64, INT32
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.ops import MatMul
from tests.kernel_runner import targets
from tests.node_runner import run_node

Array = NDArray[Any]
TARGETS = [pytest.param(target, id=f"{target.vector_nbytes * 8}") for target in targets()]
EXTENTS = st.one_of(st.integers(0, 33), st.sampled_from([47, 48, 49, 64, 96, 97, 130]))
DEPTHS = st.one_of(st.integers(0, 33), st.sampled_from([64, 383, 384, 385, 800]))
X = expr.arg(0, FLOAT32)
GELU = 0.5 * (X + expr.arg(1, FLOAT32)) * (1 + expr.erf((X + expr.arg(1, FLOAT32)) * math.sqrt(0.5)))
EPILOGUES: dict[str, tuple[Expr, tuple[str, ...]]] = {
    "relu": (expr.maximum(X, 0.0), ()),
    "bias": (X + expr.arg(1, FLOAT32), ("row",)),
    "gelu": (GELU, ("row",)),
    "scaled": (X * expr.arg(1, FLOAT32) + expr.arg(2, FLOAT32), ("column", "scalar")),
    "residual": (expr.tanh(X + expr.arg(1, FLOAT32)) + expr.arg(2, FLOAT32), ("row", "full")),
    "whole": (expr.cast(expr.exp(X) < expr.arg(1, FLOAT32), INT32), ("full",)),
    "double": (expr.cast(X, FLOAT64) * 3 + 1, ()),
}


def floats(random: np.random.Generator, *shape: int) -> Array:
    return random.standard_normal(shape, dtype=np.float32)


def stored(matrix: Array, transposed: bool) -> Array:
    return np.ascontiguousarray(matrix.swapaxes(-1, -2)) if transposed else matrix


def symbols(shape: Sequence[int], names: Sequence[str], values: dict[str, int]) -> tuple[Dim, ...]:
    """The shape with every extent a symbol, but for 0 and 1, which a symbol of a batch axis may not be."""
    found: list[Dim] = []
    for name, extent in zip(names, shape, strict=True):
        if extent == 0:
            found.append(0)
        elif name.startswith("batch") and extent == 1:
            found.append(1)
        else:
            values[name] = extent
            found.append(symbol(name))
    return tuple(found)


def assert_product(got: Array, a: Array, b: Array, slack: float = 1.0) -> None:
    """`got` within the bound of any order of summation of a @ b."""
    exact = a.astype(np.float64) @ b.astype(np.float64)
    size = np.abs(a.astype(np.float64)) @ np.abs(b.astype(np.float64))
    assert got.shape == exact.shape
    bound = ((min(a.shape[-1], 400) + 4) * size / 4 + 4 * (slack - 1)) * np.finfo(np.float32).eps + 1e-30
    assert (np.abs(got - exact) <= bound).all()


@settings(max_examples=50, deadline=None)
@given(
    target=st.sampled_from(targets()), m=EXTENTS, k=DEPTHS, n=EXTENTS,
    transposes=st.tuples(st.booleans(), st.booleans()), threads=st.integers(1, 3), seed=st.integers(0, 99),
    batch=st.sampled_from(
        [((), ()), ((3,), ()), ((), (2,)), ((2,), (2,)), ((3, 1), (1, 2)), ((0,), (0,)), ((4, 1), (3,))]
    ),
)  # fmt: skip
def test_symbolic_extents(
    target: Target, m: int, k: int, n: int, transposes: tuple[bool, bool], threads: int, seed: int, batch: Any
) -> None:
    random = np.random.default_rng(seed)
    a, b = floats(random, *batch[0], m, k), floats(random, *batch[1], k, n)
    x, y = stored(a, transposes[0]), stored(b, transposes[1])
    values: dict[str, int] = {}
    names = [f"batch{i}" for i in range(4)]
    shapes = {
        0: symbols(x.shape, [*names[4 - len(batch[0]) :], *("km" if transposes[0] else "mk")], values),
        1: symbols(y.shape, [*names[4 - len(batch[1]) :], *("nk" if transposes[1] else "kn")], values),
    }
    op = MatMul(*transposes)
    got = run_node(emit_product, op, [x, y], target, threads=threads, shapes=shapes, values=values)
    assert_product(got, a, b)


@settings(max_examples=25, deadline=None)
@given(
    target=st.sampled_from(targets()), m=EXTENTS, k=DEPTHS, n=EXTENTS, constant=st.integers(0, 1),
    transposes=st.tuples(st.booleans(), st.booleans()), threads=st.integers(1, 3), seed=st.integers(0, 99),
    batch=st.sampled_from([((), ()), ((3,), ()), ((2,), (2,)), ((3, 1), (1, 2))]),
)  # fmt: skip
def test_constant_operands(
    target: Target, m: int, k: int, n: int, constant: int, transposes: tuple[bool, bool], threads: int, seed: int,
    batch: Any,
) -> None:  # fmt: skip
    random = np.random.default_rng(seed)
    a, b = floats(random, *batch[0], m, k), floats(random, *batch[1], k, n)
    operands = [stored(a, transposes[0]), stored(b, transposes[1])]
    values: dict[str, int] = {}
    free = 1 - constant
    names = [*("batch0", "batch1")[2 - len(batch[free]) :], "x", "y"]
    shape = symbols(operands[free].shape, names, values)
    inner = (-1 if free == 0 else -2) if not transposes[free] else (-2 if free == 0 else -1)
    shape = tuple(k if axis == inner % len(shape) else extent for axis, extent in enumerate(shape))
    got = run_node(
        emit_product, MatMul(*transposes), operands, target, threads=threads, constants=(constant,),
        shapes={free: shape}, values=values,
    )  # fmt: skip
    assert_product(got, a, b)


@settings(max_examples=25, deadline=None)
@given(
    target=st.sampled_from(targets()), m=st.integers(1, 4), k=DEPTHS, n=st.one_of(EXTENTS, st.just(500)),
    threads=st.integers(1, 3), seed=st.integers(0, 99), batch=st.sampled_from([(), (2,), (3, 2)]),
)  # fmt: skip
def test_few_rows_times_columns_in_place(
    target: Target, m: int, k: int, n: int, threads: int, seed: int, batch: tuple[int, ...]
) -> None:
    random = np.random.default_rng(seed)
    a, b = floats(random, *batch, m, k), floats(random, *batch, k, n)
    values: dict[str, int] = {}
    names = ["batch0", "batch1"][: len(batch)]
    shapes = {
        0: (*symbols(a.shape[:-2], names, values), m, *symbols([k], "k", values)),
        1: symbols((*batch, n, k), [*names, "n", "k"], values),
    }
    operands = [a, stored(b, True)]
    op = MatMul(transpose_b=True)
    got = run_node(emit_product, op, operands, target, threads=threads, shapes=shapes, values=values)
    assert_product(got, a, b)


@settings(max_examples=25, deadline=None)
@given(
    target=st.sampled_from(targets()), m=st.one_of(EXTENTS, st.just(500)), k=DEPTHS,
    transposes=st.tuples(st.booleans(), st.booleans()), constants=st.sampled_from([(), (0,), (1,)]),
    threads=st.integers(1, 3), seed=st.integers(0, 99), batch=st.sampled_from([((), ()), ((3,), ()), ((2,), (2,))]),
)  # fmt: skip
def test_one_column(
    target: Target, m: int, k: int, transposes: tuple[bool, bool], constants: tuple[int, ...], threads: int, seed: int,
    batch: Any,
) -> None:  # fmt: skip
    random = np.random.default_rng(seed)
    a, b = floats(random, *batch[0], m, k), floats(random, *batch[1], k, 1)
    bias, full = floats(random, 1), floats(random, *np.broadcast_shapes(*batch), m, 1)
    operands = [stored(a, transposes[0]), stored(b, transposes[1]), bias, full]
    op = MatMul(*transposes, epilogue=X + expr.arg(1, FLOAT32) * expr.arg(2, FLOAT32))
    got = run_node(emit_product, op, operands, target, constants=constants, threads=threads)
    assert_product(got - bias * full, a, b, slack=16)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8, 9, 40])
def test_few_rows_of_a_static_product(target: Target, m: int) -> None:
    random = np.random.default_rng(m)
    a, b = floats(random, m, 700), floats(random, 700, 100)
    for constants in ((), (1,)):
        got = run_node(emit_product, MatMul(), [a, b], target, constants=constants)
        assert_product(got, a, b)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", EPILOGUES)
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=["flat", "batched"])
def test_epilogues(target: Target, name: str, batch: tuple[int, ...]) -> None:
    root, kinds = EPILOGUES[name]
    random = np.random.default_rng(7)
    for m, k, n in ((5, 40, 100), (17, 3, 1), (1, 64, 50), (3, 0, 7)):
        a, b = floats(random, *batch, m, k) / 8, floats(random, k, n)
        forms = {"row": (n,), "column": (m, 1), "scalar": (), "full": (*batch, m, n)}
        extras = [floats(random, *forms[kind]) for kind in kinds]
        for transposed_a in (False, True):
            op = MatMul(transposed_a, epilogue=root)
            got = run_node(emit_product, op, [stored(a, transposed_a), b, *extras], target, threads=2, constants=(1,))
            wide = [expr.cast(expr.arg(i, FLOAT32), FLOAT64) for i in range(1 + len(extras))]
            product = a.astype(np.float64) @ b.astype(np.float64)
            exact = expr.evaluate(root, [product.astype(np.float32), *extras])
            assert got.dtype == root.dtype and got.shape == exact.shape and len(wide) == 1 + len(extras)
            if root.dtype == INT32:
                assert (got != exact).mean() < 0.01
            else:
                np.testing.assert_allclose(got, exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64], ids=str)
def test_other_floats(target: Target, dtype: Any) -> None:
    random = np.random.default_rng(3)
    a, b = floats(random, 11, 130).astype(dtype), floats(random, 130, 55).astype(dtype)
    for constants in ((), (0,), (1,)):
        got = run_node(emit_product, MatMul(), [a, b], target, constants=constants)
        exact = a.astype(np.float64) @ b.astype(np.float64)
        assert got.dtype == dtype
        assert np.abs(got.astype(np.float64) - exact).max() <= 40 * float(ml_dtypes.finfo(dtype).eps)


def test_a_half_product_with_an_epilogue_rounds_once() -> None:
    random = np.random.default_rng(3)
    a, b = (floats(random, 20, 20).astype(np.float16) for _ in range(2))
    x = expr.arg(0, FLOAT16)
    (target, *_) = targets()
    got = run_node(emit_product, MatMul(epilogue=x * 3 + 1), [a, b], target)
    exact = a.astype(np.float64) @ b.astype(np.float64) * 3 + 1
    assert (np.abs(got.astype(np.float64) - exact) <= np.abs(exact) * 2.0**-11 + 2e-5).all()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("transposed_b", [False, True])
def test_nan_and_infinity_stay_in_their_rows_and_columns(target: Target, transposed_b: bool) -> None:
    random = np.random.default_rng(11)
    a, b = floats(random, 30, 50), floats(random, 50, 70)
    a[3, 49], a[7, 0], a[29, 20], b[10, 69], b[5, 16] = np.inf, np.nan, -np.inf, np.inf, np.nan
    with np.errstate(all="ignore"):
        exact = a @ b
    for constants in ((), (1,)):
        got = run_node(
            emit_product, MatMul(False, transposed_b), [a, stored(b, transposed_b)], target, constants=constants
        )
        np.testing.assert_array_equal(np.isnan(got), np.isnan(exact))
        np.testing.assert_array_equal(np.isinf(got), np.isinf(exact))
        np.testing.assert_allclose(got, exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("depth", [64, 768, 5000])
def test_errors_are_those_of_blas(target: Target, depth: int) -> None:
    random = np.random.default_rng(depth)
    a, b = floats(random, 64, depth), floats(random, depth, 64)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    got = run_node(emit_product, MatMul(), [a, b], target)
    own, other = (np.sqrt(((x - exact) ** 2).mean()) for x in (got, a @ b))
    assert own <= 1.25 * other


@pytest.mark.parametrize("transposed_b", [False, True])
@pytest.mark.parametrize("constants", [(), (1,)])
@pytest.mark.parametrize("batch", [(), (5,)], ids=["flat", "batched"])
def test_threads_at_once_compute_the_same(transposed_b: bool, constants: tuple[int, ...], batch: Any) -> None:
    random = np.random.default_rng(12)
    target = targets()[0]
    a, b, bias = floats(random, *batch, 100, 500), floats(random, *batch, 500, 300), floats(random, 300)
    op = MatMul(False, transposed_b, epilogue=GELU)
    operands = [a, stored(b, transposed_b), bias]
    alone = run_node(emit_product, op, operands, target, constants=constants)
    for threads in (2, 3, 4, 7):
        for _ in range(5):
            got = run_node(
                emit_product, op, operands, target, threads=threads, at_once=True, constants=constants
            )  # fmt: skip
            np.testing.assert_array_equal(got, alone)


@settings(max_examples=40, deadline=None)
@given(
    target=st.sampled_from(targets()), m=EXTENTS, k=DEPTHS, n=EXTENTS, transposed=st.booleans(),
    kinds=st.sampled_from([(np.uint8, np.int8), (np.int8, np.int8), (np.uint8, np.uint8), (np.int8, np.uint8)]),
    batch=st.sampled_from([((), ()), ((3,), ()), ((2,), (2,))]), threads=st.integers(1, 3), seed=st.integers(0, 99),
    extreme=st.booleans(),
)  # fmt: skip
def test_bytes(
    target: Target, m: int, k: int, n: int, transposed: bool, kinds: Any, batch: Any, threads: int, seed: int,
    extreme: bool,
) -> None:  # fmt: skip
    random = np.random.default_rng(seed)
    limits = [np.iinfo(kind) for kind in kinds]
    a, b = (
        random.choice([limit.min, limit.max], (*lead, *tail)).astype(kind)
        if extreme
        else random.integers(limit.min, limit.max + 1, (*lead, *tail), kind)
        for lead, tail, kind, limit in zip(batch, ((m, k), (k, n)), kinds, limits, strict=True)
    )
    values: dict[str, int] = {}
    shapes = {0: symbols(a.shape, [*["batch0"] * len(batch[0]), "m", "k"], values)}
    shapes[0] = (*shapes[0][:-1], k)
    product = expr.arg(0, INT32)
    zero = random.integers(-9, 9, (n,), np.int32)
    root = expr.cast(product - expr.arg(1, INT32), FLOAT32) * 0.5
    for op, extras in ((MatMul(False, transposed, accumulate=INT32), []),
                       (MatMul(False, transposed, root, INT32), [zero])):  # fmt: skip
        operands = [a, stored(b, transposed), *extras]
        got = run_node(
            emit_product, op, operands, target, constants=(1,), threads=threads, shapes=shapes, values=values
        )  # fmt: skip
        exact = a.astype(np.int64) @ b.astype(np.int64)
        np.testing.assert_array_equal(got, (exact - zero).astype(np.float32) / 2 if extras else exact)


def test_integers_and_unused_products_have_no_native_form() -> None:
    (target, *_) = targets()
    whole = np.ones((3, 3), np.int32)
    constant = MatMul(epilogue=expr.arg(1, FLOAT32) * 2)
    for op, operands in ((MatMul(), [whole, whole]), (constant, [np.ones((3, 3), np.float32)] * 3)):
        with pytest.raises(AssertionError, match="no native form"):
            run_node(emit_product, op, operands, target)


@pytest.mark.parametrize(("n", "widths"), [(0, []), (1, [1]), (16, [1]), (64, [2, 2]), (768, [3] * 16), (49, [2, 2])])
def test_panels_are_nearly_equal(n: int, widths: list[int]) -> None:
    assert panel_widths(n, TileShape(8, 3, 16, "float")) == widths


def test_panels_hold_every_element_once() -> None:
    (target, *_) = targets()
    shape = tile_shape(target, "float")
    b = np.arange(1, 2 * 5 * 77 + 1, dtype=np.float32).reshape(2, 5, 77)
    packed = pack_panels(b, shape, np.float32)
    assert packed.ctypes.data % 64 == 0 and packed.shape[0] == 2
    assert sorted(packed[packed != 0]) == sorted(b.ravel())
