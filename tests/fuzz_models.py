"""Feed the engine model files that nobody vetted: `python -m tests.fuzz_models --count 10000`.

Every case is a real small model, mutated, or a hostile one made on purpose; its number says which. It is compiled and
run in a worker process with limits. The outcome must be a result or a typed error: never a crash, a hang, another
exception, a file read outside the model's folder, or more memory than the limit. The exit code is 0 if that holds.
`--case N` shows one case in this process, with its traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from rich.console import Console
from rich.progress import Progress

import gpu_engine
from tests.fuzz_cases import FuzzCase, fuzz_case, inputs_for
from tests.fuzz_worker import Outcome, run_numbers

SEED = 20260731
LIMIT_S = 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    os.environ["GPU_ENGINE_CACHE"] = "off"
    if options.case is not None:
        return _show(fuzz_case(options.seed, options.case), options.save)
    numbers = range(options.start, options.start + options.count)
    outcomes = []
    with Progress(console=Console(file=sys.stderr), transient=True) as progress:
        task = progress.add_task("fuzz", total=len(numbers))
        for outcome in run_numbers(numbers, options.seed, options.jobs, options.limit):
            outcomes.append(outcome)
            progress.advance(task)
            if outcome.failure:
                print(_line(outcome, options.seed), flush=True)
    _report(outcomes)
    return 1 if any(outcome.failure for outcome in outcomes) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_models", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="how many cases")
    parser.add_argument("--start", type=int, default=0, help="the first case's number")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--jobs", type=int, default=2, help="worker processes")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="SECONDS", help="time limit of one case")
    parser.add_argument("--case", type=int, metavar="N", help="run this one case here and show its traceback")
    parser.add_argument("--save", type=Path, metavar="FILE", help="with --case: write the model to this file")
    return parser


def _line(outcome: Outcome, seed: int) -> str:
    return f"FAILURE {outcome.number} {fuzz_case(seed, outcome.number).what}: {outcome.kind}: {outcome.failure}"


def _report(outcomes: Sequence[Outcome]) -> None:
    for kind, count in Counter(outcome.kind for outcome in outcomes).most_common():
        print(f"{count:7d}  {kind}")
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    largest = max(outcomes, key=lambda outcome: outcome.nbytes)
    print(f"worst time    {slowest.seconds:.1f} s (case {slowest.number}, {slowest.kind})")
    print(f"worst memory  {largest.nbytes / 2**20:,.0f} MiB (case {largest.number}, {largest.kind})")
    print(f"failures      {sum(bool(outcome.failure) for outcome in outcomes)} of {len(outcomes)}")


def _show(case: FuzzCase, save: Path | None) -> int:
    print(case.what)
    if save is not None:
        save.write_bytes(case.model)
    try:
        print(onnx.printer.to_text(onnx.ModelProto.FromString(case.model))[:5000])
    except (DecodeError, UnicodeDecodeError) as error:
        print(f"{len(case.model)} bytes: {error}")
    try:
        with gpu_engine.compile(case.model, device="cpu") as engine:
            inputs = inputs_for(engine, case)
            print("inputs", inputs)
            print("outputs", None if inputs is None else engine.run(inputs))
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
