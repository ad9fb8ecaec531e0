"""However requests are batched, each gets what it would get alone: the matrix of streams, requests and batches."""

from __future__ import annotations

import itertools
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest

from tests.equivalence import BATCHES, DTYPES, Case, differences, matrix, pairwise
from tests.recording_device import MakeEngine, RecordingDevice, double, plain, plan_of, rows


@pytest.mark.parametrize("timeout_ms", [0, 1])
@pytest.mark.parametrize("requests", [1, 3, 8, 9, 16, 64])
@pytest.mark.parametrize("streams", [1, 2])
def test_every_result_is_that_of_the_request_alone(
    recorder: RecordingDevice, make_engine: MakeEngine, streams: int, requests: int, timeout_ms: float
) -> None:
    for batch in BATCHES:
        engine = make_engine(recorder, plain(), streams=streams, batch=batch, batch_timeout_ms=timeout_ms)
        futures = [engine.submit(rows(i)) for i in range(requests)]
        for i, future in enumerate(futures):
            np.testing.assert_array_equal(future.result(30), double(rows(i))[0])
        counts = engine.statistics()
        assert counts.inference_count == requests and max(counts.batch_sizes) <= batch
        assert sum(counts.close_reasons.values()) == counts.execution_count
        engine.close()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
def test_every_dtype(recorder: RecordingDevice, make_engine: MakeEngine, dtype: str, shared: bool) -> None:
    """With `shared`, all requests are views of one array that is neither contiguous nor writable."""

    def model(x: Any) -> list[Any]:
        return [x[:, ::-1], np.concatenate([x, x], axis=1)]

    recorder.model = model
    plan = plan_of({"x": (dtype, ("N", "w"))}, {"y": (dtype, ("N", "w")), "z": (dtype, ("N", "2*w"))})
    engine = make_engine(recorder, plan, streams=2, batch=8)
    everything = np.arange(40 * 6).reshape(40, 6).astype(dtype)[:, ::2]
    everything.setflags(write=False)
    inputs = [everything[i : i + 1] if shared else everything[i : i + 1].copy() for i in range(40)]
    for x, (y, z) in zip(inputs, engine.map([x] for x in inputs), strict=True):
        assert y.dtype == z.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(y, x[:, ::-1])
        np.testing.assert_array_equal(z, np.concatenate([x, x], axis=1))


def test_strings(recorder: RecordingDevice, make_engine: MakeEngine) -> None:
    recorder.model = lambda x: [np.char.upper(x.astype(str)).astype(object)]
    plan = plan_of({"x": (object, ("N", 2))}, {"y": (object, ("N", 2))})
    engine = make_engine(recorder, plan, streams=1, batch=4)
    inputs = [np.array([[f"a{i}", "é" * i]], object) for i in range(10)]
    for x, y in zip(inputs, engine.map(inputs), strict=True):
        assert y.tolist() == [[text.upper() for text in x[0]]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_on_the_cpu(dtype: str) -> None:
    """A slice of the matrix that `python -m tests.equivalence` goes through, with copied and with shared inputs."""
    case = Case(
        streams=2, requests=9, batch=4, timeout_ms=0.0, interval_ms=0.0, shared=dtype in "f2f8i1u4", dtype=dtype
    )
    assert not differences([case], deterministic=False)


@pytest.mark.parametrize("requests", [3, 64])
@pytest.mark.parametrize("batch", [1, 16, 256])
def test_bits_on_the_cpu(requests: int, batch: int) -> None:
    case = Case(streams=2, requests=requests, batch=batch, timeout_ms=1.0, interval_ms=0.0, shared=True, dtype="f4")
    assert not differences([case], deterministic=True)


def test_the_whole_matrix_is_openvinos() -> None:
    assert len(matrix()) == 2 * 6 * 8 * 2 * 2 * 2 * 12


def test_in_few_points_every_two_values_of_two_axes_meet() -> None:
    def pairs(cases: list[Case]) -> set[Any]:
        return {pair for case in cases for pair in itertools.combinations(enumerate(astuple(case)), 2)}

    chosen = pairwise(matrix())
    assert pairs(chosen) == pairs(matrix()) and len(chosen) < 150
