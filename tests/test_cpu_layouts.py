"""Images channels last on the CPU device: the layout pass, transposes in registers, pools."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_fallback.layouts import assign_layouts
from cpu_fallback.native import Target, host
from cpu_fallback.pooling import pool_call
from cpu_fallback.transposition import as_matrices, transpose_call
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import FLOAT32
from gpu_engine.ir.graph import Builder, Graph, Value, verify
from gpu_engine.ir.ops import (
    Concat,
    Conv,
    ConvTranspose,
    MatMul,
    Pad,
    Pool,
    Reduce,
    Reshape,
    Resize,
    Slice,
    Softmax,
    Transpose,
)
from gpu_engine.ir.ops.channels_last import LastConv, LastConvTranspose, LastPool, to_first, to_last
from gpu_engine.plan.layouts import is_relabelling
from tests.cpu_execution import DEVICE, assert_close, lowered, run_slot
from tests.kernel_runner import guarded, guards_hold, run_native, targets
from tests.reference import graph_of, pointwise, random_inputs, run_graph

Array = NDArray[Any]
TARGETS = targets()
N, H, W = (dims.symbol(name) for name in "NHW")
SIZES = {"N": 2, "H": 13, "W": 10}


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def conv(b: Builder, x: Value, outputs: int, kernel: int = 3, stride: int = 1, group: int = 1) -> Value:
    """With a bias and Relu."""
    assert isinstance(x.shape[1], int)
    depth = x.shape[1] // group * kernel**2
    w = b.constant(normal(outputs, outputs, x.shape[1] // group, kernel, kernel) / np.float32(depth**0.5))
    bias = b.constant(normal(1, outputs, 1, 1))
    pads = (kernel // 2,) * 2
    epilogue = expr.maximum(expr.arg(0, FLOAT32) + expr.arg(1, FLOAT32), 0.0)
    return b.emit(Conv((stride,) * 2, pads, pads, (1, 1), group, epilogue), x, w, bias)


def check(build: Callable[..., Value], transposes: int, channels: int = 5, rank: int = 4) -> Graph:
    """The pass leaves so many transposes, and the result is that of the graph before it, natively."""
    shape = (N, channels, H, W)[:rank]
    before = graph_of({"x": shape}, build)
    after = verify(assign_layouts(before, host()), "layouts")
    counts = Counter(type(node.op) for node in after.nodes)
    assert counts[Transpose] == transposes, str(after)
    inputs = random_inputs(before, **SIZES)
    expected = run_graph(before, inputs)
    for name, array in run_graph(after, inputs).items():
        assert_close(array, expected[name], 1e-5)
    plan = lowered(before)
    (stream,) = DEVICE.open(plan, 1, 1, 1)
    try:
        found = run_slot(stream.slots[0], plan, list(inputs.values()))
    finally:
        stream.close()
    for array, wanted in zip(found, expected.values(), strict=True):
        assert_close(array, wanted, 1e-4)
    return after


def test_a_chain_of_convolutions_is_transposed_at_its_ends() -> None:
    def build(b: Builder, x: Value) -> Value:
        x = conv(b, conv(b, x, 20), 20, group=20)
        return conv(b, x, 18, 1)

    after = check(build, 2)
    assert [type(node.op) for node in after.nodes].count(LastConv) == 3


def test_an_image_of_few_channels_is_read_as_it_is() -> None:
    after = check(lambda b, x: conv(b, x, 20), 1, channels=3)
    assert any(isinstance(node.op, LastConv) and node.op.planar for node in after.nodes)


def test_branches_meet_channels_last() -> None:
    def build(b: Builder, x: Value) -> Value:
        x = conv(b, x, 16)
        left, right = conv(b, x, 20), conv(b, x, 20, 1)
        both = b.emit(Concat(1), pointwise(b, lambda a, c: a * c, left, right), right)
        return conv(b, both, 17)

    check(build, 2)


def test_gates_pools_and_heads_stay_channels_last() -> None:
    def build(b: Builder, x: Value) -> Value:
        x = conv(b, x, 24, stride=2)
        x = b.emit(Pool("max", (3, 3), (2, 2), (1, 1), (1, 1), (1, 1)), x)
        gate = conv(b, b.emit(Reduce("mean", (2, 3), True), x), 24, 1)
        x = pointwise(b, lambda x, g: x * g, x, gate)
        flat = b.emit(Reshape((x.shape[0], 24)), b.emit(Reduce("mean", (2, 3), True), x))
        return b.emit(MatMul(), flat, b.constant(normal(3, 24, 7)))

    after = check(build, 1)
    assert any(isinstance(node.op, LastPool) for node in after.nodes)


def test_a_pyramid_of_resizes_and_transposed_convolutions() -> None:
    def build(b: Builder, x: Value) -> Value:
        x = conv(b, x, 16)
        twice = (x.shape[0], 16, 2 * x.shape[2], 2 * x.shape[3])
        up = b.emit(Resize(twice, (1.0, 1.0, 2.0, 2.0), "nearest", "asymmetric", "floor"), x)
        wide = b.emit(ConvTranspose((2, 2), (0, 0), (0, 0), (1, 1), (0, 0)), x, b.constant(normal(5, 16, 16, 2, 2)))
        return pointwise(b, lambda a, c: a + c, up, wide)

    after = check(build, 2)
    assert any(isinstance(node.op, LastConvTranspose) for node in after.nodes)


def test_sequences_of_pixels_come_out_without_a_transpose() -> None:
    """A vision transformer's patches, a recognizer's columns: channels end up last anyway."""

    def patches(b: Builder, x: Value) -> Value:
        x = conv(b, x, 20, 1)
        flat = b.emit(Reshape((x.shape[0], 20, x.shape[2] * x.shape[3])), x)
        return b.emit(Transpose((0, 2, 1)), flat)

    def norm(b: Builder, x: Value) -> Value:
        x = b.emit(Transpose((0, 2, 3, 1)), conv(b, x, 20))
        x = pointwise(b, lambda x, s: x * s, x, b.constant(normal(2, 20)))
        return conv(b, b.emit(Transpose((0, 3, 1, 2)), x), 16)

    check(patches, 0, channels=3)
    check(norm, 1, channels=3)


def test_softmax_slices_and_pads_over_any_axis() -> None:
    def build(b: Builder, x: Value) -> Value:
        x = conv(b, x, 20)
        x = b.emit(Softmax(1), x)
        x = b.emit(Slice((0, 2, 1, 0), (1, 2, 1, 1), (x.shape[0], 6, x.shape[2] - 1, x.shape[3])), x)
        return b.emit(Pad((0, 1, 0, 2), (0, 0, 1, 0)), x, b.constant(np.float32(3)))

    check(build, 2)


def test_signals_over_one_axis() -> None:
    def build(b: Builder, x: Value) -> Value:
        for outputs in (20, 17):
            assert isinstance(x.shape[1], int)
            w = b.constant(normal(outputs, outputs, x.shape[1], 3))
            x = b.emit(Conv((1,), (1,), (1,), (1,)), x, w)
        return x

    check(build, 2, rank=3)


def test_an_epilogue_that_tiles_cannot_compute_becomes_a_map() -> None:
    """A gate per image and channel lies beside a result in no way that a tile can read."""

    def build(b: Builder, x: Value) -> Value:
        gate = b.emit(Reduce("mean", (2, 3), True), x)
        w = b.constant(normal(4, 5, 5, 3, 3))
        gated = expr.arg(0, FLOAT32) * expr.arg(1, FLOAT32)
        return b.emit(Conv((1, 1), (1, 1), (1, 1), (1, 1), 1, gated), x, w, gate)

    check(build, 2)


def test_what_has_no_convolution_stays_as_it_is() -> None:
    after = check(lambda b, x: b.emit(Pool("max", (2, 2), (2, 2), (0, 0), (0, 0), (1, 1)), x), 0)
    assert not any(isinstance(node.op, LastPool) for node in after.nodes)


def test_weights_that_are_not_constant_are_left_to_others() -> None:
    def build(b: Builder, x: Value, w: Value) -> Value:
        return b.emit(Conv((1, 1), (1, 1), (1, 1), (1, 1)), x, w)

    graph = graph_of({"x": (N, 5, H, W), "w": (6, 5, 3, 3)}, build)
    assert str(assign_layouts(graph, host())) == str(graph)


def test_transposes_that_move_nothing() -> None:
    assert is_relabelling((N, 5, 1, 1), to_last(4)) and is_relabelling((N, 1, H, W), to_last(4))
    assert not is_relabelling((N, 5, H, 1), to_last(4))
    assert tuple(to_last(5)[axis] for axis in to_first(5)) == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.vector_nbytes}")
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from([np.float32, np.float64]),
    team=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_transposed_matrices(target: Target, shape: tuple[int, int, int], dtype: Any, team: int) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    out, memory = guarded((shape[0], shape[2], shape[1]), dtype)
    run_native(transpose_call(0, 1, *shape, np.dtype(dtype).itemsize), [x, out], target, team)
    np.testing.assert_array_equal(out, x.transpose(0, 2, 1))
    assert guards_hold(memory)


def test_transposes_that_are_matrices() -> None:
    assert as_matrices((2, 3, 4, 5), (0, 2, 3, 1)) == (2, 3, 20)
    assert as_matrices((2, 3, 4, 5), (0, 3, 1, 2)) == (2, 12, 5)
    assert as_matrices((3, 4), (1, 0)) == (1, 3, 4)
    assert as_matrices((2, 3, 4, 5), (0, 2, 1, 3)) is as_matrices((3, 4), (0, 1)) is None


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.vector_nbytes}")
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_pools(target: Target, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(rank))

    kernel, strides, dilations, before, after = each(1, 4), each(1, 3), each(1, 2), each(-1, 2), each(-1, 2)
    extents = [
        max(1, (k - 1) * d + 1 - b - a) + data.draw(st.integers(0, 8))
        for k, d, b, a in zip(kernel, dilations, before, after, strict=True)
    ]
    kind = data.draw(st.sampled_from(["max", "average", "sum"]))
    op = Pool(kind, kernel, strides, before, after, dilations, data.draw(st.booleans()), data.draw(st.booleans()))
    x = normal(0, data.draw(st.integers(0, 2)), data.draw(st.integers(1, 70)), *extents)
    if x.size and data.draw(st.booleans()):
        x.flat[0], x.flat[-1] = np.nan, np.inf
    with np.errstate(all="ignore"):
        expected = op.evaluate(np, x)[0].transpose(to_last(x.ndim))
    image = np.ascontiguousarray(x.transpose(to_last(x.ndim)))
    out, memory = guarded(expected.shape, np.float32)
    call = pool_call(op, (0, image.shape), (1, out.shape), target)
    assert call is not None
    run_native(call, [image, out], target, data.draw(st.integers(1, 3)))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    assert guards_hold(memory)
