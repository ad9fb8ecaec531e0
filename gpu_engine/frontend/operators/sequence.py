"""Sequences and optionals whose structure is known while the model is imported."""

from __future__ import annotations

import numpy as np

from gpu_engine.errors import DependsOnValues, InvalidModel, UnsupportedModel
from gpu_engine.frontend.operators.movement import concat, cut, split_by_value
from gpu_engine.frontend.operators.operands import known_scalar, static_length
from gpu_engine.frontend.operators.shape import squeezed, unsqueezed
from gpu_engine.frontend.registry import normal_axis, operator
from gpu_engine.frontend.sequences import AbsentValue, Emitted, SequenceValue
from gpu_engine.ir.graph import Builder, Value
from gpu_engine.ir.ops import Gather, Reshape

MAX_PARTS = 1 << 14
"""Each is a node or two."""


def elements_of(b: Builder, sequence: Emitted) -> tuple[Value, ...]:
    """The elements of a sequence; InvalidModel for anything else."""
    if not isinstance(sequence, SequenceValue):
        raise InvalidModel(f"{b.source} wants a sequence")
    return sequence.elements


@operator("SequenceEmpty", since=11)
def sequence_empty(b: Builder, *, dtype: int = 1) -> tuple[SequenceValue]:
    """https://onnx.ai/onnx/operators/onnx__SequenceEmpty.html"""
    return (SequenceValue(()),)


@operator("SequenceConstruct", since=11)
def sequence_construct(b: Builder, *inputs: Value) -> tuple[SequenceValue]:
    """https://onnx.ai/onnx/operators/onnx__SequenceConstruct.html"""
    return (SequenceValue(inputs),)


@operator("SequenceLength", since=11)
def sequence_length(b: Builder, sequence: SequenceValue) -> Value:
    """https://onnx.ai/onnx/operators/onnx__SequenceLength.html"""
    return b.constant(np.int64(len(elements_of(b, sequence))))


@operator("SequenceAt", since=11)
def sequence_at(b: Builder, sequence: SequenceValue, position: Value) -> Value:
    """https://onnx.ai/onnx/operators/onnx__SequenceAt.html

    A position that only running tells picks among elements of one type.
    """
    elements = elements_of(b, sequence)
    if known_scalar(position) is not None:
        return elements[place(b, position, len(elements), len(elements))]
    if not elements or any(element.type != elements[0].type for element in elements):
        raise DependsOnValues(f"{b.source}: a position known only while running, among elements of several types")
    stacked = concat(b, *(unsqueezed(b, element, (0,)) for element in elements), axis=0)
    return b.emit(Gather(0), stacked, b.emit(Reshape(()), position))


def place(b: Builder, position: Value | None, default: int, count: int) -> int:
    """Where a position points among `count` places; a negative one counts from the end."""
    where = default if position is None else known_scalar(position)
    if not isinstance(where, int):
        raise DependsOnValues(f"{b.source}: the position must be known when the model is compiled")
    if not -count <= where < count and position is not None:
        raise InvalidModel(f"{b.source}: position {where} is outside {count} places")
    return where % count if position is not None else where


@operator("SequenceInsert", since=11)
def sequence_insert(
    b: Builder, sequence: SequenceValue, tensor: Value, position: Value | None = None
) -> tuple[SequenceValue]:
    """https://onnx.ai/onnx/operators/onnx__SequenceInsert.html"""
    elements = elements_of(b, sequence)
    where = place(b, position, len(elements), len(elements) if _is_negative(position) else len(elements) + 1)
    return (SequenceValue((*elements[:where], tensor, *elements[where:])),)


def _is_negative(position: Value | None) -> bool:
    where = known_scalar(position)
    return isinstance(where, int) and where < 0


@operator("SequenceErase", since=11)
def sequence_erase(b: Builder, sequence: SequenceValue, position: Value | None = None) -> tuple[SequenceValue]:
    """https://onnx.ai/onnx/operators/onnx__SequenceErase.html"""
    elements = elements_of(b, sequence)
    where = place(b, position, len(elements) - 1, len(elements))
    return (SequenceValue((*elements[:where], *elements[where + 1 :])),)


@operator("SplitToSequence", since=11)
def split_to_sequence(
    b: Builder, x: Value, split: Value | None = None, *, axis: int = 0, keepdims: int = 1
) -> tuple[SequenceValue]:
    """https://onnx.ai/onnx/operators/onnx__SplitToSequence.html"""
    axis = normal_axis(axis, x.rank)
    extent = x.shape[axis]
    if split is not None and split.rank == 1:
        return (SequenceValue(split_by_value(b, x, axis, split, static_length(split, "sizes"))),)
    size = 1 if split is None else known_scalar(split)
    if not isinstance(extent, int) or not isinstance(size, int):
        raise DependsOnValues(f"{b.source}: a sequence of {extent} / {size} parts, whose number depends on the run")
    if size < 1 or extent > size * MAX_PARTS:
        raise UnsupportedModel(f"{b.source}: {extent} / {size} parts of a sequence, at most {MAX_PARTS:,} are possible")
    starts = range(0, extent, size)
    parts = tuple(cut(b, x, {axis: (start, 1, min(size, extent - start))}) for start in starts)
    if split is None and not keepdims:
        parts = tuple(squeezed(b, part, (axis,)) for part in parts)
    return (SequenceValue(parts),)


@operator("ConcatFromSequence", since=11)
def concat_from_sequence(b: Builder, sequence: SequenceValue, *, axis: int, new_axis: int = 0) -> Value:
    """https://onnx.ai/onnx/operators/onnx__ConcatFromSequence.html"""
    elements = elements_of(b, sequence)
    if not elements:
        raise InvalidModel(f"{b.source}: an empty sequence")
    if new_axis:
        axis = normal_axis(axis, elements[0].rank + 1)
        elements = tuple(unsqueezed(b, element, (axis,)) for element in elements)
    return concat(b, *elements, axis=axis)


@operator("Optional", since=15)
def optional(b: Builder, x: Value | None = None, *, type: object = None) -> tuple[Emitted]:
    """https://onnx.ai/onnx/operators/onnx__Optional.html"""
    return (AbsentValue() if x is None else x,)


@operator("OptionalHasElement", since=15)
def optional_has_element(b: Builder, x: Emitted | None = None) -> Value:
    """https://onnx.ai/onnx/operators/onnx__OptionalHasElement.html"""
    return b.constant(np.bool_(x is not None and not isinstance(x, AbsentValue)))


@operator("OptionalGetElement", since=15)
def optional_get_element(b: Builder, x: Emitted) -> tuple[Emitted]:
    """https://onnx.ai/onnx/operators/onnx__OptionalGetElement.html"""
    if isinstance(x, AbsentValue):
        raise InvalidModel(f"{b.source}: the optional holds nothing")
    return (x,)
