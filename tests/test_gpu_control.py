"""If and Loop on the GPU's plan: bodies run on the device, and the host reads only what it must."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("triton")

import gpu_engine
from gpu_engine.gpu.control import Body
from gpu_engine.gpu.interpret import InterpretDevice
from gpu_engine.gpu.launches import BodyCall
from gpu_engine.gpu.planning import kernels_of
from gpu_engine.plan.lower import NOT_BATCHED
from gpu_engine.tools.bundles import imported
from tests.gpu_runner import execute
from tests.test_control import floats, model_of
from tests.test_cpu_control import NESTED, SCANNED, STACKED, SWAPPED

BRANCHES = """
g (bool c, float[N, 3] x) => (float[N, 3] y, float[N, 3] z) {
  y, z = If (c) <
    then_branch = yes () => (float[N, 3] a, float[N, 3] same) { a = Exp (x)  same = Identity (x) },
    else_branch = no () => (float[N, 3] b, float[N, 3] d) { b = Neg (x)  d = Add (x, x) }
  >
}"""
GROWING = """
g (bool c, float[N] x) => (float[M] y) {
  z = If (c) <
    then_branch = yes () => (float[K] a) { a = Concat <axis = 0> (x, x) },
    else_branch = no () => (float[L] b) { b = Neg (x) }
  >
  y = Add (z, z)
}"""
COUNTED = """
g (int64 n, float[N] x) => (float[N] y) {
  y = Loop (n, , x) <body = step (int64 i, bool go, float[N] s) => (bool on, float[N] t) {
      on = Constant <value = bool {1}> ()
      t = Add (s, x)
  }>
}"""
UNTIL = """
g (float x, float limit) => (float y) {
  on = Less (x, limit)
  y = Loop (, on, x) <body = step (int64 i, bool go, float s) => (bool more, float t) {
      t = Add (s, s)
      more = Less (t, limit)
  }>
}"""


def agree(model: onnx.ModelProto, *many: Mapping[str, Any]) -> None:
    """One engine gives what the CPU's gives for each input."""
    with gpu_engine.compile(model, device="interpret") as ours, gpu_engine.compile(model, device="cpu") as cpu:
        assert any(isinstance(step.kernel, BodyCall) for step in ours.plan.steps)
        for inputs in many:
            arrays = {name: np.asarray(array) for name, array in inputs.items()}
            expected = cpu.run(arrays)
            for name, found in ours.run(arrays).items():
                np.testing.assert_allclose(found, expected[name], 1e-6, err_msg=name)


def test_carried_values_change_places() -> None:
    agree(
        model_of(SWAPPED),
        *({"n": np.int64(n), "go": np.bool_(go), "a": floats(2, 3), "b": floats(2, 3, seed=1)}
          for n in (0, 1, 3) for go in (False, True)),
    )  # fmt: skip


def test_slices_are_stacked() -> None:
    agree(model_of(STACKED), *({"x": floats(n, 2), "c": np.array([n > 2, True, False])} for n in (1, 3)))


def test_scans() -> None:
    agree(model_of(SCANNED), *({"x": floats(t, 2, 2), "start": floats(2, 2, seed=1)} for t in (1, 4, 2)))


def test_bodies_inside_bodies() -> None:
    agree(model_of(NESTED), *({"n": np.int64(n), "c": np.bool_(c), "x": floats(3, 2)} for n in (0, 3) for c in (0, 1)))


def test_branches_of_one_shape() -> None:
    agree(model_of(BRANCHES), *({"c": np.bool_(c), "x": floats(n, 3)} for c in (0, 1) for n in (1, 4)))


def test_branches_that_tell_extents() -> None:
    agree(model_of(GROWING), *({"c": np.bool_(c), "x": floats(n)} for c in (0, 1, 1) for n in (1, 4, 2)))


def test_the_run_tells_when_to_stop() -> None:
    agree(model_of(UNTIL), *({"x": np.float32(x), "limit": np.float32(20)} for x in (1, 3, 30)))


def notes_of(text: str, *inputs: Any) -> dict[tuple[str, str], int]:
    """What a plan noted while it ran once."""
    device = InterpretDevice()
    plan = device.lower(imported(model_of(text).SerializeToString()), NOT_BATCHED)
    (stream,) = device.open(plan, 1, 1, None)
    extents = {"N": 4}
    for staged, array in zip(stream.slots[0].stage(tuple(extents[s] for s in plan.symbols)), inputs, strict=True):
        staged[...] = array
    device.arrays.notes.clear()
    stream.slots[0].launch()
    stream.slots[0].wait()
    return dict(device.arrays.notes)


def test_iterations_that_are_only_counted_wait_for_nothing() -> None:
    assert not notes_of(COUNTED, np.int64(5), floats(4))


def test_a_condition_that_the_body_computes_is_waited_for_once_an_iteration() -> None:
    assert notes_of(UNTIL, np.float32(1), np.float32(20)) == {("waits", "bool()"): 5}


def test_the_kernels_of_bodies_are_kernels_of_the_plan() -> None:
    plan = InterpretDevice().lower(imported(model_of(UNTIL).SerializeToString()), NOT_BATCHED)
    (call,) = (step.kernel for step in plan.steps if isinstance(step.kernel, BodyCall))
    (body,) = call.bodies
    assert kernels_of(body) and set(kernels_of(body)) <= set(kernels_of(plan))


def test_slots_of_bodies_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    before = Body.__init__

    def counting(self: Body, plan: Any, open_slot: Any) -> None:
        before(self, plan, lambda: opened.append(plan) or open_slot())

    monkeypatch.setattr(Body, "__init__", counting)
    with gpu_engine.compile(model_of(BRANCHES), device="interpret") as engine:
        for c in (True, False, True, True):
            engine.run({"c": np.bool_(c), "x": floats(2, 3)})
    assert len(opened) == 2


def test_one_plan_runs_on_any_seed() -> None:
    plan = InterpretDevice().lower(imported(model_of(COUNTED).SerializeToString()), NOT_BATCHED)
    x = floats(7)
    for seed in (0, 1):
        (found,) = execute(plan, [np.array(3), x], seed)
        np.testing.assert_allclose(found, 4 * x, 1e-6)
