"""Settings that every test shares."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

from gpu_engine.options import validated
from gpu_engine.runtime.engine import Engine
from tests.recording_device import MakeEngine, RecordingDevice, double, plain

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")
os.environ["GPU_ENGINE_CACHE"] = "off"


def has_cuda_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if has_cuda_driver():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA driver on this machine"))


@pytest.fixture(params=["synchronous", "asynchronous"])
def recorder(request: pytest.FixtureRequest) -> RecordingDevice:
    """A recording device of each kind, whose model is `double`."""
    return RecordingDevice(double, asynchronous=request.param == "asynchronous")


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    """make_engine(device, plan=plain(), **options) -> an engine, closed after the test; not warmed up unless asked."""
    made: list[tuple[Engine, RecordingDevice]] = []

    def make(device: RecordingDevice, plan: Any = None, **options: Any) -> Engine:
        made.append((Engine(plan or plain(), device, validated(**{"warmup": False, **options})), device))
        return made[-1][0]

    yield make
    for engine, device in made:
        device.release()
        engine.close(timeout_s=30)
