"""`gpu-engine simulate`: how the scheduler would serve a load on a machine that is not there."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from gpu_engine.options import validated
from gpu_engine.runtime.sizing import SLOTS_PER_STREAM, Limits, Sizes, choose
from gpu_engine.tools.files import console
from gpu_engine.tools.virtual_time import Cost, Costs, Load, Outcome, Queue, percentile, simulate

PERCENTILES = (50.0, 90.0, 99.0, 99.9, 100.0)
PER_SECOND = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
_TERM = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(s|ms|us|ns)")


@dataclass(frozen=True)
class Traffic:
    """What arrives: `rate` requests a second at random (Poisson), or `clients` callers with one request each.

    A request has one to `rows` rows and one of `shapes` shapes; so many of a hundred `cancelled_percent` are cancelled,
    `patience_s` after they came.
    """

    requests: int
    rate: float = 0.0
    clients: int = 0
    rows: int = 1
    shapes: int = 1
    timeout_s: float = 0.0
    cancelled_percent: float = 0.0
    patience_s: float = 0.0


def parse_cost(text: str) -> Cost:
    """The cost that "2ms+50us" names: of a batch, and of each of its rows; ValueError for anything else."""
    terms = [_TERM.fullmatch(term.strip()) for term in text.split("+")]
    if len(terms) > 2 or None in terms:
        raise ValueError(f"a cost is written like 2ms+50us (of a batch, and of each row), given {text!r}")
    seconds = [float(term[1]) / PER_SECOND[term[2]] for term in terms if term is not None]
    return Cost(*seconds)


def load_of(traffic: Traffic, seed: int) -> Load:
    """Random requests; the same seed gives the same ones."""
    random, n = np.random.default_rng(seed), traffic.requests
    arrivals = random.exponential(1 / traffic.rate, n).cumsum() if traffic.rate else np.zeros(n)
    leaves = np.where(random.random(n) < traffic.cancelled_percent / 100, traffic.patience_s, np.inf)
    return Load(
        arrivals.tolist(),
        random.integers(1, traffic.rows + 1, n).tolist() if traffic.rows > 1 else (),
        random.integers(0, traffic.shapes, n).tolist() if traffic.shapes > 1 else (),
        0 if traffic.rate else traffic.clients,
        traffic.timeout_s,
        leaves.tolist() if traffic.cancelled_percent else (),
    )


def sizes_of(gpus: int, streams: int, slots: int, batch: int | None, in_flight: int | None) -> Sizes:
    """What the engine would choose for these options on an asynchronous device with `slots` of `SLOTS_PER_STREAM`."""
    options = validated(streams=gpus * streams, batch=batch, requests=in_flight, hint="THROUGHPUT")
    return choose(options, Limits(auto_streams=gpus * streams, asynchronous=slots == SLOTS_PER_STREAM))


def facts(outcome: Outcome, sizes: Sizes, offered: float, took_s: float) -> dict[str, Any]:
    """Everything that is reported, ready for JSON; seconds in virtual time but for `took_s`."""
    ordered = sorted(outcome.latencies)
    seconds = outcome.seconds or float("nan")
    return {
        "streams": sizes.streams,
        "slots": sizes.slots,
        "batch": sizes.batch.batch,
        "batch_reason": sizes.batch.reason,
        "offered_per_s": offered or None,
        "requests": outcome.submitted,
        "completed": outcome.completed,
        "rejected": outcome.rejected,
        "expired": outcome.expired,
        "cancelled": outcome.cancelled,
        "rows": outcome.rows,
        "virtual_s": outcome.seconds,
        "requests_per_s": outcome.completed / seconds,
        "rows_per_s": outcome.rows / seconds,
        "latency_ms": {f"p{p:g}": percentile(ordered, p) * 1e3 for p in PERCENTILES} if ordered else {},
        "executions": outcome.executions,
        "mean_batch": outcome.rows / outcome.executions if outcome.executions else 0.0,
        "batches": dict(sorted(outcome.batches.items())),
        "close_reasons": dict(outcome.reasons.most_common()),
        "busy": [round(share, 4) for share in outcome.busy],
        "max_in_flight": list(outcome.max_in_flight),
        "took_s": took_s,
    }


def run_simulation(
    requests: Annotated[int, typer.Option(min=1, help="How many requests arrive in all.")] = 1_000_000,
    rate: Annotated[float, typer.Option(min=0, help="Requests a second, at random; 0: callers that wait.")] = 0.0,
    clients: Annotated[int, typer.Option(min=1, help="Without --rate: callers with one request each.")] = 1024,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs behind one queue.")] = 8,
    streams: Annotated[int, typer.Option(min=1, help="Streams of each GPU.")] = 4,
    slots: Annotated[int, typer.Option(min=1, max=SLOTS_PER_STREAM, help="Slots of each stream.")] = SLOTS_PER_STREAM,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows of a batch; else from --in-flight.")] = None,
    in_flight: Annotated[int | None, typer.Option(min=1, help="Requests in flight, as compile(requests=).")] = None,
    compute: Annotated[str, typer.Option(help="What a batch and each row of it take to compute.")] = "2ms+50us",
    copy_in: Annotated[str, typer.Option(help="The same to copy to a GPU.")] = "20us+1us",
    copy_out: Annotated[str, typer.Option(help="The same to copy back.")] = "20us+1us",
    host: Annotated[str, typer.Option(help="The same to form on the host, one at a time.")] = "0us",
    batch_timeout_ms: Annotated[float, typer.Option(min=0, help="How long a batch may wait to fill.")] = 0.0,
    max_queue_size: Annotated[int, typer.Option(min=0, help="Requests that may wait; 0: no limit.")] = 0,
    timeout_ms: Annotated[float, typer.Option(min=0, help="How long a request waits at most; 0: for ever.")] = 0.0,
    rows: Annotated[int, typer.Option(min=1, help="Requests have 1 to so many rows.")] = 1,
    shapes: Annotated[int, typer.Option(min=1, help="Requests have one of so many shapes.")] = 1,
    cancelled: Annotated[float, typer.Option(min=0, max=100, help="Percent cancelled by their callers.")] = 0.0,
    patience_ms: Annotated[float, typer.Option(min=0, help="How long after they came.")] = 0.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same requests.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Serve a load in virtual time with the real scheduler: a million requests on eight GPUs in seconds."""
    costs = Costs(*map(parse_cost, (compute, copy_in, copy_out, host)))
    sizes = sizes_of(gpus, streams, slots, batch, in_flight)
    traffic = Traffic(requests, rate, clients, rows, shapes, timeout_ms / 1e3, cancelled, patience_ms / 1e3)
    queue = Queue(sizes.streams, sizes.slots, sizes.batch.batch, batch_timeout_ms / 1e3, max_queue_size)
    started = time.perf_counter()
    outcome = simulate(load_of(traffic, seed), queue, costs)
    found = facts(outcome, sizes, rate, time.perf_counter() - started)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _print(found)


def _print(found: dict[str, Any]) -> None:
    out, busy = console(), found["busy"]
    offered = f", {found['offered_per_s']:,.0f} a second offered" if found["offered_per_s"] else ""
    out.print(
        f"{found['streams']} streams x {found['slots']} slots, batch {found['batch']} ({found['batch_reason']})\n"
        f"{found['requests']:,} requests{offered}: {found['completed']:,} completed, {found['rejected']:,} rejected, "
        f"{found['expired']:,} expired, {found['cancelled']:,} cancelled\n"
        f"{found['requests_per_s']:,.0f} requests/s, {found['rows_per_s']:,.0f} rows/s over {found['virtual_s']:.3f} s "
        f"of virtual time, simulated in {found['took_s']:.1f} s\n"
        f"streams compute {min(busy):.1%} to {max(busy):.1%} of the time, {sum(busy) / len(busy):.1%} on average; "
        f"at most {max(found['max_in_flight'])} in flight on one",
        highlight=False,
    )
    latencies = Table("latency", *found["latency_ms"])
    latencies.add_row("ms", *(f"{value:,.3f}" for value in found["latency_ms"].values()))
    reasons = Table("closed because", *found["close_reasons"])
    reasons.add_row("batches", *(f"{count:,}" for count in found["close_reasons"].values()))
    for table in (latencies, reasons, _histogram(found["batches"], found["executions"])):
        out.print(table)


def _histogram(batches: dict[int, int], executions: int) -> Table:
    """Batches by rows, at most 16 lines of them."""
    step = -(-max(batches, default=1) // 16)
    table = Table("rows", "batches", "share", "", caption=f"{executions:,} batches in all")
    bins: dict[int, int] = {}
    for rows, count in batches.items():
        bins[(rows - 1) // step] = bins.get((rows - 1) // step, 0) + count
    for place, count in sorted(bins.items()):
        first, last = place * step + 1, (place + 1) * step
        label = str(first) if step == 1 else f"{first} to {last}"
        table.add_row(label, f"{count:,}", f"{count / executions:.1%}", "█" * round(40 * count / max(bins.values())))
    return table
