"""Section 3.5 of the specification: device strings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gpu_engine
from gpu_engine.errors import DeviceError
from gpu_engine.options import DeviceChoice, one_batch, parse_device
from gpu_engine.runtime import late
from gpu_engine.runtime.engine import Engine
from tests.test_semantics_3_03 import product_model


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cuda", DeviceChoice("cuda")),
        ("cuda:0", DeviceChoice("cuda")),
        ("GPU", DeviceChoice("cuda")),
        ("GPU.1", DeviceChoice("cuda", 1)),
        ("cuda:all", DeviceChoice("cuda", every=True)),
        ("cuda:2,0", DeviceChoice("cuda", 2, others=(0,))),
        ("GPU.0,1(8)", DeviceChoice("cuda", 0, 8, others=(1,))),
        ("cpu", DeviceChoice("cpu")),
        ("AUTO", DeviceChoice("auto")),
        ("CPU(4)", DeviceChoice("cpu", 0, 4)),
        ("GPU(8)", DeviceChoice("cuda", 0, 8)),
        ("BATCH:GPU", DeviceChoice("cuda", batched=True)),
        ("BATCH:CPU(4)", DeviceChoice("cpu", 0, 4, True)),
    ],
)
def test_3_05_devices(text: str, expected: DeviceChoice) -> None:
    assert parse_device(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("CPU(0)", "Batch value for 'CPU' must be > 0"),
        ("GPU(-1)", "Batch value for 'GPU' must be > 0"),
        ("GPU(x)", "number in parentheses"),
        ("GPU(", "number in parentheses"),
        ("GPU(4x)", "number in parentheses"),
        ("cpu:all", "only cuda has several"),
        ("interpret:0,1", "only cuda has several"),
        ("cuda:1,0,1", "names a device twice"),
        ("cuda:0,", "unknown device"),
        ("cuda:every", "unknown device"),
        ("cud", "did you mean 'cuda'"),
        ("", "unknown device"),
        ("npu", "devices are auto, cpu, cuda"),
    ],
)
def test_3_05_bad_devices(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_device(text)


def test_3_05_a_device_is_a_string() -> None:
    with pytest.raises(TypeError, match="device"):
        parse_device(0)  # type: ignore[arg-type]


def test_3_05_two_batches_collide() -> None:
    assert one_batch(parse_device("CPU(4)"), None) == 4 == one_batch(parse_device("CPU(4)"), 4)
    assert one_batch(parse_device("CPU"), 3) == 3
    with pytest.raises(ValueError, match="asks for batch 4 and batch= for 8"):
        one_batch(parse_device("CPU(4)"), 8)


def compiled(**options: Any) -> Engine:
    engine = gpu_engine.compile(product_model(), warmup=False, **options)
    assert isinstance(engine, Engine)
    return engine


@pytest.mark.parametrize(
    ("device", "batch", "factor", "shares"),
    [
        ("CPU", 1, "user", False),
        ("CPU(4)", 4, "user", True),
        ("cpu:0(4)", 4, "user", True),
        ("BATCH:CPU", 8, "device", True),
        ("batch:cpu(16)", 16, "user", True),
    ],
)
def test_3_05_a_device_string_decides_the_batch(device: str, batch: int, factor: str, shares: bool) -> None:
    with compiled(device=device) as engine:
        plan = engine.explain_batching()
        assert (plan.batch, plan.limiting_factor) == (batch, factor)
        assert engine.get_property("ALLOW_AUTO_BATCHING") is shares
        assert engine.run(np.zeros((2, 3, 40), np.float32)).shape == (2, 3, 40)


def test_3_05_cuda_is_strict_and_auto_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(late.DEVICES, "cuda", "gpu_engine.no_such_room:CudaDevice")
    for device in ("cuda", "GPU.1", "BATCH:GPU(4)"):
        with pytest.raises(DeviceError, match=r"cuda is not usable: No module named"):
            compiled(device=device)
    for device, options in (("auto", {}), ("cuda", {"fallback": "cpu"}), ("BATCH:GPU(4)", {"fallback": "cpu"})):
        caplog.clear()
        with caplog.at_level("INFO"), compiled(device=device, **options) as engine:
            assert engine.device.startswith("cpu (") and "cuda is not usable" in engine.device
            assert engine.batch == (4 if "(4)" in device else 1)
        assert "running on cpu" in caplog.text and "cuda is not usable" in caplog.text
