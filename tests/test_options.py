"""Options are checked once, with clear errors; device strings are read in every spelling."""

from __future__ import annotations

from typing import Any

import pytest

from gpu_engine.options import AUTO, NUMA, DeviceChoice, PerformanceMode, Scheduler, one_batch, parse_device, validated


@pytest.mark.parametrize("name", ["streams", "requests", "batch", "threads", "max_queue_size"])
def test_counts(name: str) -> None:
    assert getattr(validated(**{name: 3}), name) == 3  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=name):
        validated(**{name: True})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=name):
        validated(**{name: 1.5})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=name):
        validated(**{name: -3})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("streams", "expected"),
    [(None, None), (0, AUTO), (-1, AUTO), ("auto", AUTO), ("AUTO", AUTO), (-2, NUMA), ("NUMA", NUMA), (7, 7)],
)
def test_streams(streams: Any, expected: int | None) -> None:
    assert validated(streams=streams).streams == expected


def test_bad_streams() -> None:
    with pytest.raises(ValueError, match="'auto' or 'numa'"):
        validated(streams="many")
    with pytest.raises(TypeError, match="streams"):
        validated(streams=False)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_bad_timeouts(value: float) -> None:
    with pytest.raises(ValueError, match="batch_timeout_ms"):
        validated(batch_timeout_ms=value)


def test_other_numbers() -> None:
    assert validated(batch_timeout_ms=0.5).batch_timeout_ms == 0.5
    with pytest.raises(TypeError, match="batch_timeout_ms"):
        validated(batch_timeout_ms=True)
    with pytest.raises(TypeError, match="batch_timeout_ms"):
        validated(batch_timeout_ms="soon")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="memory_fraction"):
        validated(memory_fraction=0)
    with pytest.raises(TypeError, match="auto_batching"):
        validated(auto_batching=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("hint", ["latency", "LATENCY", "Latency", PerformanceMode.LATENCY])
def test_hints(hint: Any) -> None:
    assert validated(hint=hint).hint is PerformanceMode.LATENCY


def test_bad_hints() -> None:
    with pytest.raises(ValueError, match="did you mean 'throughput'"):
        validated(hint="throughputs")
    with pytest.raises(TypeError, match="hint"):
        validated(hint=2)  # type: ignore[arg-type]
    assert [mode.value for mode in PerformanceMode] == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "member"),
    [(text, Scheduler.single_stream) for text in ("sync", "single", "single_stream", "default", "", None, "SYNC")]
    + [(text, Scheduler.multi_stream) for text in ("async", "multi", "multi_stream")]
    + [("elastic", Scheduler.elastic), (Scheduler.elastic, Scheduler.elastic)],
)
def test_schedulers(text: Any, member: Scheduler) -> None:
    assert Scheduler.of(text) is member


def test_schedulers_equal_their_strings() -> None:
    assert Scheduler.default is Scheduler.single_stream
    assert Scheduler.multi_stream == "multi_stream" and "multi_stream" == Scheduler.multi_stream  # noqa: SIM300
    assert {"elastic": 1}[Scheduler.elastic] == 1 and "elastic" in {Scheduler.elastic}


def test_bad_schedulers() -> None:
    for text in ("e", "last", "x"):
        with pytest.raises(ValueError, match=f"unsupported Scheduler: {text}"):
            Scheduler.of(text)
    with pytest.raises(ValueError, match="unsupported type for scheduler: int"):
        Scheduler.of(3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cuda", DeviceChoice("cuda")),
        ("cuda:0", DeviceChoice("cuda")),
        ("GPU", DeviceChoice("cuda")),
        ("GPU.1", DeviceChoice("cuda", 1)),
        ("cpu", DeviceChoice("cpu")),
        ("AUTO", DeviceChoice("auto")),
        ("CPU(4)", DeviceChoice("cpu", 0, 4)),
        ("GPU(8)", DeviceChoice("cuda", 0, 8)),
        ("BATCH:GPU", DeviceChoice("cuda", batched=True)),
        ("BATCH:CPU(4)", DeviceChoice("cpu", 0, 4, True)),
    ],
)
def test_devices(text: str, expected: DeviceChoice) -> None:
    assert parse_device(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("CPU(0)", "Batch value for 'CPU' must be > 0"),
        ("GPU(-1)", "Batch value for 'GPU' must be > 0"),
        ("GPU(x)", "number in parentheses"),
        ("GPU(", "number in parentheses"),
        ("GPU(4x)", "number in parentheses"),
        ("cud", "did you mean 'cuda'"),
        ("", "unknown device"),
        ("npu", "devices are auto, cpu, cuda"),
    ],
)
def test_bad_devices(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_device(text)


def test_a_device_is_a_string() -> None:
    with pytest.raises(TypeError, match="device"):
        parse_device(0)  # type: ignore[arg-type]


def test_two_batches_collide() -> None:
    assert one_batch(parse_device("CPU(4)"), None) == 4 == one_batch(parse_device("CPU(4)"), 4)
    assert one_batch(parse_device("CPU"), 3) == 3
    with pytest.raises(ValueError, match="asks for batch 4 and batch= for 8"):
        one_batch(parse_device("CPU(4)"), 8)
