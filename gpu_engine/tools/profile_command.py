"""`gpu-engine profile`: what each step of a model takes under load, and a trace of its batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from gpu_engine.compiler import compile_defaults, open_device
from gpu_engine.configuration import completed
from gpu_engine.errors import ExecutionError, InputError
from gpu_engine.options import Options, parse_device, validated
from gpu_engine.plan.plan import Plan
from gpu_engine.runtime.device import Device
from gpu_engine.runtime.statistics import Statistics
from gpu_engine.tools.bench_command import Config
from gpu_engine.tools.feeds import random_feed
from gpu_engine.tools.files import Array, console, named_inputs
from gpu_engine.tools.profiling import Profile, StepRow, profile, step_rows, unaccounted_s
from gpu_engine.tools.stages import (
    Extents,
    extents_of,
    kernel_name,
    parse_extents,
    read_named,
    shapes_at,
    short,
    stages_of,
)
from gpu_engine.tools.trace import trace_events, write_trace


def run_profile(
    model: Annotated[Path, typer.Argument(help="An .onnx file or a bundle.")],
    device: Annotated[str, typer.Option(help='"auto", "cpu", "cuda", "cuda:1", "cuda:all", ...')] = "auto",
    config: Config = None,
    streams: Annotated[
        str | None, typer.Option(help='Executions at the same time: a number, or "auto"; 1 unless given.')
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows per execution; 1 unless given.")] = None,
    in_flight: Annotated[int, typer.Option(min=0, help="Requests in flight; 0: enough for every slot.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Cores per stream.")] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="About how long it runs.")] = 3.0,
    extent: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Extents of the inputs.")] = None,
    inputs: Annotated[
        list[str] | None, typer.Option("--input", "-i", metavar="[NAME=]FILE", help=".npy or .npz; else random.")
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="Only so many steps, the longest first; 0: all in order.")] = 0,
    trace: Annotated[Path | None, typer.Option(help="Write a trace for ui.perfetto.dev to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time every step of a model under load, mapped to its ONNX nodes."""
    opened, reason, options = _opened(config, device, streams, batch, threads)
    stages = stages_of(read_named(model), opened.lower)
    arrays, made = _inputs(stages.plan, inputs or (), parse_extents(extent or ()))
    try:
        found = profile(stages, opened, options, reason, arrays, in_flight, seconds)
    except (InputError, ExecutionError) as error:
        raise (InputError(f"{error}; {made}") if made else error) from error
    rows = step_rows(found)
    facts = profile_facts(model, f"{opened.name} ({reason})", found, rows)
    if trace is not None:
        names = [(short(step.source), kernel_name(step)) for step in stages.plan.steps]
        events = trace_events(tuple(found.record.executions), names)
        write_trace(trace, events, {"model": str(model), "device": facts["device"]})
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    _print(facts, rows, top)
    if trace is not None:
        print(f"{trace}: the last {len(found.record.executions):,} executions; open it at https://ui.perfetto.dev")


def _opened(
    config: Path | None, device: str, streams: str | None, batch: int | None, threads: int | None
) -> tuple[Device, str, Options]:
    """The device, why it is this one, and the options of what is given or what a configuration says."""
    count = int(streams) if streams is not None and streams.isdecimal() else streams
    given = {"device": device, "streams": count, "batch": batch, "threads": threads, "precision": None}
    chosen = completed(given, compile_defaults(), config)
    opened, reason = open_device(parse_device(chosen["device"]), precision=chosen["precision"] or "fp32")
    options = validated(streams=chosen["streams"] or 1, batch=chosen["batch"] or 1, threads=chosen["threads"])
    return opened, reason, options


def _inputs(plan: Plan, files: Sequence[str], given: Extents) -> tuple[dict[str, Array], str]:
    """Inputs from files, or made up for the plan; then also what to say if it does not take them."""
    if files:
        return named_inputs(files, [port.name for port in plan.input_ports]), ""
    extents = extents_of(plan, given)
    text = ", ".join(f"{name}={value}" for name, value in extents.items()) or "of known extents"
    feed = random_feed(plan.input_ports, shapes_at(plan, extents), None, 0)
    return feed, f"the inputs were made up ({text}); --extent and --input give others"


def profile_facts(model: Path, device: str, found: Profile, rows: list[StepRow]) -> dict[str, Any]:
    """Everything that is reported, ready for JSON."""
    statistics, executions = found.timed.statistics, found.record.extents.total()
    return {
        "model": str(model),
        "device": device,
        "streams": found.streams,
        "batch": found.batch,
        "executions": executions,
        "mean_batch": statistics.mean_batch,
        "rows_per_s": found.timed.rows_per_s,
        "rows_per_s_without_clocks": found.plain.rows_per_s,
        "mean_ms": _stage_ms(statistics),
        "mean_ms_without_clocks": _stage_ms(found.plain.statistics),
        "outside_steps_us": unaccounted_s(found) / max(executions, 1) * 1e6,
        "steps": [asdict(row) for row in rows],
    }


def _stage_ms(statistics: Statistics) -> dict[str, float]:
    """What an execution takes on average, by stage."""
    totals = {
        "copy in": statistics.copy_in_ns, "compute": statistics.compute_ns, "copy out": statistics.copy_out_ns
    }  # fmt: skip
    return {name: total / max(statistics.execution_count, 1) / 1e6 for name, total in totals.items()}


def _print(facts: dict[str, Any], rows: list[StepRow], top: int) -> None:
    out = console()
    plain = facts["mean_ms_without_clocks"]
    stages = ", ".join(f"{name} {value:.3f} ms ({plain[name]:.3f})" for name, value in facts["mean_ms"].items())
    table = Table("step", "ONNX nodes", "kernel", "results", "us", "share", "GFLOP/s", "GB/s")
    shown = sorted(rows, key=lambda row: -row.mean_us)[:top] if top else rows
    for row in shown:
        runs = "" if row.runs == 1 else f" ({row.runs:g} runs)"
        table.add_row(
            str(row.number), Text("\n".join(row.nodes)), row.kernel + runs, Text(row.results), f"{row.mean_us:,.1f}",
            f"{row.share:.1%}", _number(row.gflop_per_s), _number(row.gb_per_s),
        )  # fmt: skip
    out.print(table)
    out.print(
        f"{facts['device']}: {facts['streams']} streams, batch {facts['batch']}\n"
        f"{facts['executions']:,} executions of {facts['mean_batch']:.1f} rows; mean {stages}; "
        f"{facts['outside_steps_us']:,.1f} us of compute in no step\n"
        f"{facts['rows_per_s']:,.1f} rows/s ({facts['rows_per_s_without_clocks']:,.1f}); in parentheses without clocks",
        highlight=False,
        markup=False,
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"
