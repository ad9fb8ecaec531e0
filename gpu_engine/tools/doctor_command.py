"""The options of `gpu-engine doctor` and what it prints."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpu_engine.tools.bench_command import Device
from gpu_engine.tools.doctor import Diagnosis, examine


def run_doctor(
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what models can run on here, what is missing, and the command that installs it; 1 if the device does not run
    a small model."""
    found = examine(device)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        _print(found, Console())
    if found.error:
        raise typer.Exit(1)


def _print(diagnosis: Diagnosis, console: Console) -> None:
    table = Table(box=SIMPLE_HEAD, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for each in diagnosis.findings:
        between = "; " if each.found and each.trouble else ""
        table.add_row(each.topic, Text.assemble(each.found, between, (each.trouble, "yellow")))
    console.print(table)
    for each in diagnosis.findings:
        if each.command:
            console.print(f"{each.topic}: {each.command}", highlight=False, markup=False, soft_wrap=True)
    verdict = f"runs on {diagnosis.ran_on}" if diagnosis.ran_on else f"does not run: {diagnosis.error}"
    style = "green" if diagnosis.ran_on else "red"
    console.print(Text(f"device {diagnosis.device!r} {verdict}", style), soft_wrap=True)
