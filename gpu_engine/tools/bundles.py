"""`gpu-engine build`: a model and all its GPU kernels, compiled on a machine without a GPU, as one file."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from rich.table import Table

from gpu_engine.errors import DeviceError
from gpu_engine.frontend.importer import import_model
from gpu_engine.frontend.reader import SpecificationFunctions, read
from gpu_engine.gpu.binary import Binary
from gpu_engine.gpu.bundle import Bundle, write_bundle
from gpu_engine.gpu.kernel import Kernel
from gpu_engine.gpu.options import GpuOptions
from gpu_engine.gpu.planning import gpu_plan, kernels_of
from gpu_engine.ir.graph import Graph
from gpu_engine.passes.batchability import prove
from gpu_engine.passes.pipeline import optimize
from gpu_engine.runtime.late import KERNEL_COMPILER, load

Tell = Callable[[str, int, int], None]
"""tell(kernel and architecture, done, of how many)"""


def parse_arch(text: str) -> int:
    """90 for "sm_90"; ValueError for anything else."""
    found = re.fullmatch(r"sm_(\d{2,3})a?", text)
    if found is None:
        raise ValueError(f"an architecture is written like sm_90, given {text!r}")
    return int(found[1])


def build(
    model: Path, output: Path, architectures: Sequence[int], precision: str, processes: int, tell: Tell
) -> Bundle:
    """Compile all kernels of `model` for every architecture and write them to `output` with the model, which must
    hold its weights itself."""
    data = model.read_bytes()
    graph = imported(data)
    batching = prove(graph)
    wanted = [
        (kernel, arch)
        for arch in architectures
        for kernel in kernels_of(gpu_plan(graph, batching, GpuOptions(precision, arch)))
    ]
    binaries = _compiled(wanted, processes, tell)
    return write_bundle(output, data, binaries, architectures, precision)


def imported(model: bytes) -> Graph:
    """The optimized graph."""
    return optimize(import_model(read(model), SpecificationFunctions()))


def _compiled(wanted: Sequence[tuple[Kernel, int]], processes: int, tell: Tell) -> dict[tuple[Kernel, int], Binary]:
    try:
        compile_binary = load(KERNEL_COMPILER)
    except ImportError as error:
        raise DeviceError(f"building a bundle needs Triton: {error}") from error
    found = {}
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        results = pool.map(compile_binary, *zip(*wanted, strict=True)) if wanted else ()
        for done, (key, binary) in enumerate(zip(wanted, results, strict=True), 1):
            found[key] = binary
            tell(f"{key[0].name} for sm_{key[1]}", done, len(wanted))
    return found


def table(bundle: Bundle) -> Table:
    """A row for every kernel and architecture."""
    grid = Table("kernel", "architecture", "threads", "shared bytes", "digest")
    for entry in bundle.entries:
        grid.add_row(
            entry.kernel, f"sm_{entry.arch}", str(entry.threads), f"{entry.shared_nbytes:,}", entry.digest
        )  # fmt: skip
    return grid
