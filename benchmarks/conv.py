"""Convolutions of real networks on one thread: this engine's kernels beside ONNX Runtime's, in turns.

    python -m benchmarks.conv [--model NAME] [--only TEXT] [--seconds 0.5] [--narrow]

Every distinct layer of a network, with a bias and Relu, at its own shape: how often it occurs; GFLOP/s of CPU time,
counting the operations of direct convolution, the least of many short samples; ONNX Runtime's model of that one node,
which changes the layout before and after ("node"), and its own clock around the convolution alone ("conv"); the peak
of the multipliers measured between them. The last lines add a network's layers up. `--narrow` generates code for AVX2
on a machine that has more. Every result is checked against ONNX Runtime's.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx.numpy_helper
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from benchmarks.contest import Contender, contest, geometric_mean, native, ort, peak, placed, result, speed
from benchmarks.models import MODELS
from cpu_fallback.conv_lowering import Layer as Emitted
from cpu_fallback.conv_lowering import Operand, emit_conv
from cpu_fallback.epilogues import finish_of
from cpu_fallback.layouts import FEW_CHANNELS
from cpu_fallback.native import Target, host
from gpu_engine.frontend.importer import import_model
from gpu_engine.frontend.reader import SpecificationFunctions, read
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import FLOAT32
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import Conv
from gpu_engine.ir.ops.channels_last import LastConv, permuted, to_last
from gpu_engine.passes.pipeline import optimize
from gpu_engine.plan.lower import Lowering

Array = NDArray[Any]
NARROW = Target("haswell", "", 32, masked=False, halves=True)
NETWORKS = {"resnet18": 224, "resnet50": 224, "mobilenetv2": 224, "ppocrv4_det": 640}
RECTIFIED = expr.maximum(expr.arg(0, FLOAT32) + expr.arg(1, FLOAT32), 0.0)


@dataclass(frozen=True)
class Layer:
    """A convolution of one image [1, channels, height, width]."""

    channels: int
    outputs: int
    height: int
    width: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    group: int

    @property
    def name(self) -> str:
        kind = "depthwise" if self.group == self.channels == self.outputs else f"{self.group} groups" * (self.group > 1)
        size = f"{self.height}x{self.width}"
        kernel = "x".join(map(str, self.kernel))
        return " ".join(filter(None, (f"{self.channels}->{self.outputs}", size, kernel, f"s{self.strides[0]}", kind)))

    @property
    def op(self) -> Conv:
        return Conv(self.strides, self.before, self.after, (1, 1), self.group)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.outputs, self.channels // self.group, *self.kernel)


def layers_of(name: str, size: int) -> Counter[Layer]:
    """The convolutions of a network for one image, and how often each occurs."""
    graph = optimize(import_model(read(str(MODELS[name].path())), SpecificationFunctions()))
    (image,) = graph.inputs
    extents = {
        symbol: 1 if axis == 0 else size for axis, extent in enumerate(image.shape) for symbol in dims.symbols(extent)
    }

    def layer(node: Node, op: Conv) -> Layer:
        shape = [dims.number(dims.substitute(extent, extents)) for extent in node.inputs[0].shape]
        weights = node.inputs[1].shape
        return Layer(
            shape[1], weights[0], shape[2], shape[3], weights[2:], op.strides, op.before, op.after, op.group
        )  # type: ignore[arg-type]  # fmt: skip

    return Counter(layer(node, node.op) for node in graph.nodes if isinstance(node.op, Conv) and _large(node))


def _large(node: Node) -> bool:
    """Over images: what gates do after pooling is a product of a row and a matrix."""
    return node.inputs[0].rank == 4 and node.outputs[0].shape[2:] != (1, 1)


def emit(
    lowering: Lowering, op: LastConv, node: Node, inputs: tuple[int, ...], outputs: tuple[int, ...], target: Target
) -> bool:
    x, w, *extras = (Operand(buffer, value.shape) for buffer, value in zip(inputs, node.inputs, strict=True))
    out = Operand(outputs[0], node.outputs[0].shape)
    finish, weights = finish_of(op.epilogue, extras, out.shape, target), node.inputs[1].constant
    assert finish is not None and weights is not None and w.shape == weights.shape
    emit_conv(Emitted(lowering, target, x, out, finish, op.planar), op.form, weights)
    return True


@dataclass(frozen=True)
class Operands:
    x: Array
    w: Array
    bias: Array


def operands_of(layer: Layer) -> Operands:
    random = np.random.default_rng(0)
    x = random.standard_normal((1, layer.channels, layer.height, layer.width), dtype=np.float32)
    w = random.standard_normal(layer.weight_shape, dtype=np.float32)
    bias = random.standard_normal(layer.outputs, dtype=np.float32)
    return Operands(x, w / np.float32(np.prod(layer.weight_shape[1:]) ** 0.5), bias)


def ours(layer: Layer, given: Operands, target: Target) -> Contender:
    planar = layer.channels <= FEW_CHANNELS and layer.group == 1
    op, perm = layer.op, to_last(4)
    last = LastConv(op.strides, op.before, op.after, op.dilations, op.group, RECTIFIED, planar)
    image = given.x if planar else np.ascontiguousarray(given.x.transpose(perm))
    return native(emit, last, [placed(array) for array in (image, given.w, given.bias)], target, (1, 2))


def node_of(layer: Layer, given: Operands) -> bytes:
    """A model of this convolution."""
    nodes = [
        helper.make_node(
            "Conv", ["x", "w", "b"], ["c"], kernel_shape=layer.kernel, strides=layer.strides, group=layer.group,
            pads=[*layer.before, *layer.after],
        ),
        helper.make_node("Relu", ["c"], ["y"]),
    ]  # fmt: skip
    weights = [onnx.numpy_helper.from_array(given.w, "w"), onnx.numpy_helper.from_array(given.bias, "b")]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, given.x.shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    model = helper.make_model(
        helper.make_graph(nodes, "layer", [x], [y], weights), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    content: bytes = model.SerializeToString()
    return content


class Clock:
    """ONNX Runtime's own clock around the convolution, without the changes of layout."""

    def __init__(self, model: bytes, feeds: Mapping[str, Array]) -> None:
        self._folder = TemporaryDirectory()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(self._folder.name) / "profile")
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._feeds = feeds

    def run(self, times: int) -> None:
        for _ in range(times):
            self._session.run(None, self._feeds)

    def best_s(self) -> float:
        events = json.loads(Path(self._session.end_profiling()).read_text())
        self._folder.cleanup()
        kernels = [event for event in events if event["name"].endswith("kernel_time")]
        return min(event["dur"] for event in kernels if "Conv" in event["args"]["op_name"]) / 1e6


@dataclass(frozen=True)
class Result:
    """Seconds of one run of a layer."""

    ours_s: float
    node_s: float
    conv_s: float
    faster: float


def measure(layer: Layer, count: int, target: Target, seconds: float) -> Result:
    given = operands_of(layer)
    mine, theirs = ours(layer, given, target), ort(node_of(layer, given), {"x": given.x}, "y")
    found, truth = result(mine), result(theirs).transpose(to_last(4))
    assert found.shape == permuted(result(theirs).shape, to_last(4))
    off = np.abs(found - truth).max() / np.abs(truth).max()
    assert off < 3e-5, f"{layer.name}: off by {off}"
    clock = Clock(node_of(layer, given), {"x": given.x})
    top = peak(target)
    contest([mine, theirs, Contender("clock", clock.run), top[0]], seconds)
    conv_s, best = clock.best_s(), top[1] / top[0].best_s / 1e9
    operations = 2 * truth.size * np.prod(layer.weight_shape[1:]) / 1e9
    rates = [operations / s for s in (mine.best_s, theirs.best_s, conv_s)]
    print(
        f"{layer.name:40} x{count} {' '.join(f'{rate:7.1f}' for rate in rates)}  {rates[0] / best:5.0%} of {best:4.0f}"
        f"  {rates[0] / rates[1]:5.2f} {rates[0] / rates[2]:5.2f}  {mine.compile_s * 1e3:4.0f} ms",
        flush=True,
    )
    return Result(mine.best_s, theirs.best_s, conv_s, speed(mine, theirs))


def race(name: str, target: Target, seconds: float, only: str) -> None:
    """All layers of a network, then their sums."""
    print(f"{name:40} nr     ours    node    conv  of peak        / node / conv", flush=True)
    layers = {layer: count for layer, count in layers_of(name, NETWORKS[name]).items() if only in layer.name}
    found = {layer: measure(layer, count, target, seconds) for layer, count in layers.items()}
    if not found:
        return
    totals = [
        sum(getattr(result, field) * layers[layer] for layer, result in found.items())
        for field in ("ours_s", "node_s", "conv_s")
    ]
    mean = geometric_mean([result.faster for result in found.values()])
    print(
        f"{name}: {totals[0] * 1e3:.2f} ms; nodes {totals[1] * 1e3:.2f} ms, {totals[1] / totals[0]:.2f} times as long; "
        f"convolutions alone {totals[2] * 1e3:.2f} ms, {totals[2] / totals[0]:.2f} times as long; "
        f"geometric mean of the ratios to nodes {mean:.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=NETWORKS, action="append")
    parser.add_argument("--only", default="")
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--narrow", action="store_true")
    chosen = parser.parse_args()
    own = host()
    for name in chosen.model or NETWORKS:
        race(name, NARROW if chosen.narrow else own, chosen.seconds, chosen.only)


if __name__ == "__main__":
    main()
