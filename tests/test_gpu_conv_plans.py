"""Networks of convolutions as GPU plans: no stray transposes, one launch a layer; the machine code of kernels."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("triton")


from gpu_engine.gpu.launches import Launch
from gpu_engine.gpu.layouts import assign_layouts
from gpu_engine.gpu.offline import compiled, problems, resources
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import FLOAT16, FLOAT32, INT8, INT32, is_float
from gpu_engine.ir.graph import Builder, TensorType, Value
from gpu_engine.ir.ops import Conv, MatMul, Pool, Reduce, Reshape, Transpose
from gpu_engine.ir.ops.channels_last import LastConv, LastPool
from tests.gpu_runner import execute, kernels, lowered
from tests.reference import graph_of as network
from tests.reference import run_graph
from tests.test_gpu_conv import CASES, assert_near, conv, data, plan_of


def residual_network(b: Builder, x: Value) -> Value:
    """A stem, two blocks of which one changes the shape, a head."""

    def layer(x: Value, m: int, kernel: int = 3, stride: int = 1, group: int = 1, before: Value | None = None) -> Value:
        assert isinstance(x.shape[1], int)
        w = b.constant(data(m + kernel, FLOAT32, m, x.shape[1] // group, kernel, kernel) / np.float32(9))
        bias = b.constant(data(m, FLOAT32, m, 1, 1))
        root = expr.arg(0, FLOAT32) + expr.arg(1, FLOAT32)
        root = root if before is None else root + expr.arg(2, FLOAT32)
        root = expr.maximum(root, 0.0)
        pads = (kernel // 2,) * 2
        extras = () if before is None else (before,)
        return b.emit(Conv((stride,) * 2, pads, pads, (1, 1), group, root), x, w, bias, *extras)

    x = b.emit(Pool("max", (3, 3), (2, 2), (1, 1), (1, 1), (1, 1)), layer(x, 8, 7, 2))
    x = layer(layer(x, 8), 8, before=x)
    x = layer(layer(layer(x, 12, 1), 12, 3, 2, 12), 16, 1, before=layer(x, 16, 1, 2))
    x = b.emit(Reduce("mean", (2, 3), True), x)
    return b.emit(MatMul(), b.emit(Reshape((x.shape[0], 16)), x), b.constant(data(3, FLOAT32, 16, 5)))


def test_a_residual_network_has_no_transposes() -> None:
    graph = network({"x": (dims.symbol("N"), 3, dims.symbol("H"), dims.symbol("W"))}, residual_network)
    kinds = [type(node.op) for node in assign_layouts(graph).nodes]
    assert kinds.count(LastConv) == 7 and kinds.count(LastPool) == 1 and Transpose not in kinds
    x = data(9, FLOAT32, 2, 3, 20, 17)
    plan = lowered(graph)
    launched = [step for step in plan.steps if isinstance(step.kernel, Launch)]
    assert len({step.source for step in launched}) <= 10
    (found,) = execute(plan, [x])
    assert_near(found, run_graph(graph, {"x": x})["y"])


def test_what_stays_channels_first() -> None:
    """A convolution between a transposed output and a pool of an input leaves two transposes at most."""

    def build(b: Builder, x: Value) -> Value:
        x = b.emit(Pool("max", (2, 2), (2, 2), (0, 0), (0, 0), (1, 1)), x)
        w = b.constant(data(1, FLOAT32, 6, 5, 3, 3))
        return b.emit(Conv((1, 1), (1, 1), (1, 1), (1, 1)), x, w)

    graph = network({"x": (2, 5, 8, 6)}, build)
    kinds = [type(node.op) for node in assign_layouts(graph).nodes]
    assert kinds == [Pool, Transpose, LastConv, Transpose]
    x = data(9, FLOAT32, 2, 5, 8, 6)
    (found,) = execute(lowered(graph), [x])
    assert_near(found, run_graph(graph, {"x": x})["y"])


def test_layers_of_other_extents_share_a_kernel() -> None:
    """Images, channels and strides are numbers that launches pass."""
    batch, found = dims.symbol("batch"), []
    for extent, channels, stride in ((56, 64, 1), (28, 128, 1), (28, 128, 2)):
        op, types = conv((3, 3), stride, (1, 1)), [TensorType(FLOAT32, (batch, extent, extent, channels))]
        w = np.zeros((128, channels, 3, 3), np.float32)
        found.append({kernel.text for kernel in kernels(plan_of(op, [*types, TensorType(FLOAT32, w.shape)], {1: w}))})
    assert found[0] & found[1] and found[1] & found[2]


MACHINE_CODE = {
    "half": (CASES["3x3"][0], (8, 28, 28, 128), (128, 128, 3, 3), FLOAT16, "fp32", "HGMMA", "LDGSTS.E.BYPASS.128"),
    "few": (CASES["3x3"][0], (8, 28, 28, 24), (32, 24, 3, 3), FLOAT16, "fp32", "HGMMA", "LDGSTS.E.BYPASS.128"),
    "tf32": (CASES["3x3"][0], (8, 28, 28, 128), (128, 128, 3, 3), FLOAT32, "tf32", "HGMMA", "LDGSTS.E.BYPASS.128"),
    "bytes": (CASES["3x3"][0], (8, 28, 28, 128), (128, 128, 3, 3), INT8, "fp32", "IGMMA", "LDGSTS.E.BYPASS.128"),
    "first": (CASES["first layer"][0], (8, 3, 224, 224), (64, 3, 7, 7), FLOAT16, "fp32", "HGMMA", ""),
    "dw": (conv((3, 3), 1, (1, 1), group=96), (8, 56, 56, 96), (96, 1, 3, 3), FLOAT16, "fp32", "", "LDG.E.128"),
}  # fmt: skip


@pytest.mark.parametrize("case", MACHINE_CODE)
def test_machine_code(case: str) -> None:
    """Matrix instructions where products are, loads of 16 bytes, no spills."""
    op, image, weights, dtype, precision, matrix, load = MACHINE_CODE[case]
    op = dataclasses.replace(op, accumulate=None if is_float(dtype) else INT32)
    w = np.zeros(weights, dtype)
    plan = plan_of(op, [TensorType(dtype, image), TensorType(dtype, weights)], {1: w}, precision)
    kernel = kernels(plan)[0]
    binary = compiled(kernel, 90)
    used = resources(binary)
    assert not problems(kernel, binary, used, 90)
    assert not matrix or matrix in used.matrix_instructions
    assert not load or used.count(load)
    narrow = used.count("LDGSTS.E") - used.count("LDGSTS.E.BYPASS")
    assert case == "first" or not narrow, f"{narrow} loads of single elements"
