"""Section 3.11 of the specification: properties under OpenVINO's names, and 2.19's rules for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import gpu_engine
from cpu_fallback.device import CpuDevice
from gpu_engine import PerformanceMode
from gpu_engine.runtime.properties import ExecutionMode
from tests.recording_device import F32, MakeEngine, RecordingDevice, double, plan_of, rows, until
from tests.test_control import model_of

RW = """NUM_STREAMS PERFORMANCE_HINT PERFORMANCE_HINT_NUM_REQUESTS ALLOW_AUTO_BATCHING AUTO_BATCH_TIMEOUT
INFERENCE_NUM_THREADS COMPILATION_NUM_THREADS INFERENCE_PRECISION_HINT EXECUTION_MODE_HINT MODEL_PRIORITY PERF_COUNT
CACHE_DIR CACHE_MODE ENABLE_CPU_PINNING ENABLE_HYPER_THREADING SCHEDULING_CORE_TYPE ENABLE_MMAP LOG_LEVEL"""
RO = """SUPPORTED_PROPERTIES OPTIMAL_NUMBER_OF_INFER_REQUESTS RANGE_FOR_STREAMS RANGE_FOR_ASYNC_INFER_REQUESTS
OPTIMAL_BATCH_SIZE MAX_BATCH_SIZE NETWORK_NAME EXECUTION_DEVICES LOADED_FROM_CACHE FULL_DEVICE_NAME DEVICE_ARCHITECTURE
DEVICE_UUID OPTIMIZATION_CAPABILITIES"""
MODEL = model_of("doubling (float[N, 4] x) => (float[N, 4] y) { y = Add (x, x) }")


def compiled(**options: Any) -> Any:
    return gpu_engine.compile(MODEL, device="cpu", **options)


@pytest.fixture(scope="module")
def cpu_engine() -> Iterator[Any]:
    with compiled(streams=1, requests=8, warmup=False) as engine:
        yield engine


def test_3_11_every_name_can_be_read(cpu_engine: Any) -> None:
    supported = cpu_engine.get_property("SUPPORTED_PROPERTIES")
    assert set(supported) == {*RW.split(), *RO.split()}
    assert {name for name, kind in supported.items() if kind == "RW"} == {"AUTO_BATCH_TIMEOUT"}
    assert all(cpu_engine.get_property(name) is not None for name in supported)


def test_3_11_values_in_effect(cpu_engine: Any) -> None:
    device = CpuDevice()
    expected = {
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": PerformanceMode.THROUGHPUT,
        "PERFORMANCE_HINT_NUM_REQUESTS": 8,
        "ALLOW_AUTO_BATCHING": True,
        "AUTO_BATCH_TIMEOUT": 0,
        "COMPILATION_NUM_THREADS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "EXECUTION_MODE_HINT": ExecutionMode.ACCURACY,
        "MODEL_PRIORITY": "MEDIUM",
        "PERF_COUNT": False,
        "CACHE_DIR": "",
        "OPTIMAL_NUMBER_OF_INFER_REQUESTS": 8,
        "RANGE_FOR_STREAMS": (1, device.stream_limit),
        "RANGE_FOR_ASYNC_INFER_REQUESTS": (1, 2, 1),
        "OPTIMAL_BATCH_SIZE": 8,
        "NETWORK_NAME": "doubling",
        "EXECUTION_DEVICES": ("cpu",),
    }
    assert {name: cpu_engine.get_property(name) for name in expected} == expected
    assert cpu_engine.get_property("LOADED_FROM_CACHE") in (False, True), "another process may have compiled it before"
    assert cpu_engine.get_property("MAX_BATCH_SIZE") > 1000


def test_3_11_modes_are_numbered_as_openvino_does() -> None:
    assert [(mode.name, mode.value) for mode in PerformanceMode] == [
        ("LATENCY", 1),
        ("THROUGHPUT", 2),
        ("CUMULATIVE_THROUGHPUT", 3),
    ]
    assert [(mode.name, mode.value) for mode in ExecutionMode] == [("PERFORMANCE", 1), ("ACCURACY", 2)]


@pytest.mark.parametrize(
    ("options", "hint", "streams", "requests", "sharing", "spread"),
    [
        ({}, PerformanceMode.LATENCY, 1, 1, False, (1, 1, 1)),
        ({"hint": "latency", "requests": 16}, PerformanceMode.LATENCY, 1, 1, False, (1, 1, 1)),
        ({"hint": "latency", "streams": 3}, PerformanceMode.LATENCY, 3, 3, False, (1, 1, 1)),
        ({"streams": 1, "batch": 2}, PerformanceMode.THROUGHPUT, 1, 4, True, (1, 2, 1)),
        ({"hint": "throughput", "batch": 2}, PerformanceMode.THROUGHPUT, 2, 8, True, (1, 2, 1)),
        ({"hint": "Cumulative_Throughput", "batch": 1}, PerformanceMode.CUMULATIVE_THROUGHPUT, 2, 4, True, (1, 2, 1)),
    ],
)
def test_3_11_hints(
    recorder: RecordingDevice,
    make_engine: MakeEngine,
    options: Any,
    hint: Any,
    streams: int,
    requests: int,
    sharing: bool,
    spread: Any,
) -> None:
    engine = make_engine(recorder, **options)
    names = ("PERFORMANCE_HINT", "NUM_STREAMS", "OPTIMAL_NUMBER_OF_INFER_REQUESTS", "ALLOW_AUTO_BATCHING")
    assert [engine.get_property(name) for name in names] == [hint, streams, requests, sharing]
    assert engine.get_property("RANGE_FOR_ASYNC_INFER_REQUESTS") == spread


def test_3_11_optimal_requests_do_not_depend_on_requests(make_engine: MakeEngine) -> None:
    engine = make_engine(RecordingDevice(double), streams=2, requests=10)
    assert engine.get_property("PERFORMANCE_HINT_NUM_REQUESTS") == 10
    assert engine.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS") == engine.batch * 2 * 2 == 8


def test_3_11_batch_sizes_of_the_device(make_engine: MakeEngine) -> None:
    recorder = RecordingDevice(double, row_nbytes=1000, free_nbytes=25_000, batch_limit=24)
    engine = make_engine(recorder, streams=1, batch=2, memory_fraction=1)
    assert engine.get_property("MAX_BATCH_SIZE") == 25 and engine.get_property("OPTIMAL_BATCH_SIZE") == 16
    recorder.free_nbytes = 7_000
    assert engine.get_property("MAX_BATCH_SIZE") == 7 and engine.get_property("OPTIMAL_BATCH_SIZE") == 4
    dynamic = plan_of({"x": (F32, ("N", "w"))}, {"y": (F32, ("N", "w"))})
    assert make_engine(recorder, dynamic).get_property("MAX_BATCH_SIZE") == 1
    refused = make_engine(recorder, plan_of({"x": (F32, ("N", 4))}, {"y": (F32, ("N", 4))}, refused="it cannot"))
    assert refused.get_property("MAX_BATCH_SIZE") == refused.get_property("OPTIMAL_BATCH_SIZE") == 1


def test_3_11_unknown_names(cpu_engine: Any) -> None:
    for call in (
        lambda: cpu_engine.get_property("NUM_STREAM"),
        lambda: cpu_engine.set_property("NUM_STREAM", 1),
        lambda: compiled(properties={"NUM_STREAM": 1}),
    ):
        with pytest.raises(ValueError, match=r"^Unsupported config key: NUM_STREAM; did you mean 'NUM_STREAMS'\?$"):
            call()


def test_3_11_only_the_timeout_is_live(cpu_engine: Any) -> None:
    for name in (*RW.split(), *RO.split()):
        if name == "AUTO_BATCH_TIMEOUT":
            continue
        with pytest.raises(ValueError, match=r"^only AUTO_BATCH_TIMEOUT can be changed on a compiled engine"):
            cpu_engine.set_property(name, 1)
    for value in (-1, float("nan")):
        with pytest.raises(ValueError, match="AUTO_BATCH_TIMEOUT"):
            cpu_engine.set_property("AUTO_BATCH_TIMEOUT", value)
    with pytest.raises(ValueError, match="only AUTO_BATCH_TIMEOUT"):
        cpu_engine.set_property({"AUTO_BATCH_TIMEOUT": 7, "NUM_STREAMS": 2})
    assert cpu_engine.get_property("AUTO_BATCH_TIMEOUT") == 0, "all or nothing"


def test_3_11_the_timeout_of_a_live_engine(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    engine = make_engine(recorder, streams=1, batch=4)
    assert engine.run(rows(1))[0, 0] == 3 and engine.statistics().served_by_callers == 1
    engine.set_property("AUTO_BATCH_TIMEOUT", 60_000)
    assert engine.get_property("AUTO_BATCH_TIMEOUT") == 60_000
    future = engine.submit(rows(2))
    until(lambda: engine._pool._timekeeper is not None)
    assert not future.done()
    for wrong in ("soon", "-1", "nan", True):
        with pytest.raises((ValueError, TypeError), match="AUTO_BATCH_TIMEOUT"):
            engine.set_property("AUTO_BATCH_TIMEOUT", wrong)
    engine.set_property({"AUTO_BATCH_TIMEOUT": "0.5"})
    assert future.result(30)[0, 0] == 5 and engine.statistics().close_reasons["timeout"] == 1
    engine.set_property("AUTO_BATCH_TIMEOUT", 60_000)
    future = engine.submit(rows(3))
    until(lambda: engine._pool._timekeeper is not None)
    engine.set_property("AUTO_BATCH_TIMEOUT", 0)
    assert future.result(30)[0, 0] == 7
    assert engine.run(rows(1))[0, 0] == 3 and engine.statistics().served_by_callers == 2


def test_3_11_properties_of_compile() -> None:
    properties = {
        "NUM_STREAMS": "1",
        "PERFORMANCE_HINT": "Throughput",
        "PERFORMANCE_HINT_NUM_REQUESTS": 6,
        "ALLOW_AUTO_BATCHING": "YES",
        "AUTO_BATCH_TIMEOUT": "2.5",
        "INFERENCE_NUM_THREADS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "EXECUTION_MODE_HINT": "accuracy",
        "MODEL_PRIORITY": "MEDIUM",
        "PERF_COUNT": "NO",
        "ENABLE_MMAP": True,
        "CACHE_DIR": "",
    }
    with compiled(properties=properties) as engine:
        assert (engine.streams, engine.batch) == (1, 3)
        read = {name: engine.get_property(name) for name in properties}
        np.testing.assert_array_equal(engine.run_many(np.ones((5, 4), F32)), np.full((5, 4), 2, F32))
    assert (read["NUM_STREAMS"], read["PERFORMANCE_HINT_NUM_REQUESTS"], read["AUTO_BATCH_TIMEOUT"]) == (1, 6, 2.5)
    assert read["INFERENCE_NUM_THREADS"] == 1
    with compiled(properties={"NUM_STREAMS": "AUTO", "PERFORMANCE_HINT": PerformanceMode.LATENCY}) as engine:
        assert engine.streams == CpuDevice().auto_streams() and engine.batch == 1, "an explicit number beats the hint"


@pytest.mark.parametrize(
    ("options", "properties", "names"),
    [
        ({"streams": 2}, {"NUM_STREAMS": 1}, ("streams=2", "NUM_STREAMS=1")),
        ({"hint": "latency"}, {"PERFORMANCE_HINT": "THROUGHPUT"}, ("hint=LATENCY", "PERFORMANCE_HINT='THROUGHPUT'")),
        ({"requests": 4}, {"PERFORMANCE_HINT_NUM_REQUESTS": 5}, ("requests=4", "PERFORMANCE_HINT_NUM_REQUESTS=5")),
        ({"batch_timeout_ms": 1}, {"AUTO_BATCH_TIMEOUT": 2}, ("batch_timeout_ms=1.0", "AUTO_BATCH_TIMEOUT=2")),
        ({"auto_batching": True}, {"ALLOW_AUTO_BATCHING": False}, ("auto_batching=True", "ALLOW_AUTO_BATCHING=False")),
        ({"precision": "fp32"}, {"INFERENCE_PRECISION_HINT": "f16"}, ("precision='fp32'", "INFERENCE_PRECISION_HINT")),
    ],
)
def test_3_11_an_error_names_both_settings_that_collide(options: Any, properties: Any, names: Any) -> None:
    with pytest.raises(ValueError, match="collide: give one of them") as found:
        compiled(**options, properties=properties)
    assert all(name in str(found.value) for name in names)


def test_3_11_the_same_said_twice_is_no_collision() -> None:
    with compiled(
        streams=1, hint="throughput", properties={"NUM_STREAMS": 1, "PERFORMANCE_HINT": "THROUGHPUT"}
    ) as engine:
        assert engine.streams == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("COMPILATION_NUM_THREADS", 4),
        ("MODEL_PRIORITY", "HIGH"),
        ("PERF_COUNT", True),
        ("CACHE_DIR", "/tmp/somewhere"),
        ("CACHE_MODE", "OPTIMIZE_SPEED"),
        ("ENABLE_HYPER_THREADING", "YES"),
        ("SCHEDULING_CORE_TYPE", "PCORE_ONLY"),
        ("ENABLE_MMAP", False),
        ("LOG_LEVEL", "LOG_DEBUG"),
        ("INFERENCE_PRECISION_HINT", "f16"),
        ("EXECUTION_MODE_HINT", "PERFORMANCE"),
        ("EXECUTION_MODE_HINT", ExecutionMode.PERFORMANCE),
    ],
)
def test_3_11_what_would_have_no_effect_is_refused_with_the_reason(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=.* would have no effect on cpu"):
        compiled(properties={name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("OPTIMAL_BATCH_SIZE", 4, "can be read, but not set"),
        ("NUM_STREAMS", "many", "'auto' or 'numa'"),
        ("PERFORMANCE_HINT", "fast", "unsupported hint"),
        ("ALLOW_AUTO_BATCHING", "maybe", "True or False"),
        ("AUTO_BATCH_TIMEOUT", "soon", "milliseconds"),
        ("INFERENCE_PRECISION_HINT", "f64", "one of f32"),
        ("EXECUTION_MODE_HINT", "SPEED", "'PERFORMANCE' or 'ACCURACY'"),
        ("PERF_COUNT", "maybe", "True or False"),
    ],
)
def test_3_11_bad_values(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compiled(properties={name: value})


def test_3_11_a_gpu_takes_other_properties() -> None:
    for properties, precision in (
        ({"INFERENCE_PRECISION_HINT": "f16"}, "f16"),
        ({"EXECUTION_MODE_HINT": "PERFORMANCE"}, "tf32"),
        ({"EXECUTION_MODE_HINT": "PERFORMANCE", "INFERENCE_PRECISION_HINT": "f32"}, "f32"),
    ):
        with gpu_engine.compile(MODEL, device="interpret", properties=properties) as engine:
            assert engine.get_property("INFERENCE_PRECISION_HINT") == precision
            expected = ExecutionMode.ACCURACY if precision == "f32" else ExecutionMode.PERFORMANCE
            assert engine.get_property("EXECUTION_MODE_HINT") is expected
            assert engine.get_property("DEVICE_ARCHITECTURE") == "sm_90"
    with pytest.raises(ValueError, match="computes without threads"):
        gpu_engine.compile(MODEL, device="interpret", properties={"INFERENCE_NUM_THREADS": 2})


def test_3_11_loaded_from_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether every kernel was there already: on disk, or made by an earlier compilation of this process."""
    monkeypatch.setenv("GPU_ENGINE_CACHE", str(tmp_path))
    new = model_of("g (float[N, 5] x) => (float[N, 5] y) { t = Sin (x) u = Exp (t) y = Mul (u, x) }")
    for expected in (False, True):
        with gpu_engine.compile(new, device="cpu") as engine:
            assert engine.get_property("LOADED_FROM_CACHE") is expected
            assert engine.get_property("CACHE_DIR") == str(tmp_path)
