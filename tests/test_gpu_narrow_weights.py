"""Products on the GPU whose weights stay narrow in memory: every form beside the reference, and the machine code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from gpu_engine.gpu.interpret import InterpretDevice
from gpu_engine.gpu.options import GpuOptions
from gpu_engine.ir.dtypes import BFLOAT16, FLOAT16, FLOAT32, INT8, UINT8, DType, from_onnx, limits
from gpu_engine.ir.graph import Builder, Graph, Value
from gpu_engine.ir.ops import Dequantize, MatMul
from gpu_engine.plan.lower import NOT_BATCHED
from gpu_engine.plan.plan import Plan
from tests.gpu_runner import Array, array_steps, execute, kernels
from tests.reference import graph_of, pointwise

RNG = np.random.default_rng()
INT4, UINT4, UINT2 = from_onnx(22), from_onnx(21), from_onnx(25)
TOLERANCE = {FLOAT32: 2e-6, FLOAT16: 2e-3, BFLOAT16: 1.6e-2}


def codes_of(dtype: DType, *shape: int) -> Array:
    low, high = limits(dtype)
    return RNG.integers(int(low), int(high) + 1, shape).astype(dtype)


def parts(codes: DType, dtype: DType, shape: tuple[int, ...], zeros: bool) -> list[Array]:
    scale = [RNG.uniform(0.5, 2, shape).astype(dtype)]
    return scale + [codes_of(codes, *shape)] * zeros


def narrow_graph(op: Dequantize, held: list[Array], rows: Any, *, transpose_b: bool = False) -> Graph:
    """max([..., rows, k] times weights, 0) + 1."""
    depth = held[0].shape[1 if transpose_b else 0]

    def build(b: Builder, x: Value) -> Value:
        weights = b.emit(op, *map(b.constant, held))
        return pointwise(b, lambda e: e * 0.5 + 1.0, b.emit(MatMul(transpose_b=transpose_b), x, weights))

    return graph_of({"x": (op.dtype, (*rows, depth))}, build)


def lowered(graph: Graph, precision: str = "fp32") -> Plan:
    plan = InterpretDevice(options=GpuOptions(precision)).lower(graph, NOT_BATCHED)
    assert not array_steps(plan)
    assert any(kernel.name.startswith("narrow") for kernel in kernels(plan))
    return plan


def agree(op: Dequantize, held: list[Array], rows: tuple[int, ...], *, transpose_b: bool = False, **given: Any) -> Plan:
    plan = given.get("plan") or lowered(narrow_graph(op, held, rows, transpose_b=transpose_b))
    (weights,) = op.evaluate(np, *held)
    weights = (weights.T if transpose_b else weights).astype(np.float64)
    x = RNG.normal(size=(*rows, len(weights))).astype(op.dtype)
    product = x.astype(np.float64) @ weights
    (got,) = execute(plan, [x], seed=sum(rows))
    scale = np.sqrt((x.astype(np.float64) ** 2) @ weights**2) + 1
    error = np.abs(got.astype(np.float64) - (product * 0.5 + 1)) / scale
    assert error.max() < given.get("tolerance", TOLERANCE[op.dtype])
    return plan


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("codes", [INT8, UINT8, INT4, UINT4, UINT2], ids=str)
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
def test_every_type(dtype: DType, codes: DType, zeros: bool) -> None:
    """A scale for all, for a column, and for blocks along k; the weights as they lie and transposed."""
    k, n = 70, 19
    for op, shape in (
        (Dequantize(dtype), ()), (Dequantize(dtype), (n,)), (Dequantize(dtype, 0, 32), (3, n)),
    ):  # fmt: skip
        held = [codes_of(codes, k, n), *parts(codes, dtype, shape, zeros)]
        agree(op, held, (5,))
        if op.block:
            turned = [np.ascontiguousarray(array.T) for array in held]
            agree(Dequantize(dtype, 1, 32), turned, (2, 9), transpose_b=True)
