"""Products on the GPU whose weights stay narrow in memory: every form beside the reference, and the machine code."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("triton")

import gpu_engine
from cpu_fallback.device import CpuDevice
from gpu_engine.frontend.importer import import_model
from gpu_engine.frontend.reader import SpecificationFunctions, read
from gpu_engine.gpu.interpret import InterpretDevice
from gpu_engine.gpu.offline import compiled, problems, resources
from gpu_engine.gpu.options import GpuOptions
from gpu_engine.gpu.planning import gpu_plan
from gpu_engine.ir import dims
from gpu_engine.ir.dtypes import BFLOAT16, FLOAT16, FLOAT32, INT8, INT32, UINT8, DType, from_onnx, is_float, limits
from gpu_engine.ir.graph import Builder, Graph, Value
from gpu_engine.ir.ops import Dequantize, MatMul
from gpu_engine.passes import narrow_weights
from gpu_engine.passes.batchability import prove
from gpu_engine.passes.pipeline import optimize
from gpu_engine.plan.lower import NOT_BATCHED
from gpu_engine.plan.plan import Plan
from tests.gpu_runner import Array, array_steps, execute, kernels
from tests.reference import graph_of, pointwise

RNG = np.random.default_rng()
INT4, UINT4, UINT2, E4M3, E5M2 = map(from_onnx, (22, 21, 25, 17, 19))
TOLERANCE = {FLOAT32: 2e-6, FLOAT16: 2e-3, BFLOAT16: 1.6e-2}


def codes_of(dtype: DType, *shape: int) -> Array:
    if is_float(dtype):
        return RNG.normal(size=shape).astype(dtype)
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
    assert error.max(initial=0) < given.get("tolerance", TOLERANCE[op.dtype])
    return plan


CASES = (
    (FLOAT32, INT8, True), (FLOAT32, UINT8, False), (FLOAT32, INT4, True), (FLOAT32, UINT4, False),
    (FLOAT32, UINT2, True), (FLOAT32, E4M3, False), (FLOAT16, INT8, False), (FLOAT16, UINT4, True),
    (FLOAT16, E5M2, False), (BFLOAT16, UINT8, True), (BFLOAT16, INT4, True), (BFLOAT16, E4M3, False),
)  # fmt: skip


@pytest.mark.parametrize(("dtype", "codes", "zeros"), CASES, ids=str)
def test_every_type(dtype: DType, codes: DType, zeros: bool) -> None:
    """A scale for all, for a column, and for blocks along k; weights as they lie and transposed; few rows and more."""
    k, n = 70, 19
    for op, shape in (
        (Dequantize(dtype), ()), (Dequantize(dtype), (n,)), (Dequantize(dtype, 0, 32), (3, n)),
    ):  # fmt: skip
        held = [codes_of(codes, k, n), *parts(codes, dtype, shape, zeros)]
        agree(op, held, (5,) if shape else (2, 2))
        if op.block:
            turned = [np.ascontiguousarray(array.T) for array in held]
            agree(Dequantize(dtype, 1, 32), turned, (3,), transpose_b=True)


def test_zero_points_that_are_numbers() -> None:
    """As MatMulNBits has them: a float for every block."""
    for dtype, kind in ((FLOAT32, FLOAT32), (FLOAT16, FLOAT16), (FLOAT16, FLOAT32)):
        held = [codes_of(UINT4, 21, 70), *parts(UINT4, dtype, (21, 3), False)]
        held.append(RNG.uniform(0, 15, (21, 3)).astype(kind))
        agree(Dequantize(dtype, 1, 32), held, (6,), transpose_b=True)


def test_blocks_along_columns_and_odd_blocks() -> None:
    held = [codes_of(INT4, 64, 40), *parts(INT4, FLOAT32, (64, 3), True)]
    with pytest.raises(AssertionError):
        lowered(narrow_graph(Dequantize(FLOAT32, 1, 16), held, (3,)))  # a scale for every row and some columns
    held = [codes_of(INT8, 1, 40), *parts(INT8, FLOAT32, (1, 3), True)]
    agree(Dequantize(FLOAT32, 1, 16), held, (3,))
    held = [codes_of(UINT4, 200, 9), *parts(UINT4, FLOAT16, (3, 9), True)]
    agree(Dequantize(FLOAT16, 0, 96), held, (3,))


def test_a_symbolic_number_of_rows_is_one_plan() -> None:
    held = [codes_of(UINT4, 160, 33), *parts(UINT4, FLOAT32, (5, 33), True)]
    op, rows = Dequantize(FLOAT32, 0, 32), dims.symbol("rows")
    plan = lowered(narrow_graph(op, held, (rows, 2)))
    assert len({kernel.name for kernel in kernels(plan)}) > 2
    for count in (0, 1, 2, 3, 20):
        agree(op, held, (count, 2), plan=plan)


def test_parts_of_k() -> None:
    held = [codes_of(UINT4, 2080, 20), *parts(UINT4, FLOAT32, (65, 20), True)]
    for rows in (1, 3, 9):
        plan = agree(Dequantize(FLOAT32, 0, 32), held, (rows,))
        assert any("tl.atomic_add" in kernel.text for kernel in kernels(plan))


@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16"])
def test_precision_of_factors(precision: str) -> None:
    held = [codes_of(INT4, 70, 20), *parts(INT4, FLOAT32, (20,), False)]
    op = Dequantize(FLOAT32)
    plan = lowered(narrow_graph(op, held, (7,)), precision)
    agree(op, held, (7,), plan=plan, tolerance={"tf32": 2e-3, "fp16": 2e-3, "bf16": 1e-2}[precision])


def test_what_is_not_finite() -> None:
    """A row with NaN or infinity is lost, others are not: codes that fill up a step are multiplied by nothing."""
    for dtype, rows in ((FLOAT16, 20), (FLOAT32, 3)):
        codes = codes_of(UINT4, 70, 19)
        codes[5] = 15
        held = [codes, *parts(UINT4, dtype, (19,), False)]
        x = RNG.normal(size=(rows, 70)).astype(dtype)
        x[0, 69], x[1, 5] = np.nan, np.inf
        (got,) = execute(lowered(narrow_graph(Dequantize(dtype), held, (rows,))), [x])
        assert np.isnan(got[0]).all() and np.isinf(got[1]).all() and np.isfinite(got[2:]).all()


def model_of(nodes: list[Any], initializers: list[Any], dtype: int, depth: int) -> onnx.ModelProto:
    ports = [helper.make_tensor_value_info(name, dtype, shape) for name, shape in (("x", ["rows", depth]), ("y", None))]
    graph = helper.make_graph(nodes, "test", ports[:1], ports[1:], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def optimized(model: onnx.ModelProto) -> Graph:
    return optimize(import_model(read(model), SpecificationFunctions()))


def blocked_weights(k: int, n: int, block: int) -> tuple[list[Any], list[Any]]:
    """DequantizeLinear of int4 [n, k] in blocks, transposed before it is multiplied."""
    codes = codes_of(INT4, n, k).astype(np.int64)
    held = [
        helper.make_tensor("w", TensorProto.INT4, (n, k), codes.ravel()),
        numpy_helper.from_array(RNG.uniform(0.01, 0.1, (n, k // block)).astype(np.float32), "s"),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=1, block_size=block),
        helper.make_node("Transpose", ["d"], ["t"], perm=[1, 0]), helper.make_node("MatMul", ["x", "t"], ["p"]),
        helper.make_node("Relu", ["p"], ["y"]),
    ]  # fmt: skip
    return nodes, held


def test_models_keep_their_weights_narrow() -> None:
    """On the GPU alone: the CPU device computes with numbers, as ever."""
    k, n, block = 512, 256, 32
    model = model_of(*blocked_weights(k, n, block), TensorProto.FLOAT, k)
    graph = optimized(model)
    assert [type(node.op) for node in graph.nodes] == [Dequantize, MatMul]
    plan = InterpretDevice().lower(graph, prove(graph))
    assert plan.program.weights_nbytes == k * n // 2 + k // block * n * 4
    x = RNG.normal(size=(3, k)).astype(np.float32)
    with gpu_engine.compile(model, device="cpu") as engine:
        np.testing.assert_allclose(execute(plan, [x])[0], engine.run(x), rtol=1e-5, atol=1e-4)
    cpu = CpuDevice().lower(graph, prove(graph))
    assert all(type(step.kernel).__name__ == "Native" for step in cpu.steps)


def test_small_weights_and_those_of_others_become_numbers() -> None:
    nodes, held = blocked_weights(64, 32, 16)
    assert [type(node.op) for node in optimized(model_of(nodes, held, TensorProto.FLOAT, 64)).nodes] == [MatMul]
    nodes, held = blocked_weights(512, 256, 32)
    nodes[-1] = helper.make_node("Add", ["p", "r"], ["y"])
    nodes.insert(1, helper.make_node("ReduceMax", ["d"], ["r"], keepdims=0))
    assert [type(node.op) for node in optimized(model_of(nodes, held, TensorProto.FLOAT, 512)).nodes] == [MatMul]


def test_quantised_activations_still_multiply_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """QDQ of bytes on both sides; and where activations are floats, the same weights stay bytes."""
    monkeypatch.setattr(narrow_weights, "LEAST", 1)
    weights = numpy_helper.from_array(codes_of(INT8, 32, 24), "w")
    held = [weights, *(numpy_helper.from_array(np.float32(v), n) for n, v in (("s", 0.1), ("xs", 0.05)))]
    product = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"]), helper.make_node("MatMul", ["dx", "d"], ["y"]),
    ]  # fmt: skip
    quantised = [
        helper.make_node("QuantizeLinear", ["x", "xs"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "xs"], ["dx"]),
    ]  # fmt: skip
    both = optimized(model_of(quantised + product, held, TensorProto.FLOAT, 32))
    assert [getattr(node.op, "accumulate", None) for node in both.nodes if isinstance(node.op, MatMul)] == [INT32]
    assert not any(isinstance(node.op, Dequantize) for node in both.nodes)
    plain = [helper.make_node("Relu", ["x"], ["dx"]), *product]
    one = optimized(model_of(plain, held, TensorProto.FLOAT, 32))
    assert [node.inputs[0].dtype for node in one.nodes if isinstance(node.op, Dequantize)] == [INT8]


MACHINE_CODE: tuple[tuple[DType, DType, int, int, int, str], ...] = (
    (FLOAT16, UINT4, 32, 1, 90, "HMMA"), (FLOAT16, INT8, 0, 512, 90, "HGMMA"), (FLOAT32, UINT4, 32, 1, 90, "FFMA"),
)  # fmt: skip


@pytest.mark.parametrize(("dtype", "codes", "block", "rows", "arch", "instruction"), MACHINE_CODE)
def test_machine_code(dtype: DType, codes: DType, block: int, rows: int, arch: int, instruction: str) -> None:
    """Weights of [4096, 4096] are loaded 16 bytes at a time, nothing spills, matrix instructions multiply."""
    k = n = 4096
    shape = (n, k // block) if block else (n, 1)
    held = [np.zeros((n, k), codes), np.ones(shape, dtype)]
    graph = narrow_graph(Dequantize(dtype, 1, block), held, (rows,), transpose_b=True)
    plan = gpu_plan(graph, NOT_BATCHED, GpuOptions(arch=arch))
    kernel = next(kernel for kernel in kernels(plan) if kernel.name.startswith("narrow"))
    binary = compiled(kernel, arch)
    used = resources(binary)
    assert not problems(kernel, binary, used, arch)
    assert used.count(instruction)
    assert any(name.startswith(("LDGSTS", "LDG")) and name.endswith("128") for name in used.instructions)
