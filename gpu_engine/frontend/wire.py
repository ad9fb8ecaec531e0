"""Large weights taken out of a model's bytes before protobuf parses, and copies, the rest.

https://protobuf.dev/programming-guides/encoding/. Whatever is not understood is left to protobuf.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

GRAPH, INITIALIZER, DATA_TYPE, RAW_DATA = 7, 5, 2, 9
VARINT, LENGTH = 0, 2
FIXED = {1: 8, 5: 4}
"""Bytes of what has a wire type of its own."""
LEAST_NBYTES = 4096
MOST_FIELDS, MOST_TENSOR_FIELDS = 1_000_000, 32


class NotUnderstood(Exception):
    """The bytes are malformed, or unusual."""


@dataclass(frozen=True)
class Slim:
    """A ModelProto's bytes without some initializers' raw data, and that data by the initializer's number."""

    data: bytes
    lifted: dict[int, memoryview]


def slim(data: memoryview, plain_types: frozenset[int]) -> Slim | None:
    """The model without the raw data of large initializers of `plain_types`, views of `data`; None to parse as is."""
    try:
        graphs = [field for field in _fields(data, 0, len(data)) if field.number == GRAPH]
        if len(graphs) != 1 or graphs[0].wire != LENGTH:
            return None
        (graph,) = graphs
        pieces, lifted = _graph(data, graph, plain_types)
    except NotUnderstood:
        return None
    if not lifted:
        return None
    body = b"".join(pieces)
    head = (data[: graph.start], _key(GRAPH), _varint_bytes(len(body)))
    return Slim(b"".join((*head, body, data[graph.stop :])), lifted)


@dataclass(frozen=True, slots=True)
class _Field:
    """A field from `start` to `stop`; its contents begin at `inside`. `value` is that of a varint."""

    number: int
    wire: int
    start: int
    inside: int
    stop: int
    value: int


def _graph(
    data: memoryview, graph: _Field, plain_types: frozenset[int]
) -> tuple[list[memoryview | bytes], dict[int, memoryview]]:
    """The pieces of a GraphProto without what is lifted out of it."""
    pieces: list[memoryview | bytes] = []
    lifted: dict[int, memoryview] = {}
    kept, number = graph.inside, -1
    for field in _fields(data, graph.inside, graph.stop):
        if field.number != INITIALIZER:
            continue
        number += 1
        raw = _raw_data(data, field, plain_types) if field.stop - field.inside >= LEAST_NBYTES else None
        if raw is None:
            continue
        nbytes = field.stop - field.inside - (raw.stop - raw.start)
        pieces += [data[kept : field.start], _key(INITIALIZER), _varint_bytes(nbytes)]
        pieces += [data[field.inside : raw.start], data[raw.stop : field.stop]]
        lifted[number] = data[raw.inside : raw.stop]
        kept = field.stop
    pieces.append(data[kept : graph.stop])
    return pieces, lifted


def _raw_data(data: memoryview, tensor: _Field, plain_types: frozenset[int]) -> _Field | None:
    """The raw data of a TensorProto that has it once, for elements of one of `plain_types`."""
    if tensor.wire != LENGTH:
        raise NotUnderstood
    fields = list(_fields(data, tensor.inside, tensor.stop, MOST_TENSOR_FIELDS))
    raw = [field for field in fields if field.number == RAW_DATA]
    kinds = [field.value for field in fields if field.number == DATA_TYPE and field.wire == VARINT]
    found = len(raw) == len(kinds) == 1 and raw[0].wire == LENGTH and kinds[0] in plain_types
    return raw[0] if found else None


def _fields(data: memoryview, at: int, end: int, most: int = MOST_FIELDS) -> Iterator[_Field]:
    """The fields of a message; NotUnderstood where they do not end at `end`, or are too many to look at from Python."""
    for _ in range(most + 1):
        if at == end:
            return
        start = at
        key, at = _varint(data, at, end)
        value, inside = 0, at
        wire = key & 7
        if wire == VARINT:
            value, at = _varint(data, at, end)
        elif wire == LENGTH:
            nbytes, inside = _varint(data, at, end)
            at = inside + nbytes
        elif wire in FIXED:
            at += FIXED[wire]
        else:
            raise NotUnderstood
        if at > end:
            raise NotUnderstood
        yield _Field(key >> 3, wire, start, inside, at, value)
    raise NotUnderstood


def _varint(data: memoryview, at: int, end: int) -> tuple[int, int]:
    """(the number at `at`, where it ends)."""
    value = 0
    for i in range(10):
        if at + i >= end:
            break
        byte = data[at + i]
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, at + i + 1
    raise NotUnderstood


def _varint_bytes(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)


def _key(number: int) -> bytes:
    return _varint_bytes(number << 3 | LENGTH)
