"""Loops among native steps: signals are handled while they run."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import gpu_engine
from cpu_fallback.calls import Native
from tests.test_control import model_of


class Stopped(BaseException):
    pass


@pytest.fixture
def alarm() -> Iterator[None]:
    """A signal after a moment, whose handler raises."""

    def ring(*_: object) -> None:
        raise Stopped("by the alarm")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def counting(trips: int) -> onnx.ModelProto:
    """y = x + 1, so many times over."""
    value = helper.make_tensor_value_info
    nodes = [helper.make_node("Identity", ["go"], ["still"]), helper.make_node("Add", ["s", "one"], ["t"])]
    inputs = [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("s", TensorProto.FLOAT, [2])]
    body = helper.make_graph(
        nodes, "body", inputs, [value("still", TensorProto.BOOL, []), value("t", TensorProto.FLOAT, [2])]
    )
    weights = [
        helper.make_tensor("n", TensorProto.INT64, [], [trips]),
        helper.make_tensor("yes", TensorProto.BOOL, [], [True]),
        helper.make_tensor("one", TensorProto.FLOAT, [2], [1.0, 1.0]),
    ]
    loop = helper.make_node("Loop", ["n", "yes", "x"], ["y"], body=body)
    ports = [value("x", TensorProto.FLOAT, [2])], [value("y", TensorProto.FLOAT, [2])]
    return helper.make_model(
        helper.make_graph([loop], "g", *ports, weights), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )


@pytest.mark.usefixtures("alarm")
def test_an_endless_loop_ends_when_a_handler_raises() -> None:
    with gpu_engine.compile(counting(2**62), device="cpu", streams=1) as engine, pytest.raises(Stopped, match="alarm"):
        engine.run({"x": np.zeros(2, np.float32)})


NESTED = """
g (int64 n, bool yes, float[2] x) => (float[2] y) {
  y = Loop (n, yes, x) <body = outer (int64 i, bool before, float[2] s) => (bool after, float[2] t) {
    after = Identity (before)
    t = Loop (n, before, s) <body = inner (int64 j, bool was, float[2] u) => (bool still, float[2] v) {
      still = Identity (was)
      v = Add (u, x)
    }>
  }>
}"""


@pytest.mark.usefixtures("alarm")
def test_no_loop_around_one_that_was_interrupted_goes_on() -> None:
    given = {"n": np.int64(2**62), "yes": np.bool_(True), "x": np.zeros(2, np.float32)}
    with gpu_engine.compile(model_of(NESTED), device="cpu", streams=1) as engine:
        assert all(isinstance(step.kernel, Native) for step in engine.plan.steps)
        with pytest.raises(Stopped, match="alarm"):
            engine.run(given)
        signal.setitimer(signal.ITIMER_REAL, 0)
        result = engine.run(given | {"n": np.int64(3), "x": np.ones(2, np.float32)})
    np.testing.assert_array_equal(result["y"], np.full(2, 10, np.float32))


@pytest.mark.parametrize("trips", [0, 1, 4095, 4096, 4097, 10_000])
def test_looks_change_nothing(trips: int) -> None:
    with gpu_engine.compile(counting(trips), device="cpu", streams=1) as engine:
        result = engine.run({"x": np.zeros(2, np.float32)})
    np.testing.assert_array_equal(result["y"], np.full(2, trips, np.float32))
