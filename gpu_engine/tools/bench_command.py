"""The options of `gpu-engine bench`, under the names that users of benchmark_app, perf_analyzer and trtexec know."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from gpu_engine.tools.bench import Bench, measure_all
from gpu_engine.tools.bench_output import as_json, tables, write_csv
from gpu_engine.tools.environment import environment
from gpu_engine.tools.feeds import Request
from gpu_engine.tools.load import Course
from gpu_engine.tools.measures import PERCENTILES, rank
from gpu_engine.tools.peers import PEERS
from gpu_engine.tools.scenarios import scenario

Model = Annotated[Path, typer.Argument(help="An .onnx file.")]
Device = Annotated[str, typer.Option("--device", "-d", help='"auto", "cpu", "cuda", "cuda:1", "cuda:all", ...')]
Config = Annotated[
    Path | None, typer.Option("--config", "-load_config", help="A TOML file of compile()'s options, as `tune` writes.")
]
Inputs = Annotated[
    list[str] | None, typer.Option("--input", "-i", metavar="[NAME=]FILE", help="A .npy or .npz file; may be repeated.")
]
Shapes = Annotated[
    list[str] | None,
    typer.Option("--shape", "--shapes", "-shape", metavar="NAME:1x3x224x224", help="For random data; may be repeated."),
]
Seed = Annotated[int, typer.Option(help="Of random data and arrivals.")]
Precision = Annotated[str | None, typer.Option("--precision", help="fp32, tf32, fp16 or bf16; GPUs only.")]
HINTS = {"tput": "throughput", "ctput": "cumulative_throughput", "none": None}


def hint_of(text: str | None) -> str | None:
    """The hint of compile() that a spelling of benchmark_app's means."""
    return None if text is None else HINTS.get(text.lower(), text)


def bench(
    model: Model,
    more_peers: Annotated[list[str] | None, typer.Argument(hidden=True, metavar="PEER")] = None,
    device: Device = "auto",
    config: Config = None,
    streams: Annotated[
        str | None,
        typer.Option("--streams", "-nstreams", help='Executions at the same time: a number, "auto", "numa".'),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option("--requests", "--concurrency", "-nireq", min=0, help="In flight; 0: as many as it takes."),
    ] = None,
    batch: Annotated[int | None, typer.Option("--batch", "-b", min=0, help="Rows per execution.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", "-nthreads", min=0, help="Cores per stream.")] = None,
    hint: Annotated[str | None, typer.Option("--hint", "-hint", help="throughput (tput), latency or none.")] = None,
    precision: Precision = None,
    scenarios: Annotated[
        list[str] | None,
        typer.Option("--scenario", help="closed, open, SingleStream, MultiStream, Server or Offline; may be repeated."),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", "--duration", "-t", min=0.01, help="Measured for each scenario.")
    ] = 10.0,
    iterations: Annotated[
        int | None, typer.Option("--iterations", "-niter", min=1, help="Queries to measure instead, rounded up.")
    ] = None,
    warmup: Annotated[
        float, typer.Option("--warmup", min=0, help="Seconds at least, then until it is steady; 0: none.")
    ] = 1.0,
    rate: Annotated[
        float | None, typer.Option("--rate", "--request-rate", help="Queries a second of open loops.")
    ] = None,
    latency_ms: Annotated[
        float | None, typer.Option("--latency-ms", help="The Server scenario's bound: the highest rate within it.")
    ] = None,
    percentiles: Annotated[
        list[float] | None, typer.Option("--percentile", "-latency_percentile", help="From 1 to 100; may be repeated.")
    ] = None,
    inputs: Inputs = None,
    shapes: Shapes = None,
    seed: Seed = 0,
    compare: Annotated[
        list[str] | None,
        typer.Option("--compare", metavar="PEER ...", help=f"In the same run, in turns: {', '.join(PEERS)}."),
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write a line for each result to this file.")] = None,
) -> None:
    """Measure throughput and latency, in a closed loop and in an open one unless a scenario is given."""
    if more_peers and not compare:
        raise typer.BadParameter(f"unexpected argument {more_peers[0]!r}")
    peers = [*(compare or ()), *(more_peers or ())]
    options = engine_options(device, config, streams, batch, threads, hint_of(hint), precision)
    for percent in percentiles or ():
        rank(1, percent)
    console = Console()
    wanted = Bench(
        model=model,
        options=options,
        request=Request(inputs or (), shapes or (), seed),
        course=Course(seconds, warmup, iterations),
        in_flight=requests or None,
        rate=rate,
        bound_ms=latency_ms,
        percentiles=percentiles or PERCENTILES,
        peers=peers,
    )
    chosen = [scenario(name) for name in scenarios or ("closed", "open")]
    with console.status("compiling") as status:
        results = list(measure_all(wanted, chosen, status.update))
    machine = environment(peers)
    console.print(tables(results, machine))
    if json is not None:
        json.write_text(as_json(results, machine), encoding="utf-8")
    if csv is not None:
        write_csv(csv, results, machine)


def engine_options(
    device: str,
    config: Path | None,
    streams: str | None,
    batch: int | None,
    threads: int | None,
    hint: str | None,
    precision: str | None,
) -> dict[str, Any]:
    """Options of compile() that were given."""
    count = int(streams) if streams is not None and streams.lstrip("-").isdigit() else streams
    found = {
        "config": config, "streams": count, "batch": batch, "threads": threads, "hint": hint, "precision": precision,
    }  # fmt: skip
    return {"device": device} | {name: value for name, value in found.items() if value is not None}
