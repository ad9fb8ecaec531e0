"""A graph of ours as a PyTorch module over the same weights: what torch.compile is measured with.

The module is a torch.fx graph of PyTorch's own operators, so nothing of ours runs when it does. Attention becomes
scaled_dot_product_attention and normalization layer_norm, as people write them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule
from torch.fx import Node as FxNode

from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Graph, Node, ShapeTensor, Value
from gpu_engine.ir.interpreter import bind_extents
from gpu_engine.ir.ops import (
    Attention,
    Concat,
    Conv,
    ConvTranspose,
    Expand,
    Gather,
    GatherElements,
    Iota,
    LayerNorm,
    Map,
    MatMul,
    Pad,
    Pool,
    Reduce,
    Reshape,
    Slice,
    Softmax,
    Transpose,
)
from gpu_engine.ir.parameters import op_dims, resolve

Shape = Sequence[int]
DTYPES = {
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float16): torch.float16,
    np.dtype(ml_dtypes.bfloat16): torch.bfloat16,
    np.dtype(np.float64): torch.float64,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int8): torch.int8,
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.bool_): torch.bool,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "pow": torch.pow, "neg": torch.neg,
    "abs": torch.abs, "min": torch.minimum, "max": torch.maximum, "sqrt": torch.sqrt, "exp": torch.exp,
    "log": torch.log, "sin": torch.sin, "cos": torch.cos, "tanh": torch.tanh, "erf": torch.erf,
    "floor": torch.floor, "ceil": torch.ceil, "round": torch.round, "sign": torch.sign, "isnan": torch.isnan,
    "lt": torch.lt, "le": torch.le, "eq": torch.eq, "and": torch.logical_and, "or": torch.logical_or,
    "not": torch.logical_not,
}  # fmt: skip
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
MAXIMA = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVERAGES = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
FOLDS = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax, "min": torch.amin}


class NotInTorch(Exception):
    """An operation that this module does not translate; the message names it."""


def torch_module(graph: Graph, shapes: Sequence[Shape]) -> GraphModule:
    """The graph for inputs of these shapes, a tuple of outputs; its weights are buffers. Raises `NotInTorch`."""
    known: dict[str, int] = {}
    for value, shape in zip(graph.inputs, shapes, strict=True):
        bind_extents(known, value, tuple(shape))
    return _Translation(FxGraph(), torch.nn.Module(), known, {}).module(graph)


@dataclass(frozen=True)
class _Translation:
    """A module under construction: `nodes` are what values became, `extents` what the symbols are."""

    fx: FxGraph
    holder: torch.nn.Module
    extents: Mapping[str, int]
    nodes: dict[Value, FxNode]

    def module(self, graph: Graph) -> GraphModule:
        for i, value in enumerate(graph.inputs):
            self.nodes[value] = self.fx.placeholder(f"input_{i}")
        for node in graph.nodes:
            self._translate(node)
        self.fx.output(tuple(map(self.of, graph.outputs)))
        return GraphModule(self.holder, self.fx)

    def of(self, value: Value) -> FxNode:
        """The node of a value; constants become buffers."""
        if value not in self.nodes:
            assert value.known is not None
            array = value.known
            if value.symbolic:
                array = np.array([self.number(dim) for dim in array.flat], value.dtype).reshape(array.shape)
            self.nodes[value] = self._buffer(_tensor(array))
        return self.nodes[value]

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> FxNode:
        return self.fx.call_function(function, args, options)

    def number(self, dim: Dim) -> int:
        return dims.number(dims.substitute(dim, self.extents))

    def shape(self, value: Value) -> list[int]:
        return [self.number(dim) for dim in value.shape]

    def _buffer(self, tensor: torch.Tensor) -> FxNode:
        name = f"weight_{len(list(self.holder.buffers()))}"
        self.holder.register_buffer(name, tensor)
        return self.fx.get_attr(name)

    def _translate(self, node: Node) -> None:
        values: dict[Dim, int] = {dim: self.number(dim) for dim in op_dims(node.op)}
        op = resolve(node.op, values) if values else node.op
        rule = RULES.get(type(op))
        if rule is None:
            raise NotInTorch(f"{node.source}: {type(op).__name__}")
        (self.nodes[node.outputs[0]],) = (rule(self, op, node),)

    def expression(self, root: Expr, operands: Sequence[FxNode]) -> FxNode:
        """An expression over operands, an operator for each of its nodes."""
        found: dict[Expr, Any] = {}
        for part in expr.walk(root):
            args = [found[child] for child in part.args]
            if part.op == "arg":
                found[part] = operands[part.value]
            elif part.op == "const":
                found[part] = part.value.item()
            elif part.op == "cast":
                found[part] = self.call(torch.Tensor.to, self._tensor(args[0], part.args[0]), DTYPES[part.dtype])
            elif part.op == "where":
                found[part] = self.call(torch.where, *args)
            elif part.op in FUNCTIONS:
                found[part] = self._applied(part, args)
            else:
                raise NotInTorch(f"the operation {part.op!r}")
        return self._tensor(found[root], root)

    def _applied(self, part: Expr, args: list[Any]) -> FxNode:
        """Constants may be Python numbers behind a tensor, and a clamp is one operator."""
        if part.op in ("min", "max") and any(not isinstance(arg, FxNode) for arg in args):
            tensor, bound = args if isinstance(args[0], FxNode) else args[::-1]
            return self.call(torch.clamp, tensor, **{"max" if part.op == "min" else "min": bound})
        if args and not isinstance(args[0], FxNode):
            args[0] = self._tensor(args[0], part.args[0])
        return self.call(FUNCTIONS[part.op], *args)

    def _tensor(self, found: Any, part: Expr) -> FxNode:
        return found if isinstance(found, FxNode) else self._buffer(torch.tensor(found, dtype=DTYPES[part.dtype]))

    def finished(self, product: FxNode, epilogue: Expr | None, node: Node, first: int) -> FxNode:
        """A product with its epilogue over the operands from the first on."""
        if epilogue is None:
            return product
        return self.expression(epilogue, [product, *map(self.of, node.inputs[first:])])


def _tensor(array: Any) -> torch.Tensor:
    contiguous = np.ascontiguousarray(array).reshape(array.shape)
    if contiguous.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(contiguous.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(contiguous.copy())


def _matmul(to: _Translation, op: MatMul, node: Node) -> FxNode:
    a, b = map(to.of, node.inputs[:2])
    a = to.call(torch.transpose, a, -1, -2) if op.transpose_a else a
    b = to.call(torch.transpose, b, -1, -2) if op.transpose_b else b
    return to.finished(to.call(torch.matmul, a, b), op.epilogue, node, 2)


def _padded(to: _Translation, x: FxNode, before: Shape, after: Shape, value: float) -> tuple[FxNode, tuple[int, ...]]:
    """An image, and what a convolution or pool still has to pad on both sides of its axes."""
    if tuple(before) == tuple(after) and min(before, default=0) >= 0:
        return x, tuple(before)
    pads = [pad for pair in zip(reversed(before), reversed(after), strict=True) for pad in pair]
    return to.call(F.pad, x, pads, value=value), (0,) * len(before)


def _conv(to: _Translation, op: Conv, node: Node) -> FxNode:
    x, padding = _padded(to, to.of(node.inputs[0]), op.before, op.after, 0.0)  # type: ignore[arg-type]
    function, w = CONVOLUTIONS[len(op.strides)], to.of(node.inputs[1])
    product = to.call(function, x, w, None, list(op.strides), list(padding), list(op.dilations), op.group)
    return to.finished(product, op.epilogue, node, 2)


def _conv_transpose(to: _Translation, op: ConvTranspose, node: Node) -> FxNode:
    if op.before != op.after:
        raise NotInTorch(f"{node.source}: a transposed convolution with pads {op.before} and {op.after}")
    x, w = map(to.of, node.inputs[:2])
    options = [list(op.strides), list(op.before), list(op.output_padding), op.group, list(op.dilations)]
    return to.finished(to.call(TRANSPOSED[len(op.strides)], x, w, None, *options), op.epilogue, node, 2)


def _pool(to: _Translation, op: Pool, node: Node) -> FxNode:
    rank, x = len(op.kernel), to.of(node.inputs[0])
    if op.kind == "max":
        x, padding = _padded(to, x, op.before, op.after, -math.inf)  # type: ignore[arg-type]
        options = [list(op.kernel), list(op.strides), list(padding), list(op.dilations), op.ceil_mode]
        return to.call(MAXIMA[rank], x, *options)
    if op.kind != "average" or op.before != op.after or any(step != 1 for step in op.dilations):
        raise NotInTorch(f"{node.source}: a pool {op}")
    options = [list(op.kernel), list(op.strides), list(op.before), op.ceil_mode, op.count_include_pad]
    return to.call(AVERAGES[rank], x, *options)


def _reduce(to: _Translation, op: Reduce, node: Node) -> FxNode:
    operands = list(map(to.of, node.inputs))
    x = to.expression(op.before, operands) if op.before is not None else operands[0]
    if op.kind not in FOLDS:
        raise NotInTorch(f"{node.source}: a reduction {op.kind!r}")
    result = to.call(FOLDS[op.kind], x, list(op.axes), op.keepdims)
    return result if op.after is None else to.expression(op.after, [result])


def _layer_norm(to: _Translation, op: LayerNorm, node: Node) -> FxNode:
    shape = to.shape(node.inputs[0])[op.axis :]
    affine = [to.call(torch.reshape, to.call(torch.broadcast_to, to.of(value), shape), shape) for value in
              node.inputs[1:]]  # fmt: skip
    x = to.of(node.inputs[0])
    if not op.centered:
        return to.call(F.rms_norm, x, shape, *affine[:1], eps=op.epsilon)
    return to.call(F.layer_norm, x, shape, *affine, eps=op.epsilon)


def _attention(to: _Translation, op: Attention, node: Node) -> FxNode:
    """PyTorch counts a row without any finite score as zeros; its exporter writes that down, as `zero_nan`."""
    q, k, v, *masks = map(to.of, node.inputs)
    mask = masks[0] if masks else None
    if mask is not None and op.causal:
        raise NotInTorch(f"{node.source}: {op}")
    if masks and node.inputs[3].dtype == np.bool_ and op.fill != -math.inf:
        zeros = to.call(torch.zeros_like, mask, dtype=DTYPES[node.inputs[0].dtype])
        mask = to.call(torch.masked_fill, zeros, to.call(torch.logical_not, mask), op.fill)
    options = {"attn_mask": mask, "is_causal": op.causal, "scale": op.scale}
    return to.call(F.scaled_dot_product_attention, q, k, v, **options)


def _gather(to: _Translation, op: Gather, node: Node) -> FxNode:
    x, indices = map(to.of, node.inputs)
    if op.axis == 0 and node.inputs[0].rank == 2:
        return to.call(F.embedding, indices, x)
    flat = to.call(torch.index_select, x, op.axis, to.call(torch.reshape, indices, [-1]))
    return to.call(torch.reshape, flat, to.shape(node.outputs[0]))


def _gather_elements(to: _Translation, op: GatherElements, node: Node) -> FxNode:
    x, indices = map(to.of, node.inputs)
    wrapped = to.call(torch.add, indices, to.shape(node.inputs[0])[op.axis])
    counted = to.call(torch.where, to.call(torch.lt, indices, 0), wrapped, indices)
    return to.call(torch.gather, x, op.axis, counted)


def _slice(to: _Translation, op: Slice, node: Node) -> FxNode:
    x = to.of(node.inputs[0])
    for axis, (start, step, extent) in enumerate(zip(op.starts, op.steps, op.extents, strict=True)):
        if step < 1:
            raise NotInTorch(f"{node.source}: a slice by {step}")
        stop = dims.number(start) + step * dims.number(extent)
        x = to.call(torch.ops.aten.slice.Tensor, x, axis, start, stop, step)
    return x


def _pad(to: _Translation, op: Pad, node: Node) -> FxNode:
    pads = [pad for pair in zip(reversed(op.before), reversed(op.after), strict=True) for pad in pair]
    constant = node.inputs[1].constant if len(node.inputs) > 1 else np.zeros(())
    if op.mode != "constant" or constant is None:
        raise NotInTorch(f"{node.source}: {op}")
    return to.call(F.pad, to.of(node.inputs[0]), pads, value=constant.item())


def _map(to: _Translation, op: Map, node: Node) -> FxNode:
    found = to.expression(op.expr, list(map(to.of, node.inputs)))
    return to.call(torch.broadcast_to, found, to.shape(node.outputs[0]))


def _softmax(to: _Translation, op: Softmax, node: Node) -> FxNode:
    return to.call(F.log_softmax if op.log else F.softmax, to.of(node.inputs[0]), op.axis)


def _iota(to: _Translation, op: Iota, node: Node) -> FxNode:
    return to.of(Value(node.outputs[0].type, np.arange(dims.number(op.extent), dtype=op.dtype)))


RULES: dict[type, Callable[[_Translation, Any, Node], FxNode]] = {
    Attention: _attention,
    Concat: lambda to, op, node: to.call(torch.cat, list(map(to.of, node.inputs)), op.axis),
    Conv: _conv,
    ConvTranspose: _conv_transpose,
    Expand: lambda to, op, node: to.call(torch.broadcast_to, to.of(node.inputs[0]), list(op.shape)),
    Gather: _gather,
    GatherElements: _gather_elements,
    Iota: _iota,
    LayerNorm: _layer_norm,
    Map: _map,
    MatMul: _matmul,
    Pad: _pad,
    Pool: _pool,
    Reduce: _reduce,
    Reshape: lambda to, op, node: to.call(torch.reshape, to.of(node.inputs[0]), list(op.shape)),
    ShapeTensor: lambda to, op, node: to.of(Value(node.outputs[0].type, np.array(op.values).reshape(op.shape))),
    Slice: _slice,
    Softmax: _softmax,
    Transpose: lambda to, op, node: to.call(torch.permute, to.of(node.inputs[0]), list(op.perm)),
}
