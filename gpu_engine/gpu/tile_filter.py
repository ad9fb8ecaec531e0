"""Which tiles a GPU can run, known from compiling them: no spills, shared memory within limits, matrix instructions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gpu_engine.gpu.float8 import FIRST_ARCH
from gpu_engine.gpu.gemm import K_FIRST
from gpu_engine.gpu.gemm_kernels import Factor, Product
from gpu_engine.gpu.gemm_steps import Step, byte_step, dot_step, float8_step, sum_step
from gpu_engine.gpu.kernel import TritonKernel
from gpu_engine.gpu.launches import Launch
from gpu_engine.gpu.lowering import lowering_for
from gpu_engine.gpu.maps import Walked
from gpu_engine.gpu.offline import Resources, compiled, problems, resources
from gpu_engine.gpu.options import GpuOptions
from gpu_engine.gpu.persistent_gemm import emit_chosen
from gpu_engine.gpu.tiles import PERSISTENT, PERSISTENT_ARCHITECTURES, Choice, GemmTile, candidates, takes_parts
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import FLOAT16, FLOAT32, FLOAT64, INT8, INT16, INT32, UINT8, DType, from_onnx
from gpu_engine.plan.lower import Lowering

E4M3 = from_onnx(17)
FAMILIES: dict[str, tuple[DType, DType, DType, Step]] = {
    "half": (FLOAT16, FLOAT16, FLOAT16, dot_step(FLOAT32, FLOAT16, (FLOAT16, FLOAT16))),
    "converted": (FLOAT32, FLOAT16, FLOAT32, dot_step(FLOAT32, FLOAT16, (FLOAT32, FLOAT16))),
    "tf32": (FLOAT32, FLOAT32, FLOAT32, dot_step(FLOAT32, FLOAT32, (FLOAT32, FLOAT32), "tf32")),
    "ieee": (FLOAT32, FLOAT32, FLOAT32, dot_step(FLOAT32, FLOAT32, (FLOAT32, FLOAT32))),
    "double": (FLOAT64, FLOAT64, FLOAT64, dot_step(FLOAT64, FLOAT64, (FLOAT64, FLOAT64))),
    "bytes": (UINT8, INT8, INT32, byte_step((UINT8, INT8))),
    "planes": (INT16, INT16, INT32, byte_step((INT16, INT16))),
    "float8": (E4M3, E4M3, FLOAT32, float8_step((E4M3, E4M3), 90)),
    "float8_half": (E4M3, E4M3, FLOAT32, float8_step((E4M3, E4M3), 80)),
    "sums": (FLOAT32, FLOAT32, FLOAT32, sum_step(FLOAT32, (FLOAT32, FLOAT32))),
}
"""Types of the factors and the product, and the step, that stand for each family of tiles."""
WALKED = {family: FAMILIES[family] for family in ("half", "converted", "tf32")} | {
    "bytes": (INT8, INT8, INT32, byte_step((INT8, INT8)))
}
"""The same for tiles that programs walk over."""
EXTENT = 768


def gemm_kernel(family: str, tile: GemmTile, splits: int = 1) -> TritonKernel:
    """A product of any number of rows with [768, 768] and a bias, as the layers of a network are, in `splits` parts."""
    kind = family.removeprefix(PERSISTENT)
    first, second, dtype, step = FAMILIES[family] if kind == family else WALKED[kind]
    lowering = Lowering(lowering_for(GpuOptions()))
    rows = dims.symbol("rows")
    a, bias = lowering.buffer(first, (rows, EXTENT)), lowering.buffer(dtype, (EXTENT,))
    b, out = lowering.buffer(second, (EXTENT, EXTENT)), lowering.buffer(dtype, (rows, EXTENT))
    along_k, along_n = (1, EXTENT) if kind in K_FIRST else (EXTENT, 1)
    product = Product(
        Factor(a, (), EXTENT, 1), Factor(b, (), along_n, along_k), rows, EXTENT, EXTENT, (rows, EXTENT), 1,
        expr.arg(0, dtype) + expr.arg(1, dtype), (Walked(bias, (0, 1)),), out, dtype,
    )  # fmt: skip
    emit_chosen(lowering, product, step, [Choice(1, None, tile, splits, family != kind)], 90)
    (launch,) = (step.kernel for step in lowering.steps)
    assert isinstance(launch, Launch) and isinstance(launch.kernel, TritonKernel)
    return launch.kernel


def examined(family: str, tile: GemmTile, arch: int, splits: int = 1) -> tuple[Resources, list[str]]:
    """(what a tile takes on sm_`arch`, reasons not to use it)."""
    kernel = gemm_kernel(family, tile, splits)
    binary = compiled(kernel, arch)
    used = resources(binary)
    return used, problems(kernel, binary, used, arch)


def rejected(architectures: Iterable[int]) -> Iterator[str]:
    """A line for every tile that a table holds and a GPU cannot run well."""
    for arch in architectures:
        for family, (factor, *_) in FAMILIES.items():
            if family == "float8" and arch < FIRST_ARCH:
                continue
            for splits in (1, 2):
                tiles = [
                    tile
                    for tile in candidates(family, factor.itemsize, arch)
                    if splits == 1 or takes_parts(family, tile)
                ]
                yield from _rejected(family, tiles, arch, splits)
        for family, (factor, _, dtype, _) in WALKED.items():
            if arch in PERSISTENT_ARCHITECTURES[family]:
                walked = PERSISTENT + family
                tiles = candidates(walked, factor.itemsize, arch, waiting_nbytes=dtype.itemsize)
                yield from _rejected(walked, tiles, arch, 1)


def _rejected(family: str, tiles: Iterable[GemmTile], arch: int, splits: int) -> Iterator[str]:
    for tile in tiles:
        used, found = examined(family, tile, arch, splits)
        yield from (f"sm_{arch} {family} {tile} in {splits}, {used}: {reason}" for reason in found)
