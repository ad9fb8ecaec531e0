"""What the soak runs: small models of several kinds, engines with different options, and cases whose answers are known
before the first request is sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper, parser

import gpu_engine

Array = NDArray[Any]
RELATIVE, ABSOLUTE = 1e-4, 1e-5
CASES = 40
"""Of each model; every third has rows for several executions."""
CHOICES = 3
"""Rows of the table that every model gathers from: a greater index fails when it runs, in whatever batch."""

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
MODELS = {
    "mlp": """g (float[N, 48] x, int64[N] which) => (float[N, 16] y) {
        a = MatMul (x, first)  b = Relu (a)  c = MatMul (b, second)  d = Gather (table, which)  y = Add (c, d) }""",
    "text": """g (int64[N, S] x, int64[N] which) => (float[N, 16] y) {
        e = Gather (words, x)  axis = Constant <value = int64[1] {1}> ()  m = ReduceMean <keepdims = 0> (e, axis)
        t = Tanh (m)  p = MatMul (t, second)  d = Gather (table, which)  y = Add (p, d) }""",
    "image": """g (float[N, 3, H, W] x, int64[N] which) => (float[N, 16] y) {
        c = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, filters)  r = Relu (c)
        axes = Constant <value = int64[2] {2, 3}> ()  m = ReduceMean <keepdims = 0> (r, axes)
        d = Gather (table, which)  y = Add (m, d) }""",
    "sequence": """g (float[N, T, 8] x, int64[N] which) => (float[N, T, 16] y, float[N] s) {
        p = MatMul (x, wide)  q = Softmax <axis = 1> (p)  d = Gather (table, which)
        axis = Constant <value = int64[1] {1}> ()  u = Unsqueeze (d, axis)  y = Add (q, u)
        axes = Constant <value = int64[2] {1, 2}> ()  s = ReduceMax <keepdims = 0> (y, axes) }""",
}
WEIGHTS: dict[str, dict[str, tuple[int, ...]]] = {
    "mlp": {"first": (48, 64), "second": (64, 16), "table": (CHOICES, 16)},
    "text": {"words": (100, 24), "second": (24, 16), "table": (CHOICES, 16)},
    "image": {"filters": (16, 3, 3, 3), "table": (CHOICES, 16)},
    "sequence": {"wide": (8, 16), "table": (CHOICES, 16)},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "mlp": {"streams": 2, "batch": 8},
    "text": {"streams": 1, "batch": 8, "batch_timeout_ms": 2.0},
    "image": {"streams": 2, "batch": 4, "max_queue_size": 48},
    "sequence": {"hint": "LATENCY"},
}


@dataclass(frozen=True)
class Case:
    """Inputs and what they must give, in the order of the outputs."""

    inputs: dict[str, Array]
    outputs: tuple[Array, ...]

    def wrong(self, given: dict[str, Array]) -> str:
        """What is wrong with an answer; empty if nothing."""
        for name, expected, found in zip(given, self.outputs, given.values(), strict=True):
            if found.shape != expected.shape or found.dtype != expected.dtype:
                return f"{name}: {found.dtype}{list(found.shape)} where {list(expected.shape)} is right"
            if not np.allclose(found, expected, RELATIVE, ABSOLUTE):
                return f"{name}: off by {np.abs(found - expected).max():g}"
        return ""

    def poisoned(self) -> dict[str, Array]:
        """The same with an index that is out of range in its last row."""
        which = self.inputs["which"].copy()
        which[-1] = CHOICES + 5
        return self.inputs | {"which": which}

    def misshapen(self) -> dict[str, Array]:
        """The same with an axis too many, which is refused before it is queued."""
        return self.inputs | {"x": self.inputs["x"][None]}


@dataclass(frozen=True)
class Subject:
    """An engine under test and its cases; `large` are those of several executions."""

    name: str
    engine: gpu_engine.Engine
    small: tuple[Case, ...]
    large: tuple[Case, ...]


def model_named(name: str) -> onnx.ModelProto:
    """One of MODELS with its weights."""
    model = parser.parse_model(HEAD + MODELS[name])
    random = np.random.default_rng(len(name))
    for weight, shape in WEIGHTS[name].items():
        array = random.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, weight))
    onnx.checker.check_model(model)
    return model


def cases_of(name: str, model: onnx.ModelProto, seed: int, batch: int) -> list[Case]:
    """Random inputs of many shapes and ONNX Runtime's answers; no two answers are alike, so that none can stand for
    another."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    random, found = np.random.default_rng(seed), []
    for number in range(CASES):
        rows = int(random.integers(2 * batch + 1, 5 * batch)) if number % 3 == 2 else int(random.integers(1, 4))
        inputs = {"x": random_input(name, rows, random), "which": random.integers(0, CHOICES, rows)}
        found.append(Case(inputs, tuple(session.run(None, inputs))))
    first = [case.outputs[0] for case in found]
    for i, a in enumerate(first):
        for b in first[:i]:
            assert a.shape[1:] != b.shape[1:] or not np.allclose(a[0], b[0], 10 * RELATIVE, 10 * ABSOLUTE)
    return found


def random_input(name: str, rows: int, random: np.random.Generator) -> Array:
    if name == "text":
        return random.integers(0, 100, (rows, int(random.choice([3, 7, 16]))))
    shapes = {
        "mlp": (48,),
        "image": (3, int(random.choice([8, 12])), int(random.choice([8, 20]))),
        "sequence": (int(random.choice([4, 9])), 8),
    }
    return random.standard_normal((rows, *shapes[name]), np.float32)


def open_subjects(seed: int) -> list[Subject]:
    """Every model with its engine; the caller closes the engines."""
    subjects = []
    for name, options in OPTIONS.items():
        model = model_named(name)
        engine = gpu_engine.compile(model, device="cpu", **options)
        assert isinstance(engine, gpu_engine.Engine)
        cases = cases_of(name, model, seed, engine.batch)
        small, large = [case for i, case in enumerate(cases) if i % 3 != 2], cases[2::3]
        subjects.append(Subject(name, engine, tuple(small), tuple(large)))
    return subjects
