"""A benchmark's results as tables for a person, as JSON and as CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from gpu_engine.tools.environment import Environment, Settings
from gpu_engine.tools.results import Result, Work
from gpu_engine.tools.subject import OURS

MIB = 1 << 20


def tables(results: Sequence[Result], environment: Environment) -> Group:
    """Everything that `gpu-engine bench` prints."""
    parts: list[Any] = [environment_table(environment)]
    ours = next((each.settings for each in results if each.settings is not None), None)
    if ours is not None:
        parts.append(settings_table(ours))
    parts += results_tables(results)
    parts += [work_table(each) for each in results if each.work is not None and each.scenario == results[0].scenario]
    parts += [Text(line, style) for line, style in remarks(results)]
    return Group(*parts)


def environment_table(found: Environment) -> Table:
    quota = "no quota" if found.quota is None else f"a quota of {found.quota:g} cores"
    rows = {
        "processor": f"{found.processor}; {found.cores} of {found.logical_cores} cores, {quota}",
        "memory": f"{found.memory_nbytes / 2**30:.1f} GiB",
        "system": f"{found.system}, Python {found.python}",
        "versions": ", ".join(f"{name} {number}" for name, number in found.versions.items()),
    }
    return _facts(rows)


def settings_table(found: Settings) -> Table:
    memory = (found.weights_nbytes / MIB, found.activations_nbytes / MIB)
    return _facts(
        {
            "device": found.device,
            "streams": str(found.streams),
            "batch": f"{found.batch}: {found.batch_reason} (bound by: {found.limiting_factor})",
            "requests": f"{found.in_flight} in flight, {found.rows} row{'s' * (found.rows != 1)} each",
            "planned memory": f"{memory[0]:.1f} MiB weights, {memory[1]:.1f} MiB activations",
        }
    )


def _facts(rows: dict[str, str]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        grid.add_row(Text(name, "dim"), Text(text))
    return grid


def results_tables(results: Sequence[Result]) -> Iterator[Table]:
    """A column for each scenario; where engines are compared, a table for each scenario with a column for each."""
    if len({each.engine for each in results}) == 1:
        yield _results_table("", results, {each: _load(each) for each in results})
        return
    for name in dict.fromkeys(each.scenario for each in results):
        inside = [each for each in results if each.scenario == name]
        yield _results_table(_load(inside[0]), inside, {each: each.engine for each in inside})


def _results_table(title: str, results: Sequence[Result], names: Mapping[Result, str]) -> Table:
    grid = Table("", title=title or None, title_justify="left", box=SIMPLE_HEAD)
    for each in results:
        grid.add_column(names[each], justify="right")
    grid.add_row("queries", *(f"{each.queries:,}" for each in results))
    grid.add_row("items/s", *(f"{each.items_per_s:,.1f}" for each in results))
    grid.add_row("latency, mean (ms)", *(_number(each.latency.mean_ms) for each in results))
    for percent in sorted({percent for each in results for percent in each.latency.percentiles_ms}):
        grid.add_row(f"p{percent:g}", *(_number(each.latency.percentiles_ms.get(percent)) for each in results))
    grid.add_row("max", *(_number(each.latency.max_ms) for each in results))
    if any(each.engine != OURS for each in results):
        grid.add_row(f"times as good ({results[0].metric})", *(_ratio(each, results) for each in results))
    return grid


def _load(found: Result) -> str:
    if found.scenario == "closed":
        return f"closed, {found.in_flight} in flight"
    return found.scenario if found.rate is None else f"{found.scenario}, {found.rate:,.4g}/s"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if value < 1000 else f"{value:,.0f}"


def _ratio(found: Result, results: Sequence[Result]) -> str:
    """How many times as good ours is as this one, by the scenario's figure of merit."""
    ours = next(each for each in results if each.scenario == found.scenario and each.engine == OURS)
    if found is ours or not found.figure or not ours.figure:
        return ""
    times = found.figure / ours.figure if found.unit == "ms" else ours.figure / found.figure
    return f"{times:.2f}"


def work_table(found: Result) -> Table:
    """Where a request's time went inside our engine."""
    work = found.work
    assert work is not None
    rows = max(1, work.rows)
    parts = {
        "queue": work.queue_ns,
        "copy in": work.copy_in_ns,
        "compute": work.compute_ns,
        "copy out": work.copy_out_ns,
    }
    spent = ", ".join(f"{name} {nanoseconds / rows / 1e6:.4g} ms" for name, nanoseconds in parts.items())
    return _facts(
        {
            "startup": f"compiled in {work.compile_s:.2f} s, first request {work.first_s * 1e3:.1f} ms",
            "mean batch": f"{work.mean_batch:.2f} rows an execution",
            "time a row": spent,
        }
    )


def remarks(results: Sequence[Result]) -> Iterator[tuple[str, str]]:
    """(line, style) for all that a reader must know: figures of merit, steadiness, warnings, rules, differences."""
    for each in results:
        where = f"{each.scenario}, {each.engine}"
        if each.steady:
            yield f"{where}: steady", "green"
        for warning in each.warnings:
            yield f"{where}: {warning}", "yellow"
    for each in results:
        if each.metric != "throughput" and each.metric != "median":
            valid = "valid" if not each.violations else f"not valid for MLPerf: {'; '.join(each.violations)}"
            yield f"{each.scenario}, {each.engine}: {each.metric} {each.figure:,.4g} {each.unit}; {valid}", ""
    for name in {each.engine: each for each in results}:
        copies = next(each.copies for each in results if each.engine == name)
        gaps = [each.difference for each in results if each.engine == name and each.difference is not None]
        gap = f"; its outputs differ from ours by {max(gaps):.1e} of the largest" if gaps and name != OURS else ""
        yield f"{name}: latencies include copying {copies}{gap}", "dim"


def as_json(results: Sequence[Result], environment: Environment) -> str:
    """{"environment": ..., "results": [...]}; percentiles are keyed "p99"."""
    return json.dumps({"environment": asdict(environment), "results": [*map(_plain, results)]}, indent=1)


def _plain(found: Result) -> dict[str, Any]:
    plain = asdict(found)
    percentiles = plain["latency"].pop("percentiles_ms")
    plain["latency"] |= {f"p{percent:g}_ms": value for percent, value in percentiles.items()}
    if isinstance(found.work, Work):
        plain["work"]["mean_batch"] = found.work.mean_batch
    return plain


def write_csv(path: Path, results: Sequence[Result], environment: Environment) -> None:
    """One line for each result: flat columns, the environment's first."""
    rows = [
        {**_flat("", {"date": environment.date, "processor": environment.processor}), **_flat("", _plain(each))}
        for each in results
    ]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def _flat(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(f"{prefix}{name}.", value)
        elif isinstance(value, list | tuple):
            flat[prefix + name] = "; ".join(map(str, value))
        else:
            flat[prefix + name] = value
    return flat
