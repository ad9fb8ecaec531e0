"""Convolutions, pools, products and attention of the CPU device against their references."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import FLOAT16, FLOAT32, FLOAT64, INT8, INT32, UINT8, DType
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.ops import Attention, Conv, ConvTranspose, MatMul, Pool
from tests.cpu_execution import check_op

Array = NDArray[Any]
N, H, W = (dims.symbol(name) for name in "NHW")
BIASED = expr.maximum(expr.arg(0, FLOAT32) + expr.arg(1, FLOAT32), 0.0)


def normal(*shape: int, dtype: DType = FLOAT32) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


def conv(
    x: Array, w: Array, strides: Any = 1, pads: Any = (0, 0), dilations: Any = 1, group: int = 1,
    epilogue: Expr | None = None, extras: tuple[Array, ...] = (), symbolic: bool = False,
) -> None:  # fmt: skip
    rank = x.ndim - 2
    before, after = ((side,) * rank if isinstance(side, int) else tuple(side) for side in pads)
    steps = ((value,) * rank if isinstance(value, int) else tuple(value) for value in (strides, dilations))
    spread, apart = steps
    op = Conv(spread, before, after, apart, group, epilogue)
    shapes = None
    if symbolic:
        shapes = ((N, x.shape[1], H, W), w.shape, *(extra.shape for extra in extras))
    check_op(op, [x, w, *extras], 3e-5, shapes, native=False)


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
def test_convolutions_over_images(symbolic: bool) -> None:
    x = normal(2, 4, 9, 8)
    conv(x, normal(6, 4, 1, 1), symbolic=symbolic)
    conv(x, normal(6, 4, 3, 3), 1, (1, 1), symbolic=symbolic)
    conv(x, normal(6, 4, 3, 2), (2, 1), ((0, 2), (1, 1)), (2, 1), symbolic=symbolic)
    conv(x, normal(6, 4, 1, 1), 2, symbolic=symbolic)
    conv(x, normal(6, 2, 3, 3), 1, (1, 1), group=2, symbolic=symbolic)
    conv(x, normal(8, 1, 3, 3), 2, ((1, 0), (0, 1)), group=4, symbolic=symbolic)
    conv(x, normal(6, 4, 3, 3), 1, (1, 1), epilogue=BIASED, extras=(normal(6, 1, 1),), symbolic=symbolic)
    conv(x, normal(6, 4, 1, 1), epilogue=BIASED, extras=(normal(6, 1, 1),), symbolic=symbolic)


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
def test_depthwise_convolutions(symbolic: bool) -> None:
    x = normal(2, 4, 9, 18)
    conv(x, normal(4, 1, 3, 3), 1, (1, 1), group=4, symbolic=symbolic)
    conv(x, normal(4, 1, 3, 3), 2, ((1, 0), (0, 1)), group=4, symbolic=symbolic)
    conv(x, normal(4, 1, 5, 5), 1, (2, 2), 1, 4, BIASED, (normal(4, 1, 1),), symbolic)
    conv(x, normal(4, 1, 2, 3), 1, (0, 0), (3, 2), 4, symbolic=symbolic)


def test_convolutions_of_other_ranks_and_edges() -> None:
    conv(normal(2, 4, 50), normal(6, 4, 3))
    conv(normal(2, 4, 50), normal(4, 1, 3), 2, (1, 1), 3, 4)
    conv(normal(1, 2, 5, 6, 7), normal(3, 2, 2, 3, 2), (1, 2, 1), ((1, 0, 1), (0, 1, 1)))
    conv(normal(2, 4, 9, 8), normal(6, 4, 3, 3), 1, ((-1, 1), (1, -2)))
    conv(normal(2, 4, 9, 8), normal(4, 1, 3, 3), 1, ((-1, 1), (1, -2)), 1, 4)
    conv(normal(0, 4, 9, 8), normal(6, 4, 3, 3))
    conv(normal(2, 4, 2, 2), normal(6, 4, 3, 3))
    conv(normal(1, 32, 120, 90), normal(4, 32, 3, 3), 1, (1, 1))
    for dtype, tolerance in ((FLOAT64, 1e-12), (FLOAT16, 1e-2)):
        operands = [normal(1, 3, 6, 6, dtype=dtype), normal(2, 3, 3, 3, dtype=dtype)]
        check_op(Conv((1, 1), (1, 1), (1, 1), (1, 1)), operands, tolerance, native=False)
    narrowing = expr.cast(expr.arg(0, FLOAT32) * 9, INT8)
    conv(normal(1, 3, 6, 6), normal(2, 3, 3, 3), epilogue=narrowing)


def test_transposed_convolutions() -> None:
    for kernel, stride, dilation, pad in itertools.product((1, 2, 3), (1, 2), (1, 2), (0, 1)):
        for group, channels, maps in ((1, 3, 4), (2, 4, 3)):
            op = ConvTranspose((stride,) * 2, (pad,) * 2, (pad, 0), (dilation,) * 2, (0, stride - 1), group)
            operands = [normal(2, channels, 5, 4), normal(channels, maps, kernel, kernel)]
            if (5 - 1) * stride + (kernel - 1) * dilation + 1 > 2 * pad:
                check_op(op, operands, 3e-5, native=False)
    op = ConvTranspose((2, 2), (0, 0), (0, 0), (1, 1), (0, 0), 1, BIASED)
    check_op(op, [normal(2, 3, 5, 4), normal(3, 4, 2, 2), normal(4, 1, 1)], 3e-5, native=False)
    check_op(
        op,
        [normal(2, 3, 5, 4), normal(3, 4, 2, 2), normal(4, 1, 1)],
        3e-5,
        ((N, 3, H, W), (3, 4, 2, 2), (4, 1, 1)),
        False,
    )


POOLS = [
    Pool("max", (3, 3), (2, 2), (1, 1), (1, 1), (1, 1)),
    Pool("max", (3, 3), (2, 2), (0, 0), (0, 0), (1, 1), True),
    Pool("max", (2, 2), (1, 2), (0, 0), (0, 0), (2, 1)),
    Pool("average", (3, 3), (1, 1), (1, 1), (1, 1), (1, 1)),
    Pool("average", (3, 3), (2, 2), (1, 1), (1, 0), (1, 1), True),
    Pool("average", (3, 3), (2, 2), (1, 1), (1, 0), (1, 1), True, True),
    Pool("average", (2, 2), (2, 2), (0, 0), (0, 0), (1, 1)),
    Pool("sum", (3, 3), (2, 2), (1, 1), (1, 0), (1, 1)),
    Pool("average", (9, 9), (2, 2), (1, 1), (1, 0), (1, 1)),
]


@pytest.mark.parametrize("index", range(len(POOLS)))
def test_pools(index: int) -> None:
    op = POOLS[index]
    x = normal(2, 3, 10, 11)
    check_op(op, [x], 1e-5, native=False)
    check_op(op, [x], 1e-5, ((N, 3, H, W),), native=False)
    check_op(op, [x.astype(FLOAT16)], 1e-2, native=False)
    if op.kind == "max":
        x[0, 0, 2, 2] = np.nan
        check_op(op, [x], native=False)
        check_op(op, [(x[1:] * 50).astype(INT8)], native=False)
        check_op(op, [np.abs(x[1:] * 50).astype(UINT8)], native=False)


def test_matrix_products() -> None:
    for a_turned, b_turned in itertools.product((False, True), repeat=2):
        a, b = normal(5, 7), normal(7, 4)
        a, b = np.ascontiguousarray(a.T if a_turned else a), np.ascontiguousarray(b.T if b_turned else b)
        check_op(MatMul(a_turned, b_turned), [a, b], 1e-5, native=False)
        check_op(MatMul(a_turned, b_turned, BIASED), [a, b, normal(4)], 1e-5, native=False)
    k = dims.symbol("k")
    check_op(MatMul(), [normal(2, 3, 5, 7), normal(7, 4)], 1e-5, ((N, 3, H, 7), (7, 4)), False)
    check_op(MatMul(), [normal(2, 3, 5, 7), normal(2, 3, 7, 4)], 1e-5, ((N, 3, H, k), (N, 3, k, W)), False)
    check_op(MatMul(), [normal(2, 1, 5, 7), normal(3, 7, 4)], 1e-5, native=False)
    check_op(MatMul(), [normal(5, 0), normal(0, 4)], 0, native=False)
    check_op(MatMul(), [normal(0, 5), normal(5, 4)], 0, native=False)
    check_op(MatMul(), [normal(5, 7, dtype=FLOAT16), normal(7, 4, dtype=FLOAT16)], 1e-2, native=False)
    narrowing = expr.cast(expr.arg(0, FLOAT32) * expr.arg(1, FLOAT32), INT8)
    check_op(MatMul(epilogue=narrowing), [normal(5, 7), normal(7, 4), normal(4)], native=False)


def test_integer_products_are_exact() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 256, (5, 1700), np.uint8), generator.integers(-128, 128, (1700, 4), np.int8)
    check_op(MatMul(accumulate=INT32), [a, b], native=False)
    a64, b64 = (generator.integers(-(2**31), 2**31, shape) for shape in ((5, 17), (17, 3)))
    check_op(MatMul(), [a64, b64], native=False)


@pytest.mark.parametrize("dtype", (FLOAT32, FLOAT64), ids=str)
def test_attention(dtype: DType) -> None:
    q, k, v = normal(2, 3, 5, 8, dtype=dtype), normal(2, 3, 7, 8, dtype=dtype), normal(2, 3, 7, 4, dtype=dtype)
    generator = np.random.default_rng(0)
    masks: list[list[Array]] = [
        [], [normal(1, 1, 1, 7, dtype=dtype)], [generator.random((2, 1, 5, 7)) < 0.6], [normal(5, 7, dtype=dtype)],
        [np.zeros((2, 3, 5, 7), bool)],
    ]  # fmt: skip
    for mask, causal, zero_nan in itertools.product(masks, (False, True), (False, True)):
        check_op(Attention(0.3, causal, zero_nan=zero_nan), [q, k, v, *mask], 1e-5, native=False)
    check_op(Attention(0.3, True, -1e4), [q[0, 0], k[0, 0], v[0, 0]], 1e-5, native=False)
    check_op(Attention(0.3), [q, k, v], 1e-5, ((N, 3, H, 8), (N, 3, W, 8), (N, 3, W, 4)), False)
    check_op(Attention(0.1), [normal(2, 6, 16), normal(2, 0, 16), normal(2, 0, 8)], 0, native=False)


def test_attention_in_several_blocks() -> None:
    check_op(Attention(0.1), [normal(1, 2, 600, 16), normal(1, 2, 1000, 16), normal(1, 2, 1000, 8)], 1e-5, native=False)
    check_op(
        Attention(0.1, True),
        [normal(2, 600, 16), normal(1000, 16), normal(2, 1000, 8), normal(1, 1000)],
        1e-5,
        native=False,
    )
