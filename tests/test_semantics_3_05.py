"""Section 3.5 of the specification: device strings."""

from __future__ import annotations

import pytest

from gpu_engine.options import DeviceChoice, one_batch, parse_device


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
