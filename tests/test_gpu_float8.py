"""float8 on the GPU: conversions bit for bit, and products of what QuantizeLinear made of both factors."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("triton")

from gpu_engine.frontend.importer import import_model
from gpu_engine.frontend.reader import SpecificationFunctions, read
from gpu_engine.gpu.interpret import InterpretDevice
from gpu_engine.gpu.options import GpuOptions
from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import FLOAT16, FLOAT32, DType, from_onnx
from gpu_engine.ir.graph import Graph
from gpu_engine.ir.ops import Map
from gpu_engine.passes.batchability import prove
from gpu_engine.passes.pipeline import optimize
from gpu_engine.plan.plan import Plan
from tests.gpu_runner import Array, array_steps, execute, kernels, run_op

RNG = np.random.default_rng()
E4M3, E5M2 = TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2
KINDS = pytest.mark.parametrize("kind", [E4M3, E5M2])
SCALE = np.float32(0.0625)


def assert_same(got: Array, wanted: Array) -> None:
    """The same numbers, zeros by their sign; any NaN for NaN."""
    found, expected = got.astype(np.float32), wanted.astype(np.float32)
    np.testing.assert_array_equal(found, expected)
    there = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(found)[there], np.signbit(expected)[there])


@KINDS
def test_conversions(kind: int) -> None:
    """All float8 numbers, what lies between them and next to that, float32 of any bits, and the ends."""
    dtype = from_onnx(kind)
    numbers = np.arange(256, dtype=np.uint8).view(dtype)
    (wide,) = run_op(Map(expr.cast(expr.arg(0, dtype), FLOAT32)), [numbers])
    assert_same(wide, numbers)
    ordered = np.sort(wide[np.isfinite(wide)])
    middles = (ordered[:-1] + ordered[1:]) / 2
    bits = RNG.integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    ends = np.array([np.inf, -np.inf, np.nan, 464, 465, 480, 61440, 61441, 65536, 1e38], np.float32)
    x = np.concatenate(
        [wide, middles, np.nextafter(middles, np.inf), np.nextafter(middles, -np.inf), bits, ends, -ends]
    )
    for saturate in (False, True):
        op = Map(expr.cast(expr.arg(0, FLOAT32), dtype, saturate=saturate))
        assert_same(run_op(op, [x])[0], op.evaluate(np, x)[0])


def float8(kind: int, name: str, *shape: int) -> tuple[Any, Array]:
    numbers = RNG.normal(size=shape).astype(from_onnx(kind))
    return helper.make_tensor(name, kind, shape, numbers.tobytes(), raw=True), numbers.astype(np.float64)


def qdq(x: str, y: str, kind: int) -> list[Any]:
    """y is x quantised and dequantised: the zero point says the type."""
    return [
        helper.make_node("QuantizeLinear", [x, "xs", f"z{kind}"], [f"q_{y}"]),
        helper.make_node("DequantizeLinear", [f"q_{y}", "xs", f"z{kind}"], [y]),
    ]  # fmt: skip


def model_of(nodes: list[Any], held: list[Any], shapes: dict[str, Any], dtype: DType) -> onnx.ModelProto:
    number = TensorProto.FLOAT16 if dtype == FLOAT16 else TensorProto.FLOAT
    ports = [helper.make_tensor_value_info(name, number, shape) for name, shape in (*shapes.items(), ("y", None))]
    zeros = [helper.make_tensor(f"z{kind}", kind, [], b"\0", raw=True) for kind in (E4M3, E5M2)]
    scale = numpy_helper.from_array(SCALE.astype(dtype), "xs")
    graph = helper.make_graph(nodes, "test", ports[:-1], ports[-1:], [*held, *zeros, scale])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def optimized(model: onnx.ModelProto) -> Graph:
    return optimize(import_model(read(model), SpecificationFunctions()))


def planned(model: onnx.ModelProto, arch: int = 90) -> Plan:
    graph = optimized(model)
    plan = InterpretDevice(options=GpuOptions(arch=arch)).lower(graph, prove(graph))
    assert not array_steps(plan)
    return plan


def names(plan: Plan) -> list[str]:
    return [kernel.name for kernel in kernels(plan)]


def rounded(x: Array, kind: int) -> Array:
    """What QuantizeLinear and DequantizeLinear leave of x, in float64."""
    return np.asarray(expr.convert(x / SCALE, from_onnx(kind), saturate=True), np.float64) * SCALE


def close(got: Array, wanted: Array, depth: int) -> None:
    error = np.abs(got.astype(np.float64) - wanted) / (np.sqrt(depth) + np.abs(wanted))
    assert error.max() < (2e-6 if got.dtype == np.float32 else 1e-3)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16], ids=str)
@pytest.mark.parametrize("arch", [80, 90])
@KINDS
def test_layers_of_float8(kind: int, arch: int, dtype: DType) -> None:
    """Two layers: between them only bytes are written, and what is not finite is clipped as ONNX has it."""
    (w, numbers), (v, others) = float8(kind, "w", 40, 24), float8(E4M3, "v", 24, 19)
    scales = RNG.uniform(0.5, 2, 24).astype(dtype)
    held = [
        w, v, numpy_helper.from_array(scales, "ws"), numpy_helper.from_array(np.asarray(0.5, dtype), "vs"),
        numpy_helper.from_array(np.ones(24, dtype), "b"),
    ]  # fmt: skip
    nodes = [
        *qdq("x", "dx", kind), helper.make_node("DequantizeLinear", ["w", "ws"], ["dw"], axis=1),
        helper.make_node("Gemm", ["dx", "dw", "b"], ["p"]), helper.make_node("Relu", ["p"], ["r"]),
        *qdq("r", "dr", kind), helper.make_node("DequantizeLinear", ["v", "vs"], ["dv"]),
        helper.make_node("MatMul", ["dr", "dv"], ["y"]),
    ]  # fmt: skip
    plan = planned(model_of(nodes, held, {"x": ["rows", 40]}, dtype), arch)
    assert list(dict.fromkeys(names(plan))) == ["map", f"gemm_float8{'' if arch >= 89 else '_half'}"]
    x = RNG.normal(size=(5, 40)).astype(dtype)
    x[0, 0], x[1, 0] = np.inf, 1e4
    hidden = np.maximum(rounded(x.astype(np.float32), kind) @ (numbers * scales.astype(np.float64)) + 1, 0)
    (got,) = execute(plan, [x])
    wanted = rounded(hidden.astype(np.float32), kind) @ (others * 0.5)
    if dtype == FLOAT32:
        close(got, wanted, 1000)
    assert (np.abs(got - wanted) <= 0.05 * (hidden @ np.abs(others)) + 0.05).all()  # float16 may round the other way


def test_not_a_number_stays_one() -> None:
    w, _ = float8(E4M3, "w", 40, 24)
    nodes = [
        *qdq("x", "dx", E4M3), helper.make_node("DequantizeLinear", ["w", "xs"], ["dw"]),
        helper.make_node("MatMul", ["dx", "dw"], ["y"]),
    ]  # fmt: skip
    x = RNG.normal(size=(5, 40)).astype(np.float32)
    x[2, 39] = np.nan
    (got,) = execute(planned(model_of(nodes, [w], {"x": [5, 40]}, FLOAT32)), [x])
    assert np.isnan(got[2]).all() and np.isfinite(np.delete(got, 2, 0)).all()


@pytest.mark.parametrize("arch", [80, 90])
def test_convolutions_of_float8(arch: int) -> None:
    """What is dequantised for others as well is computed once, and dequantised for these."""
    w, numbers = float8(E4M3, "w", 24, 8, 3, 3)
    scales = RNG.uniform(0.5, 2, 24).astype(np.float32)
    nodes = [
        *qdq("x", "dx", E4M3), helper.make_node("DequantizeLinear", ["w", "ws"], ["dw"], axis=0),
        helper.make_node("Conv", ["dx", "dw"], ["c"], pads=[1, 1, 1, 1]), helper.make_node("ReduceMax", ["dx"], ["m"]),
        helper.make_node("Add", ["c", "m"], ["y"]),
    ]  # fmt: skip
    held = [w, numpy_helper.from_array(scales, "ws")]
    plan = planned(model_of(nodes, held, {"x": [2, 8, 5, 6]}, FLOAT32), arch)
    assert any(name.startswith("conv_float8") for name in names(plan))
    x = RNG.normal(size=(2, 8, 5, 6)).astype(np.float32)
    grid = rounded(x, E4M3)
    padded = np.pad(grid, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    wanted = np.einsum("nchwij,mcij->nmhw", windows, numbers * scales[:, None, None, None]) + grid.max()
    close(execute(plan, [x])[0], wanted, 72)


def test_two_quantised_activations() -> None:
    """Nothing is constant, the types differ, b is transposed."""
    nodes = [
        *qdq("a", "da", E5M2), *qdq("b", "db", E4M3), helper.make_node("Transpose", ["db"], ["bt"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["da", "bt"], ["y"]),
    ]  # fmt: skip
    plan = planned(model_of(nodes, [], {"a": [2, 5, 33], "b": [2, 18, 33]}, FLOAT32))
    assert names(plan) == ["map", "map", "gemm_float8"]
    a, b = RNG.normal(size=(2, 5, 33)).astype(np.float32), RNG.normal(size=(2, 18, 33)).astype(np.float32)
    close(execute(plan, [a, b])[0], rounded(a, E5M2) @ rounded(b, E4M3).swapaxes(1, 2), 33)
