"""Memory planning: what shares memory is never alive at once, whatever extents a plan is bound to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import FLOAT32, INT8
from gpu_engine.ir.graph import Builder, Value
from gpu_engine.ir.ops import Map, Reshape, Softmax, Transpose
from gpu_engine.plan.lower import without_unused
from gpu_engine.plan.memory import (
    ALIGNMENT,
    Layout,
    Lifetime,
    assign_regions,
    buffer_nbytes,
    in_place_pairs,
    lifetimes,
    typical_nbytes,
)
from gpu_engine.plan.plan import Buffer, Step
from tests.cpu_execution import lowered
from tests.reference import graph_of

N = dims.symbol("N")
X = expr.arg(0, FLOAT32)


@st.composite
def spans(draw: st.DrawFn) -> list[Lifetime]:
    found = draw(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 6), st.integers(0, 500)), max_size=25))
    return [Lifetime(first, first + length, nbytes) for first, length, nbytes in found]


@given(spans(), st.data())
def test_intervals_never_overlap(found: list[Lifetime], data: st.DataObject) -> None:
    regions = assign_regions(found)
    sizes = np.array(data.draw(st.lists(st.integers(0, 900), min_size=len(found), max_size=len(found))), np.int64)
    offsets, total = Layout(regions).offsets(sizes)
    assert_apart(found, offsets.tolist(), sizes.tolist(), total)


def assert_apart(found: Sequence[Lifetime], offsets: Sequence[int], sizes: Sequence[int], total: int) -> None:
    for i, a in enumerate(found):
        assert offsets[i] % ALIGNMENT == 0 and offsets[i] >= 0 and offsets[i] + sizes[i] <= total
        for j in range(i):
            alive_together = not (found[j].last < a.first or a.last < found[j].first)
            apart = offsets[i] + sizes[i] <= offsets[j] or offsets[j] + sizes[j] <= offsets[i]
            assert apart or not alive_together, (i, j)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=12), st.integers(0, 400))
def test_chains_take_over(lengths: list[int], nbytes: int) -> None:
    """A chain of takeovers is one region, beside which a long life gets another."""
    chain, start = [], 0
    for length in lengths:
        chain.append(Lifetime(start, start + length, nbytes))
        start += length
    joined = [(i, i + 1) for i in range(len(chain) - 1)]
    regions = assign_regions([*chain, Lifetime(0, start, nbytes)], joined)
    assert len(set(regions[:-1])) == 1 and regions[-1] != regions[0]


def test_as_few_regions_as_are_alive_at_once() -> None:
    found = [Lifetime(i, i + 1, 100) for i in range(10)]
    assert len(set(assign_regions(found))) == 2


def test_sizes_to_plan_with() -> None:
    buffers = [Buffer(FLOAT32, (N, 3)), Buffer(INT8, (dims.symbol("L"), N)), Buffer(INT8, (7,))]
    assert typical_nbytes(buffers, "N") == [4 * 3 * 4, 256 * 4, 7]
    assert typical_nbytes([Buffer(INT8, (dims.broadcast(N, 2 * dims.symbol("L")),))], None) == [1 << 20]
    assert buffer_nbytes(buffers[0]) == 12 * N


def three_maps(builder: Builder, x: Value) -> Value:
    a = builder.emit(Softmax(1), x)
    b = builder.emit(Map(X * 2), a)
    c = builder.emit(Reshape((N * 5,)), b)
    return builder.emit(Transpose((1, 0)), builder.emit(Reshape((N, 5)), builder.emit(Map(X + 1), c)))


def test_aliases_share_and_maps_take_over() -> None:
    plan = lowered(graph_of({"x": (N, 5)}, three_maps))
    arena = plan.program.segments[0].arena
    assert len(arena.owned) == 3 and set(arena.layout.regions.tolist()) == {0}
    spans_ = lifetimes(plan, arena.owned, [1] * 3)
    assert in_place_pairs(plan, arena.owned, spans_) == [(0, 1), (1, 2)]
    assert [(s.first, s.last) for s in spans_] == [(0, 1), (1, 2), (2, 3)]


def test_what_is_needed_later_is_not_taken_over() -> None:
    def build(builder: Builder, x: Value) -> Value:
        a = builder.emit(Softmax(1), x)
        b = builder.emit(Map(expr.exp(X)), a)
        return builder.emit(Softmax(0), builder.emit(Map(X - expr.arg(1, FLOAT32)), b, a))

    plan = lowered(graph_of({"x": (N, 5)}, build))
    arena = plan.program.segments[0].arena
    assert len(set(arena.layout.regions[:2].tolist())) == 2


def test_what_was_packed_is_kept_packed_alone() -> None:
    found = [Buffer(INT8, (4,), np.zeros(4, np.int8)), Buffer(INT8, (8,), np.zeros(8, np.int8)), Buffer(INT8, (4,))]
    found.append(Buffer(INT8, (2, 4), alias=1))
    kept = without_unused(found, [Step(None, (3,), (2,), "a step")], ())
    assert [buffer.constant is None for buffer in kept] == [True, False, True, True]
    assert without_unused(found, [], (0,))[0].constant is found[0].constant


def test_weights_are_counted_once() -> None:
    weight = np.ones((4, 4), np.float32)

    def build(builder: Builder, x: Value) -> Value:
        known = builder.constant(weight)
        return builder.emit(Map(X + expr.arg(1, FLOAT32)), builder.emit(Map(X * expr.arg(1, FLOAT32)), x, known), known)

    assert lowered(graph_of({"x": (4, 4)}, build)).program.weights_nbytes == 64
