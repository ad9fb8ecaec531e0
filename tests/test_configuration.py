"""compile(config=...): what a file says, what a call says, and what neither may say."""

from __future__ import annotations

from pathlib import Path

import pytest

import gpu_engine
from gpu_engine.configuration import completed, read_configuration
from gpu_engine.tools.demo import FOLDER
from gpu_engine.tools.tune import configuration_text
from tests.tuning import tuned

MODEL = FOLDER / "digits.onnx"


def write(folder: Path, text: str) -> Path:
    path = folder / "engine.toml"
    path.write_text(text)
    return path


def test_a_file_gives_options(tmp_path: Path) -> None:
    path = write(tmp_path, 'device = "cpu"\nstreams = 1\nbatch = 3 # rows\n')
    with gpu_engine.compile(MODEL, config=path) as engine:
        assert (engine.device.split()[0], engine.streams, engine.batch) == ("cpu", 1, 3)
    with gpu_engine.compile(MODEL, config={"batch": 5, "device": "cpu"}) as engine:
        assert engine.batch == 5


def test_the_call_has_the_last_word(tmp_path: Path) -> None:
    path = write(tmp_path, 'device = "cpu"\nbatch = 3\n')
    with gpu_engine.compile(MODEL, config=path, batch=2) as engine:
        assert engine.batch == 2


def test_an_unknown_option_is_named_with_the_one_that_was_meant(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown option 'stream'; did you mean 'streams'"):
        gpu_engine.compile(MODEL, config=write(tmp_path, "stream = 2\n"))


@pytest.mark.parametrize(("text", "message"), [("streams = \n", "is no TOML"), ("[streams]\na = 1\n", "one value")])
def test_a_file_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gpu_engine.compile(MODEL, config=write(tmp_path, text))


def test_values_are_checked_as_in_a_call(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch must not be negative"):
        gpu_engine.compile(MODEL, config=write(tmp_path, "batch = -1\n"))
    with pytest.raises(TypeError, match="batch must be an integer"):
        gpu_engine.compile(MODEL, config=write(tmp_path, "batch = true\n"))


def test_only_what_the_call_leaves_at_its_default_comes_from_the_file() -> None:
    defaults = {"device": "auto", "streams": None}
    assert completed({"device": "auto", "streams": 1}, defaults, {"device": "cpu", "streams": 9}) == {
        "device": "cpu",
        "streams": 1,
    }


def test_what_tune_writes_is_what_compile_reads(tmp_path: Path) -> None:
    found = tuned()
    path = write(tmp_path, configuration_text(found))
    assert read_configuration(path) == found.options
    assert path.read_text().startswith("# Written by `gpu-engine tune` for a_model.onnx")
    with pytest.warns(RuntimeWarning, match="capping"):
        engine = gpu_engine.compile(MODEL, config={**read_configuration(path), "streams": 1000})
    with engine:
        assert engine.batch == found.found.chosen.point.batch
