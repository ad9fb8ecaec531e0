"""`gpu-engine ops`: the table of operators, and that the README's counts are those of the registry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gpu_engine.errors import InputError
from gpu_engine.frontend.registry import REGISTRY, operator
from gpu_engine.ir.graph import Builder, Value
from gpu_engine.tools.cli import app
from gpu_engine.tools.operators import LOWERINGS, MARKS, OperatorRow, operator_rows, summary, update_summary

README = Path(__file__).parent.parent / "README.md"
COMMAND = "gpu-engine ops --update README.md"


def rows_by_name() -> dict[tuple[str, str], OperatorRow]:
    return {(row.domain, row.name): row for row in operator_rows()}


def test_rows_say_how_operators_are_lowered() -> None:
    rows = rows_by_name()
    lowerings = {name: rows["ai.onnx", name].lowering for name in ("Relu", "Softmax", "NonZero", "HannWindow")}
    assert lowerings == {
        "Relu": "pointwise", "Softmax": "composed", "NonZero": "array", "HannWindow": "specification body"
    }  # fmt: skip
    assert rows["ai.onnx", "StringNormalizer"].lowering == "host"
    gradient = rows["ai.onnx.preview.training", "Gradient"]
    assert gradient.lowering == "missing" and gradient.missing == (1,)
    assert rows["ai.onnx.ml", "CastMap"].lowering == "composed"
    assert rows["com.microsoft", "FusedMatMul"].versions == (1,)
    assert {row.lowering for row in rows.values()} == set(LOWERINGS)
    assert all("cpu" in row.devices for row in rows.values())


def test_versions_are_those_of_the_specification() -> None:
    softmax = rows_by_name()["ai.onnx", "Softmax"]
    assert softmax.versions == (1, 11, 13) and softmax.missing == ()
    assert len(rows_by_name()) == len(operator_rows()) > 220


def test_a_new_operator_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY, ("com.example", "Same"), [])
    before = summary(operator_rows())

    @operator("Same", since=3, domain="com.example")
    def same(b: Builder, x: Value) -> Value:
        return x

    row = rows_by_name()["com.example", "Same"]
    assert (row.versions, row.missing, row.lowering) == ((3,), (), "composed")
    assert summary(operator_rows()) != before


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["ops", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_prints_every_form() -> None:
    data: list[dict[str, Any]] = json.loads(run("--json"))
    assert {"domain": "ai.onnx", "name": "Relu"}.items() <= next(row for row in data if row["name"] == "Relu").items()
    table = run("--markdown").splitlines()
    assert len(table) == len(data) + 2 and table[0].startswith("| operator | domain |")
    plain = run()
    assert "Softmax" in plain and summary(operator_rows()) in plain
    missing = run("--missing", "--json")
    assert 0 < len(json.loads(missing)) < 10


def test_counts_in_a_file_are_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "text.md"
    path.write_text(f"before\n{MARKS[0]}old\n{MARKS[1]}after\n")
    run("--update", str(path), "--missing")
    assert path.read_text() == f"before\n{MARKS[0]}{summary(operator_rows())}{MARKS[1]}after\n"
    path.write_text("nothing")
    with pytest.raises(InputError, match="has no lines"):
        update_summary(path, operator_rows())


def test_the_readme_counts_what_the_registry_holds() -> None:
    inside = README.read_text().split(MARKS[0])[1].split(MARKS[1])[0]
    assert inside == summary(operator_rows()), f"run {COMMAND}"
