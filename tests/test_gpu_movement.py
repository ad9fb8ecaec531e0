"""What moves elements on the GPU: transposing, broadcasting, slicing, joining, padding, gathering, counting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("triton")

from gpu_engine.gpu.offline import Resources, compiled, problems, resources
from gpu_engine.ir import dims
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import BFLOAT16, BOOL, FLOAT16, FLOAT32, FLOAT64, INT8, INT32, INT64, UINT8, DType
from gpu_engine.ir.graph import Op, ShapeTensor, TensorType
from gpu_engine.ir.ops import (
    Concat,
    Expand,
    Gather,
    GatherElements,
    GatherND,
    Iota,
    Pad,
    Slice,
    Transpose,
)
from tests.gpu_runner import array_steps, execute, graph_of, kernels, lowered, run_op

Array = NDArray[Any]
WIDTHS = (INT8, FLOAT16, FLOAT32, FLOAT64)
N, S, H, W = map(dims.symbol, "NSHW")


def counted(shape: Sequence[int], dtype: DType = FLOAT32) -> Array:
    """Elements that differ from their neighbours."""
    bits = np.random.default_rng(0).integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
    return bits.view(bool if dtype == BOOL else dtype).reshape(shape) if dtype != BOOL else (bits[..., 0] & 1) != 0


def assert_moved(found: Array, wanted: Array) -> None:
    """Bit for bit."""
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    assert found.tobytes() == np.ascontiguousarray(wanted).tobytes()


def check(op: Op, arrays: Sequence[Array], seed: int = 0) -> None:
    assert_moved(run_op(op, arrays, seed=seed)[0], op.evaluate(np, *arrays)[0])


def check_symbolic(op: Any, shapes: Sequence[Any], bindings: Sequence[Any], known: Sequence[Any], dtype: DType) -> None:
    """One plan of `op`, beside `known[i]`, the operation with the extents of `bindings[i]`."""
    plan = lowered(graph_of(op, [TensorType(dtype, shape) for shape in shapes]))
    assert not array_steps(plan)
    for seed, (binding, reference) in enumerate(zip(bindings, known, strict=True)):
        arrays = [counted(shape, dtype) for shape in binding]
        assert_moved(execute(plan, arrays, seed)[0], reference.evaluate(np, *arrays)[0])


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
@pytest.mark.parametrize(
    ("shape", "perm"),
    [
        ((33, 70), (1, 0)), ((2, 3, 35, 5), (0, 2, 3, 1)), ((2, 5, 7, 3), (0, 3, 1, 2)), ((2, 9, 3, 8), (0, 2, 1, 3)),
        ((2, 9, 3, 8), (0, 2, 3, 1)), ((3, 4, 5), (2, 1, 0)), ((4,), (0,)), ((), ()), ((2, 0, 3), (2, 0, 1)),
        ((1, 5, 1, 6), (3, 0, 2, 1)), ((2, 3, 2, 3, 2, 3), (5, 0, 4, 1, 3, 2)), ((64, 64), (1, 0)),
    ],
)  # fmt: skip
def test_transpose(shape: tuple[int, ...], perm: tuple[int, ...], dtype: DType) -> None:
    check(Transpose(perm), [counted(shape, dtype)], seed=len(shape))


@pytest.mark.parametrize(
    ("shape", "perm", "bindings"),
    [
        ((N, S, 12, 4), (0, 2, 1, 3), [((1, 1, 12, 4),), ((2, 9, 12, 4),)]),
        ((N, 12, S, 4), (0, 1, 3, 2), [((2, 12, 1, 4),), ((1, 12, 40, 4),)]),
        ((N, H, W, 3), (0, 3, 1, 2), [((2, 5, 7, 3),), ((1, 16, 16, 3),)]),
        ((N, S), (1, 0), [((1, 1),), ((33, 65),), ((7, 1),)]),
    ],
)
def test_transpose_of_symbolic_extents(shape: Any, perm: Any, bindings: Any) -> None:
    op = Transpose(perm)
    check_symbolic(op, [shape], bindings, [op] * len(bindings), FLOAT32)


@pytest.mark.parametrize("dtype", (*WIDTHS, BOOL), ids=str)
@pytest.mark.parametrize(
    ("shape", "wide"), [((), (5,)), ((3, 1), (3, 33)), ((1, 3), (2, 5, 3)), ((4, 1, 7), (4, 6, 7)), ((0, 1), (0, 4))]
)
def test_expand(shape: tuple[int, ...], wide: tuple[int, ...], dtype: DType) -> None:
    check(Expand(wide), [counted(shape, dtype)])


def test_expand_to_symbolic_extents() -> None:
    bindings = [((5, 1), (5, 6)), ((1, 1), (1, 6)), ((5, 6), (5, 6))]
    plan = lowered(graph_of(Expand((N, 6)), [TensorType(FLOAT32, (N, S))]))
    assert not array_steps(plan)
    for shape, wide in bindings:
        x = counted(shape)
        assert_moved(execute(plan, [x])[0], np.broadcast_to(x, wide))


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
@pytest.mark.parametrize(
    ("shape", "starts", "steps", "extents"),
    [
        ((20,), (3,), (1,), (9,)), ((20,), (19,), (-1,), (20,)), ((5, 33), (4, 30), (-2, -3), (3, 11)),
        ((3, 8, 48), (0, 2, 16), (1, 1, 1), (3, 5, 24)), ((3, 8), (0, 0), (1, 1), (3, 0)),
        ((3, 8), (1, 7), (1, -1), (1, 8)), ((2, 3, 40), (1, 0, 1), (1, 2, 2), (1, 2, 20)),
    ],
)  # fmt: skip
def test_slice(shape: Any, starts: Any, steps: Any, extents: Any, dtype: DType) -> None:
    check(Slice(starts, steps, extents), [counted(shape, dtype)], seed=1)


def test_slice_of_symbolic_extents() -> None:
    backwards = Slice((N - 1, 0, S - 1), (-1, 1, -1), (N, 3, S))
    bindings = [((n, 3, s),) for n, s in ((1, 1), (4, 9), (3, 40))]
    known = [Slice((n - 1, 0, s - 1), (-1, 1, -1), (n, 3, s)) for ((n, _, s),) in bindings]
    check_symbolic(backwards, [(N, 3, S)], bindings, known, FLOAT32)
    shorter = Slice((0, 1), (1, 1), (N, S - 1))
    pairs = [((2, 1),), ((3, 8),)]
    check_symbolic(
        shorter, [(N, S)], pairs, [Slice((0, min(1, s)), (1, 1), (n, s - 1)) for ((n, s),) in pairs], FLOAT16
    )


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
@pytest.mark.parametrize(
    ("axis", "shapes"),
    [
        (0, [(3,), (5,)]), (1, [(2, 3), (2, 1), (2, 40)]), (1, [(2, 3, 4, 4), (2, 5, 4, 4)]), (0, [(0, 3), (2, 3)]),
        (2, [(2, 3, 1)] * 11), (1, [(2, 0)]), (0, [(4, 2)]), (1, [(0, 2), (0, 3)]), (1, [(1, 2000), (1, 50)]),
    ],
)  # fmt: skip
def test_concat(axis: int, shapes: Any, dtype: DType) -> None:
    check(Concat(axis), [counted(shape, dtype) for shape in shapes], seed=axis)


def test_concat_of_symbolic_extents() -> None:
    for axis, shapes, bindings in (
        (1, [(N, S), (N, 3), (N, W)], [((2, 4), (2, 3), (2, 1)), ((1, 70), (1, 3), (1, 33))]),
        (0, [(N, 6), (S, 6)], [((1, 6), (3, 6)), ((300, 6), (1, 6))]),
    ):
        check_symbolic(Concat(axis), shapes, bindings, [Concat(axis)] * 2, FLOAT32)


def test_one_launch_joins_eight_tensors() -> None:
    for count in (2, 8, 9):
        plan = lowered(graph_of(Concat(1), [TensorType(FLOAT32, (N, 5))] * count))
        assert len(plan.steps) == -(-count // 8)


@pytest.mark.parametrize("mode", ("constant", "reflect", "edge", "wrap"))
@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
@pytest.mark.parametrize(
    ("shape", "before", "after"),
    [
        ((2, 3, 5, 6), (0, 0, 1, 2), (0, 0, 2, 1)), ((4,), (9,), (13,)), ((2, 5, 3), (0, 1, 0), (0, 1, 0)),
        ((3, 4), (0, -1), (2, -2)), ((1, 7), (2, -3), (0, 1)), ((3, 4), (0, 0), (0, 0)), ((5, 1), (0, 3), (0, 2)),
    ],
)  # fmt: skip
def test_pad(shape: Any, before: Any, after: Any, dtype: DType, mode: str) -> None:
    x = counted(shape, dtype)
    check(Pad(before, after, mode), [x], seed=2)
    if mode == "constant":
        check(Pad(before, after), [x, counted((), dtype)])


def test_pad_of_symbolic_extents() -> None:
    sizes = [(1, 3, 4, 5), (2, 3, 9, 2)]
    for mode in ("constant", "reflect", "edge", "wrap"):
        op = Pad((0, 0, 1, 1), (0, 0, 2, 0), mode)
        check_symbolic(op, [(N, 3, H, W)], [(size,) for size in sizes], [op] * 2, FLOAT32)
    upwards = Pad((0, 0), (0, (S + 7) // 8 * 8 - S))
    known = [Pad((0, 0), (0, -s % 8)) for s in (1, 8, 13)]
    check_symbolic(upwards, [(N, S)], [((2, s),) for s in (1, 8, 13)], known, FLOAT32)
    off = Pad((0, 0), (0, 3 - S))
    known = [Pad((0, 0), (0, 3 - s)) for s in (1, 3, 7)]
    plan = lowered(graph_of(off, [TensorType(FLOAT32, (2, S))]))
    for reference, s in zip(known, (1, 3, 7), strict=True):
        x = counted((2, s))
        assert_moved(execute(plan, [x])[0], reference.evaluate(np, x)[0])


def test_pad_of_nothing() -> None:
    check(Pad((1, 0), (0, 2)), [counted((0, 3))])
    plan = lowered(graph_of(Pad((1,), (1,), "edge"), [TensorType(FLOAT32, (0,))]))
    assert array_steps(plan)


@pytest.mark.parametrize("kind", (INT32, INT64), ids=str)
@pytest.mark.parametrize(
    ("shape", "axis", "places"),
    [
        ((7, 33), 0, (5,)), ((7, 64), 0, (2, 3)), ((5,), 0, ()), ((2, 6, 3), 1, (4,)), ((2, 6, 3), 2, (1, 40)),
        ((3, 5), 1, ()), ((4, 2), 0, (0,)), ((3, 0), 0, (2,)), ((2, 3, 1), 1, (9,)), ((6, 2048), 0, (3,)),
    ],
)  # fmt: skip
def test_gather(shape: Any, axis: int, places: Any, kind: DType) -> None:
    indices = np.random.default_rng(1).integers(-shape[axis], shape[axis], places).astype(kind)
    for dtype in (FLOAT16, FLOAT32, INT64, BOOL):
        check(Gather(axis), [counted(shape, dtype), indices], seed=3)


def test_gather_of_symbolic_extents() -> None:
    plan = lowered(graph_of(Gather(0), [TensorType(FLOAT32, (50, 24)), TensorType(INT64, (N, S))]))
    table = counted((50, 24))
    for seed, shape in enumerate([(1, 1), (2, 37), (3, 5)]):
        indices = np.random.default_rng(seed).integers(-50, 50, shape)
        assert_moved(execute(plan, [table, indices], seed)[0], table[indices])
    plan = lowered(graph_of(Gather(1), [TensorType(FLOAT16, (N, S, H)), TensorType(INT32, (W,))]))
    for seed, shape in enumerate([(1, 1, 1), (2, 9, 35)]):
        x = counted(shape, FLOAT16)
        indices = np.random.default_rng(seed).integers(0, shape[1], 5).astype(np.int32)
        assert_moved(execute(plan, [x, indices], seed)[0], x[:, indices])


def test_an_index_outside_reads_nothing() -> None:
    """The reference raises; a kernel cannot."""
    x = counted((4, 24))
    indices = np.array([0, 4, -5, 1 << 40, -(1 << 40), 3])
    (found,) = run_op(Gather(0), [x, indices])
    assert_moved(found[[0, 5]], x[[0, 3]])
    assert not found[1:5].any()
    (found,) = run_op(GatherElements(0), [x, np.array([[0, 9], [-5, -1]])])
    assert (found == [[x[0, 0], 0], [0, x[3, 1]]]).all()
    (found,) = run_op(GatherND(0), [x, np.array([[0, 24], [-5, 0], [3, -1]])])
    assert (found == [0, 0, x[3, 23]]).all()


@pytest.mark.parametrize("kind", (INT32, INT64), ids=str)
@pytest.mark.parametrize(
    ("shape", "axis", "wanted"),
    [((5, 7), 0, (3, 7)), ((5, 7), 1, (5, 20)), ((2, 3, 4), 1, (1, 9, 2)), ((9,), 0, (33,)), ((2, 3), 0, (0, 3))],
)
def test_gather_elements(shape: Any, axis: int, wanted: Any, kind: DType) -> None:
    indices = np.random.default_rng(2).integers(-shape[axis], shape[axis], wanted).astype(kind)
    for dtype in WIDTHS:
        check(GatherElements(axis), [counted(shape, dtype), indices])


def test_gather_elements_of_symbolic_extents() -> None:
    plan = lowered(graph_of(GatherElements(1), [TensorType(FLOAT32, (N, S)), TensorType(INT64, (N, H))]))
    for rows, columns, count in ((1, 1, 1), (3, 8, 40)):
        x, indices = counted((rows, columns)), np.random.default_rng(0).integers(0, columns, (rows, count))
        assert_moved(execute(plan, [x, indices])[0], np.take_along_axis(x, indices, 1))


@pytest.mark.parametrize(
    ("shape", "batch", "places"),
    [
        ((4, 5, 6), 0, (3, 2)), ((4, 5, 6), 0, (2, 7, 3)), ((4, 5, 6), 1, (4, 2)), ((4, 5, 6), 1, (4, 3, 1)),
        ((4, 5, 6), 2, (4, 5, 1)), ((9, 48), 0, (5, 1)),
    ],
)  # fmt: skip
def test_gather_nd(shape: Any, batch: int, places: Any) -> None:
    limits = np.array(shape[batch : batch + places[-1]], np.int64)
    indices = np.random.default_rng(3).integers(-limits, limits, places)
    for dtype in WIDTHS:
        check(GatherND(batch), [counted(shape, dtype), indices], seed=1)
    check(GatherND(batch), [counted(shape), indices.astype(np.int32)])


@pytest.mark.parametrize("dtype", (INT64, INT32, UINT8, FLOAT32, FLOAT16, BFLOAT16, FLOAT64), ids=str)
def test_iota(dtype: DType) -> None:
    for extent in (0, 1, 200, 1030):
        (found,) = run_op(Iota(extent, dtype), [])
        assert_moved(found, np.arange(extent).astype(dtype))


def test_shape_tensor() -> None:
    values: tuple[Dim, ...] = (3, -1, 1 << 40, 0)
    for dtype in (INT64, FLOAT32):
        (found,) = run_op(ShapeTensor(values, (2, 2), dtype), [])
        assert_moved(found, np.array(values).reshape(2, 2).astype(dtype))


def test_what_kernels_leave_alone() -> None:
    kind = TensorType(np.dtype(np.complex128), (2, 3))
    assert array_steps(lowered(graph_of(Transpose((1, 0)), [kind])))
    assert not array_steps(lowered(graph_of(Transpose((1, 0)), [TensorType(np.dtype(np.complex64), (2, 3))])))
    assert not array_steps(lowered(graph_of(Concat(0), [TensorType(np.dtype(ml_dtypes.float8_e5m2), (2, 3))] * 2)))


def machine_code(op: Any, *kinds: TensorType) -> Resources:
    (kernel,) = kernels(lowered(graph_of(op, kinds)))
    binary = compiled(kernel, 90)
    used = resources(binary)
    assert problems(kernel, binary, used, 90) == []
    return used


@pytest.mark.parametrize(
    ("op", "kinds"),
    [
        (Transpose((0, 2, 1, 3)), [TensorType(FLOAT32, (N, S, 12, 64))]),
        (Transpose((0, 2, 3, 1)), [TensorType(FLOAT32, (N, 64, 56, 56))]),
        (Transpose((0, 2, 3, 1)), [TensorType(FLOAT16, (N, 64, 56, 56))]),
        (Gather(0), [TensorType(FLOAT32, (30522, 768)), TensorType(INT64, (N, S))]),
        (Concat(1), [TensorType(FLOAT32, (N, 64)), TensorType(FLOAT32, (N, 128))]),
        (Slice((0, 0, 64), (1, 1, 1), (N, S, 64)), [TensorType(FLOAT32, (N, S, 192))]),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, list) else str(value[0].dtype),
)
def test_loads_of_16_bytes(op: Any, kinds: list[TensorType]) -> None:
    used = machine_code(op, *kinds)
    assert used.load_bits == 128
    assert any(text.startswith("STG.E") and text.endswith("128") for text in used.instructions)


def test_pads_store_16_bytes_at_a_time() -> None:
    used = machine_code(Pad((0, 0, 3, 3), (0, 0, 3, 3)), TensorType(FLOAT32, (N, 3, 224, 224)))
    assert any(text.startswith("STG.E") and text.endswith("128") for text in used.instructions)
