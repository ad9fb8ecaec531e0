"""Matrix products on the GPU: every type, form and part of the kernels beside the reference, and their machine code."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from gpu_engine.gpu import gemm
from gpu_engine.gpu.interpret import InterpretDevice
from gpu_engine.gpu.options import GpuOptions
from gpu_engine.gpu.tile_filter import FAMILIES, examined, gemm_kernel
from gpu_engine.gpu.tiles import GEMM_TILES, Choice, Extents, GemmTile, choose
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INT8,
    INT16,
    INT32,
    INT64,
    UINT8,
    UINT16,
    UINT32,
    UINT64,
    DType,
    is_float,
)
from gpu_engine.ir.graph import TensorType
from gpu_engine.ir.ops import MatMul
from gpu_engine.plan.lower import NOT_BATCHED
from gpu_engine.plan.plan import Plan
from tests.gpu_runner import Array, array_steps, execute, graph_of, kernels, lowered, run_op

RNG = np.random.default_rng()
TOLERANCE = {FLOAT64: 1e-13, FLOAT32: 2e-6, FLOAT16: 2e-3, BFLOAT16: 1.6e-2}
FLOATS, INTEGERS = tuple(TOLERANCE), (INT32, UINT32, INT64, UINT64)
FORMS: tuple[tuple[tuple[int, ...], tuple[int, ...], bool, bool], ...] = (
    ((5, 7), (7, 9), False, False), ((7, 5), (7, 33), True, False), ((65, 40), (3, 40), False, True),
    ((2, 3, 5, 7), (7, 9), False, False), ((2, 1, 5, 7), (3, 9, 7), False, True), ((4, 5), (2, 5, 1), False, False),
    ((17, 64), (64, 64), False, False), ((1, 70), (70, 30), False, False), ((2, 6, 3), (2, 6, 17), True, False),
)  # fmt: skip
EMPTY: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (((0, 4), (4, 5)), ((3, 0), (0, 5)), ((0, 2, 3), (3, 1)))


def random(dtype: DType, *shape: int) -> Array:
    if is_float(dtype):
        return RNG.normal(size=shape).astype(dtype)
    bounds = np.iinfo(dtype)
    return RNG.integers(bounds.min, bounds.max, shape, dtype=dtype, endpoint=True)


def assert_product(op: MatMul, got: Array, arrays: list[Array], tolerance: float | None = None) -> None:
    """Floats beside a product in float64; integers exactly."""
    wide = [array.astype(np.float64) if is_float(array.dtype) else array for array in arrays]
    (wanted,) = MatMul(op.transpose_a, op.transpose_b, accumulate=op.accumulate).evaluate(np, *wide[:2])
    if op.epilogue is not None:
        wanted = expr.evaluate(op.epilogue, [wanted.astype(np.float64), *wide[2:]])
    if not is_float(got.dtype):
        np.testing.assert_array_equal(got, wanted)
        return
    scale = np.sqrt(arrays[0].shape[-1 if not op.transpose_a else -2] + 1) + np.abs(wanted.astype(np.float64))
    error = np.abs(got.astype(np.float64) - wanted.astype(np.float64)) / scale
    assert error.max(initial=0) < (tolerance or TOLERANCE[got.dtype])


def assert_rounded(got: Array, a: Array, b: Array, precision: str) -> None:
    """A product whose factors were rounded: within six standard deviations of what that makes of each sum, from the
    sum's own terms. The bits of tf32 are cut off."""
    bits = {"tf32": 10, "fp16": 11, "bf16": 8}[precision]
    error = np.abs(got - a.astype(np.float64) @ b)
    spread = np.sqrt(np.square(a, dtype=np.float64) @ np.square(b))
    assert (error / spread).max() < 6 * 2.0**-bits / np.sqrt(3)
    assert error.max() > 1e-5


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
def test_every_type_and_form(dtype: DType) -> None:
    for seed, (a, b, transpose_a, transpose_b) in enumerate(
        FORMS if is_float(dtype) else FORMS[dtype.itemsize % 3 :: 3]
    ):
        op, arrays = MatMul(transpose_a, transpose_b), [random(dtype, *a), random(dtype, *b)]
        assert_product(op, run_op(op, arrays, seed=seed)[0], arrays)


@pytest.mark.parametrize("shapes", EMPTY, ids=str)
def test_nothing_to_multiply(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    for dtype in (FLOAT32, FLOAT16, INT64):
        arrays = [random(dtype, *shape) for shape in shapes]
        np.testing.assert_array_equal(run_op(MatMul(), arrays)[0], MatMul().evaluate(np, *arrays)[0])


@pytest.mark.parametrize("a", [INT8, UINT8, INT16, UINT16], ids=str)
@pytest.mark.parametrize("b", [INT8, UINT8, INT16, UINT16], ids=str)
def test_bytes_and_halves_are_exact(a: DType, b: DType) -> None:
    op = MatMul(accumulate=UINT32 if a.kind == b.kind == "u" else INT32)
    for arrays in ([random(a, 2, 5, 70), random(b, 2, 70, 19)], [random(a, 20, 32), random(b, 32, 19)]):
        assert_product(op, run_op(op, arrays)[0], arrays)
        plan = lowered(graph_of(op, [TensorType(x.dtype, x.shape) for x in arrays], {1: arrays[1]}))
        assert_product(op, execute(plan, arrays[:1], seed=1)[0], arrays)


def test_constants_are_narrowed_where_that_is_exact() -> None:
    op, weights = MatMul(accumulate=INT32), RNG.integers(-128, 128, (40, 24)).astype(np.int16)
    a = random(INT16, 9, 40)
    plan = lowered(graph_of(op, [TensorType(INT16, (9, 40)), TensorType(INT16, (40, 24))], {1: weights}))
    assert [argument.type for argument in kernels(plan)[0].arguments if argument.is_pointer] == ["*i16", "*i8", "*i32"]
    assert_product(op, execute(plan, [a])[0], [a, weights])


def _epilogue(dtype: DType, *operands: DType) -> expr.Expr:
    """max(product + operands, 0)."""
    total = expr.cast(expr.arg(0, dtype), FLOAT32)
    for i, operand in enumerate(operands, 1):
        total = total + expr.cast(expr.arg(i, operand), FLOAT32)
    return expr.maximum(total, 0.0)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
def test_operands_of_an_epilogue_are_broadcast(dtype: DType) -> None:
    a, b = random(dtype, 2, 3, 17, 16), random(dtype, 16, 18)
    for shapes in (
        [(18,), (17, 1), (2, 3, 17, 18)], [(2, 1, 1, 18), (3, 1, 1)], [(2, 1, 17, 1), (1, 1), (3, 17, 18)]
    ):  # fmt: skip
        extras = [random(FLOAT32, *shape) for shape in shapes]
        op = MatMul(epilogue=_epilogue(dtype, *(extra.dtype for extra in extras)))
        for factor in (b, np.broadcast_to(b, (3, *b.shape)).copy()):
            arrays = [a, factor, *extras]
            assert_product(op, run_op(op, arrays)[0], arrays)


def test_an_epilogue_of_integers() -> None:
    a, b, scale = random(UINT8, 7, 33), random(INT8, 33, 20), random(FLOAT32, 20)
    scaled = expr.cast(expr.arg(0, INT32), FLOAT32) * expr.arg(1, FLOAT32) * 1e-3
    op = MatMul(accumulate=INT32, epilogue=expr.cast(expr.round_even(scaled), INT8, saturate=True))
    got, wanted = run_op(op, [a, b, scale])[0], op.evaluate(np, a, b, scale)[0]
    assert got.dtype == INT8
    np.testing.assert_array_equal(got, wanted)


def test_what_is_not_finite() -> None:
    a, b = random(FLOAT32, 20, 40), random(FLOAT32, 40, 18)
    a[3, 5], a[7, 0], b[39, 17], b[1, 2] = np.nan, np.inf, -np.inf, np.nan
    for dtype in (FLOAT32, FLOAT16):
        factors = [a.astype(dtype), b.astype(dtype)]
        (got,), (wanted,) = run_op(MatMul(), factors), MatMul().evaluate(np, *factors)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(wanted))
        np.testing.assert_array_equal(np.isposinf(got), np.isposinf(wanted))


def _bound(op: MatMul, types: list[TensorType], constants: dict[int, Array] | None = None) -> Plan:
    plan = lowered(graph_of(op, types, constants))
    assert not array_steps(plan)
    return plan


def test_symbolic_extents_bound_to_many_values() -> None:
    m, n, k, batch = map(dims.symbol, ("m", "n", "k", "batch"))
    types = [TensorType(FLOAT32, (batch, m, k)), TensorType(FLOAT32, (batch, k, n)), TensorType(FLOAT32, (batch, m, n))]
    op = MatMul(epilogue=_epilogue(FLOAT32, FLOAT32))
    plan = _bound(op, types)
    for sizes in ((1, 1, 1, 1), (2, 3, 4, 5), (3, 70, 17, 33), (2, 5, 0, 7), (0, 5, 6, 7)):
        b, i, j, depth = sizes
        arrays = [random(FLOAT32, b, i, depth), random(FLOAT32, b, depth, j), random(FLOAT32, b, i, j)]
        assert_product(op, execute(plan, arrays, seed=sum(sizes))[0], arrays)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16], ids=str)
def test_a_symbolic_number_of_rows_takes_a_tile_for_each_range(dtype: DType, monkeypatch: pytest.MonkeyPatch) -> None:
    """[batch, 3, 96] times [96, 40]: one plan, as many rows as there are, each range with its own kernels."""
    tiles = GemmTile(16, 32, 32, 4, 2), GemmTile(32, 32, 32, 4, 2), GemmTile(64, 64, 32, 4, 2)
    choices = Choice(1, 17, tiles[0], 1), Choice(17, 40, tiles[1], 2), Choice(40, None, tiles[2], 1)
    monkeypatch.setattr(gemm, "choose", lambda *args, **options: choices)
    batch, weights, bias = dims.symbol("batch"), random(dtype, 96, 40), random(dtype, 40)
    op = MatMul(epilogue=_epilogue(dtype, dtype))
    types = [TensorType(dtype, (batch, 3, 96)), TensorType(dtype, (96, 40)), TensorType(dtype, (40,))]
    plan = _bound(op, types, {1: weights, 2: bias})
    assert len(kernels(plan)) == 3
    for rows in (0, 1, 5, 6, 13, 14, 30):
        a = random(dtype, rows, 3, 96)
        assert_product(op, execute(plan, [a])[0], [a, weights, bias])


@pytest.mark.parametrize("splits", [2, 5])
def test_parts_are_added_in_order(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = Choice(1, None, GemmTile(16, 16, 32, 4, 2), splits)
    monkeypatch.setattr(gemm, "choose", lambda *args, **options: (choice,))
    for a, b, dtype, accumulate in (
        ((2, 19, 70), (2, 70, 5), FLOAT32, None), ((40, 70), (70, 16), FLOAT16, None),
        ((7, 33), (33, 1), UINT8, INT32), ((5, 10), (10, 3), INT64, None),
    ):  # fmt: skip
        op, arrays = MatMul(accumulate=accumulate), [random(dtype, *a), random(dtype, *b)]
        results = [run_op(op, arrays, seed=seed)[0] for seed in (0, 1)]
        np.testing.assert_array_equal(*results)
        assert_product(op, results[0], arrays)


@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16"])
def test_precision_of_factors(precision: str) -> None:
    a, b = random(FLOAT32, 40, 96), random(FLOAT32, 96, 33)
    types = [TensorType(FLOAT32, a.shape), TensorType(FLOAT32, b.shape)]
    device = InterpretDevice(options=GpuOptions(precision=precision))
    for constants in ({}, {1: b}):
        plan = device.lower(graph_of(MatMul(), types, constants), NOT_BATCHED)
        (got,) = execute(plan, [a] if constants else [a, b])
        assert_rounded(got, a, b, precision)


def test_precisions_have_names() -> None:
    with pytest.raises(ValueError, match="fp8"):
        GpuOptions(precision="fp8")


CHECKED: tuple[tuple[str, int, int, str], ...] = (
    ("half", 0, 90, "HGMMA"), ("half", 0, 80, "HMMA"), ("half", 1, 100, "UTCHMMA"), ("half", 5, 90, "HMMA"),
    ("tf32", 0, 90, "HGMMA"), ("converted", 0, 90, "HGMMA"), ("bytes", 2, 90, "IGMMA"), ("double", 1, 90, "DMMA"),
    ("ieee", 1, 90, "FFMA"), ("sums", 2, 90, "FFMA"), ("float8", 2, 90, "QGMMA"), ("float8_half", 2, 80, "HMMA"),
)  # fmt: skip


@pytest.mark.parametrize(("family", "index", "arch", "instruction"), CHECKED)
def test_machine_code(family: str, index: int, arch: int, instruction: str) -> None:
    """All tiles for all GPUs: `python -m benchmarks.gpu_tiles 80 90 100`."""
    used, found = examined(family, GEMM_TILES[family][index], arch)
    assert not found
    assert used.count(instruction)
    wide: Any = used.instructions
    assert any(name.startswith(("LDGSTS", "LDG")) and name.endswith("128") for name in wide)


def test_layers_share_kernels() -> None:
    kernel = gemm_kernel("half", GEMM_TILES["half"][1])
    assert "768" not in kernel.text


def test_products_of_other_extents_share_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which numbers are equal, or multiples of 16, does not matter to a kernel of float32; what divides by 4 does."""
    choice = Choice(1, None, GemmTile(32, 32, 32, 4, 2), 2)
    monkeypatch.setattr(gemm, "choose", lambda *args, **options: (choice,))
    m, found = dims.symbol("m"), []
    for rows, k, n in ((m, 64, 256), (m, 256, 64), (m * 49, 64, 64), (m * 48, 96, 32), (m, 96, 33)):
        types = [TensorType(FLOAT32, (rows, k)), TensorType(FLOAT32, (k, n))]
        found += kernels(lowered(graph_of(MatMul(), types, {1: random(FLOAT32, k, n)})))
    assert len(set(found[:4])) == 1 and found[4] != found[0]


def test_a_choice_covers_every_number_of_rows() -> None:
    for family, (factor, *_) in FAMILIES.items():
        for arch in (80, 86, 89, 90, 100, 120):
            found = choose(family, Extents(1, dims.symbol("m"), 768, 3072, factor.itemsize), arch, heavy=True)
            assert len(found) > 1 and found[0].least == 1 and found[-1].end is None
            assert all(a.end == b.least for a, b in itertools.pairwise(found))
