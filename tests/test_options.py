"""Options are checked once, with clear errors."""

from __future__ import annotations

from typing import Any

import pytest

from gpu_engine.options import AUTO, NUMA, PerformanceMode, validated


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
