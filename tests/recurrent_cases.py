"""Recurrent layers of all kinds with operands for them, run as native kernels by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_fallback.native import Target
from cpu_fallback.recurrent import emit_recurrent
from gpu_engine.frontend.operators.recurrent import ACTIVATIONS, DEFAULTS, activation_exprs
from gpu_engine.ir import dims
from gpu_engine.ir.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, INT8, UINT8, DType
from gpu_engine.ir.graph import Node
from gpu_engine.ir.ops import Recurrent
from gpu_engine.ir.ops.recurrent import GATES, OPTIONAL
from gpu_engine.plan.lower import NOT_BATCHED, Lowering, lower_graph
from gpu_engine.plan.plan import Plan
from tests.kernel_runner import guarded, guards_hold, run_native
from tests.reference import graph_of

Array = NDArray[Any]
SMOOTH = tuple(name for name in ACTIVATIONS if name not in ("thresholdedrelu", "affine"))
BOUNDED = ("sigmoid", "tanh", "scaledtanh", "hardsigmoid", "softsign")
"""Gates that let no state grow without bound, which would make any rounding arbitrarily large."""
EXACT = ("hardsigmoid", "relu", "leakyrelu")
"""Activations that a few exactly rounded operations make up."""


@dataclasses.dataclass(frozen=True)
class Case:
    kind: str = "lstm"
    steps: int = 3
    rows: int = 2
    hidden: int = 5
    directions: int = 1
    backwards: bool = False
    present: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    clip: float | None = None
    input_forget: bool = False
    linear_before_reset: bool = False
    dtype: DType = FLOAT32
    weights: DType | None = None
    per_column: bool = False
    seed: int = 0

    def op(self, computed: DType | None = None) -> Recurrent:
        reverse = (False, True) if self.directions == 2 else (self.backwards,)
        functions = activation_exprs(computed or self.dtype, self.kind, self.directions, self.names, (), ())
        present = tuple(name for name in OPTIONAL if name in self.given)
        return Recurrent(
            self.kind, reverse, functions, present, self.clip, self.input_forget, self.linear_before_reset
        )  # fmt: skip

    @property
    def given(self) -> tuple[str, ...]:
        return self.present + (("scale", "zero") if self.weights is not None else ())

    def arrays(self) -> list[Array]:
        generator = np.random.default_rng(self.seed)
        width, hidden, d = GATES[self.kind] * self.hidden, self.hidden, self.directions
        columns = (d, width) if self.per_column else (d,)
        shapes = {"bias": (d, hidden), "peepholes": (d, 3 * hidden), "scale": columns, "zero": columns}

        def array(name: str) -> Array:
            shape = shapes.get(name, (d, self.rows, hidden))
            if name == "lengths":
                return generator.integers(0, self.steps + 2, self.rows).astype(np.int32)
            if name == "zero":
                assert self.weights is not None
                return generator.integers(0, 9, shape).astype(self.weights)
            if name == "scale":
                return (generator.random(shape) / (127 * hidden**0.5)).astype(np.float32)
            return generator.standard_normal(shape).astype(self.dtype)

        x = generator.standard_normal((self.steps, self.rows, d * width)).astype(self.dtype)
        if self.weights is None:
            weights = (generator.standard_normal((d, width, hidden)) * hidden**-0.5).astype(self.dtype)
        else:
            low, high = (-128, 127) if self.weights == INT8 else (0, 255)
            weights = generator.choice([low, high, 0, 1, 7], (d, width, hidden)).astype(self.weights)
        return [x, weights, *(array(name) for name in OPTIONAL if name in self.given)]


def native_plan(op: Recurrent, arrays: Sequence[Array], target: Target, constant: bool = True) -> Plan:
    """The plan of `op` alone, with everything but the inputs constant if `constant`."""
    kinds = {f"x{i}": (array.dtype, array.shape) for i, array in enumerate(arrays) if i == 0 or not constant}

    def lower(lowering: Lowering, node: Node, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> None:
        assert emit_recurrent(lowering, op, node, inputs, outputs, target)

    def build(builder: Any, x: Any, *values: Any) -> Any:
        return builder.emit_all(op, x, *values, *(map(builder.constant, arrays[1:]) if constant else ()))

    return lower_graph(graph_of(kinds, build), NOT_BATCHED, lower)


def run_recurrent(op: Recurrent, arrays: Sequence[Array], target: Target, threads: int = 1) -> list[Array]:
    """The results of the native kernel; results and records are poison before, and nothing around them may change."""
    plan = native_plan(op, arrays, target)
    places, memories = [], []
    for buffer in plan.buffers:
        place, memory = guarded([dims.number(extent) for extent in buffer.shape], buffer.dtype)
        if buffer.constant is not None:
            place[...] = buffer.constant
        places.append(place)
        memories.append(memory)
    places[plan.inputs[0]][...] = arrays[0]
    (step,) = plan.steps
    run_native(step.kernel, places, target, threads)
    assert all(map(guards_hold, memories))
    return [places[i] for i in plan.outputs]


def expected_of(case: Case, arrays: Sequence[Array]) -> list[Array]:
    """The reference in float64, in the case's own dtype."""
    wide = [array.astype(np.float64) if array.dtype.kind in "fV" else array for array in arrays]
    with np.errstate(all="ignore"):
        return [result.astype(case.dtype) for result in case.op(FLOAT64).evaluate(np, *wide)]


def assert_near(found: Sequence[Array], expected: Sequence[Array], tolerance: float) -> None:
    for actual, wanted in zip(found, expected, strict=True):
        assert (actual.dtype, actual.shape) == (wanted.dtype, wanted.shape)
        wide = wanted.astype(np.float64)
        scale = np.abs(wide[np.isfinite(wide)]).max(initial=1.0)
        np.testing.assert_allclose(
            actual.astype(np.float64), wide, rtol=tolerance, atol=tolerance * scale
        )  # fmt: skip


TOLERANCE = {FLOAT32: 2e-5, FLOAT64: 1e-12, FLOAT16: 4e-3, BFLOAT16: 3e-2}
FULL = {
    "lstm": ("lengths", "initial_h", "initial_c", "peepholes"),
    "gru": ("lengths", "initial_h", "bias"),
    "rnn": ("lengths", "initial_h"),
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(sorted(GATES)))
    linear = kind == "gru" and draw(st.booleans())
    optional = [name for name in FULL[kind] if name != "bias" or linear]
    directions = draw(st.sampled_from((1, 1, 2)))
    own = len(DEFAULTS[kind])
    bounded = [kind != "rnn" and i % own == 0 for i in range(own * directions)]
    named = draw(st.booleans())
    return Case(
        kind=kind,
        steps=draw(st.integers(0, 4)),
        rows=draw(st.sampled_from((0, 1, 1, 2, 3, 5, 6, 7, 8, 13, 33))),
        hidden=draw(st.integers(1, 40)),
        directions=directions,
        backwards=draw(st.booleans()),
        present=tuple(name for name in optional if draw(st.booleans())),
        names=tuple(draw(st.sampled_from(BOUNDED if gate else SMOOTH)) for gate in bounded) if named else (),
        clip=draw(st.sampled_from((None, None, 0.5, 3.0))),
        input_forget=kind == "lstm" and draw(st.booleans()),
        linear_before_reset=linear,
        dtype=draw(st.sampled_from((FLOAT32, FLOAT32, FLOAT32, FLOAT64, FLOAT16, BFLOAT16))),
        seed=draw(st.integers(0, 99)),
    )


@st.composite
def quantised_cases(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(sorted(GATES)))
    linear = kind == "gru" and draw(st.booleans())
    optional = [name for name in FULL[kind] if name != "bias" or linear]
    directions = draw(st.sampled_from((1, 1, 2)))
    return Case(
        kind=kind,
        steps=draw(st.integers(0, 4)),
        rows=draw(st.sampled_from((0, 1, 1, 2, 5, 8, 13))),
        hidden=draw(st.integers(1, 40)),
        directions=directions,
        backwards=draw(st.booleans()),
        present=tuple(name for name in optional if draw(st.booleans())),
        names=tuple(draw(st.sampled_from(EXACT)) for _ in range(len(DEFAULTS[kind]) * directions)),
        linear_before_reset=linear,
        weights=draw(st.sampled_from((INT8, UINT8))),
        per_column=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )
