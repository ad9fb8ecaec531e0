"""What `import gpu_engine` gives, costs and leaves out."""

from __future__ import annotations

import subprocess
import sys

import gpu_engine
from gpu_engine import errors

IMPORT_LIMIT_S = 0.4
LEFT_OUT = ("torch", "triton", "cupy", "typer", "rich", "onnxruntime", "openvino")


def measured(statement: str) -> str:
    """What a fresh interpreter prints after `statement`."""
    return subprocess.run([sys.executable, "-c", statement], check=True, capture_output=True, text=True).stdout


def test_names() -> None:
    tree = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert {"compile", "Engine", "Scheduler"} | tree <= set(gpu_engine.__all__)
    assert all(hasattr(gpu_engine, name) for name in gpu_engine.__all__)


def test_every_error_is_in_the_tree() -> None:
    found = [value for value in vars(errors).values() if isinstance(value, type)]
    assert all(issubclass(error, errors.GpuEngineError) for error in found)
    assert issubclass(errors.InputError, ValueError)
    assert issubclass(errors.OutOfMemory, MemoryError)
    assert issubclass(errors.RequestTimeout, TimeoutError)
    drawn = errors.__doc__ or ""
    assert all(error.__name__ in drawn for error in found)


def test_import_is_quick() -> None:
    statement = "import time; t = time.process_time(); import gpu_engine; print(time.process_time() - t)"
    assert min(float(measured(statement)) for _ in range(3)) < IMPORT_LIMIT_S


def test_import_leaves_heavy_packages_out() -> None:
    statement = f"import sys, gpu_engine; print([name for name in {LEFT_OUT} if name in sys.modules])"
    assert measured(statement).strip() == "[]"
