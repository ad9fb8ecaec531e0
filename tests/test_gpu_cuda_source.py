"""CUDA C kernels beside their references: scatter, TopK, Unique, NonMaxSuppression; the shim that runs them; NVRTC."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from gpu_engine.errors import DeviceError
from gpu_engine.gpu import nvrtc, shim_runner
from gpu_engine.gpu.kernel import Argument, CudaKernel
from gpu_engine.gpu.launches import ArrayCall, Launch
from gpu_engine.gpu.nvrtc import compile_cuda
from gpu_engine.gpu.offline import cubin_resources
from gpu_engine.gpu.shim_runner import BarrierError, run
from gpu_engine.ir import dims
from gpu_engine.ir.dtypes import BFLOAT16, BOOL, FLOAT16, FLOAT32, FLOAT64, INT8, INT32, INT64, UINT32, DType
from gpu_engine.ir.graph import TensorType
from gpu_engine.ir.ops.array import Array
from gpu_engine.ir.ops.scatter import scatter_along, scatter_nd
from gpu_engine.ir.ops.selection import microsoft_unique, non_max_suppression, top_of, unique
from tests.gpu_runner import array_steps, execute, graph_of, lowered

needs_compiler = pytest.mark.skipif(not shim_runner.has_compiler(), reason="g++ compiles CUDA C for the host")
needs_nvrtc = pytest.mark.skipif(not nvrtc.has_compiler(), reason="NVRTC compiles CUDA C for GPUs")
REDUCTIONS = ("none", "add", "mul", "max", "min")
N, M = dims.symbol("N"), dims.symbol("M")


def rng() -> np.random.Generator:
    return np.random.default_rng()


def checked(op: Array, arrays: Sequence[Any], types: Sequence[TensorType] | None = None, tolerance: float = 0) -> None:
    """The plan is of kernels alone and agrees with the reference."""
    kinds = list(types or (TensorType(array.dtype, array.shape) for array in arrays))
    plan = lowered(graph_of(op, kinds))
    assert not array_steps(plan), op.function.__name__
    compare(execute(plan, arrays), op.evaluate(np, *arrays), tolerance)


def compare(found: Sequence[Any], expected: Sequence[Any], tolerance: float = 0) -> None:
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.dtype == wanted.dtype
        wide = [array.astype(np.float64) if array.dtype.kind in "fV" else array for array in (actual, wanted)]
        np.testing.assert_allclose(*wide, rtol=tolerance, equal_nan=True)


def numbers(dtype: DType, shape: tuple[int, ...]) -> Any:
    """Few distinct values, so that many are equal; of floats also NaN, infinities and both zeros."""
    values = rng().integers(-4 if dtype.kind != "u" else 0, 5, shape)
    if dtype.kind not in "fV":
        return values.astype(dtype)
    special = np.array([np.nan, np.inf, -np.inf, -0.0])
    odd = rng().random(shape) < 0.1
    return np.where(odd, special[rng().integers(0, 4, shape)], values / 2).astype(dtype)


def distinct(shape: tuple[int, ...], extent: int, axis: int) -> Any:
    """Indices that do not repeat along the axis, some of them counted from the end."""
    found = np.argsort(rng().random((*shape[:axis], extent, *shape[axis + 1 :])), axis)
    found = found[tuple(slice(0, n) for n in shape)]
    return np.where(rng().random(shape) < 0.3, found - extent, found)


def along(axis: int, reduction: str, kind: TensorType) -> Array:
    return Array(scatter_along, (kind,), (("axis", axis), ("reduction", reduction)))


@needs_compiler
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("shape", "places", "axis"), [((3, 40), (2, 37), 1), ((7, 3, 5), (4, 3, 2), 0)])
def test_scatter_along_an_axis(reduction: str, shape: Any, places: Any, axis: int) -> None:
    for dtype in (FLOAT32, FLOAT16 if axis else INT8):
        data, updates = numbers(dtype, shape), numbers(dtype, places)
        if reduction == "none":
            indices = distinct(places, shape[axis], axis)
        else:
            indices = rng().integers(-shape[axis], shape[axis], places)
        op = along(axis, reduction, TensorType(dtype, shape))
        checked(op, [data, indices.astype(rng().choice([np.int32, np.int64])), updates])


@needs_compiler
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("shape", "tuples", "depth"), [((6,), (70,), 1), ((4, 9), (33,), 2), ((5, 40), (9,), 1)])
def test_scatter_by_tuples(reduction: str, shape: Any, tuples: Any, depth: int) -> None:
    extents = np.array(shape[:depth])
    if reduction == "none":
        few = min(int(extents.prod()), int(np.prod(tuples)))
        indices = np.stack(np.unravel_index(rng().permutation(int(extents.prod()))[:few], shape[:depth]), -1)
        tuples = (few,)
    else:
        indices = rng().integers(-extents, extents, (*tuples, depth))
    for dtype in (FLOAT32, BFLOAT16 if depth == 2 else UINT32):
        data, updates = numbers(dtype, shape), numbers(dtype, (*tuples, *shape[depth:]))
        op = Array(scatter_nd, (TensorType(dtype, shape),), (("reduction", reduction),))
        checked(op, [data, indices.astype(np.int64), updates])


@needs_compiler
def test_sums_are_made_in_order() -> None:
    """Rounding shows the order: every run gives the reference's bits."""
    data, updates = numbers(FLOAT32, (2, 3)), rng().standard_normal((2, 100), np.float32)
    data[np.isnan(data)] = 0
    indices = rng().integers(0, 3, (2, 100))
    checked(along(1, "add", TensorType(FLOAT32, (2, 3))), [data, indices, updates])


@needs_compiler
def test_one_plan_scatters_any_shape() -> None:
    kind, update = TensorType(FLOAT32, (N, 3)), TensorType(FLOAT32, (M, 3))
    op = along(0, "add", kind)
    plan = lowered(graph_of(op, [kind, TensorType(INT64, (M, 3)), update]))
    assert not array_steps(plan)
    for n, m in ((4, 7), (1, 2), (9, 0)):
        arrays = [numbers(FLOAT32, (n, 3)), rng().integers(0, n, (m, 3)), numbers(FLOAT32, (m, 3))]
        compare(execute(plan, arrays), op.evaluate(np, *arrays))


@needs_compiler
def test_an_index_out_of_range_writes_nothing() -> None:
    op = along(0, "none", TensorType(FLOAT32, (3,)))
    plan = lowered(graph_of(op, [TensorType(FLOAT32, (3,)), TensorType(INT64, (3,)), TensorType(FLOAT32, (3,))]))
    (found,) = execute(plan, [np.zeros(3, np.float32), np.array([3, -4, 1]), np.ones(3, np.float32)])
    assert found.tolist() == [0, 1, 0]


def top(kind: TensorType, axis: int, count: Any, largest: bool) -> Array:
    shape = (*kind.shape[:axis], count, *kind.shape[axis + 1 :])
    attributes = (("axis", axis), ("largest", largest), ("count", count))
    return Array(top_of, (TensorType(kind.dtype, shape), TensorType(INT64, shape)), attributes, (True, False))


@needs_compiler
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT64, INT8, UINT32])
def test_top_k(dtype: DType, largest: bool) -> None:
    for shape, axis, count in (((33,), 0, 5), ((3, 9, 2), 1, 9), ((2, 100), 1, 1), ((2, 5), 1, 0)):
        checked(top(TensorType(dtype, shape), axis, count, largest), [numbers(dtype, shape)])


@needs_compiler
def test_top_k_of_many() -> None:
    """More than shared memory sorts, and of distinct elements."""
    x = rng().standard_normal((2, 1500), np.float32)
    checked(top(TensorType(FLOAT32, x.shape), 1, 1100, True), [x])
    checked(top(TensorType(FLOAT32, x.shape), 1, 300, False), [x])


@needs_compiler
def test_top_k_of_any_shape() -> None:
    kind = TensorType(FLOAT32, (N, M))
    op = top(kind, 1, dims.floor_div(M, 2), True)
    plan = lowered(graph_of(op, [kind]))
    assert not array_steps(plan)
    for n, m in ((2, 9), (1, 1), (0, 4)):
        x = numbers(FLOAT32, (n, m))
        compare(execute(plan, [x]), top(TensorType(FLOAT32, (n, m)), 1, m // 2, True).evaluate(np, x))


def groups(kind: TensorType, axis: int | None, ordered: int, function: Any = unique) -> Array:
    found, count = dims.symbol("u1"), dims.product(kind.shape) if axis is None else kind.shape[axis]
    values = (found,) if axis is None else (*kind.shape[:axis], found, *kind.shape[axis + 1 :])
    shapes = [(kind.dtype, values), (INT64, (found,)), (INT64, (count,)), (INT64, (found,))]
    if function is microsoft_unique:
        return Array(function, tuple(TensorType(*shapes[i]) for i in (0, 2, 3)), binds=("u1",))
    attributes = (("axis", axis), ("sorted", ordered))
    return Array(function, tuple(TensorType(*shape) for shape in shapes), attributes, binds=("u1",))


def check_groups(op: Array, x: Any, kind: TensorType | None = None) -> None:
    """One launch, then a step that takes what it found."""
    plan = lowered(graph_of(op, [kind or TensorType(x.dtype, x.shape)]))
    assert [type(step.kernel) for step in plan.steps] == [Launch, ArrayCall]
    compare(execute(plan, [x]), op.evaluate(np, x))


@needs_compiler
@pytest.mark.parametrize("ordered", [0, 1])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, INT64, BOOL])
def test_unique_elements(dtype: DType, ordered: int) -> None:
    for shape in ((), (1,), (300,), (3, 5, 7), (0, 4)):
        x = numbers(dtype, shape)
        check_groups(groups(TensorType(dtype, shape), None, ordered), x)


@needs_compiler
@pytest.mark.parametrize("ordered", [0, 1])
@pytest.mark.parametrize("dtype", [FLOAT32, INT64])
def test_unique_slices(dtype: DType, ordered: int) -> None:
    for shape, axis in (((9,), 0), ((40, 2), 0), ((2, 30, 1), 1), ((1, 2, 20), 2), ((0, 3), 0)):
        x = numbers(dtype, shape)
        check_groups(groups(TensorType(dtype, shape), axis, ordered), x)


@needs_compiler
def test_unique_in_order_of_appearance() -> None:
    """As com.microsoft has it: no NaN equals another."""
    for count in (0, 33, 500):
        x = numbers(FLOAT32, (count,))
        check_groups(groups(TensorType(FLOAT32, (count,)), None, 0, microsoft_unique), x)


@needs_compiler
def test_unique_of_any_shape() -> None:
    kind = TensorType(INT32, (N, M))
    for axis in (None, 1):
        plan = lowered(graph_of(groups(kind, axis, 1), [kind]))
        for n, m in ((3, 9), (1, 1), (2, 0)):
            x = numbers(INT32, (n, m))
            compare(execute(plan, [x]), groups(TensorType(INT32, (n, m)), axis, 1).evaluate(np, x))


def suppression(present: tuple[bool, ...], centred: bool) -> Array:
    kind = TensorType(INT64, (dims.symbol("u1"), 3))
    attributes = (("center_point_box", int(centred)),)
    return Array(non_max_suppression, (kind,), attributes, present, ("u1",), host=True)


@needs_compiler
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("present", [(True,) * 5, (True, True, True, False, True), (True, True, True, False, False)])
def test_suppression(present: tuple[bool, ...], centred: bool) -> None:
    for count, limit in ((40, 5), (33, 100), (1, 1), (7, 0), (0, 3)):
        boxes = rng().random((2, count, 4), np.float32) * 4
        boxes[..., 2:] = boxes[..., 2:] / 2 if centred else boxes[..., :2] + boxes[..., 2:] / 2
        scores = (rng().integers(0, 12, (2, 3, count)) / 12).astype(np.float32)
        options = [np.array([limit]), np.array([0.3], np.float32), np.array([0.25], np.float32)]
        arrays = [boxes, scores, *(value for value, here in zip(options, present[2:], strict=True) if here)]
        op = suppression(present, centred)
        constants = {2: arrays[2]} if limit == 5 else {}
        plan = lowered(graph_of(op, [TensorType(a.dtype, a.shape) for a in arrays], constants))
        assert [type(step.kernel) for step in plan.steps] == [Launch, ArrayCall]
        found = execute(plan, [array for i, array in enumerate(arrays) if i not in constants])
        compare(found, op.evaluate(np, *arrays))


def kernel(text: str, threads: int) -> CudaKernel:
    head = f'extern "C" __global__ void __launch_bounds__({threads}) k(int* p0) {{\n'
    return CudaKernel("k", head + text + "\n}\n", (Argument("*i32"),), threads)


def ran(text: str, threads: int, blocks: int = 1) -> list[int]:
    out = np.zeros(threads * blocks, np.int32)
    run(kernel(text, threads), (blocks, 1, 1), [out.ctypes.data])
    return out.tolist()


@needs_compiler
def test_barriers_and_shared_memory() -> None:
    text = """
      __shared__ int x[70]; int t = threadIdx.x; x[t] = t * t; __syncthreads();
      p0[blockIdx.x * 70 + t] = x[69 - t] + blockIdx.x;"""
    assert ran(text, 70, 2) == [(69 - t) ** 2 + b for b in range(2) for t in range(70)]


@needs_compiler
def test_lanes_exchange() -> None:
    text = """
      int t = threadIdx.x, lane = t % 32;
      int up = __shfl_up_sync(~0u, t, 1), over = __shfl_xor_sync(~0u, t, 3), third = __shfl_sync(~0u, t, 3);
      unsigned odd = __ballot_sync(~0u, t & 1), same = __match_any_sync(~0u, t % 4);
      p0[t] = up + 100 * over + 10000 * third + (odd == 0xAAAAAAAAu) * 1000000 + (same >> lane & 17) * 2000000;"""
    expected = [
        t - (t % 32 > 0) + 100 * (t ^ 3) + 10000 * (t // 32 * 32 + 3) + 1000000
        + (17 if t % 32 < 28 else 1) * 2000000 for t in range(64)
    ]  # fmt: skip
    assert ran(text, 64) == expected


@needs_compiler
def test_a_barrier_that_some_never_reach() -> None:
    with pytest.raises(BarrierError, match="k: some threads wait"):
        ran("if (threadIdx.x < 3) __syncthreads(); else __syncwarp(~0u << 3); __syncthreads(); __syncwarp(1);", 40)


def test_without_a_compiler_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DeviceError, match="g\\+\\+ is not installed"):
        ran("p0[0] = 41;", 1)


def all_kernels() -> list[CudaKernel]:
    """One of every kind that is written."""
    ops: list[tuple[Array, list[TensorType]]] = []
    for reduction, dtype in (("none", FLOAT32), ("add", FLOAT32), ("mul", INT64), ("max", FLOAT64)):
        data = TensorType(dtype, (8, 8))
        ops += [(along(axis, reduction, data), [data, TensorType(INT64, (4, 4)), TensorType(dtype, (4, 4))])
                for axis in (0, 1)]  # fmt: skip
    by_tuples = Array(scatter_nd, (TensorType(FLOAT32, (8, 8)),), (("reduction", "min"),))
    ops.append((by_tuples, [TensorType(FLOAT32, (8, 8)), TensorType(INT32, (5, 2)), TensorType(FLOAT32, (5,))]))
    for dtype, count in ((FLOAT16, 5), (INT64, 5), (FLOAT32, 2000)):
        kind = TensorType(dtype, (4, 20000))
        ops.append((top(kind, 1, count, True), [kind]))
    rows = TensorType(FLOAT32, (N, 3))
    ops += [(groups(rows, axis, ordered), [rows]) for axis in (None, 0) for ordered in (0, 1)]
    ops.append((groups(TensorType(FLOAT64, (N,)), None, 0, microsoft_unique), [TensorType(FLOAT64, (N,))]))
    limits = [TensorType(INT64, (1,)), TensorType(FLOAT32, (1,)), TensorType(FLOAT32, (1,))]
    boxes = [TensorType(FLOAT32, (1, 50, 4)), TensorType(FLOAT32, (1, 3, 50)), *limits]
    ops += [(suppression((True,) * 5, centred), boxes) for centred in (True,)]
    plans = [lowered(graph_of(op, kinds)) for op, kinds in ops]
    found = (step.kernel.kernel for plan in plans for step in plan.steps if isinstance(step.kernel, Launch))
    return list(dict.fromkeys(made for made in found if isinstance(made, CudaKernel)))


@needs_nvrtc
def test_every_kernel_compiles_without_spills() -> None:
    for made in all_kernels():
        binary = compile_cuda(made, 90)
        used = cubin_resources(binary.cubin)
        assert not used.spills and not used.stack_nbytes and used.registers * binary.threads <= 1 << 16, made.name


@needs_nvrtc
@pytest.mark.parametrize("arch", [80, 100])
def test_kernels_compile_for_other_architectures(arch: int) -> None:
    for made in all_kernels()[-2:]:
        assert compile_cuda(made, arch).cubin.startswith(b"\x7fELF")


@needs_nvrtc
def test_a_kernel_that_is_no_cuda() -> None:
    with pytest.raises(DeviceError, match=r"k does not compile for sm_90: .*"):
        compile_cuda(kernel("p0[0] = nothing;", 32), 90)
