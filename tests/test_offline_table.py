"""The table of compiled kernels: what a kernel should have become, verdicts on disk, and the lines that sum them up."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from gpu_engine.gpu import offline as gpu_offline
from gpu_engine.gpu.elf import stack_nbytes
from gpu_engine.gpu.expectations import Dot, dots, expects_vectors, matrix_instruction, shortfalls
from gpu_engine.gpu.kernel import Argument, TritonKernel
from gpu_engine.gpu.tile_filter import gemm_kernel
from gpu_engine.gpu.tiles import GemmTile
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import FLOAT16, FLOAT32, UINT8, DType
from gpu_engine.ir.graph import TensorType
from gpu_engine.ir.ops import Map, Transpose
from tests import offline
from tests.gpu_runner import graph_of, kernels, lowered
from tests.offline_verdicts import Verdict, Verdicts, inspected

M, N = dims.symbol("m"), dims.symbol("n")
TTIR = """
    %acc = tt.dot %a, %b, %c : tensor<128x64xf16> * tensor<64x256xf16> -> tensor<128x256xf32> loc(#loc77)
    %acc = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<64x32xf32> * tensor<32x128xf32> -> tensor<64x128xf32>
    %acc = tt.dot %a, %b, %c : tensor<16x16xf32> * tensor<16x64xf32> -> tensor<16x64xf32> loc(#loc102)
    %acc = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<64x64xi8> * tensor<64x64xi8> -> tensor<64x64xi32>
"""
HALF, ROUNDED, EXACT, BYTES = Dot(128, "f16"), Dot(64, "tf32"), Dot(16, "f32"), Dot(64, "i8")


def test_products_are_read_off_a_kernel() -> None:
    assert dots(TTIR) == [HALF, ROUNDED, EXACT, BYTES]


@pytest.mark.parametrize(
    ("dot", "wanted"),
    [(HALF, ("HMMA", "HGMMA", "UTCHMMA", "HMMA")), (ROUNDED, ("HMMA", "HGMMA", "UTCHMMA", "HMMA")),
     (EXACT, (None,) * 4), (Dot(16, "bf16"), ("HMMA",) * 4), (BYTES, ("IMMA", "IGMMA", "IMMA", "IMMA")),
     (Dot(32, "f64"), ("DMMA",) * 4)],
)  # fmt: skip
def test_every_architecture_has_its_matrix_instruction(dot: Dot, wanted: tuple[str | None, ...]) -> None:
    assert tuple(matrix_instruction(dot, arch) for arch in (80, 90, 100, 120)) == wanted


def test_a_missing_instruction_and_narrow_loads_are_said() -> None:
    kernel = pointwise(FLOAT32, (M, 1024))
    found = list(shortfalls(kernel, TTIR, 90, 64, lambda name: name == "HMMA"))
    assert found == [
        "no HGMMA for tl.dot of 128 rows of f16", "no HGMMA for tl.dot of 64 rows of tf32",
        "no IGMMA for tl.dot of 64 rows of i8",
        "loads of 64 bits where 128 are possible",
    ]  # fmt: skip
    assert not list(shortfalls(kernel, TTIR, 90, 128, lambda name: name in ("HGMMA", "IGMMA")))


def pointwise(dtype: DType, *shapes: tuple[dims.Dim, ...]) -> TritonKernel:
    terms = [expr.arg(i, dtype) for i in range(len(shapes))]
    root = terms[0] + terms[1] if len(terms) > 1 else terms[0] * terms[0]
    (kernel,) = kernels(lowered(graph_of(Map(root), [TensorType(dtype, shape) for shape in shapes])))
    return kernel


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, UINT8], ids=str)
def test_where_lanes_are_neighbours_in_memory_wide_loads_are_possible(dtype: DType) -> None:
    assert expects_vectors(pointwise(dtype, (M, N)))
    assert expects_vectors(pointwise(dtype, (M, 512), (M, 1)))
    assert expects_vectors(pointwise(dtype, (4096, 4096)))
    assert not expects_vectors(pointwise(dtype, (3, 5)))


def test_where_they_are_not_nothing_is_expected() -> None:
    turned = kernels(lowered(graph_of(Transpose((1, 0)), [TensorType(FLOAT32, (512, 512))])))[0]
    assert not expects_vectors(turned)
    text = "def map(p0):\n    i = tl.program_id(0) * 1024 + tl.arange(0, 1024)\n    x = tl.load(p0 + (i * 2))\n"
    assert not expects_vectors(TritonKernel("map", text, (Argument("*fp32", True),)))


def test_verdicts_are_kept(tmp_path: Path) -> None:
    kernel, broken = pointwise(FLOAT32, (M, N)), TritonKernel("map", "def map():\n    nothing\n", ())
    first = Verdicts(tmp_path)
    assert first.get(kernel, 90) is None
    for one in (kernel, broken):
        first.add(one, 90, inspected(one, 90))
    again = Verdicts(tmp_path)
    assert again.get(kernel, 90) == first.get(kernel, 90) and again.get(kernel, 80) is None
    assert again.get(broken, 90) is None
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text() + '{"name": "cut o')
    assert Verdicts(tmp_path).get(kernel, 90) is not None


def test_a_line_for_each_architecture_and_precision() -> None:
    kernel = pointwise(FLOAT32, (M, N))
    fine = inspected(kernel, 90)
    assert fine.used is not None and fine.wrong == ()
    wanted = [offline.Wanted(kernel, arch, precision) for arch in (80, 90) for precision in ("fp32", "fp16")]
    found = {(kernel, 90): fine, (kernel, 80): Verdict(None, ("it does not compile",))}
    grid = offline.summary(wanted, found)
    columns = [list(column.cells) for column in grid.columns]
    assert columns[0] == ["sm_80", "sm_80", "sm_90", "sm_90"] and columns[2] == ["1"] * 4
    assert columns[-1] == ["1", "1", "0", "0"]
    assert offline.table(found, only_wrong=True).row_count == 1


def test_a_kernel_that_spills_is_compiled_with_more_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stack that the ELF file says is what NVIDIA's tool says."""
    kernel = gemm_kernel("half", GemmTile(32, 32, 32, 1, 2))
    few = {"maxnreg": 40}
    monkeypatch.setattr(gpu_offline, "RELIEFS", (few,))
    spilling = gpu_offline.compiled(kernel, 80)
    assert stack_nbytes(spilling.asm["cubin"]) == gpu_offline.resources(spilling).stack_nbytes > 0
    monkeypatch.setattr(gpu_offline, "RELIEFS", (few, {}))
    mended = gpu_offline.compiled(kernel, 80)
    assert stack_nbytes(mended.asm["cubin"]) == gpu_offline.resources(mended).stack_nbytes == 0
