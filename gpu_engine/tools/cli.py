"""The command line: `gpu-engine demo`, `run`, `bench`, `tune`, `build`, `precision`, `inspect`, `profile`, `simulate`,
`ops` and `doctor`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import gpu_engine
from cpu_fallback.cores import usable_cores
from gpu_engine.compiler import compile_defaults
from gpu_engine.configuration import completed
from gpu_engine.gpu import bundle
from gpu_engine.tools import bundles, operators
from gpu_engine.tools.bench_command import Config, Inputs, Precision, Seed, Shapes, bench
from gpu_engine.tools.demo import Advance, Report, run_demo
from gpu_engine.tools.doctor_command import run_doctor
from gpu_engine.tools.feeds import Request
from gpu_engine.tools.files import describe_value, named_outputs, read_inputs, write_outputs
from gpu_engine.tools.inspection_command import run_inspection
from gpu_engine.tools.precision import as_json as report_as_json
from gpu_engine.tools.precision import measure
from gpu_engine.tools.precision import table as report_table
from gpu_engine.tools.profile_command import run_profile
from gpu_engine.tools.simulation import run_simulation
from gpu_engine.tools.tune_command import tune

app = typer.Typer(
    help="Run ONNX models for throughput.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)

Device = Annotated[str, typer.Option(help='"auto", "cpu", "cuda", "cuda:1", "cuda:all", ...')]
Model = Annotated[Path, typer.Argument(help="An .onnx file.")]

app.command("doctor")(run_doctor)
app.command("inspect")(run_inspection)
app.command("profile")(run_profile)
app.command("simulate")(run_simulation)


def main() -> None:
    """The script's entry point. Exit codes: 0 done, 1 the engine or a file said no, 2 the command line is wrong."""
    try:
        app()
    except (gpu_engine.GpuEngineError, OSError, ValueError) as error:
        Console(stderr=True).print(Text(f"{type(error).__name__}: {error}", "red"))
        sys.exit(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"gpu-engine {version('gpu-engine')}")
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run ONNX models for throughput."""


@app.command()
def demo(
    device: Device = "auto",
    streams: Annotated[int, typer.Option(min=1, help="Executions at the same time.")] = 2,
    requests: Annotated[int, typer.Option(min=1, help="Callers at the same time.")] = 16,
    seconds: Annotated[float, typer.Option(min=0.01, help="About how long each pass runs.")] = 3.0,
) -> None:
    """Read handwritten digits one by one and in one call, and show what batching does for callers at the same time."""
    console = Console()
    with _progress(console) as progress:

        def start(title: str, items: int) -> Advance:
            task = progress.add_task(title, total=items)
            return lambda count: progress.advance(task, count)

        report = run_demo(device, streams, requests, seconds, start)
    _print_report(report)


@app.command()
def run(
    model: Model,
    inputs: Annotated[
        list[str], typer.Option("--input", "-i", metavar="[NAME=]FILE", help="A .npy or .npz file; may be repeated.")
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the outputs to this .npz file.")] = None,
    device: Device = "auto",
    config: Config = None,
) -> None:
    """Run a model once on arrays from files."""
    with gpu_engine.compile(model, device=device, config=config) as engine:
        outputs = named_outputs(engine.run(read_inputs(inputs)))
    for name, value in outputs.items():
        print(f"{name}: {describe_value(value)}")
    if output is not None:
        write_outputs(outputs, output)


app.command()(bench)
app.command()(tune)


@app.command()
def build(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The bundle to write: NAME.bundle.")],
    arch: Annotated[list[str], typer.Option(help="A GPU architecture such as sm_90; may be repeated.")] = ["sm_90"],  # noqa: B006
    precision: Precision = None,
    config: Config = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Kernels compiled at the same time; one for each core unless given.")
    ] = None,
) -> None:
    """Compile all GPU kernels of a model into one file, with or without a GPU here."""
    console = Console()
    if output.suffix != bundle.SUFFIX:
        raise ValueError(f"{output}: a bundle's name ends in {bundle.SUFFIX}")
    with _progress(console) as progress:
        task = progress.add_task("kernels", total=None)

        def tell(_: str, done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        wanted = completed({"precision": precision}, compile_defaults(), config)["precision"] or "fp32"
        count = processes or len(usable_cores().numbers)
        made = bundles.build(model, output, [*map(bundles.parse_arch, arch)], wanted, count, tell)
    console.print(bundles.table(made))
    print(f"{output}: {len(made.entries)} kernels, {output.stat().st_size:,} bytes")


@app.command("precision")
def compare_precisions(
    model: Model,
    inputs: Inputs = None,
    shapes: Shapes = None,
    device: Annotated[str, typer.Option(help='"cuda", "cuda:1", or "interpret" without a GPU')] = "cuda",
    seed: Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how far tf32, fp16 and bf16 move a model's outputs from those of fp32."""
    report = measure(model, device, Request(inputs or (), shapes or (), seed))
    if as_json:
        print(report_as_json(report))
        return
    Console().print(report_table(report))
    if report.skipped:
        print(f"not numbers: {', '.join(report.skipped)}")


@app.command()
def ops(
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    missing: Annotated[
        bool, typer.Option("--missing", help="Only what is missing, wholly or in some version.")
    ] = False,
    update: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Rewrite the counts in this Markdown file instead.")
    ] = None,
) -> None:
    """List the operators: versions, how they are lowered, devices."""
    every = operators.operator_rows()
    rows = [row for row in every if row.missing or not missing]
    if update is not None:
        operators.update_summary(update, every)
    elif as_json:
        print(operators.as_json(rows))
    elif as_markdown:
        print(operators.markdown(rows))
    else:
        _print_operators(rows)


def _print_operators(rows: Sequence[operators.OperatorRow]) -> None:
    table = Table(*operators.TITLES, caption="; ".join(f"{name}: {text}" for name, text in operators.LOWERINGS.items()))
    for row in rows:
        table.add_row(*operators.cells(row))
    console = Console()
    console.print(table)
    print(operators.summary(rows), end="")


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Items per second so far."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} items/s")


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def _print_report(report: Report) -> None:
    images = len(report.labels)
    single, batched = report.single.items_per_s, report.batched.items_per_s
    print(f"device      {report.device}")
    print(f"accuracy    {report.right / images:.2%} ({report.right} of {images} held-out images)")
    print(f"batch       {report.batch}: {report.batch_reason} (bound by: {report.limiting_factor})")
    print(f"one by one  {single:,.0f} items/s")
    print(
        f"batched     {batched:,.0f} items/s ({batched / single:.2f} x) in calls of many, on {report.streams} streams"
    )
    callers, gain = report.callers, report.callers.shared_per_s / report.callers.alone_per_s
    print(f"callers     {callers.count}, each with one request at a time, of a network with 64 MB of weights")
    print(f"  apart     {callers.alone_per_s:,.0f} items/s")
    print(f"  batched   {callers.shared_per_s:,.0f} items/s ({gain:.2f} x); a mean batch of {callers.mean_batch:.1f}")
