"""Runs graphs on the CPU device by hand: every byte of arenas and ports is poison before the inputs are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_fallback.calls import Native
from cpu_fallback.device import CpuDevice
from cpu_fallback.stream import CpuSlot
from gpu_engine.ir.graph import Graph, Op
from gpu_engine.plan.plan import Batching, Plan
from gpu_engine.plan.signature import Signature
from tests.reference import graph_of

Array = NDArray[Any]
DEVICE = CpuDevice()
POISON = 0xA5


def lowered(graph: Graph) -> Plan:
    """The plan of a graph that is not batched."""
    return DEVICE.lower(graph, Batching(None, (False,) * len(graph.inputs), (False,) * len(graph.outputs), "a test"))


def is_native(plan: Plan) -> bool:
    return all(isinstance(step.kernel, Native) for step in plan.steps)


def run_slot(slot: CpuSlot, plan: Plan, inputs: Sequence[Array]) -> list[Array]:
    """Copies of the outputs for inputs in port order, everything poisoned first."""
    staged = slot.stage(Signature(plan).fit([array.shape for array in inputs]).extents)
    for area in (*slot._arenas, *slot._ports):
        area.array[...] = POISON
    for place, array in zip(staged, inputs, strict=True):
        place[...] = array
    slot.launch()
    return [array.copy() for array in slot.wait()]


def run_graph(graph: Graph, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """{output name: array} of one run."""
    plan = lowered(graph)
    (stream,) = DEVICE.open(plan, 1, 1, 1)
    try:
        outputs = run_slot(stream.slots[0], plan, [inputs[name] for name in graph.input_names])
    finally:
        stream.close()
    return dict(zip(graph.output_names, outputs, strict=True))


def op_graph(op: Op, arrays: Sequence[Array], shapes: Sequence[Sequence[Any]] | None = None) -> Graph:
    """`op` of inputs x0, x1, ... with the arrays' dtypes and, unless symbolic `shapes` are given, their shapes."""
    kinds = shapes or [array.shape for array in arrays]
    named = {f"x{i}": (a.dtype, tuple(shape)) for i, (a, shape) in enumerate(zip(arrays, kinds, strict=True))}
    return graph_of(named, lambda builder, *values: builder.emit_all(op, *values))


def check_op(
    op: Op,
    arrays: Sequence[Array],
    tolerance: float = 1e-6,
    shapes: Sequence[Sequence[Any]] | None = None,
    native: bool = True,
    reference: Op | None = None,
) -> None:
    """`op` on the CPU device gives what its reference gives, through native steps alone if `native`."""
    graph = op_graph(op, arrays, shapes)
    plan = lowered(graph)
    assert not native or is_native(plan), [step.kernel for step in plan.steps]
    found = run_graph(graph, {f"x{i}": array for i, array in enumerate(arrays)})
    with np.errstate(all="ignore"):
        expected = (reference or op).evaluate(np, *arrays)
    for actual, wanted in zip(found.values(), expected, strict=True):
        assert_close(actual, wanted, tolerance)


def assert_close(actual: Array, expected: Array, tolerance: float) -> None:
    """Equal in dtype and shape; floats within the tolerance, NaN where NaN is."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    if actual.dtype.kind in "biu":
        np.testing.assert_array_equal(actual, expected)
    else:
        wide = np.complex128 if actual.dtype.kind == "c" else np.float64
        np.testing.assert_allclose(actual.astype(wide), expected.astype(wide), rtol=tolerance, atol=tolerance)
