"""The demo and the command line, in their own process as a person starts them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import gpu_engine
from benchmarks.wide_network import wide_network
from gpu_engine.tools.demo import FOLDER, load_digits, run_demo

ROOT = Path(__file__).parent.parent


def command(*arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`gpu-engine ...`: the installed script from elsewhere if there is one, else the module from the checkout."""
    script = Path(sys.executable).with_name("gpu-engine")
    start = [str(script)] if script.exists() else [sys.executable, "-m", "gpu_engine.tools"]
    place = folder if folder and script.exists() else ROOT
    return subprocess.run([*start, *map(str, arguments)], cwd=place, capture_output=True, text=True, timeout=120)


def test_the_embedded_network_is_small_and_good() -> None:
    digits = load_digits()
    assert digits.model.stat().st_size < 200_000
    assert digits.images.shape[1:] == (1, 8, 8) and digits.images.dtype == np.float32
    assert digits.images.min() >= 0 and digits.images.max() <= 1 and len(digits.images) >= 400
    with gpu_engine.compile(digits.model, device="cpu") as engine:
        guesses = engine.run(digits.images).argmax(1)
    assert (guesses == digits.labels).mean() >= 0.98


def test_both_passes_give_the_same_answers() -> None:
    told: dict[str, list[int]] = {}

    def start(title: str, items: int) -> object:
        told[title] = [items]
        return told[title].append

    report = run_demo("cpu", 2, 16, 0.2, start)  # type: ignore[arg-type]
    images = len(report.labels)
    for one in (report.single, report.batched):
        assert one.items % images == 0 and len(one.guesses) == one.items and one.seconds > 0
        assert (one.guesses.reshape(-1, images) == report.single.guesses[:images]).all()
    assert all(sum(rest) == items for items, *rest in told.values()) and len(told) == 3
    assert report.batch == 4 and report.right >= 0.98 * images
    callers = report.callers
    assert callers.count == 16 and min(callers.alone_per_s, callers.shared_per_s) > 0
    assert 1 < callers.mean_batch <= 8 and callers.difference < 1e-3


def test_the_wide_network_is_what_its_script_writes() -> None:
    assert (FOLDER / "wide.onnx").read_bytes() == wide_network().SerializeToString()
    with gpu_engine.compile(FOLDER / "wide.onnx", device="cpu") as engine:
        assert isinstance(engine, gpu_engine.Engine)
        assert engine.memory_plan().weights == 4 * 2048 * 2048 * 4 and len(engine.plan.steps) == 4
        found = engine.run(np.ones((2, 2048), np.float32))
    assert np.isfinite(found).all() and found.any() and (found[0] == found[1]).all()


def test_the_demo_prints_accuracy_and_both_throughputs(tmp_path: Path) -> None:
    result = command("demo", "--seconds", 0.05, "--device", "cpu", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    accuracy = re.search(r"accuracy +([\d.]+)% \((\d+) of (\d+) held-out images\)", result.stdout)
    assert accuracy and float(accuracy[1]) >= 98
    assert re.search(r"batch +4: .*requests", result.stdout)
    rates = [
        float(text.replace(",", "")) for text in re.findall(r"(?:by one|batched) +([\d,]+) items/s", result.stdout)
    ]
    assert len(rates) == 3 and min(rates) > 0
    assert "callers     16," in result.stdout and re.search(r"apart +[\d,]+ items/s", result.stdout)


def test_run_reads_and_writes_files(tmp_path: Path) -> None:
    digits = load_digits()
    np.save(tmp_path / "image.npy", digits.images[:3])
    result = command("run", digits.model, "-i", f"images={tmp_path / 'image.npy'}", "-o", tmp_path / "out.npz")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("probabilities: float32[3, 10]")
    assert (np.load(tmp_path / "out.npz")["probabilities"].argmax(1) == digits.labels[:3]).all()


def test_inspect_shows_ports_and_batching() -> None:
    result = command("inspect", FOLDER / "digits.onnx", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert "images: float32[batch, 1, 8, 8]" in result.stdout and "probabilities" in result.stdout
    assert "batching" in result.stdout


def unknown_operator(path: Path) -> Path:
    port = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Nonsense", ["x"], ["y"], domain="made.up")], "g", [port], [])
    graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [1]))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("made.up", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def test_errors_are_messages_with_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "random.onnx").write_bytes(bytes(range(256)))
    np.save(tmp_path / "wrong.npy", np.zeros((1, 2), np.float32))
    for arguments, word in (
        (("inspect", tmp_path / "absent.onnx"), "absent.onnx"),
        (("inspect", tmp_path / "random.onnx"), "InvalidModel"),
        (("run", unknown_operator(tmp_path / "unknown.onnx"), "-i", tmp_path / "wrong.npy"), "Nonsense"),
        (("run", FOLDER / "digits.onnx", "-i", tmp_path / "wrong.npy"), "InputError"),
        (("inspect", FOLDER / "digits.onnx", "--device", "toaster"), "toaster"),
    ):
        result = command(*arguments)
        assert result.returncode == 1 and result.stdout == "", (arguments, result)
        assert word in result.stderr.replace("\n", "") and "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [("run",), ("nonsense",), ("demo", "--streams", "0")])
def test_a_wrong_command_line_exits_with_2(arguments: tuple[str, ...]) -> None:
    assert command(*arguments).returncode == 2


def test_version() -> None:
    assert re.fullmatch(r"gpu-engine \d+\.\d+\.\d+\n", command("--version").stdout)
