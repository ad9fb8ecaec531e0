"""`gpu-engine inspect`: its facts agree with the plan, missing operators are listed, and the text shows everything."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import onnx
import pytest
from typer.testing import CliRunner

from cpu_fallback.device import CpuDevice
from gpu_engine.errors import DeviceError, InputError
from gpu_engine.tools.cli import app
from gpu_engine.tools.demo import FOLDER
from gpu_engine.tools.inspection import Facts, inspect_model
from gpu_engine.tools.stages import parse_extents, read_named, stages_of
from tests.test_control import model_of
from tests.test_demo import unknown_operator

DIGITS = FOLDER / "digits.onnx"


def facts_of(text: str, folder: Path, *, device: str = "cpu", graph: bool = False, **extents: int) -> Facts:
    onnx.save(model_of(text), folder / "model.onnx")
    return inspect_model(folder / "model.onnx", device, extents, (), "fp32", graph)


def command(*arguments: Any) -> str:
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_facts_of_a_network_agree_with_its_plan() -> None:
    device = CpuDevice()
    plan = stages_of(read_named(DIGITS), device.lower).plan
    facts = json.loads(command(DIGITS, "--device", "cpu", "--extent", "batch=5", "--json"))
    assert facts["onnx_operators"] == {"Conv": 3, "Relu": 3, "MaxPool": 2, "Flatten": 1, "Gemm": 1, "Softmax": 1}
    assert facts["operations_after"] == {"Conv": 3, "Pool": 2, "MatMul": 1, "Reshape": 1, "Softmax": 1}
    assert sum(facts["operations_before"].values()) == 15 and facts["unsupported"] == []
    assert len(facts["steps"]) == len(plan.steps) == sum(facts["kernels"].values())
    assert facts["batching"] == {"proven": True, "symbol": "batch", "refused": ""}
    named = [name for step in facts["steps"] for name in step["nodes"]]
    assert {"Conv '/layer5/Conv'", "Relu '/layer6/Relu'"} <= set(named)
    memory = facts["memory"]
    weights, activations = device.memory(plan, (5,))
    assert memory["weights_nbytes"] == weights == sum(row["nbytes"] for row in memory["weights"])
    assert memory["arena_nbytes"] + memory["ports_nbytes"] == activations
    assert memory["arena_nbytes"] < memory["arena_nbytes_without_sharing"]


def test_buffers_that_live_together_lie_apart() -> None:
    memory = inspect_model(DIGITS, "cpu", {"batch": 3}, (), "fp32", False)["memory"]
    arena = [row for row in memory["buffers"] if row["zone"] == "arena"]
    assert len(arena) > 5 and any(row["shares_with"] for row in arena)
    for a, b in combinations(arena, 2):
        together = a["first_step"] < b["last_step"] and b["first_step"] < a["last_step"]
        apart = a["offset"] + a["nbytes"] <= b["offset"] or b["offset"] + b["nbytes"] <= a["offset"]
        assert apart or not together, (a, b)
    assert max(row["offset"] + row["nbytes"] for row in arena) <= memory["arena_nbytes"]


def test_shared_weights_are_counted_once(tmp_path: Path) -> None:
    text = """g (int64[N] i, int64[N] j) => (float[N, 2] y, float[N, 2] z) <float[3, 2] w = {1, 2, 3, 4, 5, 6}> {
      y = Gather (w, i)  z = Gather (w, j) }"""
    memory = facts_of(text, tmp_path)["memory"]
    (weight,) = (row for row in memory["weights"] if row["nbytes"] == 24)
    assert memory["weights_nbytes"] == sum(row["nbytes"] for row in memory["weights"])
    assert weight["read_by"] == ["Gather 'y'", "Gather 'z'"]


def test_a_refusal_names_the_node(tmp_path: Path) -> None:
    facts = facts_of("g (float[N, 4] x) => (float[N, 4] y) { y = Softmax <axis = 0> (x) }", tmp_path)
    assert not facts["batching"]["proven"] and "Softmax 'y'" in facts["batching"]["refused"]
    assert "refused: Softmax 'y'" in command(tmp_path / "model.onnx", "--device", "cpu")


def test_every_missing_operator_is_listed_without_failing(tmp_path: Path) -> None:
    path = unknown_operator(tmp_path / "unknown.onnx")
    facts = json.loads(command(path, "--json"))
    assert facts["unsupported"] == [{"domain": "made.up", "operator": "Nonsense", "opset": 1, "nodes": 1}]
    assert "steps" not in facts and "made.up::Nonsense (opset 1) x 1" in command(path)


def test_models_that_wait_for_their_inputs_say_so(tmp_path: Path) -> None:
    text = "g (seq(float[N]) s) => (int64 n) { n = SequenceLength (s) }"
    facts = facts_of(text, tmp_path)
    assert "inputs s are compiled" in facts["compiled_later"] and facts["onnx_operators"] == {"SequenceLength": 1}
    assert "not compiled now" in command(tmp_path / "model.onnx", "--device", "cpu")


def test_what_only_running_tells_is_named(tmp_path: Path) -> None:
    text = """g (float[N, M] x) => (int64[2, k] y) {
      z = NonZero (x)  one = Constant <value = int64 {1}> ()  y = Add (z, one) }"""
    memory = facts_of(text, tmp_path, N=3, M=2)["memory"]
    (unknown,) = memory["unknown_extents"]
    known = facts_of(text, tmp_path, N=3, M=2, **{unknown: 4})["memory"]
    assert known["unknown_extents"] == [] and known["ports_nbytes"] > memory["ports_nbytes"]
    assert f"only running tells: {unknown}" in command(tmp_path / "model.onnx", "--device", "cpu")


def test_folded_nodes_and_views_are_listed(tmp_path: Path) -> None:
    text = """g (float[N, 4] x) => (float[M] y) {
      two = Constant <value = float {2}> ()  s = Mul (x, two)  flat = Constant <value = int64[1] {-1}> ()
      y = Reshape (s, flat) }"""
    facts = facts_of(text, tmp_path, graph=True)
    assert [name.split()[0] for name in facts["folded"]] == ["Constant", "Constant"]
    assert facts["no_step"] == ["Reshape 'y'"] and facts["steps"][0]["nodes"] == ["Mul 's'"]
    assert "Mul 's'" in facts["graph_before"] and "Map" in facts["graph_after"]
    shown = command(tmp_path / "model.onnx", "--device", "cpu", "--graph")
    assert "folded into constants or extents: Constant" in shown and "graph after passes" in shown


def test_gpus_are_counted_without_one() -> None:
    facts = json.loads(command(DIGITS, "--device", "cpu", "--arch", "sm_90", "--arch", "sm_80", "--json"))
    assert [row["arch"] for row in facts["gpu"]] == ["sm_90", "sm_80"]
    for row in facts["gpu"]:
        assert row["launches"] == sum(row["launched"].values()) > 5 and row["distinct_kernels"] > 0


def test_a_gpu_that_is_not_here_is_planned_for_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any, **__: Any) -> Any:
        raise DeviceError("no GPU can be used")

    monkeypatch.setattr("gpu_engine.tools.inspection.open_device", absent)
    facts = json.loads(command(DIGITS, "--device", "cuda", "--arch", "sm_90", "--precision", "fp16", "--json"))
    assert facts["device"] == "sm_90, which is not here" and facts["gpu"][0]["precision"] == "fp16"
    assert facts["kernels"]["softmax"] == 1 and facts["memory"]["arena_nbytes"] > 0
    with pytest.raises(DeviceError):
        inspect_model(DIGITS, "cuda", {}, (), "fp32", False)


@pytest.mark.parametrize("device", ["cpu", "interpret"])
def test_the_text_shows_everything(device: str) -> None:
    shown = command(DIGITS, "--device", device, "--top", "2")
    for words in ("images: float32[batch, 1, 8, 8]", "proven along batch", "ONNX nodes", "before passes",
                  "float32[batch, 8, 8, 32]" if device == "cpu" else "float32", "at batch=1", "weights, once for all",
                  "smaller ones", "Conv '/layer0/Conv'"):  # fmt: skip
        assert words in shown, words


def test_extents_are_checked() -> None:
    assert parse_extents(["N=3", "a=b=4"]) == {"N": 3, "a=b": 4}
    for text in ("N", "=3", "N=x", "N=-1"):
        with pytest.raises(ValueError, match="N=8"):
            parse_extents([text])
    with pytest.raises(InputError, match="no extent 'height'; it has batch"):
        inspect_model(DIGITS, "cpu", {"height": 3}, (), "fp32", False)


def test_a_configuration_says_the_device_and_the_precision(tmp_path: Path) -> None:
    (tmp_path / "model.toml").write_text('device = "cpu"\nprecision = "fp16"\n')
    facts = json.loads(command(DIGITS, "--config", tmp_path / "model.toml", "--arch", "sm_90", "--json"))
    assert "cpu" in facts["device"].lower() and facts["gpu"][0]["precision"] == "fp16"
    (tmp_path / "model.toml").write_text("speed = 11\n")
    with pytest.raises(ValueError, match="unknown option 'speed'"):
        CliRunner().invoke(
            app, ["inspect", str(DIGITS), "--config", str(tmp_path / "model.toml")], catch_exceptions=False
        )
