"""Recurrent as one native step: which operands it takes, how the recurrent weights are packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cpu_fallback.byte_pairs import split_all
from cpu_fallback.calls import Array, ArrayCall, Native
from cpu_fallback.lanes import COMPUTED, is_supported
from cpu_fallback.native import Target, host
from cpu_fallback.pages import PAGES
from cpu_fallback.recurrent_kernels import RecurrentKernel
from cpu_fallback.recurrent_products import BYTES, PAIRS, Form, form_of, pack, tallest
from cpu_fallback.recurrent_states import Record
from cpu_fallback.tiles import NBYTES, has_byte_pairs
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import FLOAT32, INT8, INT32, UINT8, compute_dtype, is_float
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Node, Value
from gpu_engine.ir.ops import Recurrent
from gpu_engine.ir.ops.recurrent import GATES
from gpu_engine.plan.lower import Lowering
from gpu_engine.plan.words import Address, Word

Buffers = tuple[int, ...]
MOST_TERMS = 1 << 15
"""So many products of two bytes, a zero point taken from each, add up within 32 bits."""
QUANTISED = frozenset({"scale", "zero"})
MOST_EXTRA = 3
"""Elements of a state for every one that may come twice."""
BLOCK_TILES = 4
"""Tiles of rows that run together: a panel of weights that the second cache does not keep is then fetched once."""


def lower_recurrent(lowering: Lowering, op: Recurrent, node: Node, inputs: Buffers, outputs: Buffers) -> bool:
    return emit_recurrent(lowering, op, node, inputs, outputs, host())


def emit_recurrent(
    lowering: Lowering, op: Recurrent, node: Node, inputs: Buffers, outputs: Buffers, target: Target
) -> bool:  # fmt: skip
    """Append one native step, behind one that packs the weights if only running gives them; False if it has none."""
    hidden = node.inputs[1].shape[2]
    given = dict(zip(op.present, node.inputs[2:], strict=True))
    if not isinstance(hidden, int) or not _supported(op, node.inputs[0], node.inputs[1], given, target):
        return False
    x = node.inputs[0]
    kernel = _kernel(op, x, node.inputs[1], given, target)
    buffers = dict(zip(op.present, inputs[2:], strict=True))
    packed = _packed(lowering, Packing(kernel.record, GATES[op.kind]), node, inputs, op.present)
    steps, batch, _ = x.shape
    records = lowering.buffer(np.dtype(np.uint8), (len(op.reverse), batch, kernel.record.nbytes))
    operands = [buffers[name] for name, _ in kernel.present]
    words: list[Word] = [*map(Address, (*outputs, inputs[0], *packed, records, *operands)), steps, batch, hidden]
    lowering.emit(Native(kernel, tuple(words)), (inputs[0], *packed, *operands), outputs, scratch=(records,))
    return True


def _supported(op: Recurrent, x: Value, weights: Value, given: dict[str, Value], target: Target) -> bool:
    """Whether every operand and activation has a native form."""
    wide = compute_dtype(x.dtype)
    functions = [function for own in op.activations for function in own]
    floats = [x, *(value for name, value in given.items() if name not in ("lengths", "scale", "zero"))]
    if COMPUTED.get(wide) not in ("float", "double") or not is_float(x.dtype):
        return False
    if not all(is_supported(function, target) and _is_of(function, wide) for function in functions):
        return False
    if not all(compute_dtype(value.dtype) == wide and _readable(value, wide, target) for value in floats):
        return False
    if "lengths" in given and given["lengths"].dtype != INT32:
        return False
    packed = [weights, *(given[name] for name in ("scale", "zero") if name in given)]
    if not all(isinstance(extent, int) for value in packed for extent in value.shape):
        return False
    if "scale" not in given:
        return is_float(weights.dtype)
    hidden = weights.shape[2]
    few = isinstance(hidden, int) and hidden < MOST_TERMS
    return few and wide == FLOAT32 and weights.dtype in (INT8, UINT8) and is_float(given["scale"].dtype)


def _is_of(function: Expr, wide: np.dtype[np.generic]) -> bool:
    return function.dtype == wide and all(node.dtype == wide for node in expr.walk(function) if node.op == "arg")


def _readable(value: Value, wide: np.dtype[np.generic], target: Target) -> bool:
    return is_supported(expr.cast(expr.arg(0, value.dtype), wide), target)


def _kernel(op: Recurrent, x: Value, weights: Value, given: dict[str, Value], target: Target) -> RecurrentKernel:
    hidden, scalar = dims.number(weights.shape[2]), COMPUTED[compute_dtype(x.dtype)]
    phases = (2, 1) if op.kind == "gru" and not op.linear_before_reset else (GATES[op.kind],)
    vectors = min(phases) * -(-hidden // (target.vector_nbytes // NBYTES[scalar]))
    form = form_of(target, scalar, "scale" in given, vectors)
    known = all(value.constant is not None for value in (weights, *(given[name] for name in QUANTISED & given.keys())))
    form = _bytes_form(form, op, weights, target) if form.kind == PAIRS and known else form
    record = Record(form, hidden, phases, op.kind == "lstm")
    functions = tuple(map(op.clipped, op.activations))
    return RecurrentKernel(
        kind=op.kind,
        dtype=x.dtype,
        record=record,
        reverse=op.reverse,
        rows=_rows(record, target),
        heights=_heights(x.shape[1], tallest(form, target)),
        present=tuple((name, value.dtype) for name, value in given.items() if name not in ("scale", "zero")),
        texts=tuple(tuple(map(expr.text, own)) for own in functions),
        input_forget=op.input_forget,
        centred=_is_centred(given.get("zero")),
        functions=functions,
    )


def _bytes_form(form: Form, op: Recurrent, weights: Value, target: Target) -> Form:
    """The form that multiplies bytes, where constant weights let it with few elements more; else `form`."""
    if weights.constant is None or op.kind != "lstm" or not has_byte_pairs(target):
        return form
    _, numbers = split_all(signed(weights.constant).transpose(0, 2, 1))
    extra = numbers.shape[1]
    return form if extra * MOST_EXTRA > weights.constant.shape[2] else replace(form, kind=BYTES, extra=extra)


def signed(weights: Array) -> Array:
    """Unsigned bytes as signed ones, 128 less."""
    return (weights ^ 128).view(np.int8) if weights.dtype == UINT8 else weights


def _rows(record: Record, target: Target) -> int:
    """Rows that run together at most; 0 for all, which one scale is for."""
    return 0 if record.quantised else tallest(record.form, target) * BLOCK_TILES


def _heights(batch: object, tile: int) -> tuple[int, ...]:
    return tuple(range(1, min(batch, tile) + 1)) if isinstance(batch, int) and batch else tuple(range(1, tile + 1))


def _is_centred(zero: Value | None) -> bool:
    """Whether all signed zero points are known to be 0."""
    if zero is None:
        return True
    if zero.constant is None:
        return False
    return bool((zero.constant == (128 if zero.dtype == UINT8 else 0)).all())


@dataclass(frozen=True)
class Packing:
    """From weights [D, G*H, H], and their scales and zero points, to what the kernel takes."""

    record: Record
    gates: int

    def weights(self, weights: Array) -> Array:
        """Panels of all phases, each [D, panels, ...]; unsigned bytes become signed ones, 128 less."""
        record = self.record
        wide = np.int8 if record.quantised else np.dtype(f"f{record.size}")
        apart = signed(weights).astype(wide, copy=False).reshape(len(weights), self.gates, record.hidden, record.hidden)
        columns = np.zeros((len(weights), record.hidden, self.gates, record.padded), wide)
        columns[..., : record.hidden] = apart.transpose(0, 3, 1, 2)
        packed, start = [], 0
        for count in record.phases:
            phase = columns[:, :, start : start + count].reshape(len(weights), record.hidden, -1)
            phase = split_all(phase)[0] if record.form.kind == BYTES else phase
            packed.append(pack(phase, record.form))
            start += count
        return np.concatenate(packed, axis=1)

    def columns(self, weights: Array, scale: Array, zero: Array) -> Array:
        """[D, 3, columns] int32: zero points, sums of weights without their zero point, bits of the scales."""
        directions, record = len(weights), self.record
        shape = (directions, self.gates * record.hidden)
        flip = 128 if weights.dtype == UINT8 else 0
        spread = [np.broadcast_to(v.reshape(directions, -1), shape) for v in (zero, scale)]
        zeros = spread[0].astype(np.int32) - flip
        sums = (weights.astype(np.int32) - flip).sum(axis=2, dtype=np.int32) - zeros * np.int32(record.hidden)
        found = np.zeros((directions, 3, sum(record.widths)), np.int32)
        for i, values in enumerate((zeros, sums, spread[1].astype(np.float32).view(np.int32))):
            for gate in range(self.gates):
                start = record.column(gate)
                own = values[:, gate * record.hidden : (gate + 1) * record.hidden]
                found[:, i, start : start + record.hidden] = own
        return found

    def pack(self, operands: Sequence[Array]) -> list[Array]:
        """Everything for operands (weights) or (weights, scale, zero)."""
        weights = operands[0]
        packed = [self.weights(weights)] + ([self.columns(*operands)] if self.record.quantised else [])
        numbers = [split_all(signed(weights).transpose(0, 2, 1))[1]] if self.record.form.extra else []
        return packed + numbers


def _packed(lowering: Lowering, packing: Packing, node: Node, inputs: Buffers, present: tuple[str, ...]) -> list[int]:
    """Buffers of the packed weights: made now if they are constant, else by a step of their own."""
    places = [1, *(2 + present.index(name) for name in ("scale", "zero") if name in present)]
    known = [array for i in places if (array := node.inputs[i].constant) is not None]
    if len(known) == len(places):
        return [lowering.constant(_resident(array)) for array in packing.pack(known)]
    shapes = packing.pack([np.zeros(_extents(node.inputs[i]), node.inputs[i].dtype) for i in places])
    packed = tuple(lowering.buffer(array.dtype, array.shape) for array in shapes)
    lowering.emit(ArrayCall(_pack_into, packing), tuple(inputs[i] for i in places), packed)
    return list(packed)


def _resident(array: Array) -> Array:
    """A copy in memory for packed weights."""
    copy = PAGES.zeros(array.shape, array.dtype)
    copy[...] = array
    return copy


def _extents(value: Value) -> tuple[int, ...]:
    return tuple(dims.number(extent) for extent in value.shape)


def _pack_into(op: Packing, inputs: Sequence[Array], outputs: Sequence[Array], _: Sequence[Array]) -> None:
    for out, array in zip(outputs, op.pack(inputs), strict=True):
        np.copyto(out, array)
