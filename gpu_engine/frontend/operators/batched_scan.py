"""Scan of opset 8: every operand carries a batch axis, and each sequence of the batch may have a length of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.bodies import Bodies
from gpu_engine.frontend.model import ModelGraph, ModelNode, TensorInfo
from gpu_engine.frontend.operators.control import scan
from gpu_engine.frontend.operators.indexing import reverse_sequence
from gpu_engine.frontend.registry import emit_map, operator
from gpu_engine.ir import expr
from gpu_engine.ir.dtypes import INT64
from gpu_engine.ir.graph import Builder, Value
from gpu_engine.ir.ops import GatherND, Iota, Reshape


@operator("Scan", since=8)
def scan_8(
    b: Builder,
    sequence_lens: Value | None,
    *inputs: Value,
    body: ModelGraph,
    num_scan_inputs: int,
    directions: tuple[int, ...] = (),
    scan_input_axes: tuple[int, ...] | None = None,
    bodies: Bodies,
) -> Sequence[Value]:
    """https://onnx.ai/onnx/operators/onnx__Scan.html (opset 8)

    A Scan over the batch whose body is a Scan over the sequence; the inner one is known by its `scan_input_axes`.
    """
    if scan_input_axes is not None:
        operands = inputs if sequence_lens is None else (sequence_lens, *inputs)
        return scan(b, *operands, body=body, num_scan_inputs=num_scan_inputs, scan_input_axes=scan_input_axes,
                    scan_input_directions=directions, bodies=bodies)  # fmt: skip
    states = len(inputs) - num_scan_inputs
    if num_scan_inputs < 1 or states < 0 or len(body.outputs) < states or len(directions) not in (0, num_scan_inputs):
        raise InvalidModel(f"{num_scan_inputs} scan inputs of {len(inputs)} inputs")
    if sequence_lens is not None:
        body = dataclasses.replace(body, outputs=(*body.outputs, *body.outputs[:states]))
        backwards = (*(0,) * states, *(directions or (0,) * num_scan_inputs))
        inputs, directions = (
            tuple(_turned(b, x, sequence_lens, back) for x, back in zip(inputs, backwards, strict=True)),
            (),
        )
    axes = (0,) * num_scan_inputs
    attributes = {"body": body, "num_scan_inputs": num_scan_inputs, "scan_input_axes": axes, "directions": directions}
    outer = _around(body, len(inputs), attributes)
    results = scan(b, *inputs, body=outer, num_scan_inputs=len(inputs), bodies=bodies)
    if sequence_lens is None:
        return results
    count = len(results) - states
    last = (
        _at_length(b, sequence_lens, first, every)
        for first, every in zip(inputs[:states], results[count:], strict=True)
    )
    return (*last, *(_up_to_length(b, sequence_lens, value) for value in results[states:count]))


def _turned(b: Builder, x: Value, lengths: Value, backwards: int) -> Value:
    """`x` [batch, sequence, ...], each sequence from its own end where `backwards`."""
    return reverse_sequence(b, x, lengths, batch_axis=0, time_axis=1) if backwards else x


def _around(body: ModelGraph, inputs: int, attributes: dict[str, object]) -> ModelGraph:
    """The body of a Scan over the batch: one node, a Scan over the sequence."""
    names = tuple(f"\0operand {i}" for i in range(inputs))
    results = tuple(f"\0result {i}" for i in range(len(body.outputs)))
    node = ModelNode("Scan", "", names, results, attributes)
    formal, actual = (tuple(TensorInfo(name, None, None) for name in each) for each in (names, results))
    return ModelGraph((node,), formal, actual, {})


def _at_length(b: Builder, lengths: Value, first: Value, every: Value) -> Value:
    """[batch, ...] of `every` [batch, sequence, ...] when each sequence has ended; `first` where it is empty."""
    places = emit_map(b, lambda n: expr.maximum(expr.cast(n, INT64) - 1, 0), lengths)
    found = b.emit(GatherND(1), every, b.emit(Reshape((*lengths.shape, 1)), places))
    bound = b.emit(Reshape((*lengths.shape, *(1,) * (found.rank - 1))), lengths)
    return emit_map(b, lambda n, x, start: expr.where(expr.cast(n, INT64) < 1, start, x), bound, found, first)


def _up_to_length(b: Builder, lengths: Value, value: Value) -> Value:
    """`value` [batch, sequence, ...] with zeros behind the end of each sequence."""
    tail = (1,) * (value.rank - 2)
    bound = b.emit(Reshape((*lengths.shape, 1, *tail)), lengths)
    places = b.emit(Reshape((value.shape[1], *tail)), b.emit(Iota(value.shape[1], INT64)))
    zero = b.constant(np.zeros((), value.dtype))
    return emit_map(b, lambda x, n, place, z: expr.where(place < expr.cast(n, INT64), x, z), value, bound, places, zero)
