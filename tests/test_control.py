"""If, Loop, Scan and SequenceMap through compile(), compared with ONNX Runtime; engines by structure and by value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import gpu_engine
from gpu_engine import EngineClosed, InputError, InvalidModel, UnsupportedModel
from gpu_engine.runtime.engine import Engine
from gpu_engine.structured import StructuredEngine
from tests.conformance_check import difference
from tests.one_node import onnxruntime_of

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
F32, I64 = np.float32, np.int64


def model_of(text: str, head: str = HEAD) -> onnx.ModelProto:
    model = onnx.parser.parse_model(head + text)
    onnx.checker.check_model(model)
    return model


def agree(model: onnx.ModelProto, *many: Mapping[str, Any]) -> None:
    """One engine gives what ONNX Runtime gives for each of several sets of inputs."""
    with gpu_engine.compile(model, device="cpu") as engine:
        for given in many:
            inputs = {name: np.asarray(array) for name, array in given.items()}
            expected = onnxruntime_of(model, inputs)
            actual = engine.run(inputs)
            names = [port.name for port in model.graph.output]
            assert not difference([actual[name] for name in names], expected, 1e-5, 1e-6), f"{list(inputs)}"


def floats(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(F32)


BRANCHES = """
g (bool c, float[N, 2] x) => (float[M, 2] y, float[N, 2] z) {
  y, z = If (c) <
    then_branch = yes () => (float[N, 2] a, float[N, 2] d) { a = Add (x, x)  d = Neg (x) },
    else_branch = no () => (float[K, 2] b, float[N, 2] e) { b = Concat <axis = 0> (x, x)  e = Abs (x) }>
}"""


def test_branches_whose_extents_differ() -> None:
    agree(model_of(BRANCHES), *({"c": np.bool_(c), "x": floats(n, 2, seed=n)} for c in (0, 1) for n in (1, 3, 5)))


def test_a_known_condition_leaves_one_branch() -> None:
    text = BRANCHES.replace("bool c, ", "").replace("g (", "g (").replace(" {\n  y, z", " <bool c = {1}> {\n  y, z", 1)
    with gpu_engine.compile(model_of(text), device="cpu") as engine:
        assert isinstance(engine, Engine) and not any("If" in step.source for step in engine.plan.steps)
        y, z = engine.run([floats(3, 2)])
        np.testing.assert_array_equal(y, 2 * floats(3, 2))
        np.testing.assert_array_equal(z, -floats(3, 2))


COUNTED = """
g (int64 n, bool go, float[2] x) => (float[2] last, float[T, 2] all) {
  last, all = Loop (n, go, x) <body = step (int64 i, bool before, float[2] state)
    => (bool after, float[2] next, float[2] seen) {
      after = Identity (before)
      f = Cast <to = 1> (i)
      next = Add (state, f)
      seen = Mul (next, x)
  }>
}"""


@pytest.mark.parametrize("trips", [0, 1, 7])
@pytest.mark.parametrize("go", [False, True])
def test_trips_and_conditions(trips: int, go: bool) -> None:
    """No trip gives the initial values and stacks of nothing."""
    agree(model_of(COUNTED), {"n": I64(trips), "go": np.bool_(go), "x": floats(2)})


@pytest.mark.parametrize("device", ["cpu", "interpret"])
@pytest.mark.parametrize("trips", [0, 2])
def test_slices_of_an_open_extent_stack_without_a_trip(trips: int, device: str) -> None:
    """The extents of slices that nobody made are those of what they would have been made of."""
    text = """
g (int64 n, float[N, 3] x) => (float[N, 3] last, float[T, N, 3] all) <bool go = {1}> {
  last, all = Loop (n, go, x) <body = step (int64 i, bool before, float[N, 3] state)
    => (bool after, float[N, 3] next, float[N, 3] seen) {
      after = Identity (before)
      next = Add (state, x)
      seen = Mul (next, x)
  }>
}"""
    x = floats(2, 3)
    with gpu_engine.compile(model_of(text), device=device) as engine:
        last, stacked = engine.run([I64(trips), x])
    np.testing.assert_allclose(last, (trips + 1) * x, rtol=1e-6)
    np.testing.assert_allclose(stacked, np.array([(i + 2) * x * x for i in range(trips)]).reshape(trips, 2, 3), 1e-6)


@pytest.mark.parametrize("known", ["n", "go", "both"])
def test_known_trips_and_conditions(known: str) -> None:
    text, inputs = COUNTED, {"n": I64(5), "go": np.bool_(True), "x": floats(2)}
    constants = []
    for name, declared, value in (("n", "int64 n", "int64 n = {5}"), ("go", "bool go", "bool go = {1}")):
        if known in (name, "both"):
            text = text.replace(f"{declared}, ", "", 1)
            constants.append(value)
            del inputs[name]
    agree(model_of(text.replace("all) {", f"all) <{', '.join(constants)}> {{", 1)), inputs)


def test_a_loop_that_ends_itself() -> None:
    text = """
    g (float[1] limit, float[1] x) => (float[1] last, float[T, 1] all) <int64 n = {50}, bool go = {1}> {
      last, all = Loop (n, go, x) <body = step (int64 i, bool before, float[1] state)
        => (bool after, float[1] next, float[1] seen) {
          next = Add (state, x)
          seen = Identity (next)
          more = Less (next, limit)
          after = Squeeze (more)
      }>
    }"""
    agree(model_of(text), *({"limit": F32([limit]), "x": F32([1])} for limit in (-1, 3.5, 20, 1000)))


@pytest.mark.parametrize("trips", ["known", "given"])
def test_carried_shapes_that_grow(trips: str) -> None:
    text = """
    g (int64 n, float[A, 2] x) => (float[B, 2] y, float[C] sizes) <bool go = {1}> {
      y, sizes = Loop (n, go, x) <body = step (int64 i, bool before, float[D, 2] state)
        => (bool after, float[E, 2] next, float size) {
          after = Identity (before)
          next = Concat <axis = 0> (state, x)
          count = Size (next)
          size = Cast <to = 1> (count)
      }>
    }"""
    inputs: list[dict[str, Any]] = [{"x": floats(rows, 2)} for rows in (1, 3)]
    if trips == "known":
        text = text.replace("int64 n, ", "").replace("<bool go", "<int64 n = {4}, bool go")
        agree(model_of(text), *inputs)
    else:
        agree(model_of(text), *(given | {"n": I64(n)} for n in (0, 1, 4) for given in inputs))


def test_a_loop_whose_shape_shrinks_to_what_data_say() -> None:
    text = """
    g (int64 n, float[A] x) => (float[B] y) <bool go = {1}> {
      y = Loop (n, go, x) <body = step (int64 i, bool before, float[D] state) => (bool after, float[E] next) {
          after = Identity (before)
          level = Cast <to = 1> (i)
          kept = Greater (state, level)
          next = Compress (state, kept)
      }>
    }"""
    agree(model_of(text), *({"n": I64(n), "x": np.arange(-2, 6, dtype=F32)} for n in (0, 1, 3, 9)))


def test_bodies_with_constants_of_their_own() -> None:
    text = """
    g (int64 n, float[2] x) => (float[2] y) <bool go = {1}, float[2] w = {10, 20}> {
      y = Loop (n, go, x) <body = step (int64 i, bool before, float[2] state) => (bool after, float[2] next)
        <float[2] v = {1, 2}> {
          after = Constant <value = bool {1}> ()
          u = Constant <value = float[2] {0.5, 0.25}> ()
          a = Add (state, v)
          b = Mul (a, u)
          next = Sub (b, w)
      }>
    }"""
    agree(model_of(text), *({"n": I64(n), "x": floats(2)} for n in (0, 3)))


def nested(depth: int) -> onnx.ModelProto:
    """y = x + 1 + ... with If and Loop in turns, `depth` deep; every level uses names of all levels outside it."""
    inner = [helper.make_node("Add", ["x", "one"], ["r0"])]
    for level in range(depth):
        result, before = f"r{level + 1}", f"r{level}"
        if level % 2:
            other = helper.make_graph([helper.make_node("Neg", ["x"], ["e"])], "e", [], [value("e", 2)])
            then = helper.make_graph(inner, "t", [], [value(before, 2)])
            inner = [helper.make_node("If", ["c"], [result], then_branch=then, else_branch=other)]
            continue
        carried, following = f"s{level}", f"t{level}"
        body = helper.make_graph(
            [*inner, helper.make_node("Add", [carried, before], [following]),
             helper.make_node("Identity", [f"a{level}"], [f"b{level}"])],
            "b",
            [value(f"i{level}", kind=TensorProto.INT64), value(f"a{level}", kind=TensorProto.BOOL), value(carried, 2)],
            [value(f"b{level}", kind=TensorProto.BOOL), value(following, 2)],
        )  # fmt: skip
        inner = [helper.make_node("Loop", ["n", "go", "x"], [result], body=body)]
    constants = [helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0]),
                 helper.make_tensor("go", TensorProto.BOOL, [], [1])]  # fmt: skip
    inputs = [value("x", 2), value("c", kind=TensorProto.BOOL), value("n", kind=TensorProto.INT64)]
    graph = helper.make_graph(inner, "g", inputs, [value(f"r{depth}", 2)], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def value(name: str, *shape: int, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


@pytest.mark.parametrize("depth", [1, 2, 3, 6, 10])
def test_nests(depth: int) -> None:
    agree(nested(depth), *({"x": floats(2), "c": np.bool_(c), "n": I64(n)} for c in (0, 1) for n in (0, 2)))


@pytest.mark.parametrize(("depth", "message"), [(33, "nest deeper"), (60, "nest deeper"), (400, "recursion|deeply")])
def test_nests_deeper_than_the_limit(depth: int, message: str) -> None:
    model = nested(0)
    graph = model.graph
    for _ in range(depth):
        del graph.node[:]
        branch = graph.node.add(op_type="If", input=["c"], output=["r0"]).attribute
        branch.add(name="else_branch", type=onnx.AttributeProto.GRAPH, g=nested(0).graph)
        branch.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g.output.add(name="r0")
        graph = branch[1].g
        graph.node.extend([helper.make_node("Add", ["x", "one"], ["r0"])])
    with pytest.raises((InvalidModel, UnsupportedModel), match=message):
        gpu_engine.compile(model, device="cpu")


def test_an_inner_name_hides_an_outer_one() -> None:
    text = """
    g (int64 n, float[2] x, float[2] z) => (float[2] y) <bool go = {1}> {
      y = Loop (n, go, z) <body = step (int64 i, bool before, float[2] x) => (bool after, float[2] w) {
          after = Identity (before)
          w = Add (x, z)
      }>
    }"""
    model = onnx.parser.parse_model(HEAD + text)
    with gpu_engine.compile(model, device="cpu") as engine:
        (y,) = engine.run([I64(3), floats(2, seed=1), floats(2, seed=2)])
    np.testing.assert_allclose(y, 4 * floats(2, seed=2), rtol=1e-6)


def test_symbolic_shapes_in_bodies() -> None:
    text = """
    g (int64 n, float[N, C, 2] x) => (float[N, Q] y) <bool go = {1}> {
      flat = Flatten (x)
      y = Loop (n, go, flat) <body = step (int64 i, bool before, float[N, P] state) => (bool after, float[N, P] next) {
          after = Identity (before)
          shape = Shape (x)
          part = Slice (shape, one, two)
          f = Cast <to = 1> (part)
          a = Mul (state, f)
          mean = ReduceMean <keepdims = 1> (a)
          next = Sub (a, mean)
          one = Constant <value = int64[1] {1}> ()
          two = Constant <value = int64[1] {2}> ()
      }>
    }"""
    shapes = ((1, 3, 2), (4, 3, 2), (4, 1, 2), (2, 7, 2))
    model = onnx.parser.parse_model(HEAD + text)
    body = model.graph.node[1].attribute[0].g
    nodes = [*body.node[7:], *body.node[:7]]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del body.node[:]
    body.node.extend(copies)
    agree(model, *({"n": I64(2), "x": floats(*shape)} for shape in shapes))


SCAN = """
g (float[2] start, float[T, 2] x, float[2, T] z) => (float[2] last, float[T, 2] all, float[2, T] turned) {
  last, all, turned = Scan <num_scan_inputs = 2, scan_input_axes = [0, 1], scan_input_directions = [D, 0],
    scan_output_axes = [0, 1], scan_output_directions = [0, R],
    body = step (float[2] state, float[2] part, float[2] other) => (float[2] next, float[2] seen, float[2] more) {
      next = Add (state, part)
      seen = Mul (next, other)
      more = Sub (part, state)
  }> (start, x, z)
}"""


@pytest.mark.parametrize("directions", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_scan(directions: tuple[int, int]) -> None:
    model = model_of(SCAN.replace("[D,", f"[{directions[0]},").replace(", R]", f", {directions[1]}]"))
    agree(model, *({"start": floats(2), "x": floats(t, 2), "z": floats(2, t, seed=1)} for t in (1, 4)))


@pytest.mark.parametrize("direction", [0, 1])
def test_scan_of_opset_8_with_lengths(direction: int) -> None:
    text = f"""
    g (int64[N] lens, float[N, 2] start, float[N, T, 2] x) => (float[N, 2] last, float[N, T, 2] all) {{
      last, all = Scan <num_scan_inputs = 1, directions = [{direction}], body = step (float[2] state, float[2] part)
        => (float[2] next, float[2] seen) {{ next = Add (state, part)  seen = Identity (next) }}> (lens, start, x)
    }}"""
    model = model_of(text, '<ir_version: 4, opset_import: ["" : 8]>')
    agree(model, {"lens": I64([4, 2, 1]), "start": floats(3, 2), "x": floats(3, 4, 2)})


MAPPED = """
g (seq(float[M]) x, float[1] w) => (seq(float[M]) y, seq(float[1]) s) {
  y, s = SequenceMap (x, w) <body = each (float[M] part, float[1] by) => (float[M] made, float[1] total) {
      made = Mul (part, by)
      total = ReduceSum <keepdims = 1> (part)
  }>
}"""


def test_sequence_map_of_any_length() -> None:
    """Every length is compiled once; the lengths of the elements may differ from call to call."""
    model = onnx.parser.parse_model(HEAD + MAPPED)
    with gpu_engine.compile(model, device="cpu") as engine:
        assert isinstance(engine, StructuredEngine)
        for lengths in ((), (3,), (3, 1), (2, 5), (4, 4, 4)):
            x = [floats(n, seed=n) for n in lengths]
            y, s = engine.run([x, F32([2])])
            assert not difference(y, [2 * part for part in x], 1e-6, 0)
            assert not difference(s, [part.sum(keepdims=True) for part in x], 1e-5, 1e-6)
        assert len(engine.engines) == 4


UNROLLED = """
g (int64 n, float[2] x) => (float[M, 2] y) <bool go = {1}> {
  empty = SequenceEmpty ()
  all = Loop (n, go, empty) <body = step (int64 i, bool before, seq(float[2]) state)
    => (bool after, seq(float[2]) next) {
      after = Identity (before)
      f = Cast <to = 1> (i)
      part = Mul (x, f)
      next = SequenceInsert (state, part)
  }>
  y = ConcatFromSequence <axis = 0, new_axis = 1> (all)
}"""


def test_sequences_carried_as_often_as_the_model_says() -> None:
    model = onnx.parser.parse_model(
        HEAD + UNROLLED.replace("int64 n, ", "").replace("<bool go", "<int64 n = {3}, bool go")
    )
    with gpu_engine.compile(model, device="cpu") as engine:
        assert isinstance(engine, Engine)
        (y,) = engine.run([floats(2)])
    np.testing.assert_allclose(y, np.arange(3, dtype=F32)[:, None] * floats(2))


def test_sequences_carried_as_often_as_an_input_says() -> None:
    """What to compile depends on the value of n, so there is one engine for each."""
    model = onnx.parser.parse_model(HEAD + UNROLLED)
    with gpu_engine.compile(model, device="cpu") as engine:
        assert isinstance(engine, StructuredEngine)
        for n in (1, 4, 1):
            (y,) = engine.run([I64(n), floats(2, seed=n)])
            np.testing.assert_allclose(y, np.arange(n, dtype=F32)[:, None] * floats(2, seed=n))
        assert len(engine.engines) == 2
        with pytest.raises(InvalidModel, match="empty sequence"):
            engine.run([I64(0), floats(2)])
        with pytest.raises(InputError, match="decides what is computed"):
            engine.run([np.zeros(65, I64), floats(2)])
        with pytest.raises(InputError, match="decides what is computed"):
            engine.run([F32(1), floats(2)])


def test_branches_of_different_ranks_decided_by_an_input() -> None:
    text = """
    g (bool c, float[1, 3] x) => (float y) {
      r = If (c) <then_branch = yes () => (float[3] a) { a = Squeeze (x) },
                  else_branch = no () => (float[1, 3] b) { b = Neg (x) }>
      y = Size (r)
      }""".replace("float y", "int64 y")
    agree(model_of(text), *({"c": np.bool_(c), "x": floats(1, 3)} for c in (0, 1)))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("(int64 i, bool b) => (bool a, bool c) { a = Identity (b)  c = Not (b) }", "takes 2 inputs, 3 are given"),
        ("(int64 i, bool b, float[2] s) => (bool a, float[2] t) { a = Identity (b)  t = Add (s, gone) }", "nothing"),
        ("(int64 i, bool b, float[2] s) => (bool a, float[2] t) { a = Identity (b) }", "nothing makes"),
        ("(int64 i, bool b, float[2] s) => (bool a) { a = Identity (b) }", "1 outputs"),
    ],
    ids=["few inputs", "dangling", "output of nothing", "few outputs"],
)
def test_bodies_that_contradict(body: str, message: str) -> None:
    text = f"g (int64 n, float[2] x) => (float[2] y) <bool go = {{1}}> {{ y = Loop (n, go, x) <body = step {body}> }}"
    with pytest.raises(InvalidModel, match=message):
        gpu_engine.compile(onnx.parser.parse_model(HEAD + text), device="cpu")


OPTIONAL = """
g (optional(float[M]) x, float[1] w) => (float[K] y) {
  there = OptionalHasElement (x)
  y = If (there) <then_branch = yes () => (float[M] a) { a0 = OptionalGetElement (x)  a = Add (a0, w) },
                  else_branch = no () => (float[1] b) { b = Neg (w) }>
}"""


def structured(text: str) -> StructuredEngine:
    engine = gpu_engine.compile(onnx.parser.parse_model(HEAD + text), device="cpu")
    assert isinstance(engine, StructuredEngine)
    return engine


def test_optionals() -> None:
    with structured(OPTIONAL) as engine:
        np.testing.assert_allclose(engine.run({"x": floats(3), "w": F32([1])})["y"], floats(3) + 1)
        np.testing.assert_allclose(engine.run({"x": None, "w": F32([1])})["y"], [-1])
        assert len(engine.engines) == 2


@pytest.mark.parametrize(
    "inputs",
    [{"x": [], "v": 1}, {"x": []}, [[]], [[], F32([1]), 1], 3],
    ids=["name", "missing", "one", "three", "number"],
)
def test_structured_engines_check_what_they_get(inputs: Any) -> None:
    with structured(MAPPED) as engine, pytest.raises(InputError):
        engine.run(inputs)


def test_structured_engines_submit_map_and_close() -> None:
    engine = structured(MAPPED)
    items: Sequence[Any] = [[[floats(2)] * n, F32([3])] for n in (1, 2, 1)]
    futures = [engine.submit(item) for item in items]
    for item, future, mapped in zip(items, futures, engine.map(items), strict=True):
        expected = [[3 * part for part in item[0]], [part.sum(keepdims=True) for part in item[0]]]
        assert not difference(mapped, expected, 1e-5, 1e-6)
        assert not difference(future.result(60), expected, 1e-5, 1e-6)
    engine.close()
    with pytest.raises(EngineClosed):
        engine.run([[floats(2)], F32([1])])


def test_the_structures_seen_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_engine.structured.MAX_ENGINES", 3)
    with structured(MAPPED) as engine:
        first = engine.run([[floats(1)], F32([1])])
        (kept,) = engine.engines
        for n in (2, 3, 4):
            engine.run([[floats(1)] * n, F32([1])])
        assert len(engine.engines) == 3 and kept not in engine.engines
        assert not difference(engine.run([[floats(1)], F32([1])]), first, 0, 0)
