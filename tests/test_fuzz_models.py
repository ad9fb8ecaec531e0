"""A share of the fuzz cases, and that the harness notices what must not happen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpu_engine
from tests import fuzz_models
from tests.fuzz_cases import FuzzCase, fuzz_case
from tests.fuzz_folder import CANARY, LOCATIONS, prepare
from tests.fuzz_models import SEED
from tests.fuzz_reference import Reference, disagreement
from tests.fuzz_worker import run_case, run_numbers
from tests.test_reader import external_model, small_model

ROOT = Path(__file__).parent.parent
FIRST, COUNT = 0, 300
"""Which cases run here: a stretch of them that takes little time."""


def test_models_that_nobody_vetted() -> None:
    outcomes = list(run_numbers(range(FIRST, FIRST + COUNT), SEED, jobs=2, limit_s=60))
    assert sorted(outcome.number for outcome in outcomes) == list(range(FIRST, FIRST + COUNT))
    assert not [outcome for outcome in outcomes if outcome.failure]
    kinds = {outcome.kind for outcome in outcomes}
    assert "runs as ONNX Runtime does" in kinds and "InvalidModel (compile)" in kinds


def test_cases_are_the_same_every_time() -> None:
    for number in range(20):
        first, again = fuzz_case(SEED, number), fuzz_case(SEED, number)
        assert (first.model, first.what, first.from_file) == (again.model, again.what, again.from_file)
    assert fuzz_case(SEED, 1).model != fuzz_case(SEED + 1, 1).model


def test_one_case_is_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "case.onnx"
    assert fuzz_models.main(["--case", "5", "--save", str(path)]) in (0, 1)
    assert fuzz_case(SEED, 5).what in capsys.readouterr().out
    assert path.read_bytes() == fuzz_case(SEED, 5).model


X = np.ones((2, 3), np.float32)


def plain(model: bytes | None = None) -> FuzzCase:
    return FuzzCase(0, "y = x + w", model or small_model().SerializeToString(), (X,), from_file=False)


class Stub:
    """An engine that gives what it is told to."""

    inputs, input_names = (), ()

    def __init__(self, output: Any) -> None:
        self._output = output

    def run(self, inputs: Any) -> dict[str, Any]:
        if isinstance(self._output, Exception):
            raise self._output
        return {"y": self._output}

    def __enter__(self) -> Stub:
        return self

    def __exit__(self, *_: object) -> None:
        return None


@pytest.mark.parametrize(
    ("output", "kind", "failure"),
    [
        (X, "runs, with nothing to compare", ""),
        (KeyError("gone"), "KeyError (run), untyped", "'gone' "),
        (MemoryError(), "MemoryError (run), untyped", " "),
        (gpu_engine.ExecutionError("no"), "ExecutionError (run)", ""),
        (np.float32([1, CANARY]), "leak", "an output holds what lies outside the folder"),
    ],
    ids=["fine", "untyped", "memory", "typed", "leak"],
)
def test_outcomes(output: Any, kind: str, failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_engine, "compile", lambda model, device: Stub(output))
    assert run_case(plain(), None)[:2] == (kind, failure)


def test_results_are_compared() -> None:
    reference, proto = Reference(), small_model()
    proto.ir_version = 9
    model = proto.SerializeToString()
    try:
        expected = reference.outputs(model, {"x": X})
        assert expected is not None
        np.testing.assert_array_equal(expected["y"], X + np.float32([0, 1, 2]))
        assert disagreement(model, expected, expected) == ""
        assert disagreement(model, {"y": expected["y"] + 1}, expected).startswith("outputs[0]: 6 of 6 differ")
        assert reference.outputs(model[:-9], {"x": X}) is None
        assert reference.outputs(model, {"x": X[:, :2]}) is None
    finally:
        reference.close()


WATCHED = """
import os, pathlib, sys
from tests.fuzz_folder import Watch, prepare
root = pathlib.Path(sys.argv[1])
folder, watch = prepare(root), Watch()
watch.folder = folder
parent = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
os.open("w.bin", os.O_RDONLY | os.O_NOFOLLOW, dir_fd=parent)
(folder / "sub" / "w.bin").read_bytes()
assert watch.found == [], watch.found
for path in (root / "secret.bin", folder / "link.bin", folder / ".." / "secret.bin", "/proc/self/environ"):
    open(path, "rb").close()
for name in ("link.bin", "../secret.bin"):
    os.open(name, os.O_RDONLY, dir_fd=parent)
assert len(watch.found) == 6, watch.found
"""


def test_the_watch_sees_what_leaves_the_folder(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", WATCHED, str(tmp_path)], cwd=ROOT, check=True)


@pytest.mark.parametrize("location", sorted({*LOCATIONS} - {"w.bin", "./w.bin", "sub/w.bin", "sub/./w.bin", "m.onnx"}))
def test_no_location_leads_outside(location: str, tmp_path: Path) -> None:
    """Every trap of the fuzzing folder by itself."""
    folder = prepare(tmp_path)
    (folder / "m.onnx").write_bytes(external_model(location).SerializeToString())
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises((gpu_engine.UnsafeModel, gpu_engine.InvalidModel)):
        gpu_engine.compile(folder / "m.onnx", device="cpu")
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("location", ["w.bin", "./w.bin", "sub/w.bin", "sub/./w.bin"])
def test_locations_inside_are_read(location: str, tmp_path: Path) -> None:
    folder = prepare(tmp_path)
    (folder / "m.onnx").write_bytes(external_model(location).SerializeToString())
    with gpu_engine.compile(folder / "m.onnx", device="cpu") as engine:
        y = engine.run({"x": X})["y"]
    np.testing.assert_array_equal(y, X + np.linspace(-1, 1, 4096, dtype=np.float32)[:3])
