"""Compiles every tile of the GPU's tables for the GPUs that a person names, and lists those that do not fit.

python -m benchmarks.gpu_tiles 80 90 100

With --measure, on a machine with a GPU: times every tile that fits on the products and convolutions of the catalogue's
models, and writes the fastest to the table that the engine then reads for GPUs of that architecture.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import triton

from benchmarks.gpu_measure import RUNS, kernels_of, survives, tuned
from benchmarks.gpu_problems import problems_of
from gpu_engine.errors import DeviceError
from gpu_engine.gpu.offline import compile_binary
from gpu_engine.gpu.options import PRECISIONS, GpuOptions
from gpu_engine.gpu.tile_filter import rejected
from gpu_engine.gpu.tuned_tiles import FOLDER, Table, write_table
from gpu_engine.runtime.late import load

MODELS = (
    "resnet50", "mobilenetv2", "efficientnet_b0", "bert_base", "vit_tiny", "unet", "ppocrv4_det", "ppocrv4_rec",
    "smart_turn_v3_2_int8",
)  # fmt: skip


def measure(models: Sequence[str], batches: Sequence[int], precisions: Sequence[str], runs: int, folder: Path) -> Path:
    """The table's file. DeviceError with the reason where there is no GPU or no CuPy."""
    try:
        gpu = load("benchmarks.gpu_clock:Gpu")()
    except ImportError as error:
        raise DeviceError(f"a GPU is reached through CuPy: {error}") from error
    problems = [
        problem
        for name in models
        for precision in precisions
        for problem in problems_of(name, batches, GpuOptions(precision, gpu.arch))
    ]
    kernels = kernels_of(problems)
    _tell(f"{len(problems)} problems, {len(kernels)} kernels on {gpu.name}")
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_binary, kernels, [gpu.arch] * len(kernels)))
    with gpu.driver.active():
        records = tuned(problems, gpu.driver, gpu.timer, cache(survives), runs, _tell)
    today = datetime.date.today().isoformat()
    return write_table(Table(gpu.name, gpu.arch, today, triton.__version__, tuple(records)), folder)


def _tell(line: str) -> None:
    print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_tiles", description=__doc__)
    parser.add_argument("arch", nargs="*", type=int, default=[90], help="architectures such as 80 90 100")
    parser.add_argument("--measure", action="store_true", help="time tiles on this machine's GPU")
    parser.add_argument("--model", nargs="+", default=MODELS, help="names of the catalogue")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--precision", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--runs", type=int, default=RUNS, help="of which the median counts")
    parser.add_argument("--output", type=Path, default=FOLDER, help="the folder of the table")
    options = parser.parse_args(arguments)
    if options.measure:
        try:
            path = measure(options.model, options.batch, options.precision, options.runs, options.output)
        except DeviceError as error:
            print(f"nothing was measured: {error}", file=sys.stderr)
            return 1
        print(f"wrote {path}")
        return 0
    lines = list(rejected(options.arch))
    print("\n".join(lines) or "all tiles fit")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
