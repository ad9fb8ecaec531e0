"""Compile every GPU kernel of the models at full size: `python -m tests.offline --arch sm_80 sm_90 sm_100`.

Prints a row for each kernel and architecture: registers, spills, shared memory, matrix instructions, the width of its
loads, and what is wrong. The exit code is 1 if anything is. No GPU is needed; what Triton compiled before it finds in
its cache.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.inputs import Feed
from benchmarks.models import MODELS
from gpu_engine.gpu.kernel import CudaKernel, Kernel
from gpu_engine.gpu.launches import ArrayCall
from gpu_engine.gpu.nvrtc import compile_cuda
from gpu_engine.gpu.offline import Resources, compiled, cubin_resources, parameters_of, problems, resources
from gpu_engine.gpu.options import PRECISIONS, GpuOptions
from gpu_engine.gpu.planning import gpu_plan, kernels_of
from gpu_engine.ir.dims import Dim, number, substitute
from gpu_engine.passes.batchability import prove
from gpu_engine.plan.plan import Plan, Step
from gpu_engine.plan.signature import Signature
from gpu_engine.tools.bundles import imported, parse_arch

DEFAULT_MODELS = (
    "resnet50", "mobilenetv2", "efficientnet_b0", "bert_base", "vit_tiny", "unet", "ppocrv4_det", "ppocrv4_rec",
    "silero_vad", "smart_turn_v3_2_int8",
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What became of one kernel on one architecture; `error` if it did not compile."""

    kernel: Kernel
    arch: int
    used: Resources | None
    wrong: tuple[str, ...]


def inspected(kernel: Kernel, arch: int) -> Verdict:
    """Compile one kernel and read its machine code."""
    try:
        if isinstance(kernel, CudaKernel):
            used = cubin_resources(compile_cuda(kernel, arch).cubin)
            return Verdict(kernel, arch, used, ("spills",) if used.spills or used.stack_nbytes else ())
        binary = compiled(kernel, arch)
        parameters_of(kernel, binary)
        used = resources(binary)
    except Exception as error:
        return Verdict(kernel, arch, None, (str(error).strip().splitlines()[-1][:200],))
    return Verdict(kernel, arch, used, tuple(problems(kernel, binary, used, arch)))


def plan_of(model: bytes, precision: str, arch: int) -> Plan:
    graph = imported(model)
    return gpu_plan(graph, prove(graph), GpuOptions(precision, arch))


def executed(plan: Plan, feed: Feed) -> Iterator[tuple[Step, tuple[int, ...], Callable[[Dim], int]]]:
    """(step, grid, the number that an extent is) for every launch of one inference: of the kernels for different
    extents of a product, one is chosen.

    Segments whose extents only running tells are left out.
    """
    fit = Signature(plan).fit([feed[port.name].shape for port in plan.input_ports])
    segment = plan.program.segments[0]
    values = segment.numbers.evaluate(fit.extents)
    known = dict(zip(segment.names, fit.extents, strict=True))
    for i, places in segment.grids.items():
        grid = tuple(values[place] for place in places)
        if all(grid):
            yield plan.steps[i], grid, lambda dim: number(substitute(dim, known))


def launched(plan: Plan, feed: Feed) -> int:
    """How many launches one inference takes."""
    return sum(1 for _ in executed(plan, feed))


def counts(plan: Plan, feed: Feed | None) -> str:
    """What an inference takes; its launches for the inputs of a client."""
    arrays = [step for step in plan.steps if isinstance(step.kernel, ArrayCall)]
    names = sorted({type(step.kernel.op).__name__ for step in arrays})
    launches = "" if feed is None else f"{launched(plan, feed)} launches of "
    return f"{launches}{len(kernels_of(plan))} kernels, {len(arrays)} array steps {' '.join(names)}".rstrip()


def table(verdicts: Sequence[Verdict]) -> Table:
    grid = Table(
        "kernel", "arch", "registers", "spills", "shared", "matrix instructions", "load bits", "wrong", "digest"
    )
    for found in verdicts:
        used = found.used
        cells = ("-",) * 5
        if used is not None:
            matrix = " ".join(f"{name} {count}" for name, count in used.matrix_instructions.items())
            cells = (
                str(used.registers), str(used.spills), f"{used.shared_nbytes:,}", matrix or "-", str(used.load_bits)
            )  # fmt: skip
        grid.add_row(
            found.kernel.name, f"sm_{found.arch}", *cells, "; ".join(found.wrong) or "-", found.kernel.digest[:8]
        )
    return grid


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.offline", description=__doc__)
    parser.add_argument("--arch", nargs="+", default=["sm_90"], help="architectures such as sm_80 sm_90 sm_100")
    parser.add_argument("--model", nargs="+", default=DEFAULT_MODELS, help="names of the catalogue or paths")
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=PRECISIONS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    console = Console(width=190)
    wanted: dict[tuple[Kernel, int], None] = {}
    for name in options.model:
        model = MODELS.get(name)
        data = (Path(name) if model is None else model.path()).read_bytes()
        feed = None if model is None else model.feed(*model.timed_shape)
        for precision in options.precision:
            for arch in map(parse_arch, options.arch):
                plan = plan_of(data, precision, arch)
                console.print(f"{name}, {precision}, sm_{arch}: {counts(plan, feed)}")
                wanted |= dict.fromkeys((kernel, arch) for kernel in kernels_of(plan))
    verdicts = []
    with (
        ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool,
        Progress(console=Console(file=sys.stderr), transient=True) as progress,
    ):
        task = progress.add_task("kernels", total=len(wanted))
        for verdict in pool.map(inspected, *zip(*wanted, strict=True)) if wanted else ():
            verdicts.append(verdict)
            progress.advance(task)
    console.print(table(sorted(verdicts, key=lambda found: (found.kernel.name, found.arch, found.kernel.digest))))
    wrong = sum(bool(found.wrong) for found in verdicts)
    console.print(f"{len(verdicts)} compiled kernels, {wrong} with something wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
