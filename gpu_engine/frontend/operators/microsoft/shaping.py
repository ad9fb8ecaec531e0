"""Operators that pick, place and repeat elements, most of them older than ONNX's own."""

from __future__ import annotations

from typing import Any

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators.generator import range_, trilu
from gpu_engine.frontend.operators.microsoft.domain import MICROSOFT
from gpu_engine.frontend.operators.movement import pad
from gpu_engine.frontend.operators.operands import fresh_type, known_ints
from gpu_engine.frontend.registry import array_operator, emit_array, emit_map, normal_axis, operator, scalar
from gpu_engine.ir import dims, ops
from gpu_engine.ir.dtypes import INT64
from gpu_engine.ir.graph import Builder, TensorType, Value
from gpu_engine.ir.ops.selection import microsoft_unique


@operator("ExpandDims", since=1, domain=MICROSOFT)
def expand_dims(b: Builder, x: Value, axis: Value) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.ExpandDims"""
    known = known_ints(axis)
    if known is None:
        kind = fresh_type(b, x.type, x.rank + 1)
        return emit_array(b, insert_axis, lambda *_: kind, (x, axis), {})[0]
    place = normal_axis(known[0], x.rank + 1)
    return b.emit(ops.Reshape((*x.shape[:place], 1, *x.shape[place:])), x)


def insert_axis(xp: Any, x: Any, axis: Any) -> Any:
    return xp.expand_dims(x, int(axis.ravel()[0]))


@operator("Range", since=1, domain=MICROSOFT)
def microsoft_range(b: Builder, start: Value, limit: Value, delta: Value | None = None) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.Range"""
    return range_(b, start, limit, scalar(b, 1, start.dtype) if delta is None else delta)


@operator("Pad", since=1, domain=MICROSOFT)
def microsoft_pad(b: Builder, x: Value, pads: Value, value: Value | None = None, *, mode: str = "constant") -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.Pad"""
    amounts = pads if pads.rank == 1 else b.emit(ops.Reshape((dims.product(pads.shape),)), pads)
    return pad(b, x, amounts, None if value is None else b.emit(ops.Reshape(()), value), mode=mode)


@operator("Trilu", since=1, domain=MICROSOFT)
def microsoft_trilu(b: Builder, x: Value, k: Value | None = None, *, upper: int = 1) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.Trilu"""
    return trilu(b, x, k, upper=upper)


@operator("GatherND", since=1, domain=MICROSOFT)
def microsoft_gather_nd(b: Builder, x: Value, indices: Value) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GatherND"""
    return b.emit(ops.GatherND(0), x, indices)


@operator("TorchEmbedding", since=1, domain=MICROSOFT)
def torch_embedding(
    b: Builder,
    weight: Value,
    indices: Value,
    padding_idx: Value | None = None,
    scale_grad_by_freq: Value | None = None,
) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.TorchEmbedding

    The last two inputs are for training.
    """
    return b.emit(ops.Gather(0), weight, indices)


@operator("UnfoldTensor", since=1, domain=MICROSOFT)
def unfold_tensor(b: Builder, x: Value, *, size: int, dim: int = -1, step: int = 1) -> Value:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.UnfoldTensor"""
    axis = normal_axis(dim, x.rank)
    if size < 1 or step < 1:
        raise InvalidModel(f"slices of {size} elements, {step} apart")
    count = dims.floor_div(x.shape[axis] - size, step) + 1
    starts = b.emit(ops.Reshape((count, 1)), b.emit(ops.Iota(count, INT64)))
    places = emit_map(b, lambda i, j: i * step + j, starts, b.emit(ops.Iota(size, INT64)))
    slices = b.emit(ops.Gather(axis), x, places)
    order = [i for i in range(slices.rank) if i != axis + 1]
    return b.emit(ops.Transpose((*order, axis + 1)), slices)


def _unique_types(b: Builder, x: Value) -> tuple[TensorType, ...]:
    count = b.fresh_dim()
    return TensorType(x.dtype, (count,)), TensorType(INT64, x.shape), TensorType(INT64, (count,))


array_operator("Unique", since=1, domain=MICROSOFT, infer=_unique_types)(microsoft_unique)
