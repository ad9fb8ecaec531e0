"""Reading model files: what is accepted, and that nothing else is."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from gpu_engine.errors import InvalidModel, UnsafeModel, UnsupportedModel
from gpu_engine.frontend.reader import NEWEST_OPSET, read


def small_model(opset: int = 17, **tensor: object) -> onnx.ModelProto:
    """y = x + w with w [3] of float32."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    w = helper.make_tensor("w", TensorProto.FLOAT, [3], np.arange(3, dtype=np.float32))
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"], name="sum")], "g", [x], [y], [w])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def external_model(location: str, offset: int = 0, length: int = 12, dims: tuple[int, ...] = (3,)) -> onnx.ModelProto:
    proto = small_model()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("float_data")
    tensor.ClearField("dims")
    tensor.dims.extend(dims)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return proto


def test_path_bytes_proto_and_pathlike_agree(tmp_path: Path) -> None:
    proto = small_model()
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    for source in (path, str(path), proto.SerializeToString(), proto):
        model = read(source)
        assert model.graph.nodes[0].op_type == "Add"
        assert model.graph.inputs[0].shape == ("N", 3)
        np.testing.assert_array_equal(model.graph.initializers["w"], [0, 1, 2])


@pytest.mark.parametrize("data", [b"", b"abc", b"\x08\x07", bytes(range(256)), small_model().SerializeToString()[:-7]])
def test_bytes_that_are_no_model(data: bytes) -> None:
    with pytest.raises(InvalidModel):
        read(data)


def test_an_opset_newer_than_onnx_knows() -> None:
    with pytest.raises(UnsupportedModel, match=str(NEWEST_OPSET)):
        read(small_model(NEWEST_OPSET + 1))


def test_external_data_is_mapped(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "w.bin").write_bytes(b"skip" + np.float32([7, 8, 9]).tobytes())
    (tmp_path / "m.onnx").write_bytes(external_model("sub/w.bin", offset=4).SerializeToString())
    array = read(tmp_path / "m.onnx").graph.initializers["w"]
    np.testing.assert_array_equal(array, [7, 8, 9])
    assert not array.flags.writeable and not array.flags.owndata


def outside(tmp_path: Path) -> Path:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(12))
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


@pytest.mark.parametrize("location", ["../secret.bin", "a/../../secret.bin", "", ".", "..", "w\\..\\x", "w\0"])
def test_external_data_outside_the_folder(tmp_path: Path, location: str) -> None:
    folder = outside(tmp_path)
    (folder / "m.onnx").write_bytes(external_model(location).SerializeToString())
    with pytest.raises((UnsafeModel, InvalidModel)):
        read(folder / "m.onnx")


@pytest.mark.parametrize("kind", ["absolute", "symlink", "symlinked folder", "hard link", "fifo"])
def test_external_data_through_links(tmp_path: Path, kind: str) -> None:
    folder = outside(tmp_path)
    location = "w.bin"
    match kind:
        case "absolute":
            location = str(tmp_path / "secret.bin")
        case "symlink":
            (folder / "w.bin").symlink_to(tmp_path / "secret.bin")
        case "symlinked folder":
            (folder / "up").symlink_to(tmp_path)
            location = "up/secret.bin"
        case "hard link":
            os.link(tmp_path / "secret.bin", folder / "w.bin")
        case "fifo":
            os.mkfifo(folder / "w.bin")
    (folder / "m.onnx").write_bytes(external_model(location).SerializeToString())
    with pytest.raises(UnsafeModel):
        read(folder / "m.onnx")


@pytest.mark.parametrize(
    "fields",
    [{"offset": 4}, {"offset": -4}, {"length": 8}, {"length": 1 << 62}, {"dims": (1 << 40,)}, {"dims": (-3,)}],
    ids=str,
)
def test_external_data_that_does_not_fit(tmp_path: Path, fields: dict[str, int]) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(12))
    (tmp_path / "m.onnx").write_bytes(external_model("w.bin", **fields).SerializeToString())  # type: ignore[arg-type]
    with pytest.raises(InvalidModel):
        read(tmp_path / "m.onnx")


def test_external_data_of_a_model_from_memory() -> None:
    with pytest.raises(InvalidModel, match="pass its path"):
        read(external_model("w.bin").SerializeToString())


def test_four_bit_external_data(tmp_path: Path) -> None:
    proto = external_model("w.bin", length=2)
    proto.graph.initializer[0].data_type = TensorProto.INT4
    (tmp_path / "w.bin").write_bytes(bytes([0x71, 0x0F]))
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    np.testing.assert_array_equal(read(tmp_path / "m.onnx").graph.initializers["w"].astype(int), [1, 7, -1])


def test_two_initializers_of_one_name() -> None:
    proto = small_model()
    proto.graph.initializer.append(proto.graph.initializer[0])
    assert list(read(proto).graph.initializers) == ["w"]
    proto.graph.initializer[1].float_data[0] = 5
    with pytest.raises(InvalidModel, match="two different initializers are called 'w'"):
        read(proto)


def test_sparse_initializer() -> None:
    proto = small_model()
    del proto.graph.initializer[:]
    values = helper.make_tensor("w", TensorProto.FLOAT, [2], [5.0, 6.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [2], [0, 2])
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [3]))
    np.testing.assert_array_equal(read(proto).graph.initializers["w"], [5, 0, 6])


@pytest.mark.parametrize("dims", [(1 << 40,), (-1,), (2,)], ids=str)
def test_an_initializer_whose_extents_lie(dims: tuple[int, ...]) -> None:
    proto = small_model()
    del proto.graph.initializer[0].dims[:]
    proto.graph.initializer[0].dims.extend(dims)
    with pytest.raises(InvalidModel):
        read(proto)
