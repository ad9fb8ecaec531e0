"""`gpu-engine precision`: distances of outputs, the inputs that it makes up, and what it says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner

pytest.importorskip("triton")

from gpu_engine.tools.cli import app
from gpu_engine.tools.feeds import Request
from gpu_engine.tools.precision import distance, measure


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """x [n, 64] times weights [64, 32], its sign, and how many rows there are."""
    rng = np.random.default_rng(5)
    weights = helper.make_tensor("w", TensorProto.FLOAT, [64, 32], rng.standard_normal(64 * 32))
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Shape", ["x"], ["shape"])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32]),
               helper.make_tensor_value_info("shape", TensorProto.INT64, [2])]  # fmt: skip
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])], outputs, [weights]
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


def test_fewer_bits_move_an_output_further(model: Path) -> None:
    """tf32 keeps 10 bits of a factor and rounds them, fp16 as many, bf16 7: also where kernels are interpreted."""
    report = measure(model, "interpret", Request(shapes=["x=20x64"]))
    rows = {row.precision: row for row in report.distances if row.output == "y"}
    assert list(rows) == ["tf32", "fp16", "bf16"]
    assert 1e-5 < rows["tf32"].max_abs_error < rows["bf16"].max_abs_error < 1
    ratios = {name: row.sqnr_db for name, row in rows.items()}
    assert None not in ratios.values()
    assert 50 < ratios["tf32"] < 80 and 60 < ratios["fp16"] < 80 and 40 < ratios["bf16"] < 60  # type: ignore[operator]
    assert all(0.999 < row.cosine_similarity < 1 for row in rows.values())
    (exact,) = {(row.max_abs_error, row.sqnr_db) for row in report.distances if row.output == "shape"}
    assert exact == (0, None)


def test_given_inputs_are_taken_and_seeds_repeat(model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.full((8, 64), 0.5, np.float32))
    given = measure(model, "interpret", Request(inputs=[str(tmp_path / "x.npy")]))
    first, again = (measure(model, "interpret", Request(shapes=["1x64"], seed=3)) for _ in range(2))
    assert first == again != measure(model, "interpret", Request(shapes=["1x64"], seed=4))
    command = ["precision", str(model), "--device", "interpret", "--input", f"x={tmp_path / 'x.npy'}", "--json"]
    found = json.loads(CliRunner().invoke(app, command, catch_exceptions=False).stdout)
    assert found["reference"] == "fp32" and len(found["outputs"]) == 6
    assert found["outputs"][0]["max_abs_error"] == given.distances[0].max_abs_error


def test_the_table_has_a_row_for_every_output_and_precision(model: Path) -> None:
    result = CliRunner().invoke(
        app, ["precision", str(model), "--device", "interpret", "--shape", "x=4x64"], catch_exceptions=False
    )
    lines = [line for line in result.stdout.splitlines() if any(name in line for name in ("tf32", "fp16", "bf16"))]
    assert len(lines) == 6 and sum("exact" in line for line in lines) == 3


def test_distances() -> None:
    found = distance("y", "fp16", np.array([1.0, 2, 0, np.inf, 3]), np.array([1.0, 2.5, 0.1, np.inf, np.inf]))
    assert found.max_abs_error == 0.5 and found.max_relative_error == 0.25 and found.not_finite == 1
    assert found.sqnr_db == pytest.approx(10 * math.log10(5 / (0.25 + 0.01)))
    assert found.cosine_similarity == pytest.approx(6 / math.sqrt(5 * (1 + 6.25 + 0.01)))
    same = distance("y", "fp16", np.zeros(3), np.zeros(3))
    assert (same.max_abs_error, same.cosine_similarity, same.sqnr_db, same.not_finite) == (0, 1, None, 0)


def test_refusals(model: Path) -> None:
    with pytest.raises(ValueError, match="always computes in float32"):
        measure(model, "cpu", Request())
    with pytest.raises(ValueError, match="names none of the inputs x"):
        measure(model, "interpret", Request(shapes=["z=1x64"]))
