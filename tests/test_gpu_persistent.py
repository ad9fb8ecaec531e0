"""Products by programs that walk over tiles: results, which are so, what descriptors may touch, machine code."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from gpu_engine.errors import DeviceError
from gpu_engine.gpu import gemm, interpreter, persistent_gemm
from gpu_engine.gpu.binary import MEMORY_ALIGNMENT, scratch_parameter
from gpu_engine.gpu.bundle import write_bundle
from gpu_engine.gpu.interpret import HostMemory, InterpretDevice
from gpu_engine.gpu.interpreter import AccessError, interpret, spans
from gpu_engine.gpu.kernel import Argument, TritonKernel
from gpu_engine.gpu.offline import box_problems, compile_binary, compiled
from gpu_engine.gpu.options import GpuOptions
from gpu_engine.gpu.tile_filter import examined, gemm_kernel
from gpu_engine.gpu.tiles import GEMM_TILES, PERSISTENT, Choice, Epilogue, Extents, GemmTile, choose
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, INT8, INT32, DType
from gpu_engine.ir.graph import TensorType
from gpu_engine.ir.ops import MatMul
from gpu_engine.ir.ops.channels_last import LastConv
from gpu_engine.plan.lower import NOT_BATCHED
from gpu_engine.plan.plan import Plan
from tests.gpu_runner import execute, graph_of, kernels, lowered
from tests.test_gpu_gemm import TOLERANCE, assert_product, assert_rounded, random

TILE = GemmTile(32, 32, 32, 4, 2, 2)


@pytest.fixture
def walking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three programs walk over the tiles of every product."""
    choice = Choice(1, None, TILE, 1, persistent=True)
    monkeypatch.setattr(gemm, "choose", lambda *args, **options: (choice,))
    monkeypatch.setattr(persistent_gemm, "processors", lambda arch: 3)


def walks(plan: Plan) -> list[bool]:
    """Of each kernel of a plan, whether its programs walk over tiles."""
    return ["make_tensor_descriptor" in kernel.text for kernel in kernels(plan)]


FORMS: tuple[tuple[DType, tuple[int, int], tuple[int, int], bool, bool], ...] = (
    (FLOAT16, (65, 40), (40, 48), False, False), (FLOAT16, (40, 72), (40, 48), True, False),
    (BFLOAT16, (33, 64), (48, 64), False, True), (FLOAT16, (70, 40), (37, 40), False, True),
    (BFLOAT16, (1, 32), (32, 8), False, False), (FLOAT16, (40, 32), (96, 40), True, True),
)  # fmt: skip


@pytest.mark.parametrize(("dtype", "a", "b", "transpose_a", "transpose_b"), FORMS)
def test_every_form(
    walking: None, dtype: DType, a: tuple[int, int], b: tuple[int, int], transpose_a: bool, transpose_b: bool
) -> None:
    """Odd numbers of rows, columns that no descriptor can store, more tiles than programs."""
    op, arrays = MatMul(transpose_a, transpose_b), [random(dtype, *a), random(dtype, *b)]
    plan = lowered(graph_of(op, [TensorType(dtype, array.shape) for array in arrays]))
    assert walks(plan) == [True]
    assert ("out_map" in kernels(plan)[0].text) == (b != (37, 40))
    assert_product(op, execute(plan, arrays, seed=a[0])[0], arrays)


@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16"])
def test_precision_of_factors(walking: None, precision: str) -> None:
    a, b = random(FLOAT32, 45, 68), random(FLOAT32, 68, 40)
    device = InterpretDevice(options=GpuOptions(precision))
    graph = graph_of(MatMul(), [TensorType(FLOAT32, a.shape), TensorType(FLOAT32, b.shape)], {1: b})
    plan = device.lower(graph, NOT_BATCHED)
    assert walks(plan) == [True]
    (got,) = execute(plan, [a])
    assert_rounded(got, a, b, precision)


def test_integers_are_exact(walking: None) -> None:
    op, arrays = MatMul(False, True, accumulate=INT32), [random(INT8, 39, 80), random(INT8, 20, 80)]
    plan = lowered(graph_of(op, [TensorType(INT8, array.shape) for array in arrays]))
    assert walks(plan) == [True]
    assert_product(op, execute(plan, arrays)[0], arrays)


def test_an_epilogue_with_operands_and_any_number_of_rows(walking: None) -> None:
    """relu(x w + bias + residual) * scale of each row, stored as float32."""
    batch, w, bias = dims.symbol("batch"), random(FLOAT16, 40, 48), random(FLOAT32, 48)
    total = expr.cast(expr.arg(0, FLOAT16), FLOAT32) + expr.arg(1, FLOAT32) + expr.cast(expr.arg(2, FLOAT16), FLOAT32)
    op = MatMul(epilogue=expr.maximum(total, 0.0) * expr.arg(3, FLOAT32))
    types = [
        TensorType(FLOAT16, (batch, 3, 40)), TensorType(FLOAT16, w.shape), TensorType(FLOAT32, bias.shape),
        TensorType(FLOAT16, (batch, 3, 48)), TensorType(FLOAT32, (batch, 3, 1)),
    ]  # fmt: skip
    plan = lowered(graph_of(op, types, {1: w, 2: bias}))
    assert walks(plan) == [True]
    for rows in (1, 11, 0, 14):
        a, residual, scale = random(FLOAT16, rows, 3, 40), random(FLOAT16, rows, 3, 48), random(FLOAT32, rows, 3, 1)
        (got,) = execute(plan, [a, residual, scale], seed=rows)
        assert_product(op, got, [a, w, bias, residual, scale], 1e-3)


def test_numbers_too_wide_for_descriptors_are_stored_by_lanes(walking: None) -> None:
    op = MatMul(epilogue=expr.cast(expr.arg(0, FLOAT16), FLOAT64))
    arrays = [random(FLOAT16, 33, 24), random(FLOAT16, 24, 40)]
    plan = lowered(graph_of(op, [TensorType(FLOAT16, array.shape) for array in arrays]))
    assert walks(plan) == [True] and "out_map" not in kernels(plan)[0].text
    assert_product(op, execute(plan, arrays)[0], arrays, TOLERANCE[FLOAT16])


def test_a_convolution_of_single_pixels(walking: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_engine.gpu.conv.choose", gemm.choose)
    x, w = random(FLOAT16, 2, 5, 7, 24), random(FLOAT16, 16, 24, 1, 1)
    op = LastConv((1, 1), (0, 0), (0, 0), (1, 1), 1, None, False)
    plan = lowered(graph_of(op, [TensorType(FLOAT16, x.shape), TensorType(FLOAT16, w.shape)], {1: w}))
    assert walks(plan) == [True]
    (got,) = execute(plan, [x])
    assert_product(MatMul(), got, [x, w.reshape(16, 24).T.copy()])


@pytest.mark.parametrize(("m", "programs"), [(65, 3), (65, 100), (140, 5), (31, 1)])
def test_every_tile_is_stored_once(
    walking: None, monkeypatch: pytest.MonkeyPatch, m: int, programs: int
) -> None:  # fmt: skip
    monkeypatch.setattr(persistent_gemm, "processors", lambda arch: programs)
    stores: Counter[tuple[int, ...]] = Counter()
    shipped = interpreter._Builder.create_descriptor_store

    def counted(self: Any, descriptor: Any, value: Any, indices: Sequence[Any]) -> Any:
        stores[tuple(int(index.data.item()) for index in indices)] += 1
        return shipped(self, descriptor, value, indices)

    monkeypatch.setattr(interpreter._Builder, "create_descriptor_store", counted)
    a, b = random(FLOAT16, m, 32), random(FLOAT16, 32, 72)
    execute(lowered(graph_of(MatMul(), [TensorType(FLOAT16, a.shape), TensorType(FLOAT16, b.shape)])), [a, b])
    assert stores == dict.fromkeys(itertools.product(range(0, m, 32), range(0, 96, 16)), 1)


def launches(
    m: Dim, n: int, k: int, arch: int = 90, dtype: DType = FLOAT16
) -> list[tuple[bool, Dim]]:  # fmt: skip
    """Of each launch of a product's plan, whether its programs walk over tiles, and how many they are."""
    graph = graph_of(MatMul(), [TensorType(dtype, (m, k)), TensorType(dtype, (k, n))])
    plan = InterpretDevice(options=GpuOptions(arch=arch)).lower(graph, NOT_BATCHED)
    return list(zip(walks(plan), (step.kernel.grid[0] for step in plan.steps), strict=True))


def test_large_products_alone_are_so() -> None:
    assert launches(8192, 4096, 1024) == [(True, 132)] and launches(8192, 4096, 1024, arch=100) == [(True, 148)]
    assert launches(4096, 1024, 1024) == [(True, 128)]
    for other in (
        launches(8192, 4096, 1024, arch=80), launches(8192, 4096, 1024, arch=120), launches(100_000, 64, 64),
        launches(256, 1024, 1024), launches(8192, 4096, 1020), launches(8192, 4092, 1024),
        launches(8192, 4096, 1024, dtype=FLOAT32), launches(8192, 4096, 0),
    ):  # fmt: skip
        assert not any(walking for walking, _ in other)
    rows = [walking for walking, _ in launches(dims.symbol("rows"), 3072, 768)]
    assert rows[-1] and not rows[0]


def test_tiles_leave_room_for_the_epilogue() -> None:
    def tile(nbytes: int, heavy: bool) -> GemmTile:
        (choice,) = choose("half", Extents(1, 8192, 8192, 8192, 2), 90, heavy=heavy, persistent=Epilogue(nbytes, heavy))
        assert choice.persistent
        return choice.tile

    assert tile(2, False) == GemmTile(128, 256, 64, 8, 4)
    assert tile(4, False) == GemmTile(128, 256, 64, 8, 3)
    assert tile(2, True) == GemmTile(128, 128, 64, 8, 4)


def test_what_nothing_is_computed_of_waits_twice_on_blackwell() -> None:
    kinds = [TensorType(FLOAT32, (8192, 1024)), TensorType(FLOAT32, (4096, 1024))]
    for arch, columns in ((90, 256), (100, 128)):
        device = InterpretDevice(options=GpuOptions("tf32", arch))
        (kernel,) = kernels(device.lower(graph_of(MatMul(False, True), kinds), NOT_BATCHED))
        assert f"out_map.store([down * 128, across * {columns} + 0]" in kernel.text


DESCRIBED = """def described(p0, p1, n):
    source = tl.make_tensor_descriptor(p0, shape=[n, 16], strides=[16, 1], block_shape=[8, 16])
    target = tl.make_tensor_descriptor(p1, shape=[n, 16], strides=[16, 1], block_shape=[8, 16])
    target.store([8, 0], source.load([8, 0]))
"""
COPY = TritonKernel("described", DESCRIBED, (Argument("*fp16", True), Argument("*fp16", True), Argument("i32")))


def test_descriptors_touch_what_is_declared() -> None:
    """Blocks end where their matrices do; a matrix that claims more than its buffer has is told."""
    memory = HostMemory(2 * 512)
    values = np.ndarray((2, 16, 16), np.float16, memory.bytes.data)
    values[0], values[1] = random(FLOAT16, 16, 16), 0
    source, target = (memory.address, 13 * 32), (memory.address + 512, 12 * 32)

    def copied(rows: int, shift: int = 0) -> None:
        interpret(COPY, (1, 1, 1), [source[0] + shift, target[0], rows], spans([source, target]), spans([target]))

    copied(12)
    np.testing.assert_array_equal(values[1, 8:12], values[0, 8:12])
    assert not values[1, 12:].any()
    with pytest.raises(AccessError, match=r"described, program .*: store outside the declared buffers in 16 of"):
        copied(13)
    with pytest.raises(AccessError, match="load outside the declared buffers in 16 of"):
        copied(14)
    with pytest.raises(AssertionError, match="16-byte aligned"):
        copied(12, shift=2)
    with pytest.raises(AssertionError, match="no empty tensor"):
        copied(0)


CHECKED = (("half", 0, 90, "HGMMA"), ("half", 2, 100, "UTCHMMA"), ("tf32", 1, 90, "HGMMA"))


@pytest.mark.parametrize(("family", "index", "arch", "instruction"), CHECKED)
def test_machine_code(family: str, index: int, arch: int, instruction: str) -> None:
    """All tiles for all GPUs: `python -m benchmarks.gpu_tiles 90 100`."""
    tile = GEMM_TILES[PERSISTENT + family][index]
    used, found = examined(PERSISTENT + family, tile, arch)
    assert not found
    assert used.count(instruction)
    assert (
        used.count("UTMALDG") == 2 * (tile.num_stages + (arch == 100)) and used.count("UTMASTG") and used.count("SYNCS")
    )
    assert not used.count("LDGSTS") and not used.count("STG")


@pytest.fixture(scope="module")
def kernel() -> TritonKernel:
    return gemm_kernel(PERSISTENT + "half", GEMM_TILES[PERSISTENT + "half"][0])


def test_a_binary_says_where_its_scratch_goes(kernel: TritonKernel, tmp_path: Path) -> None:
    binary = compile_binary(kernel, 90)
    assert binary.scratch_nbytes == 3 * 128 and binary.scratch_parameter == len(kernel.arguments)
    assert MEMORY_ALIGNMENT % compiled(kernel, 90).metadata.global_scratch_align == 0
    bundle = write_bundle(tmp_path / "one.bundle", b"model", {(kernel, 90): binary}, [90], "fp32")
    assert bundle.binary(kernel, 90) == binary


def test_scratch_that_nobody_reads_is_told() -> None:
    ptx = "ld.param.b64 %rd1, [k_param_1]; ld.param.b64 %rd2, [k_param_3+8];"
    assert scratch_parameter(ptx, 2, 128) == 3 and scratch_parameter(ptx, 4, 0) is None
    for own in (1, 4):
        with pytest.raises(DeviceError, match="global scratch is wanted"):
            scratch_parameter(ptx, own, 128)


def test_a_box_that_is_not_its_buffer_is_told(kernel: TritonKernel) -> None:
    text = compiled(kernel, 90).asm["ttgir"]
    assert not box_problems(text)
    copies = [line for line in text.splitlines() if "async_tma_copy_global_to_local" in line]
    assert len(copies) == 8
    for line in copies[:2]:
        halved = line.replace("-> !ttg.memdesc<128x", "-> !ttg.memdesc<64x").replace("memdesc<64x256", "memdesc<64x128")
        assert len(box_problems(text.replace(line, halved))) == 1
    assert len(box_problems(text.replace("[%c64_i32, %c128_i32]", "[%c64_i32, %c64_i32]"))) == 2
    assert len(box_problems(text.replace("tensordesc<", "described<"))) == 3 + 8 + 2
