"""The smallest case of every bug that fuzzing found: hostile models get a typed error, soon and in little memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import cpu_fallback.control
import gpu_engine
from gpu_engine import GpuEngineError, InvalidModel, OutOfMemory, UnsupportedModel
from tests.fuzz_hazards import model, node, port

INT64, BOOL = TensorProto.INT64, TensorProto.BOOL
X = np.float32([[1, 2], [3, 4], [5, 6]])


def run(proto: onnx.ModelProto, *inputs: Any) -> Any:
    with gpu_engine.compile(proto.SerializeToString(), device="cpu") as engine:
        return engine.run(list(inputs))


@pytest.mark.parametrize(
    ("name", "attributes", "said"),
    [
        ("Flatten", {"axis": [1]}, "axis of Flatten is a list"),
        ("Flatten", {"axis": 1.5}, "axis of Flatten is float 1.5"),
        ("Flatten", {"axis": "x"}, "axis of Flatten is str 'x'"),
        ("Elu", {"alpha": [1.0, 2.0]}, "alpha of Elu is a list"),
        ("MaxPool", {"kernel_shape": 2}, "kernel_shape of MaxPool is int 2"),
        ("MaxPool", {"kernel_shape": [2.0, 2.0]}, "kernel_shape of MaxPool is a list"),
        ("ReduceMean", {"axes": helper.make_tensor("t", INT64, [1], [0])}, "axes of ReduceMean is a tensor"),
        ("Gelu", {"approximate": b"\xff\xfe"}, "approximate of Gelu is bytes"),
        ("Elu", {"alpha": helper.make_graph([], "g", [], [])}, "alpha of Elu is a graph"),
    ],
)
def test_attributes_of_another_kind(name: str, attributes: dict[str, Any], said: str) -> None:
    opset = 17 if name == "ReduceMean" else 21
    with pytest.raises(InvalidModel, match=said):
        run(model([node(name, ["x"], ["y"], **attributes)], [port("x", 1, 2, 3, 3)], "y", opset=opset))


def test_an_integer_is_a_float_too() -> None:
    y = run(model([node("LeakyRelu", ["x"], ["y"], alpha=2)], [port("x", 3, 2)], "y"), -X)
    np.testing.assert_allclose(y, [-2 * X])


@pytest.mark.parametrize("place", ["input", "output", "op_type", "domain", "name", "graph", "attribute", "extent"])
def test_names_that_are_no_text(place: str) -> None:
    proto = model([node("Flatten", ["x"], ["y"], axis=1)], [port("x", "E", 2)], "y")
    mark = "qqqqqq"
    target: Any = proto.graph.node[0]
    match place:
        case "input" | "output":
            getattr(target, place)[0] = mark
        case "graph":
            proto.graph.name = mark
        case "attribute":
            target.attribute[0].name = mark
        case "extent":
            proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = mark
        case _:
            setattr(target, place, mark)
    data = proto.SerializeToString().replace(mark.encode(), b"qq\xff\xfeqq")
    with pytest.raises(InvalidModel, match="not text in UTF-8"):
        gpu_engine.compile(data, device="cpu")


@pytest.mark.parametrize("version", [-1, 2**31, 2**62])
def test_opsets_that_no_library_counts_to(version: int) -> None:
    proto = model([node("Relu", ["x"], ["y"])], [port("x", 2)], "y")
    proto.opset_import.append(helper.make_opsetid("ai.onnx.ml", version))
    with pytest.raises(InvalidModel, match="does not exist"):
        run(proto, X)


def doubling(depth: int, uses: int) -> onnx.ModelProto:
    """f0 is Neg, and every further function calls the one before `uses` times."""
    functions = []
    for i in range(depth):
        nodes = [node(f"f_{i - 1}" if i else "Neg", [f"a{k}"], [f"a{k + 1}"]) for k in range(uses)]
        imports = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
        functions.append(helper.make_function("local", f"f_{i}", ["a0"], [f"a{uses}"], nodes, imports))
    return model([node(f"f_{depth - 1}", ["x"], ["y"])], [port("x", 3, 2)], "y", functions=functions)


def test_functions_that_grow_without_bound() -> None:
    np.testing.assert_array_equal(run(doubling(5, 3), X), [-X])
    with pytest.raises(InvalidModel, match="grow to more than"):
        run(doubling(40, 2), X)


def test_loops_in_loops_that_are_unrolled_without_bound() -> None:
    body = helper.make_graph([node("SequenceInsert", ["s", "x"], ["t"]), node("Identity", ["b"], ["c"])], "b0",
                             [port("i", kind=INT64), port("b", kind=BOOL), onnx.ValueInfoProto(name="s")],
                             [port("c", kind=BOOL), onnx.ValueInfoProto(name="t")])  # fmt: skip
    for level in range(3):
        inner = [
            node("Loop", ["n", "go", f"s{level}"], [f"t{level}"], body=body),
            node("Identity", ["b"], [f"c{level}"]),
        ]
        body = helper.make_graph(inner, f"b{level + 1}",
                                 [port("i", kind=INT64), port("b", kind=BOOL), onnx.ValueInfoProto(name=f"s{level}")],
                                 [port(f"c{level}", kind=BOOL), onnx.ValueInfoProto(name=f"t{level}")])  # fmt: skip
    nodes = [node("SequenceEmpty", [], ["e"]), node("Loop", ["n", "go", "e"], ["y"], body=body)]
    proto = model(nodes, [port("x", 2)], "y", {"n": np.int64(100), "go": np.bool_(True)})
    with pytest.raises(InvalidModel, match="grow to more than"):
        run(proto, X[0])


@pytest.mark.parametrize("operator", ["Mul", "Add", "Max", "Mod"])
def test_extents_squared_again_and_again(operator: str) -> None:
    """Arithmetic too long to write down is left to the run, where int64 wraps; what it cannot hold is refused."""
    nodes = [node("Shape", ["x"], ["s0"])]
    for i in range(80):
        nodes.append(node("Add" if i % 2 else operator, [f"s{i}", f"s{i}" if i % 3 else "s0"], [f"s{i + 1}"]))
    nodes.append(node("Cast", ["s80"], ["y"], to=1))
    started = time.process_time()
    try:
        (y,) = run(model(nodes, [port("x", "N", "M")], "y"), X)
        assert y.shape == (2,)
    except OutOfMemory as error:
        assert "64 bits" in str(error)
    assert time.process_time() - started < 20


def test_extents_too_long_to_write_as_a_shape() -> None:
    nodes = [node("Tile", ["x", "s0"], ["a1"])]
    nodes = [node("Shape", ["a0"], ["s0"]), node("Tile", ["a0", "s0"], ["a1"])]
    for i in range(1, 40):
        nodes += [node("Shape", [f"a{i}"], [f"s{i}"]), node("Tile", [f"a{i}", f"s{i}"], [f"a{i + 1}"])]
    with pytest.raises((UnsupportedModel, OutOfMemory)):
        run(model(nodes, [port("a0", "N", "M")], "a40"), X)


@pytest.mark.parametrize("extents", [[2**40, 2**40], [2**62], [2**31, 2**31, 2**31], [2**46], [0, 2**62]], ids=str)
@pytest.mark.parametrize("known", [True, False])
def test_tensors_that_no_machine_holds(extents: list[int], known: bool) -> None:
    nodes = [node("ConstantOfShape", ["n"], ["a"]), node("Cos", ["a"], ["y"])]
    sizes = np.array(extents, np.int64)
    if known:
        with pytest.raises(OutOfMemory):
            run(model(nodes, [], "y", {"n": sizes}))
    else:
        with pytest.raises(OutOfMemory):
            run(model(nodes, [port("n", len(extents), kind=INT64)], "y"), sizes)


@pytest.mark.parametrize("known", [True, False])
def test_empty_tensors_whose_rows_would_be_counted(known: bool) -> None:
    nodes = [node("Expand", ["x", "n"], ["a"]), node("Softmax", ["a"], ["y"])]
    sizes = np.int64([2**40, 0])
    ports = [port("x", 1, 0)] + ([] if known else [port("n", 2, kind=INT64)])
    with pytest.raises(OutOfMemory):
        run(model(nodes, ports, "y", {"n": sizes} if known else {}), X[:1, :0], *([] if known else [sizes]))


@pytest.mark.parametrize("follow", ["ReduceSum", "ArgMax", "NonZero", "CumSum"])
def test_nothing_huge_is_computed_while_compiling(follow: str) -> None:
    """2^40 zeros would take minutes to add up."""
    operands = ["a", "axis"] if follow == "CumSum" else ["a"]
    nodes = [node("ConstantOfShape", ["n"], ["a"]), node(follow, operands, ["y"])]
    with pytest.raises(OutOfMemory):
        run(model(nodes, [], "y", {"n": np.int64([2**40]), "axis": np.int64(0)}))


def test_weights_that_only_repeat_elements_fill_no_machine() -> None:
    """Each is small enough to be known, and none takes memory before a kernel packs it."""
    shape = np.int64([2**15, 2**14])
    nodes = []
    for i in range(200):
        nodes += [node("ConstantOfShape", ["n"], [f"w{i}"]), node("MatMul", ["x", f"w{i}"], [f"y{i}"])]
    nodes.append(node("Sum", [f"y{i}" for i in range(200)], ["y"]))
    with pytest.raises(OutOfMemory, match="repeat their elements"):
        run(model(nodes, [port("x", 1, 2**15)], "y", {"n": shape}), np.zeros((1, 2**15), np.float32))


def test_sizes_whose_sum_would_wrap() -> None:
    """Each tensor alone fits 64 bits; their places in memory are added up."""
    names = [f"a{i}" for i in range(40)]
    nodes = [node("Expand", ["x", "n"], [name]) for name in names]
    nodes += [node("Sin", [name], [f"b{name}"]) for name in names]
    nodes.append(node("Sum", [f"b{name}" for name in names], ["y"]))
    with pytest.raises(OutOfMemory):
        run(model(nodes, [port("x", 1), port("n", 1, kind=INT64)], "y"), X[0, :1], np.int64([2**44]))


LATE: Sequence[tuple[onnx.NodeProto, Any]] = (
    (node("Tile", ["x", "n"], ["y"]), np.int64([2**20, 2**20])),
    (node("Expand", ["one", "n"], ["y"]), np.int64([2**20, 2**20])),
    (node("Pad", ["x", "n"], ["y"]), np.int64([2**31, 0, 2**31, 0])),
    (node("ConstantOfShape", ["n"], ["y"]), np.int64([2**20, 2**20])),
    (node("Resize", ["x", "", "", "n"], ["y"]), np.int64([2**20, 2**20])),
    (node("Range", ["zero", "limit", "step"], ["y"]), None),
    (node("OneHot", ["i", "limit", "values"], ["y"]), None),
)


@pytest.mark.parametrize(("made", "sizes"), LATE, ids=[made.op_type for made, _ in LATE])
def test_sizes_that_only_running_tells(made: onnx.NodeProto, sizes: Any) -> None:
    constants = {"one": np.ones((1, 1), np.float32), "zero": np.int64(0), "step": np.int64(1), "i": np.int64([0, 1]),
                 "values": np.float32([0, 1])}  # fmt: skip
    inputs, given = [], []
    if "x" in made.input:
        inputs.append(port("x", 3, 2))
        given.append(X)
    name = "limit" if sizes is None else "n"
    given.append(np.int64(2**40) if sizes is None else sizes)
    inputs.append(port(name, *np.shape(given[-1]), kind=INT64))
    with pytest.raises(OutOfMemory):
        run(model([made], inputs, "y", constants), *given)


@pytest.mark.parametrize("hoards", ["state", "stack"])
def test_loops_that_hoard(hoards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop without an end stops when it has taken what the machine has free: here 64 MiB."""
    monkeypatch.setattr(cpu_fallback.control, "free_memory", lambda: 64 << 20)
    monkeypatch.setattr(cpu_fallback.control, "CHECKED_NBYTES", 1 << 20)
    nodes = [node("Identity", ["b"], ["c"]), node("Concat", ["s", "s"], ["t"], axis=0) if hoards == "state" else
             node("Identity", ["s"], ["t"]), node("Neg", ["x"], ["z"])]  # fmt: skip
    body = helper.make_graph(nodes, "body", [port("i", kind=INT64), port("b", kind=BOOL), port("s", None)],
                             [port("c", kind=BOOL), port("t", None), port("z", None)])  # fmt: skip
    loop = node("Loop", ["", "go", "x"], ["last", "y"], body=body)
    with pytest.raises(OutOfMemory, match="a loop needs"):
        run(model([loop], [port("x", "N", 2)], "y", {"go": np.bool_(True)}), np.zeros((4096, 2), np.float32))


def test_a_negative_extent() -> None:
    nodes = [node("OneHot", ["i", "n", "v"], ["y"])]
    with pytest.raises(InvalidModel, match="would make"):
        run(model(nodes, [port("i", 1, kind=INT64), port("v", 2)], "y", {"n": np.int64([-1])}), X)


def sparse(dims: list[int], indices: list[int]) -> onnx.ModelProto:
    proto = model([node("Add", ["x", "w"], ["y"])], [port("x", 3)], "y")
    values = helper.make_tensor("w", TensorProto.FLOAT, [len(indices)], [5.0] * len(indices))
    places = helper.make_tensor("i", INT64, [len(indices)], indices)
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, dims))
    return proto


@pytest.mark.parametrize(("dims", "indices"), [([3], [5]), ([3], [-1]), ([2**40], [0]), ([-3], [0])], ids=str)
def test_sparse_tensors_that_lie(dims: list[int], indices: list[int]) -> None:
    with pytest.raises(InvalidModel):
        run(sparse(dims, indices), X[:, 0])


def test_a_long_chain_and_a_wide_sum_compile() -> None:
    """Every result is used twice, so the expression has 2^n leaves; a sum of thousands is made of small kernels."""
    chain = [node("Mul" if i % 2 else "Sub", [f"a{i}", f"a{i}"], [f"a{i + 1}"]) for i in range(1500)]
    np.testing.assert_array_equal(run(model(chain, [port("a0", "N", 2)], "a1500"), X), [np.zeros_like(X)])
    names = [f"b{i}" for i in range(1500)]
    nodes = [
        *(node("Neg" if i % 2 else "Abs", ["x"], [name]) for i, name in enumerate(names)),
        node("Sum", names, ["y"]),
    ]
    np.testing.assert_array_equal(run(model(nodes, [port("x", "N", 2)], "y"), X), [np.zeros_like(X)])


def test_whatever_an_operator_trips_over_is_the_models_fault() -> None:
    """Operators need not foresee everything: their exceptions name the node."""
    nodes = [node("Split", ["x"], ["y", "z"], axis=0, num_outputs=2**62)]
    with pytest.raises(GpuEngineError, match="Split"):
        run(model(nodes, [port("x", 3, 2)], "y"), X)


@pytest.mark.parametrize(("extent", "size"), [(2**33, None), (2**33, 2**10), (4, 0), (4, -1)])
def test_sequences_of_more_parts_than_a_graph_has_nodes(extent: int, size: int | None) -> None:
    names, constants = (["x"], {}) if size is None else (["x", "n"], {"n": np.int64(size)})
    nodes = [node("SplitToSequence", names, ["s"]), node("SequenceLength", ["s"], ["y"])]
    started = time.process_time()
    with pytest.raises(GpuEngineError, match=f"{extent} / {1 if size is None else size} parts"):
        gpu_engine.compile(model(nodes, [port("x", extent, 2)], "y", constants).SerializeToString())
    assert time.process_time() - started < 5
