"""Large weights are taken out of a model's bytes; what protobuf makes of the rest, and of them, is the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

import gpu_engine
from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.reader import PLAIN_TYPES, read
from gpu_engine.frontend.wire import LEAST_NBYTES, Slim, slim

Array = NDArray[Any]
LARGE = np.random.default_rng(0).standard_normal((LEAST_NBYTES // 16, 8)).astype(np.float32)
ARRAYS: dict[str, Array] = {
    "large": LARGE,
    "small": np.float32([1, 2]),
    "half": LARGE.astype(np.float16),
    "bytes": np.arange(LEAST_NBYTES + 7, dtype=np.int64).astype(np.uint8),
    "empty": np.zeros((0, 5), np.float32),
    "wide": np.arange(LEAST_NBYTES, dtype=np.int64),
    "flags": np.arange(2 * LEAST_NBYTES) % 3 == 0,
}


def model(*extra: TensorProto) -> ModelProto:
    stored = [numpy_helper.from_array(array, name) for name, array in ARRAYS.items()]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 8]) for name in "xy"]
    nodes = [helper.make_node("MatMul", ["x", "square"], ["m"]), helper.make_node("Add", ["m", "bias"], ["y"])]
    weights = {"square": LARGE.T @ LARGE, "bias": LARGE[:1]}
    stored += [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], [*stored, *extra])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def slimmed(data: bytes) -> Slim | None:
    return slim(memoryview(data), PLAIN_TYPES)


def test_large_weights_are_views_of_the_bytes_and_nothing_else_changes() -> None:
    proto = model()
    data = proto.SerializeToString()
    found = slimmed(data)
    assert found is not None and len(found.data) < len(data) // 2
    assert {proto.graph.initializer[i].name for i in found.lifted} == {"large", "half", "bytes", "wide"}
    rest = ModelProto.FromString(found.data)
    for number, raw in found.lifted.items():
        assert not rest.graph.initializer[number].HasField("raw_data")
        rest.graph.initializer[number].raw_data = bytes(raw)
    assert rest == proto


@pytest.mark.parametrize("kind", ["path", "bytes", "proto"])
def test_every_source_reads_the_same(kind: str, tmp_path: Path) -> None:
    proto, path = model(), tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    sources = {"path": path, "bytes": path.read_bytes(), "proto": proto}
    found = read(sources[kind]).graph.initializers
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_what_is_unusual_is_left_to_protobuf() -> None:
    data = model().SerializeToString()
    graph = next(field for field in (ModelProto.FromString(data).graph.SerializeToString(),))
    assert slimmed(data + b"\x3a\x00") is None, "a second graph, which protobuf merges into the first"
    assert slimmed(data[:-1]) is None and slimmed(data + b"\x0b") is None and slimmed(b"") is None
    assert slimmed(b"\x3a" + b"\xff" * 11 + graph) is None
    twice = numpy_helper.from_array(LARGE, "twice").SerializeToString()
    twice += b"\x4a" + b"\x04" + b"\x00" * 4
    assert slimmed(model(TensorProto.FromString(twice)).SerializeToString()) is not None
    body = b"\x2a" + varint(len(twice)) + twice
    assert slimmed(b"\x3a" + varint(len(body)) + body) is None, "the last of two raw data counts"


def varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def test_raw_data_of_another_size_than_the_shape_says() -> None:
    wrong = numpy_helper.from_array(LARGE, "wrong")
    wrong.dims[0] += 1
    with pytest.raises(InvalidModel):
        read(model(wrong).SerializeToString())
    wrong = numpy_helper.from_array(LARGE, "wrong")
    wrong.raw_data += b"\x00"
    with pytest.raises(InvalidModel):
        read(model(wrong).SerializeToString())


@given(st.binary(max_size=300))
def test_bytes_of_any_kind(data: bytes) -> None:
    slimmed(data)


@given(st.data())
def test_damaged_models_read_as_protobuf_reads_them(data: st.DataObject) -> None:
    whole = bytearray(model().SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, min(len(whole), 600) - 1))
        whole[place] = data.draw(st.integers(0, 255))
    found = slimmed(bytes(whole))
    if found is None:
        return
    try:
        expected = ModelProto.FromString(bytes(whole))
    except Exception:
        return
    rest = ModelProto.FromString(found.data)
    for number, raw in found.lifted.items():
        rest.graph.initializer[number].raw_data = bytes(raw)
    assert rest.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


def test_a_file_that_changes_changes_no_engine(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(model(), path)
    x = LARGE[:3]
    with gpu_engine.compile(path, device="cpu") as engine:
        before = engine.run({"x": x})["y"]
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
        with path.open("wb"):
            pass
        np.testing.assert_array_equal(engine.run({"x": x})["y"], before)
