"""`gpu-engine inspect`: a model's forms, steps, memory and batching, for people or as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpu_engine.compiler import compile_defaults
from gpu_engine.configuration import completed
from gpu_engine.tools.bench_command import Config, Precision
from gpu_engine.tools.bundles import parse_arch
from gpu_engine.tools.files import console
from gpu_engine.tools.inspection import Facts, inspect_model
from gpu_engine.tools.stages import parse_extents


def run_inspection(
    model: Annotated[Path, typer.Argument(help="An .onnx file or a bundle.")],
    device: Annotated[str, typer.Option(help='"auto", "cpu", "cuda", "interpret", ...')] = "auto",
    arch: Annotated[list[str] | None, typer.Option(help="Also count the kernels of a GPU such as sm_90.")] = None,
    precision: Precision = None,
    config: Config = None,
    extent: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Extents to measure memory at.")
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="How many buffers and weights are listed; 0: all.")] = 10,
    graph: Annotated[bool, typer.Option("--graph", help="Also the text of the graph before and after passes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all buffers and weights.")] = False,
) -> None:
    """Show what a model becomes: operators, fused steps, memory, batching, and what is missing."""
    architectures = [parse_arch(text) for text in arch or ()]
    chosen = completed({"device": device, "precision": precision}, compile_defaults(), config)
    device, precision = chosen["device"], chosen["precision"] or "fp32"
    facts = inspect_model(model, device, parse_extents(extent or ()), architectures, precision, graph)
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        _print(console(), facts, top or None)


def _print(out: Console, facts: Facts, top: int | None) -> None:
    def say(text: str) -> None:
        out.print(text, markup=False, highlight=False)

    opsets = ", ".join(f"{domain} {version}" for domain, version in facts["opsets"].items())
    say(f"{facts['model']}: {facts['producer'] or 'unknown producer'}, opsets {opsets}")
    for missing in facts["unsupported"]:
        say(
            f"missing    {missing['domain']}::{missing['operator']} "
            f"(opset {missing['opset'] or 'not imported'}) x {missing['nodes']}"
        )
    if facts["unsupported"]:
        out.print(_counts("operators", {"ONNX": facts["onnx_operators"]}))
        return
    say(f"device     {facts['device']}")
    if "compiled_later" in facts:
        say(f"not compiled now: {facts['compiled_later']}")
        out.print(_counts("operators", {"ONNX": facts["onnx_operators"]}))
        return
    for side in ("inputs", "outputs"):
        for port in facts[side]:
            say(f"{side[:-1]:10} {port['name']}: {port['dtype']}[{', '.join(port['shape'])}]")
    batching = facts["batching"]
    verdict = f"proven along {batching['symbol']}" if batching["proven"] else f"refused: {batching['refused']}"
    say(f"batching   {verdict}")
    before, after = facts["operations_before"], facts["operations_after"]
    counts = {"ONNX nodes": facts["onnx_operators"], "before passes": before, "after": after, "steps": facts["kernels"]}
    out.print(_counts("operator", counts))
    out.print(_steps(facts))
    for title, names in (("folded into constants or extents", "folded"), ("views, or of no effect", "no_step")):
        if facts[names]:
            say(f"{title}: {', '.join(facts[names])}")
    _print_memory(out, facts, top)
    if facts["gpu"]:
        out.print(_gpus(facts))
    for key in ("graph_before", "graph_after"):
        if key in facts:
            say(f"\n{key.replace('_', ' ')} passes\n{facts[key]}")


def _counts(title: str, columns: dict[str, dict[str, int]]) -> Table:
    """How often each operator, engine operation and kernel occurs, column by column."""
    table = Table(*[cell for name in columns for cell in (name, "")], title=None, caption=f"{title}s by count")
    rows = max(map(len, columns.values()))
    for place in range(rows):
        cells = []
        for counts in columns.values():
            names = list(counts)
            cells += [names[place], str(counts[names[place]])] if place < len(names) else ["", ""]
        table.add_row(*cells)
    sums = [cell for counts in columns.values() for cell in ("all", str(sum(counts.values())))]
    table.add_section()
    table.add_row(*sums)
    return table


def _steps(facts: Facts) -> Table:
    table = Table("step", "kernel", "ONNX nodes", "results")
    for row in facts["steps"]:
        binds = f"\nbinds {', '.join(row['binds'])}" if row["binds"] else ""
        table.add_row(
            str(row["step"]), row["kernel"], Text("\n".join(row["nodes"])), Text("\n".join(row["results"]) + binds)
        )
    return table


def _print_memory(out: Console, facts: Facts, top: int | None) -> None:
    memory, extents = facts["memory"], ", ".join(f"{name}={value}" for name, value in facts["extents"].items())
    out.print(
        f"memory of a slot{' at ' + extents if extents else ''}: arena {memory['arena_nbytes']:,} bytes "
        f"({memory['arena_nbytes_without_sharing']:,} without sharing), ports {memory['ports_nbytes']:,}; "
        f"weights, once for all slots: {memory['weights_nbytes']:,}",
        highlight=False,
        markup=False,
    )
    if memory["unknown_extents"]:
        out.print(f"beyond what only running tells: {', '.join(memory['unknown_extents'])}", markup=False)
    buffers = Table("buffer", "bytes", "zone", "offset", "alive in steps", "shares with", "made by")
    for row in memory["buffers"][:top]:
        life = "" if row["first_step"] is None else f"{row['first_step']} to {row['last_step']}"
        shares = f"{row['shares_with']} others" if row["shares_with"] else ""
        numbers = f"{row['nbytes']:,}", row["zone"], f"{row['offset']:,}"
        buffers.add_row(Text(row["type"]), *numbers, life, shares, Text(row["made_by"]))
    weights = Table("weight", "bytes", "read by")
    for row in memory["weights"][:top]:
        weights.add_row(Text(row["type"]), f"{row['nbytes']:,}", Text("\n".join(row["read_by"])))
    for table, listed in ((buffers, memory["buffers"]), (weights, memory["weights"])):
        hidden = len(listed) - table.row_count
        table.caption = f"and {hidden} smaller ones" if hidden else None
        if listed:
            out.print(table)


def _gpus(facts: Facts) -> Table:
    table = Table("GPU", "precision", "launches", "distinct kernels", "launched", "array steps")
    for row in facts["gpu"]:
        launched = "\n".join(f"{count} {name}" for name, count in row["launched"].items())
        arrays = "\n".join(f"{count} {name}" for name, count in row["array_steps"].items())
        table.add_row(
            row["arch"], row["precision"], str(row["launches"]), str(row["distinct_kernels"]), launched, arrays
        )  # fmt: skip
    return table
