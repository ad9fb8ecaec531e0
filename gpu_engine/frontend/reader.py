"""Read ONNX files and protobufs into a Model: the only importer of `onnx`."""

from __future__ import annotations

import math
import mmap
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, numpy_helper

from gpu_engine.errors import InvalidModel, ModelError, OutOfMemory, UnsupportedModel
from gpu_engine.frontend.external_data import ExternalData
from gpu_engine.frontend.model import (
    AttributeReference,
    DimText,
    Model,
    ModelFunction,
    ModelGraph,
    ModelNode,
    TensorInfo,
)
from gpu_engine.frontend.wire import slim
from gpu_engine.ir.dtypes import ONNX_NUMBER, STRING, from_onnx
from gpu_engine.ir.graph import TensorType

ModelSource: TypeAlias = str | bytes | os.PathLike[str] | ModelProto
NEWEST_OPSET = onnx.defs.onnx_opset_version()
MAX_DENSE_NBYTES = 1 << 30
PLAIN_TYPES = frozenset(
    (
        TensorProto.FLOAT,
        TensorProto.DOUBLE,
        TensorProto.FLOAT16,
        TensorProto.BFLOAT16,
        TensorProto.INT8,
        TensorProto.UINT8,
        TensorProto.INT32,
        TensorProto.INT64,
    )
)
"""Element types whose raw data is an array as it is."""
Lifted: TypeAlias = Mapping[int, memoryview]
Array = NDArray[Any]


def read(source: ModelSource) -> Model:
    """The model in a file (a path), in bytes, or in a ModelProto.

    External data is read from the model's own folder only, memory-mapped. Raises InvalidModel, UnsupportedModel,
    UnsafeModel, or FileNotFoundError for a path that does not exist.
    """
    proto, folder, lifted = _parse(source)
    try:
        return _model(proto, ExternalData(folder), lifted)
    except ModelError:
        raise
    except MemoryError as error:
        raise OutOfMemory(f"no memory is left to read the model: {error}") from error
    except Exception as error:
        raise InvalidModel(f"the model is malformed: {type(error).__name__}: {error}") from error


def _parse(source: ModelSource) -> tuple[ModelProto, Path | None, Lifted]:
    """The model, the folder that it lies in, and those of its weights that stay where they are."""
    if isinstance(source, ModelProto):
        return source, None, {}
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.is_dir():
            raise InvalidModel(f"{path} is a folder, not a model file")
        data, folder = _contents(path), path.resolve().parent
    elif isinstance(source, (bytes, bytearray, memoryview)):
        data, folder = memoryview(bytes(source)), None
    else:
        raise TypeError(f"a model is a path, bytes or a ModelProto, got {type(source).__name__}")
    found = slim(data, PLAIN_TYPES) if sys.byteorder == "little" else None
    proto = ModelProto()
    try:
        proto.ParseFromString(data if found is None else found.data)
    except DecodeError as error:
        raise InvalidModel(f"{len(data)} bytes that are not an ONNX model: {error}") from error
    return proto, folder, {} if found is None else found.lifted


def _contents(path: Path) -> memoryview:
    """A file's bytes, memory-mapped where the system can."""
    with path.open("rb") as file:
        try:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError):
            return memoryview(file.read())


def _model(proto: ModelProto, external: ExternalData, lifted: Lifted) -> Model:
    if not proto.HasField("graph") or not (proto.ir_version or proto.opset_import):
        raise InvalidModel("the file holds no ONNX graph")
    opsets = _opsets(proto.opset_import) or {"": 1}
    if opsets.get("", 1) > NEWEST_OPSET:
        raise UnsupportedModel(
            f"opset {opsets['']} is newer than {NEWEST_OPSET}, the newest that onnx {onnx.__version__} knows"
        )
    return Model(
        graph=_graph(proto.graph, external, lifted),
        opsets=opsets,
        functions={(_domain(f.domain), _name(f.name)): _function(f, external) for f in proto.functions},
        metadata={_name(entry.key): _name(entry.value) for entry in proto.metadata_props},
        ir_version=proto.ir_version,
        producer=f"{proto.producer_name} {proto.producer_version}".strip(),
    )


def _name(text: str | bytes) -> str:
    """A string of the file; protobuf gives bytes where they are no text."""
    if isinstance(text, bytes):
        raise InvalidModel(f"{text[:80]!r} is not text in UTF-8")
    return text


def _names(texts: Iterable[str | bytes]) -> tuple[str, ...]:
    return tuple(map(_name, texts))


def _domain(domain: str | bytes) -> str:
    return "" if domain == "ai.onnx" else _name(domain)


def _opsets(imports: Any) -> dict[str, int]:
    opsets = {_domain(entry.domain): entry.version for entry in imports}
    wrong = [f"{domain or 'ai.onnx'} {version}" for domain, version in opsets.items() if not 0 <= version < 1 << 31]
    if wrong:
        raise InvalidModel(f"the opset {', '.join(wrong)} does not exist")
    return opsets


def _graph(proto: GraphProto, external: ExternalData, lifted: Lifted = MappingProxyType({})) -> ModelGraph:
    initializers: dict[str, NDArray[Any]] = {}
    for number, tensor in enumerate(proto.initializer):
        _add(initializers, _name(tensor.name), tensor_array(tensor, external, lifted.get(number)))
    for sparse in proto.sparse_initializer:
        _add(initializers, _name(sparse.values.name), _dense(sparse, external))
    return ModelGraph(
        nodes=tuple(_node(node, external) for node in proto.node),
        inputs=tuple(map(_tensor_info, proto.input)),
        outputs=tuple(map(_tensor_info, proto.output)),
        initializers=initializers,
        name=_name(proto.name),
    )


def _add(initializers: dict[str, NDArray[Any]], name: str, array: NDArray[Any]) -> None:
    known = initializers.setdefault(name, array)
    if known is not array and not (known.dtype == array.dtype and np.array_equal(known, array)):
        raise InvalidModel(f"two different initializers are called {name!r}")


def _node(proto: NodeProto, external: ExternalData) -> ModelNode:
    attributes = {_name(attribute.name): _attribute(attribute, external) for attribute in proto.attribute}
    return ModelNode(
        _name(proto.op_type), _domain(proto.domain), _names(proto.input), _names(proto.output), attributes,
        _name(proto.name),
    )  # fmt: skip


def _function(proto: onnx.FunctionProto, external: ExternalData) -> ModelFunction:
    return ModelFunction(
        domain=_domain(proto.domain),
        name=_name(proto.name),
        inputs=_names(proto.input),
        outputs=_names(proto.output),
        nodes=tuple(_node(node, external) for node in proto.node),
        opsets=_opsets(proto.opset_import),
        defaults={_name(attribute.name): _attribute(attribute, external) for attribute in proto.attribute_proto},
    )


def _attribute(proto: AttributeProto, external: ExternalData) -> Any:
    if proto.ref_attr_name:
        return AttributeReference(_name(proto.ref_attr_name))
    match proto.type:
        case AttributeProto.FLOAT:
            return proto.f
        case AttributeProto.INT:
            return proto.i
        case AttributeProto.STRING:
            return _text(proto.s)
        case AttributeProto.TENSOR:
            return tensor_array(proto.t, external)
        case AttributeProto.GRAPH:
            return _graph(proto.g, external)
        case AttributeProto.SPARSE_TENSOR:
            return _dense(proto.sparse_tensor, external)
        case AttributeProto.FLOATS:
            return tuple(proto.floats)
        case AttributeProto.INTS:
            return tuple(proto.ints)
        case AttributeProto.STRINGS:
            return tuple(map(_text, proto.strings))
        case AttributeProto.TENSORS:
            return tuple(tensor_array(tensor, external) for tensor in proto.tensors)
        case AttributeProto.GRAPHS:
            return tuple(_graph(graph, external) for graph in proto.graphs)
        case AttributeProto.TYPE_PROTO:
            return proto.tp.tensor_type.elem_type
    raise InvalidModel(f"attribute {proto.name!r} has the unknown type {proto.type}")


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _tensor_info(proto: ValueInfoProto) -> TensorInfo:
    declared, wrappers, key = proto.type, [], None
    while (wrapper := declared.WhichOneof("value")) in ("sequence_type", "optional_type", "map_type"):
        wrappers.append(wrapper.removesuffix("_type"))
        inside = getattr(declared, wrapper)
        key = from_onnx(inside.key_type) if wrapper == "map_type" and inside.key_type else key
        declared = inside.value_type if wrapper == "map_type" else inside.elem_type
    kind = declared.tensor_type
    shape: tuple[DimText, ...] | None = None
    if kind.HasField("shape"):
        shape = tuple(map(_extent, kind.shape.dim))
    dtype = from_onnx(kind.elem_type) if kind.elem_type else None
    return TensorInfo(_name(proto.name), dtype, shape, tuple(wrappers), key)


def _extent(dim: onnx.TensorShapeProto.Dimension) -> DimText:
    if dim.HasField("dim_value"):
        return dim.dim_value if dim.dim_value >= 0 else None
    return _name(dim.dim_param) or None


def tensor_array(proto: TensorProto, external: ExternalData, raw: memoryview | None = None) -> Array:
    """The contents of a TensorProto, read-only where they stay memory-mapped: external data, and `raw` if that is the
    raw data, taken out of the TensorProto."""
    dtype, shape = from_onnx(proto.data_type), tuple(proto.dims)
    if any(extent < 0 for extent in shape):
        raise InvalidModel(f"tensor {proto.name!r} has the extents {list(shape)}")
    if proto.data_location == TensorProto.EXTERNAL:
        fields = {_name(entry.key): _name(entry.value) for entry in proto.external_data}
        return external.array(fields, dtype, shape, proto.name)
    if raw is not None:
        return np.frombuffer(raw, dtype).reshape(shape)
    array = numpy_helper.to_array(proto)
    if dtype == STRING:
        flat = [item.decode() if isinstance(item, bytes) else str(item) for item in array.ravel()]
        array = np.array([*flat, None], object)[:-1].reshape(shape)
    return np.asarray(array, dtype)


def _dense(proto: onnx.SparseTensorProto, external: ExternalData) -> Array:
    values, indices = tensor_array(proto.values, external), tensor_array(proto.indices, external)
    nbytes = math.prod(proto.dims) * values.dtype.itemsize
    if not 0 <= nbytes <= MAX_DENSE_NBYTES or (indices < 0).any():
        raise InvalidModel(
            f"a sparse tensor of the extents {list(proto.dims)}, {nbytes:,} bytes, or of negative indices"
        )
    dense = np.zeros(tuple(proto.dims), values.dtype)
    if indices.ndim == 2:
        dense[tuple(indices.T)] = values
    else:
        dense.ravel()[indices] = values
    return dense


class SpecificationFunctions:
    """The operators' bodies that the ONNX specification itself gives, from the installed `onnx`."""

    def has(self, domain: str, name: str, version: int) -> bool:
        """Whether the operator exists at this opset and has a body."""
        schema = _schema(domain, name, version)
        return schema is not None and (schema.has_function or schema.has_context_dependent_function)

    def body(self, node: ModelNode, version: int, types: Sequence[TensorType | None]) -> ModelFunction | None:
        """The body for these attributes and input types."""
        schema = _schema(node.domain, node.op_type, version)
        if schema is None:
            return None
        if schema.has_function:
            data = schema.get_function_with_opset_version(_closest(schema.function_opset_versions, version))
        elif schema.has_context_dependent_function:
            chosen = _closest(schema.context_dependent_function_opset_versions, version)
            data = schema.get_context_dependent_function_with_opset_version(
                chosen, _node_proto(node).SerializeToString(), [_type_proto(kind).SerializeToString() for kind in types]
            )
        else:
            return None
        proto = onnx.FunctionProto.FromString(data)
        if not proto.node:
            return None
        function = _function(proto, ExternalData(None))
        defaults = {
            name: _attribute(attribute.default_value, ExternalData(None))
            for name, attribute in schema.attributes.items()
            if attribute.default_value.name
        }
        opsets = {"": version, node.domain: version} | dict(function.opsets)
        return ModelFunction(
            function.domain, function.name, function.inputs, function.outputs, function.nodes, opsets, defaults
        )


@dataclass(frozen=True)
class SpecifiedOperator:
    """An operator as the installed `onnx` knows it: the versions in which it exists, and those that have a body."""

    domain: str
    name: str
    versions: tuple[int, ...]
    bodies: frozenset[int]


def specified_operators() -> list[SpecifiedOperator]:
    """Every operator of the specification that some version does not retire."""
    found: dict[tuple[str, str], dict[int, bool]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if not schema.deprecated:
            body = schema.has_function or schema.has_context_dependent_function
            found.setdefault((schema.domain, schema.name), {})[schema.since_version] = body
    return [
        SpecifiedOperator(*key, tuple(sorted(versions)), frozenset(v for v, body in versions.items() if body))
        for key, versions in found.items()
    ]


def _schema(domain: str, name: str, version: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(name, version, domain)
    except onnx.defs.SchemaError:
        return None


def _closest(versions: Sequence[int], version: int) -> int:
    return max((candidate for candidate in versions if candidate <= version), default=min(versions))


def _node_proto(node: ModelNode) -> NodeProto:
    attributes = {name: _plain(value) for name, value in node.attributes.items()}
    return onnx.helper.make_node(
        node.op_type, list(node.inputs), list(node.outputs), node.name, domain=node.domain or None, **attributes
    )


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return numpy_helper.from_array(value)
    return list(value) if isinstance(value, tuple) else value


def _type_proto(kind: TensorType | None) -> onnx.TypeProto:
    if kind is None:
        return onnx.TypeProto()
    shape = [extent if isinstance(extent, int) else str(extent) for extent in kind.shape]
    return onnx.helper.make_tensor_type_proto(ONNX_NUMBER[kind.dtype], shape)
