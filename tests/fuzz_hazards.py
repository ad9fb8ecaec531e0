"""Hostile models made on purpose: huge tensors, deep nests, recursion, growth without end, endless arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.random import Generator
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from tests.fuzz_mutations import TEXTS, pick

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
EXTENTS = (0, 1, 3, 10**4, 10**6, 10**9, 2**31 - 1, 2**31, 2**32 + 1, 2**40, 2**62, 2**63 - 1, -1, -(2**63))
LENGTHS = (3, 30, 300, 3000)


def hazard(generator: Generator) -> tuple[bytes, str]:
    """(a serialized model, the name of what made it)."""
    make = pick(generator, HAZARDS)
    return make(generator).SerializeToString(), make.__name__


def node(name: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> NodeProto:
    domain = "local" if name.startswith("f_") else ""
    return helper.make_node(name, list(inputs), list(outputs), domain=domain, **attributes)


def port(name: str, *shape: Any, kind: int = FLOAT) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model(
    nodes: Sequence[NodeProto],
    inputs: Sequence[ValueInfoProto],
    output: str,
    constants: Mapping[str, Any] | None = None,
    functions: Sequence[onnx.FunctionProto] = (),
    opset: int = 21,
) -> onnx.ModelProto:
    """A model with one output of unknown type; `constants` are its initializers."""
    weights = [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()]
    graph = helper.make_graph(nodes, "hazard", inputs, [ValueInfoProto(name=output)], weights)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=10)


def huge_result(generator: Generator) -> onnx.ModelProto:
    """One node whose result is as large as numbers in the model, or among the inputs, say."""
    rank = 1 + int(generator.integers(3))
    sizes = np.array([pick(generator, EXTENTS) for _ in range(rank)], np.int64)
    one, factors = np.ones((1,) * rank, np.float32), np.abs(sizes // 1000).astype(np.float32) + 1
    makers: tuple[tuple[NodeProto, Mapping[str, Any]], ...] = (
        (node("ConstantOfShape", ["n"], ["a"]), {"n": sizes}),
        (node("Expand", ["one", "n"], ["a"]), {"one": one, "n": sizes}),
        (node("Tile", ["one", "n"], ["a"]), {"one": one, "n": sizes}),
        (node("Range", ["zero", "n", "step"], ["a"]), {"zero": np.int64(0), "n": sizes[0], "step": np.int64(1)}),
        (node("Range", ["zero", "n", "step"], ["a"]),
         {"zero": np.float32(0), "n": np.float32(sizes[0]), "step": np.float32(pick(generator, (1e-30, 1, 0, -1)))}),
        (node("Pad", ["one", "n"], ["a"], mode=pick(generator, ("constant", "edge", "reflect", "wrap"))),
         {"one": one, "n": np.repeat(sizes, 2)}),
        (node("Resize", ["one", "", "s"], ["a"], mode=pick(generator, ("nearest", "linear", "cubic"))),
         {"one": one, "s": factors}),
        (node("Resize", ["one", "", "", "n"], ["a"]), {"one": one, "n": sizes}),
        (node("OneHot", ["i", "n", "v"], ["a"]), {"i": np.int64([0]), "n": sizes[:1], "v": np.float32([0, 1])}),
        (node("CenterCropPad", ["one", "n"], ["a"]), {"one": one, "n": sizes}),
        (node("TopK", ["one", "n"], ["a", "b"]), {"one": one, "n": sizes[:1]}),
        (node("HannWindow", ["n"], ["a"]), {"n": sizes[0]}),
        (node("RandomNormal", [], ["a"], shape=sizes.tolist()), {}),
        (node("Reshape", ["one", "n"], ["a"]), {"one": one, "n": sizes}),
        (node("Col2Im", ["x3", "n", "b"], ["a"]),
         {"x3": np.ones((1, 4, 4), np.float32), "n": sizes[:2].repeat(2)[:2], "b": np.int64([2, 2])}),
        (node("AffineGrid", ["t", "n"], ["a"]),
         {"t": np.ones((1, 2, 3), np.float32), "n": np.int64([1, 1, sizes[0], 2])}),
        (node("Slice", ["one", "n", "n"], ["a"]), {"one": one, "n": sizes}),
        (node("BlackmanWindow", ["n"], ["a"]), {"n": np.int32(sizes[0] & 0x7FFFFFFF)}),
    )  # fmt: skip
    maker, operands = pick(generator, makers)
    kind = pick(generator, ("Identity", "Relu", "ReduceSum", "Shape", "NonZero", "Cos", "Size"))
    rounded = maker.op_type.endswith("Window") and kind == "NonZero"
    follow = node("Size" if rounded else kind, ["a"], ["y"])
    open_names = [name for name in operands if generator.random() < 0.3]
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(np.asarray(operands[name]).dtype), np.shape(operands[name])
        )
        for name in open_names
    ]
    fixed = {name: value for name, value in operands.items() if name not in open_names}
    return model([maker, follow], inputs, "y", fixed)


def window(generator: Generator) -> onnx.ModelProto:
    """Convolution and pooling with windows, strides, pads and groups that reach anywhere."""
    ints = [int(pick(generator, (1, 1, 1, 2, 3, 0, -1, 5, 2**31, 2**62, -(2**63)))) for _ in range(12)]
    kind = pick(generator, ("Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool", "ConvInteger"))
    attributes: dict[str, Any] = {
        "kernel_shape": ints[:2], "strides": ints[2:4], "pads": ints[4:8], "dilations": ints[8:10], "group": ints[10],
        "output_padding": ints[2:4], "output_shape": ints[:2], "ceil_mode": ints[11], "p": ints[9],
        "auto_pad": pick(generator, ("NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID", "OTHER")),
    }  # fmt: skip
    known = onnx.defs.get_schema(kind, 21).attributes
    kept = {name: value for name, value in attributes.items() if name in known and generator.random() < 0.6}
    if "Pool" in kind:
        kept["kernel_shape"] = attributes["kernel_shape"]
        return model([node(kind, ["x"], ["y"], **kept)], [port("x", "N", 2, 5, 5)], "y")
    dtype = np.uint8 if kind == "ConvInteger" else np.float32
    x = port("x", "N", 2, 5, 5, kind=TensorProto.UINT8 if kind == "ConvInteger" else FLOAT)
    return model([node(kind, ["x", "w"], ["y"], **kept)], [x], "y", {"w": np.ones((2, 2, 3, 3), dtype)})


def wild_indices(generator: Generator) -> onnx.ModelProto:
    """Reads and writes at places that the data name, inside and outside."""
    places = np.array([pick(generator, (0, 1, -1, 2, 3, 5, -4, 2**31, 2**62, -(2**63))) for _ in range(4)], np.int64)
    x, updates = np.ones((4, 3), np.float32), np.ones((4, 1), np.float32)
    makers: tuple[tuple[NodeProto, Mapping[str, Any]], ...] = (
        (node("Gather", ["x", "i"], ["y"], axis=int(generator.integers(-2, 2))), {"i": places}),
        (node("GatherElements", ["x", "i"], ["y"], axis=0), {"i": places.reshape(4, 1)}),
        (node("GatherND", ["x", "i"], ["y"]), {"i": places.reshape(2, 2)}),
        (node("ScatterElements", ["x", "i", "u"], ["y"], axis=0), {"i": places.reshape(4, 1), "u": updates}),
        (node("ScatterND", ["x", "i", "u"], ["y"]), {"i": places.reshape(2, 2), "u": updates[:2, 0]}),
        (node("TensorScatter", ["c", "u4", "i"], ["y"]),
         {"c": np.ones((1, 1, 4, 3), np.float32), "u4": np.ones((1, 1, 2, 3), np.float32), "i": places[:1]}),
        (node("MaxUnpool", ["x4", "i"], ["y"], kernel_shape=[2, 2]),
         {"x4": np.ones((1, 1, 2, 2), np.float32), "i": places.reshape(1, 1, 2, 2)}),
        (node("OneHot", ["i", "d", "v"], ["y"]), {"i": places, "d": np.int64([5]), "v": np.float32([0, 1])}),
        (node("ReverseSequence", ["x", "i"], ["y"], time_axis=1, batch_axis=0), {"i": places}),
        (node("RoiAlign", ["x4", "r", "i"], ["y"], output_height=2, output_width=2),
         {"x4": np.ones((1, 1, 3, 3), np.float32), "r": np.ones((4, 4), np.float32) * 1e30, "i": places}),
        (node("NegativeLogLikelihoodLoss", ["x", "i"], ["y"]), {"i": places}),
        (node("CumSum", ["x", "i"], ["y"]), {"i": places[0]}),
        (node("Slice", ["x", "i", "j", "k", "s"], ["y"]),
         {"i": places[:2], "j": places[2:], "k": np.int64([0, 1]), "s": places[1:3]}),
        (node("Split", ["x", "i"], ["y", "z"], axis=0), {"i": places[:2]}),
        (node("Squeeze", ["x", "i"], ["y"]), {"i": places[:1]}),
        (node("Unsqueeze", ["x", "i"], ["y"]), {"i": places[:2]}),
    )  # fmt: skip
    maker, operands = pick(generator, makers)
    constants = {name: value for name, value in operands.items() if name != "i" or generator.random() < 0.5}
    inputs = [] if "i" in constants else [port("i", *np.shape(operands["i"]), kind=INT64)]
    if "x" in maker.input:
        inputs.append(port("x", 4, 3))
        if generator.random() < 0.3:
            constants["x"] = x
    return model([maker], inputs, "y", constants, opset=pick(generator, (17, 21, 24)))


def deep_bodies(generator: Generator) -> onnx.ModelProto:
    """If, Loop and Scan inside each other."""
    depth = int(pick(generator, (2, 5, 10, 20, 29, 31)))
    graph = helper.make_graph([node("Neg", ["x"], ["r0"])], "g0", [], [port("r0", 2)])
    for level in range(1, depth):
        graph = helper.make_graph([_around(generator, graph, level)], f"g{level}", [], [port(f"r{level}", 2)])
    constants = {"n": np.int64(2), "go": np.bool_(True)}
    inputs = [port("x", 2), port("c", kind=TensorProto.BOOL)]
    return model(list(graph.node), inputs, f"r{depth - 1}", constants)


def _around(generator: Generator, graph: GraphProto, level: int) -> NodeProto:
    output = graph.output[0].name
    if generator.random() < 0.5:
        other = helper.make_graph([node("Abs", ["x"], [f"e{level}"])], "e", [], [port(f"e{level}", 2)])
        return node("If", [pick(generator, ("c", "go"))], [f"r{level}"], then_branch=graph, else_branch=other)
    grows = generator.random() < 0.3
    state, following, still = f"s{level}", f"t{level}", f"b{level}"
    body = helper.make_graph(
        [*graph.node, node("Identity", [f"a{level}"], [still]),
         node("Concat", [state, output], [following], axis=0) if grows else node("Add", [state, output], [following])],
        f"l{level}",
        [port(f"i{level}", kind=INT64), port(f"a{level}", kind=TensorProto.BOOL), port(state, None if grows else 2)],
        [port(still, kind=TensorProto.BOOL), port(following, None if grows else 2)],
    )  # fmt: skip
    return node("Loop", ["n", "go", "x"], [f"r{level}"], body=body)


def recursive_functions(generator: Generator) -> onnx.ModelProto:
    """Functions that call themselves, each other, or the one before twice."""
    count = int(pick(generator, (1, 2, 5, 20, 40, 80)))
    calls = pick(generator, (lambda i: [i], lambda i: [(i + 1) % count], lambda i: [i - 1] * 2, lambda i: [i - 1] * 3))
    functions = []
    for i in range(count):
        called = [f"f_{j}" if j >= 0 else "Neg" for j in calls(i)]
        nodes = [node(name, [f"a{k}"], [f"a{k + 1}"]) for k, name in enumerate(called)]
        imports = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
        functions.append(helper.make_function("local", f"f_{i}", ["a0"], [f"a{len(nodes)}"], nodes, imports))
    return model([node(f"f_{count - 1}", ["x"], ["y"])], [port("x", 2)], "y", functions=functions)


def long_chain(generator: Generator) -> onnx.ModelProto:
    """Nodes one behind the other; with two uses of each result, the expression they spell has 2^n leaves."""
    length = int(pick(generator, LENGTHS))
    names = pick(
        generator, (("Relu",), ("Sin", "Exp"), ("Add",), ("Mul",), ("Softmax", "Neg"), ("Concat",), ("Where",))
    )
    nodes = []
    for i in range(length):
        name = names[i % len(names)]
        twice = [f"a{i}", f"a{i}"]
        if name in ("Add", "Mul"):
            nodes.append(node(name, twice if generator.random() < 0.5 else [f"a{i}", "a0"], [f"a{i + 1}"]))
        elif name == "Concat":
            nodes.append(node(name, twice, [f"a{i + 1}"], axis=0))
        elif name == "Where":
            nodes.append(node(name, ["c", *twice], [f"a{i + 1}"]))
        else:
            nodes.append(node(name, [f"a{i}"], [f"a{i + 1}"]))
    return model(nodes, [port("a0", pick(generator, (3, "N"))), port("c", 1, kind=TensorProto.BOOL)], f"a{length}")


def wide(generator: Generator) -> onnx.ModelProto:
    """One node of many inputs or outputs, or many nodes beside each other."""
    width = int(pick(generator, LENGTHS))
    names = [f"a{i}" for i in range(width)]
    kind = int(generator.integers(4))
    if kind == 0:
        return model([node("Concat", ["x"] * width, ["y"], axis=0)], [port("x", "N", 2)], "y")
    if kind == 1:
        split = node("Split", ["x"], names, axis=0, num_outputs=width)
        return model([split, node("Sum", names, ["y"])], [port("x", pick(generator, (width, "N")))], "y")
    nodes = [node(pick(generator, ("Sin", "Abs", "Neg")), ["x"], [name]) for name in names]
    join = node("Sum", names, ["y"]) if kind == 2 else node("Concat", names, ["y"], axis=-1)
    return model([*nodes, join], [port("x", "N", 2)], "y")


def shape_arithmetic(generator: Generator) -> onnx.ModelProto:
    """Extents computed from extents again and again, until a tensor is made of them."""
    length = int(pick(generator, (5, 20, 60, 200)))
    operators = pick(generator, (("Mul",), ("Add", "Mul"), ("Div", "Add"), ("Mod", "Mul", "Add"), ("Min", "Max", "Add"),
                                 ("Add", "Sub", "Mul", "Div", "Mod", "Max", "Min")))  # fmt: skip
    nodes = [node("Shape", ["x"], ["s0"]), node("Gather", ["s0", "place"], ["s1"])]
    for i in range(1, length):
        other = pick(generator, (f"s{i}", f"s{max(1, i - 1)}", "three", "s0"))
        nodes.append(node(str(pick(generator, operators)), [f"s{i}", other], [f"s{i + 1}"]))
    last = node("ConstantOfShape", [f"s{length}"], ["y"]), node("Expand", ["x", f"s{length}"], ["y"])
    constants = {"place": np.int64([0, 1]), "three": np.int64([3, 2])}
    return model([*nodes, pick(generator, last)], [port("x", "N", "M")], "y", constants)


def tiles(generator: Generator) -> onnx.ModelProto:
    """A tensor tiled, joined or reshaped by its own shape."""
    length, steps = int(pick(generator, (3, 8, 30, 60))), []
    for i in range(length):
        kind = int(generator.integers(4))
        steps.append(node("Shape", [f"a{i}"], [f"s{i}"]))
        if kind == 0:
            steps.append(node("Tile", [f"a{i}", f"s{i}"], [f"a{i + 1}"]))
        elif kind == 1:
            steps.append(node("Concat", [f"a{i}", f"a{i}"], [f"a{i + 1}"], axis=int(generator.integers(2))))
        elif kind == 2:
            steps += [node("Flatten", [f"a{i}"], [f"b{i}"], axis=2), node("Transpose", [f"b{i}"], [f"a{i + 1}"])]
        else:
            steps += [node("Transpose", [f"a{i}"], [f"b{i}"]), node("MatMul", [f"a{i}", f"b{i}"], [f"a{i + 1}"])]
    return model(steps, [port("a0", "N", pick(generator, ("M", 2)))], f"a{length}")


def hungry_loop(generator: Generator) -> onnx.ModelProto:
    """Loops of many iterations that double, stack or carry their state, as tensors or sequences."""
    trips = int(pick(generator, (0, 3, 40, 5000, 2**31, 2**63 - 1, -1)))
    sequence = generator.random() < 0.3
    step = {
        "double": node("SequenceInsert" if sequence else "Concat", ["s", "x" if sequence else "s"], ["t"]),
        "keep": node("Identity", ["s"], ["t"]),
        "grow": node("SequenceInsert" if sequence else "Concat", ["s", "x"], ["t"]),
    }[pick(generator, ("double", "keep", "grow"))]
    if step.op_type == "Concat":
        step.attribute.append(helper.make_attribute("axis", 0))
    state = ValueInfoProto(name="s") if sequence else port("s", None)
    outputs = [port("b", kind=TensorProto.BOOL), ValueInfoProto(name="t")]
    outputs += [ValueInfoProto(name="z")] if (stacks := generator.random() < 0.4) else []
    body = helper.make_graph(
        [node("Identity", ["a"], ["b"]), step, node("Neg", ["x"], ["z"])], "body",
        [port("i", kind=INT64), port("a", kind=TensorProto.BOOL), state], outputs,
    )  # fmt: skip
    first = [node("SequenceConstruct", ["x"], ["s_in"])] if sequence else [node("Identity", ["x"], ["s_in"])]
    loop = node("Loop", [pick(generator, ("n", "")), "go", "s_in"], ["y", "w"] if stacks else ["y"], body=body)
    inputs, constants = [port("x", 2)], {"n": np.int64(trips), "go": np.bool_(True)}
    if generator.random() < 0.3:
        inputs.append(port("n", kind=INT64))
        del constants["n"]
    return model([*first, loop], inputs, "w" if stacks else "y", constants)


def strange_extents(generator: Generator) -> onnx.ModelProto:
    """Inputs whose declared extents are texts of all kinds."""
    extents = [pick(generator, (*TEXTS, "N*N*N", "N-N", "N//2*2", "-N", "N%0", "2*N+M", "N", "M")) for _ in range(3)]
    nodes = [node("Transpose", ["x"], ["t"]), node("Reshape", ["t", "flat"], ["y"])]
    return model(nodes, [port("x", *extents)], "y", {"flat": np.int64([-1])})


HAZARDS = (
    huge_result, huge_result, huge_result, window, wild_indices, wild_indices, deep_bodies, recursive_functions,
    long_chain, wide, shape_arithmetic, tiles, hungry_loop, strange_extents,
)  # fmt: skip
