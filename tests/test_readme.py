"""The README's code runs, and the commands it names exist."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gpu_engine
from gpu_engine.frontend.registry import REGISTRY
from gpu_engine.tools.demo import FOLDER

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line.strip()
]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds what the README's blocks call model.onnx and image.npy; operators go with the test."""
    monkeypatch.setitem(REGISTRY, ("com.example", "Gelu"), [])
    shutil.copy(FOLDER / "digits.onnx", tmp_path / "model.onnx")
    np.save(tmp_path / "image.npy", np.zeros((1, 1, 8, 8), np.float32))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", range(len(PYTHON_BLOCKS)))
def test_python_blocks_run(number: int, workplace: Path) -> None:
    del workplace
    exec(compile(PYTHON_BLOCKS[number], f"README.md, Python block {number}", "exec"), {"__name__": "__readme__"})


def test_every_option_and_error_is_in_a_table() -> None:
    words = set(re.findall(r"`(\w+)`", "\n".join(line for line in README.splitlines() if line.startswith("|"))))
    options = set(inspect.signature(gpu_engine.compile).parameters) - {"model"}
    assert options <= words
    assert {error.__name__ for error in gpu_engine.GpuEngineError.__subclasses__()} - {"ModelError"} <= words


def test_there_are_blocks_and_commands() -> None:
    assert len(PYTHON_BLOCKS) >= 2
    assert sum("&& python -m pytest" in command for command in COMMANDS) == 1
    assert sum("&& gpu-engine demo" in command for command in COMMANDS) == 1


@pytest.mark.parametrize(
    "command", [command for command in COMMANDS if re.match(r"python -m (tests|benchmarks)", command)]
)
def test_modules_in_commands_exist(command: str) -> None:
    module = command.split()[2]
    assert (ROOT / Path(*module.split("."))).with_suffix(".py").exists()


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("gpu-engine ")])
def test_the_command_line_knows_its_commands(command: str) -> None:
    name = command.split()[1]
    arguments = [sys.executable, "-m", "gpu_engine.tools", *([name] if name.startswith("-") else [name, "--help"])]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
