"""Mutations of model files: bytes, protobuf fields of every kind, and what only an ONNX model has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from numpy.random import Generator
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from tests.fuzz_folder import LOCATIONS
from tests.fuzz_seeds import Seed, seed

INTEGERS = (0, 1, -1, 2, 3, 7, 8, 11, 13, 21, 64, 1000, 2**16, 2**31 - 1, 2**31, -(2**31), 2**32, 10**9, 2**40, 2**62,
            2**63 - 1, -(2**63))  # fmt: skip
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 1e-30, 1e30, 3.4e38, -3.4e38, float("nan"), float("inf"), float("-inf"))
TEXTS = (
    "", "x", "y", "?", "N", "-1", "0", "N*N", "N//0", "N%M-1", "(" * 300, "a" * 5000, "9" * 5000, "9**9**9", "\0",
    "../x", "é\u202e", "import os", "SAME_UPPER", "reflect", "linear", "NOTSET", "sum", "LSTM", "i,ij->", "0" * 20,
)  # fmt: skip
INTEGER_KINDS = (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT32,
                 FieldDescriptor.CPPTYPE_UINT64, FieldDescriptor.CPPTYPE_ENUM)  # fmt: skip
OPERATORS = {(schema.domain, schema.name): sorted(schema.attributes) for schema in onnx.defs.get_all_schemas()}
NAMES = sorted(OPERATORS)
MAX_MUTATIONS = 4


def mutated(generator: Generator) -> tuple[Seed, bytes, str]:
    """(what it was, the bytes of the mutated model, the names of the mutations)."""
    origin = seed(generator)
    proto = ModelProto.FromString(origin.model)
    names = []
    for _ in range(1 + int(generator.integers(MAX_MUTATIONS))):
        mutation = pick(generator, MUTATIONS)
        names.append(mutation.__name__)
        mutation(generator, proto)
    data = proto.SerializeToString()
    if generator.random() < 0.15:
        damage = pick(generator, DAMAGES)
        names.append(damage.__name__)
        data = damage(generator, data)
    return origin, data, " + ".join(names)


def pick(generator: Generator, items: Any) -> Any:
    """One of `items`."""
    return items[int(generator.integers(len(items)))]


def flipped(generator: Generator, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(1 + int(generator.integers(8))):
        changed[int(generator.integers(len(changed)))] ^= 1 << int(generator.integers(8))
    return bytes(changed)


def truncated(generator: Generator, data: bytes) -> bytes:
    return data[: int(generator.integers(len(data)))]


def spliced(generator: Generator, data: bytes) -> bytes:
    """A piece of the file once more somewhere else."""
    start, stop, place = sorted(int(i) for i in generator.integers(len(data) + 1, size=3))
    return data[:place] + data[start:stop] + data[place:]


def overwritten(generator: Generator, data: bytes) -> bytes:
    place, length = int(generator.integers(len(data))), 1 + int(generator.integers(16))
    return data[:place] + generator.bytes(length) + data[place + length :]


def change_field(generator: Generator, proto: ModelProto) -> None:
    """One field of one message, of any kind, to another value of its type."""
    message = _any_message(generator, proto)
    field = pick(generator, message.DESCRIPTOR.fields)
    (_change_list if field.is_repeated else _change_one)(generator, message, field)


def change_set_field(generator: Generator, proto: ModelProto) -> None:
    """As change_field, among the fields that the file sets."""
    message = _any_message(generator, proto)
    fields = [field for field, _ in message.ListFields()]
    if fields:
        field = pick(generator, fields)
        (_change_list if field.is_repeated else _change_one)(generator, message, field)


def swap_fields(generator: Generator, proto: ModelProto) -> None:
    """The same field of two messages of one type, exchanged."""
    first, second = _two_alike(generator, proto)
    field = pick(generator, first.DESCRIPTOR.fields).name
    whole = first.__class__(), first.__class__()
    for copy, source in zip(whole, (second, first), strict=True):
        copy.CopyFrom(source)
    for target, source in zip((first, second), whole, strict=True):
        target.ClearField(field)
        only = target.__class__()
        only.CopyFrom(source)
        for other in only.DESCRIPTOR.fields:
            if other.name != field:
                only.ClearField(other.name)
        target.MergeFrom(only)


def replace_message(generator: Generator, proto: ModelProto) -> None:
    """A part of the model by a copy of another part of the same type."""
    first, second = _two_alike(generator, proto)
    copy = second.__class__()
    copy.CopyFrom(second)
    first.CopyFrom(copy)


def change_name(generator: Generator, proto: ModelProto) -> None:
    """An input or output of a node: dangling, repeated, made later (perhaps a cycle), or none."""
    node = _any_of(generator, proto, "NodeProto")
    if node is None:
        return
    names = pick(generator, (node.input, node.output))
    nodes = [message for message in _messages(proto) if message.DESCRIPTOR.name == "NodeProto"]
    known = [name for other in nodes for name in (*other.input, *other.output)]
    new = pick(generator, (*known, "nothing makes this", "", *TEXTS[:3]))
    if names and generator.random() < 0.8:
        names[int(generator.integers(len(names)))] = new
    else:
        names.append(new)


def change_operator(generator: Generator, proto: ModelProto) -> None:
    node = _any_of(generator, proto, "NodeProto")
    if node is not None:
        node.domain, node.op_type = pick(generator, NAMES)


def change_opset(generator: Generator, proto: ModelProto) -> None:
    del proto.opset_import[:]
    for domain in ("", "ai.onnx.ml", "com.microsoft", "local", "ai.onnx")[: 1 + int(generator.integers(5))]:
        proto.opset_import.append(helper.make_opsetid(domain, int(generator.integers(-1, 28))))


def change_attribute(generator: Generator, proto: ModelProto) -> None:
    """An attribute of a node to a value of any type, or one more, or one fewer."""
    node = _any_of(generator, proto, "NodeProto")
    if node is None:
        return
    if node.attribute and generator.random() < 0.2:
        del node.attribute[int(generator.integers(len(node.attribute)))]
        return
    known = [attribute.name for attribute in node.attribute] + OPERATORS.get((node.domain, node.op_type), [])
    name = pick(generator, known or ["axis"])
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    graphs = [message for message in _messages(proto) if isinstance(message, GraphProto)]
    value = pick(generator, (_integer, _integers, _float, _floats, _text, _tensor))(generator)
    attribute = helper.make_attribute(name, value if generator.random() < 0.9 else pick(generator, graphs))
    if generator.random() < 0.1:
        attribute.type = int(generator.integers(15))
    del node.attribute[:]
    node.attribute.extend([*kept, attribute])


def make_constant(generator: Generator, proto: ModelProto) -> None:
    """An input of the graph as an initializer, with contents of all kinds."""
    graph = proto.graph
    if not graph.input:
        return
    port = pick(generator, graph.input)
    kind = port.type.tensor_type
    shape = [dim.dim_value if 0 <= dim.dim_value < 100 else 2 for dim in kind.shape.dim]
    graph.initializer.append(_tensor_of(generator, kind.elem_type, shape, port.name))


def make_input(generator: Generator, proto: ModelProto) -> None:
    """An initializer as an input of open or lying shape."""
    graph = proto.graph
    if not graph.initializer:
        return
    place = int(generator.integers(len(graph.initializer)))
    tensor = graph.initializer[place]
    shape = [pick(generator, (extent, "N", None, 2**33)) for extent in tensor.dims]
    graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, shape))
    del graph.initializer[place]


def change_contents(generator: Generator, proto: ModelProto) -> None:
    """The contents of a tensor, or its extents, or its length in bytes."""
    tensor = _any_of(generator, proto, "TensorProto")
    if tensor is None:
        return
    kind = int(generator.integers(3))
    if kind == 0 and max(tensor.dims, default=0) < 100 and len(tensor.dims) < 5:
        shape = [max(0, extent) for extent in tensor.dims]
        tensor.CopyFrom(_tensor_of(generator, tensor.data_type, shape, tensor.name))
    elif kind == 1:
        del tensor.dims[:]
        tensor.dims.extend(_integers(generator))
    else:
        tensor.raw_data = generator.bytes(int(generator.integers(80)))


def point_outside(generator: Generator, proto: ModelProto) -> None:
    """A tensor's contents anywhere: links, devices, other folders, offsets beyond every file."""
    tensor = _any_of(generator, proto, "TensorProto")
    if tensor is None:
        return
    tensor.data_location = TensorProto.EXTERNAL
    for field in ("raw_data", "float_data", "int32_data", "int64_data", "external_data"):
        tensor.ClearField(field)
    fields = {"location": pick(generator, LOCATIONS), "offset": str(pick(generator, (0, 64, *INTEGERS)))}
    if generator.random() < 0.5:
        fields["length"] = pick(generator, ("64", "-64", "x", "", "1e3", str(2**63), "0x10", "٣"))
    for key, value in fields.items():
        tensor.external_data.add(key=key, value=value)


def shuffle_nodes(generator: Generator, proto: ModelProto) -> None:
    graph = _any_of(generator, proto, "GraphProto")
    if graph is None:
        return
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node]
    generator.shuffle(nodes)  # type: ignore[arg-type]
    del graph.node[:]
    graph.node.extend(nodes)


def graft(generator: Generator, proto: ModelProto) -> None:
    """The nodes and initializers of another model, whose names may meet those of this one."""
    other = ModelProto.FromString(seed(generator).model).graph
    proto.graph.node.extend(other.node)
    proto.graph.initializer.extend(other.initializer)
    if generator.random() < 0.7:
        proto.graph.input.extend(other.input)
    if generator.random() < 0.7:
        proto.graph.output.extend(other.output)


def _any_message(generator: Generator, proto: ModelProto) -> Message:
    """A message of a type chosen first, so that rare kinds of message are as likely as common ones."""
    kinds: dict[str, list[Message]] = {}
    for message in _messages(proto):
        kinds.setdefault(message.DESCRIPTOR.name, []).append(message)
    found: Message = pick(generator, kinds[pick(generator, sorted(kinds))])
    return found


def _two_alike(generator: Generator, proto: ModelProto) -> tuple[Message, Message]:
    first = _any_message(generator, proto)
    alike = [message for message in _messages(proto) if message.DESCRIPTOR is first.DESCRIPTOR]
    return first, pick(generator, alike)


def _any_of(generator: Generator, proto: ModelProto, kind: str) -> Any:
    found = [message for message in _messages(proto) if message.DESCRIPTOR.name == kind]
    return pick(generator, found) if found else None


def _messages(proto: Message) -> Iterator[Message]:
    stack = [proto]
    while stack:
        message = stack.pop()
        yield message
        for field, value in message.ListFields():
            if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
                stack.extend(value if field.is_repeated else [value])


def _change_one(generator: Generator, message: Message, field: FieldDescriptor) -> None:
    if generator.random() < 0.2:
        message.ClearField(field.name)
    elif field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        getattr(message, field.name).SetInParent()
    else:
        _assign(generator, field, lambda value: setattr(message, field.name, value))


def _change_list(generator: Generator, message: Message, field: FieldDescriptor) -> None:
    items = getattr(message, field.name)
    action = int(generator.integers(4)) if len(items) else 3
    if action == 0:
        del items[int(generator.integers(len(items))) :]
    elif field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        copy = items.add()
        if len(items) > 1:
            copy.CopyFrom(items[int(generator.integers(len(items) - 1))])
    elif action == 1:
        _assign(generator, field, lambda value: items.__setitem__(int(generator.integers(len(items))), value))
    elif action == 2:
        items.extend(list(items)[: 1 + int(generator.integers(len(items)))])
    else:
        _assign(generator, field, items.append)


def _assign(generator: Generator, field: FieldDescriptor, give: Callable[[Any], None]) -> None:
    """Give a value of the field's type; one that its width does not take is left out."""
    try:
        if field.cpp_type in INTEGER_KINDS:
            give(_integer(generator))
        elif field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
            give(_float(generator))
        elif field.type == FieldDescriptor.TYPE_BYTES:
            give(pick(generator, (b"", b"\xff\xfe", generator.bytes(40), _text(generator).encode())))
        else:
            give(_text(generator))
    except (ValueError, TypeError, DecodeError):
        return


def _integer(generator: Generator) -> int:
    return int(pick(generator, INTEGERS)) if generator.random() < 0.6 else int(generator.integers(-4, 30))


def _integers(generator: Generator) -> list[int]:
    return [_integer(generator) for _ in range(1 + int(generator.integers(5)))]


def _float(generator: Generator) -> float:
    return float(pick(generator, FLOATS))


def _floats(generator: Generator) -> list[float]:
    return [_float(generator) for _ in range(1 + int(generator.integers(5)))]


def _text(generator: Generator) -> str:
    return str(pick(generator, TEXTS))


def _tensor(generator: Generator) -> TensorProto:
    shape = [int(extent) for extent in generator.integers(4, size=int(generator.integers(4)))]
    return _tensor_of(generator, pick(generator, (1, 7, 6, 9, 10, 3, 2, 8, 16, 22)), shape, "t")


def _tensor_of(generator: Generator, kind: int, shape: list[int], name: str) -> TensorProto:
    """A tensor of element type `kind` (float where that is unknown) with common and extreme contents."""
    size = int(np.prod(shape))
    if kind == TensorProto.STRING:
        return helper.make_tensor(name, kind, shape, [_text(generator).encode() for _ in range(size)])
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind))
    except KeyError:
        dtype = np.dtype(np.float32)
    values = np.array([_integer(generator) for _ in range(size)], object)
    if dtype.kind == "f" or generator.random() < 0.3:
        values = np.array([pick(generator, (0, 1, 2, 3, -1, 0.5)) for _ in range(size)], object)
    with np.errstate(all="ignore"):
        wide = values.astype(np.float64) if dtype.kind not in "iu" else values.astype(np.int64)
        return numpy_helper.from_array(wide.astype(dtype).reshape(shape), name)


MUTATIONS = (
    change_field, change_set_field, change_set_field, change_set_field, swap_fields, replace_message, change_name,
    change_name, change_operator, change_opset, change_attribute, change_attribute, change_attribute, make_constant,
    make_constant, make_input, change_contents, change_contents, point_outside, shuffle_nodes, graft,
)  # fmt: skip
DAMAGES = (flipped, flipped, truncated, spliced, overwritten)
