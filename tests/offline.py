"""Compile every GPU kernel of the models at full size: `python -m tests.offline --arch sm_80 sm_90 sm_100`.

Prints a row for each kernel and architecture: registers, spills, shared memory, matrix instructions, the width of its
loads, and what is wrong; then a line for each architecture and precision. The exit code is 1 if anything is wrong. No
GPU is needed. Verdicts are kept in `.cache/offline`: a run that was cut off goes on where it stopped, and a second one
takes seconds. `--wrong` leaves out the rows of kernels with nothing wrong.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.inputs import Feed
from benchmarks.models import MODELS
from gpu_engine.gpu import program
from gpu_engine.gpu.kernel import Kernel
from gpu_engine.gpu.launches import ArrayCall
from gpu_engine.gpu.options import PRECISIONS, GpuOptions
from gpu_engine.gpu.planning import gpu_plan, kernels_of
from gpu_engine.ir.dims import Dim, number, substitute
from gpu_engine.ir.graph import Graph
from gpu_engine.passes.batchability import prove
from gpu_engine.plan.plan import Plan, Step
from gpu_engine.plan.signature import Signature
from gpu_engine.tools.bundles import imported, parse_arch
from tests.offline_verdicts import Verdict, Verdicts, inspected

DEFAULT_MODELS = (
    "resnet50", "mobilenetv2", "efficientnet_b0", "bert_base", "vit_tiny", "unet", "ppocrv4_det", "ppocrv4_rec",
    "silero_vad", "smart_turn_v3_2_int8",
)  # fmt: skip
TITLES = ("kernel", "arch", "registers", "spills", "shared", "matrix instructions", "load bits", "wrong", "digest")
SUMMARY_TITLES = ("arch", "precision", "kernels", "spills", "most shared", "with matrix instructions", "wrong")


@dataclass(frozen=True)
class Wanted:
    """A kernel of a plan for one architecture and precision."""

    kernel: Kernel
    arch: int
    precision: str


Found = dict[tuple[Kernel, int], Verdict]


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
    known = dict(zip(segment.names, fit.extents, strict=True))
    for i, grid in program.launched(segment, fit.extents).items():
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


def wanted_of(
    name: str, precisions: Sequence[str], architectures: Sequence[int], tell: Callable[[str], None]
) -> Iterator[Wanted]:
    """The kernels of a model of the catalogue, or of a file."""
    model = MODELS.get(name)
    graph: Graph = imported((Path(name) if model is None else model.path()).read_bytes())
    feed = None if model is None else model.feed(*model.timed_shape)
    batching = prove(graph)
    for precision, arch in product(precisions, architectures):
        plan = gpu_plan(graph, batching, GpuOptions(precision, arch))
        tell(f"{name}, {precision}, sm_{arch}: {counts(plan, feed)}")
        yield from (Wanted(kernel, arch, precision) for kernel in kernels_of(plan))


def verdicts_of(wanted: Sequence[Wanted], known: Verdicts, jobs: int) -> Found:
    """Those on disk, the others made by so many processes."""
    pairs = dict.fromkeys((one.kernel, one.arch) for one in wanted)
    found = {pair: verdict for pair in pairs if (verdict := known.get(*pair)) is not None}
    missing = [pair for pair in pairs if pair not in found]
    with (
        ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool,
        Progress(console=Console(file=sys.stderr), transient=True) as progress,
    ):
        task = progress.add_task("kernels", total=len(missing))
        started = {pool.submit(inspected, *pair): pair for pair in missing}
        for future in as_completed(started):
            pair, verdict = started.pop(future), future.result()
            known.add(*pair, verdict)
            found[pair] = verdict
            progress.advance(task)
    return found


def table(found: Found, only_wrong: bool) -> Table:
    grid = Table(*TITLES)
    for (kernel, arch), verdict in sorted(
        found.items(), key=lambda item: (item[0][0].name, item[0][1], item[0][0].digest)
    ):
        if only_wrong and not verdict.wrong:
            continue
        used = verdict.used
        cells = ("-",) * 5
        if used is not None:
            matrix = " ".join(f"{name} {count}" for name, count in used.matrix_instructions.items())
            cells = (
                str(used.registers), str(used.spills), f"{used.shared_nbytes:,}", matrix or "-", str(used.load_bits)
            )  # fmt: skip
        grid.add_row(kernel.name, f"sm_{arch}", *cells, "; ".join(verdict.wrong) or "-", kernel.digest[:8])
    return grid


def summary(wanted: Sequence[Wanted], found: Found) -> Table:
    """A line for each architecture and precision; kernels that several models or precisions have count once in each."""
    grid = Table(*SUMMARY_TITLES)
    for arch, precision in dict.fromkeys((one.arch, one.precision) for one in wanted):
        kernels = dict.fromkeys(one.kernel for one in wanted if (one.arch, one.precision) == (arch, precision))
        verdicts = [found[kernel, arch] for kernel in kernels]
        used = [verdict.used for verdict in verdicts if verdict.used is not None]
        grid.add_row(
            f"sm_{arch}", precision, str(len(kernels)), str(sum(bool(one.spills or one.stack_nbytes) for one in used)),
            f"{max((one.shared_nbytes for one in used), default=0):,}",
            str(sum(bool(one.matrix_instructions) for one in used)), str(sum(bool(one.wrong) for one in verdicts)),
        )  # fmt: skip
    return grid


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.offline", description=__doc__)
    parser.add_argument("--arch", nargs="+", default=["sm_90"], help="architectures such as sm_80 sm_90 sm_100")
    parser.add_argument("--model", nargs="+", default=DEFAULT_MODELS, help="names of the catalogue or paths")
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=PRECISIONS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--wrong", action="store_true", help="only rows of kernels with something wrong")
    options = parser.parse_args(arguments)
    console = Console(width=190)
    architectures = [parse_arch(text) for text in options.arch]
    wanted = [
        one for name in options.model for one in wanted_of(name, options.precision, architectures, console.print)
    ]  # fmt: skip
    found = verdicts_of(wanted, Verdicts(), options.jobs)
    console.print(table(found, options.wrong))
    console.print(summary(wanted, found))
    wrong = sum(bool(verdict.wrong) for verdict in found.values())
    console.print(f"{len(found)} compiled kernels, {wrong} with something wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
