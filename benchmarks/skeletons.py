"""Models without their weights, for machines that nothing large can be brought to: `python -m benchmarks.skeletons`.

A skeleton is the model file with every large initializer replaced by its mean and deviation. Filled again, anywhere, it
has random weights of the same distribution and the same cost. `converted` computes in 16 bits what a model of float32
computes. Skeletons lie in an ignored folder.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, helper, numpy_helper

from benchmarks.fetch import ROOT, Unavailable
from benchmarks.models import MODELS

FOLDER = ROOT / ".cache" / "skeletons"
SMALLEST_NBYTES = 4096
NORMAL, UNIFORM = "normal", "uniform"
TIMED = (
    "resnet50", "mobilenetv2", "efficientnet_b0", "vit_base", "bert_base", "distilbert", "whisper_tiny_encoder", "unet",
)  # fmt: skip


def stripped(model: ModelProto) -> ModelProto:
    """A copy whose initializers of `SMALLEST_NBYTES` and more are descriptions.

    Vectors of floats stay: a variance that is drawn anew may be next to 0, and activations then explode.
    """
    skeleton = ModelProto()
    skeleton.CopyFrom(model)
    for tensor in skeleton.graph.initializer:
        array = numpy_helper.to_array(tensor)
        vector = array.ndim == 1 and array.dtype.kind == "f"
        if array.nbytes >= SMALLEST_NBYTES and array.dtype.kind in "fiu" and not vector:
            tensor.CopyFrom(_described(tensor.name, array))
    return skeleton


def _described(name: str, array: np.ndarray) -> TensorProto:
    if array.dtype.kind == "f":
        kind, first, second = NORMAL, float(array.mean(dtype=np.float64)), float(array.std(dtype=np.float64))
    else:
        kind, first, second = UNIFORM, int(array.min()), int(array.max())
    return TensorProto(
        name=name,
        dims=array.shape,
        data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
        doc_string=f"{kind} {first!r} {second!r}",
    )


def filled(skeleton: ModelProto, gain: float = 1.0) -> ModelProto:
    """A copy with weights; the same ones every time. Floats are `gain` times as large as the model's were."""
    model = ModelProto()
    model.CopyFrom(skeleton)
    for tensor in model.graph.initializer:
        kind, _, numbers = tensor.doc_string.partition(" ")
        if kind in (NORMAL, UNIFORM) and not tensor.raw_data:
            tensor.CopyFrom(numpy_helper.from_array(_drawn(tensor, kind, *numbers.split(), gain), tensor.name))
    return model


def _drawn(tensor: TensorProto, kind: str, first: str, second: str, gain: float) -> np.ndarray:
    random = np.random.default_rng(zlib.crc32(tensor.name.encode()))
    dtype, shape = helper.tensor_dtype_to_np_dtype(tensor.data_type), tuple(tensor.dims)
    if kind == UNIFORM:
        return random.integers(int(first), int(second), shape, dtype, endpoint=True)
    values = random.standard_normal(shape, np.float32) * np.float32(second) + np.float32(first)
    return (values * np.float32(gain)).astype(dtype)


def converted(model: ModelProto, to: int) -> ModelProto:
    """A copy that takes, computes and gives tensors of the type `to` (a number of ONNX) where the model has float32."""
    result = ModelProto()
    result.CopyFrom(model)
    for graph in _graphs(result.graph):
        del graph.value_info[:]
        kept = {node.input[i] for node in graph.node if node.op_type == "Resize" for i in (1, 2) if i < len(node.input)}
        for tensor in graph.initializer:
            if tensor.name not in kept:
                _convert(tensor, to)
        for info in (*graph.input, *graph.output):
            if info.type.tensor_type.elem_type == TensorProto.FLOAT:
                info.type.tensor_type.elem_type = to
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == AttributeProto.TENSOR and not kept & set(node.output):
                    _convert(attribute.t, to)
                if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                    attribute.i = to
    return result


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                if body.node:
                    yield from _graphs(body)


def _convert(tensor: TensorProto, to: int) -> None:
    if tensor.data_type != TensorProto.FLOAT:
        return
    if tensor.doc_string and not tensor.raw_data:
        tensor.data_type = to
        return
    array, dtype = numpy_helper.to_array(tensor), helper.tensor_dtype_to_np_dtype(to)
    largest = float(ml_dtypes.finfo(dtype).max)
    narrow = np.where(np.isfinite(array), np.clip(array, -largest, largest), array).astype(dtype)
    tensor.CopyFrom(numpy_helper.from_array(narrow, tensor.name))


def write(names: Sequence[str]) -> Iterator[Path]:
    """The skeletons of models of the catalogue, which are fetched or exported where they are missing."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = FOLDER / f"{name}.onnx"
        path.write_bytes(stripped(onnx.load(MODELS[name].path())).SerializeToString())
        yield path


def load(name: str, folder: Path = FOLDER, gain: float = 1.0) -> ModelProto:
    """A skeleton that `write` wrote, `filled`; `Unavailable` where it was not written."""
    path = folder / f"{name}.onnx"
    if not path.exists():
        raise Unavailable(f"{path} is not there: python -m benchmarks.skeletons writes it where models can be had")
    return filled(onnx.load(path), gain)


if __name__ == "__main__":
    for path in write(sys.argv[1:] or TIMED):
        print(f"{path} {path.stat().st_size:,} bytes")
