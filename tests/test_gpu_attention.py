"""Attention on the GPU beside its reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("triton")

from gpu_engine.gpu.offline import compiled, problems, resources
from gpu_engine.ir import dims
from gpu_engine.ir.dtypes import BFLOAT16, BOOL, FLOAT16, FLOAT32, DType, is_float
from gpu_engine.ir.graph import Builder, Graph, TensorType, Value
from gpu_engine.ir.ops import Attention, Reshape, Slice, Transpose
from tests.gpu_runner import array_steps, execute, graph_of, kernels, lowered, run_op

DTYPES = (FLOAT32, FLOAT16, BFLOAT16)
TOLERANCES = {2: 4e-2, 4: 4e-5}
B, S, T = map(dims.symbol, "bst")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


def factors(
    rng: np.random.Generator, dtype: DType, q: tuple[int, ...], k: tuple[int, ...], width: int = 0
) -> list[NDArray[Any]]:
    shapes = (q, k, (*k[:-1], width or k[-1]))
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


def check(op: Attention, arrays: list[NDArray[Any]], types: list[TensorType] | None = None, seed: int = 0) -> None:
    wide = [array.astype(np.float64) if is_float(array.dtype) else array for array in arrays]
    wanted, found = op.evaluate(np, *wide)[0], run_op(op, arrays, types, seed)[0]
    tolerance = TOLERANCES[arrays[0].dtype.itemsize]
    np.testing.assert_allclose(found.astype(np.float64), wanted, tolerance, tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_extents(rng: np.random.Generator, dtype: DType) -> None:
    check(Attention(0.3), factors(rng, dtype, (2, 3, 7, 8), (2, 3, 7, 8)))
    check(Attention(0.3), factors(rng, dtype, (2, 70, 16), (2, 45, 16), 24), seed=1)
    check(Attention(0.3), factors(rng, dtype, (3, 8), (5, 8)))
    check(Attention(0.3), factors(rng, dtype, (2, 3, 8), (2, 0, 8)))
    check(Attention(0.3), factors(rng, dtype, (2, 0, 8), (2, 3, 8)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_causal_with_shared_keys(rng: np.random.Generator, dtype: DType) -> None:
    check(Attention(0.2, causal=True), factors(rng, dtype, (2, 4, 33, 80), (2, 1, 65, 80), 40))
    check(Attention(0.2, causal=True), factors(rng, dtype, (1, 130, 64), (1, 130, 64)), seed=1)


@pytest.mark.parametrize("zero_nan", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_boolean_masks(rng: np.random.Generator, dtype: DType, zero_nan: bool) -> None:
    three = factors(rng, dtype, (2, 3, 5, 8), (2, 3, 70, 8))
    for shape in [(2, 1, 1, 70), (1, 3, 5, 70), (5, 1)]:
        mask = rng.random(shape) < 0.6
        mask[..., 0, :] = False
        check(Attention(0.3, zero_nan=zero_nan), [*three, mask])
        check(Attention(0.3, fill=-1e4, zero_nan=zero_nan), [*three, mask])


def test_a_masked_row_with_the_least_number_for_its_scores_is_a_mean(rng: np.random.Generator) -> None:
    three, least = factors(rng, FLOAT32, (5, 8), (70, 8)), float(np.finfo(np.float32).min)
    check(Attention(0.3, fill=least), [*three, np.zeros((5, 70), bool)])
    check(Attention(0.3), [*three, np.full((1, 70), least, np.float32)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_added_masks(rng: np.random.Generator, dtype: DType) -> None:
    three = factors(rng, dtype, (2, 3, 66, 8), (2, 3, 70, 8))
    mask = rng.normal(size=(66, 70)).astype(dtype)
    mask[3], mask[5, 20:] = -np.inf, -np.inf
    check(Attention(0.3), [*three, mask])
    check(Attention(0.3, causal=True, zero_nan=True), [*three, mask], seed=1)


@pytest.mark.parametrize("zero_nan", [False, True])
def test_nan_and_infinite_scores(rng: np.random.Generator, zero_nan: bool) -> None:
    q, k, v = factors(rng, FLOAT32, (4, 8), (40, 8))
    q[1], q[2, 0] = np.nan, np.inf
    check(Attention(0.3, zero_nan=zero_nan), [q, k, v])
    check(Attention(-0.3), [q, k, v])


def test_one_plan_attends_over_any_extents(rng: np.random.Generator) -> None:
    types = [TensorType(FLOAT32, (B, 3, extent, 64)) for extent in (S, T, T)] + [TensorType(BOOL, (B, 1, 1, T))]
    for queries, keys in [(1, 1), (3, 130), (70, 64)]:
        three = factors(rng, FLOAT32, (2, 3, queries, 64), (2, 3, keys, 64))
        check(Attention(0.1), [*three, rng.random((2, 1, 1, keys)) < 0.9], types)


def joined_projections() -> Graph:
    """Attention of heads that lie side by side in one tensor, [batch, tokens, 3, heads, features]."""
    builder, x = Builder(), Value(TensorType(FLOAT32, (B, S, 3, 4, 16)))
    turned = builder.emit(Transpose((2, 0, 3, 1, 4)), x)
    parts = []
    for i in range(3):
        one = builder.emit(Slice((i, 0, 0, 0, 0), (1, 1, 1, 1, 1), (1, B, 4, S, 16)), turned)
        parts.append(builder.emit(Reshape((B, 4, S, 16)), one))
    y = builder.emit(Transpose((0, 2, 1, 3)), builder.emit(Attention(0.2), *parts))
    return Graph((x,), (y,), tuple(builder.nodes), ("x",), ("y",))


def test_slices_and_transposes_around_attention_vanish(rng: np.random.Generator) -> None:
    plan = lowered(joined_projections())
    assert [kernel.name for kernel in kernels(plan)] == ["attention"]
    assert not array_steps(plan)
    x = rng.normal(size=(2, 21, 3, 4, 16)).astype(np.float32)
    q, k, v = (x[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
    (wanted,) = Attention(0.2).evaluate(np, q, k, v)
    found = execute(plan, [x])[0]
    np.testing.assert_allclose(found, wanted.transpose(0, 2, 1, 3), 1e-5, 1e-5)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(FLOAT16, (4, 16, 2048, 64)), (BFLOAT16, (4, 16, 2048, 128)), (FLOAT16, (B, 12, S, 64))],
    ids=str,
)
def test_narrow_factors_use_the_tensor_cores(dtype: DType, shape: tuple[Any, ...]) -> None:
    (kernel,) = kernels(lowered(graph_of(Attention(0.125, causal=True), [TensorType(dtype, shape)] * 3)))
    binary = compiled(kernel, 90)
    used = resources(binary)
    assert problems(kernel, binary, used, 90) == []
    assert "HGMMA" in used.matrix_instructions
    assert used.load_bits == 128


def test_exact_factors_do_not_spill() -> None:
    kinds = [TensorType(FLOAT32, (B, 12, S, 64))] * 3 + [TensorType(BOOL, (B, 1, 1, S))]
    (kernel,) = kernels(lowered(graph_of(Attention(0.125), kinds)))
    binary = compiled(kernel, 90)
    assert problems(kernel, binary, resources(binary), 90) == []
