"""Real models against ONNX Runtime, on inputs as their clients make them, over batches and shapes in a row.

`python -m pytest -m "models or not models" tests/test_models.py` runs them all; the default leaves out the large ones.
Requests share an execution where the file leaves axis 0 open; the onnx wheel's networks fix it at 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest

import gpu_engine
from benchmarks.fetch import OnnxData, Unavailable
from benchmarks.inputs import SENTENCES, Array, Feed, text_line, text_lines
from benchmarks.models import MODELS, RealModel

PARAMETERS = [
    pytest.param(model, id=model.name, marks=[pytest.mark.models] if model.large else []) for model in MODELS.values()
]


def fetched(model: RealModel) -> str:
    try:
        return str(model.path())
    except Unavailable as reason:
        pytest.skip(str(reason))


@cache
def reference(path: str) -> onnxruntime.InferenceSession:
    """ONNX Runtime with every optimisation off: the nearest to what the file says."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.fixture(autouse=True, scope="module")
def _forget_references() -> Iterator[None]:
    yield
    reference.cache_clear()


def assert_agrees(model: RealModel, path: str, feed: Feed, outputs: dict[str, Array]) -> None:
    session = reference(path)
    names = [port.name for port in session.get_outputs()]
    assert list(outputs) == names
    for name, expected in zip(names, session.run(names, feed), strict=True):
        assert outputs[name].dtype == expected.dtype and outputs[name].shape == expected.shape
        np.testing.assert_allclose(outputs[name], expected, model.tolerance.rtol, model.tolerance.atol, err_msg=name)


@pytest.mark.parametrize("model", PARAMETERS)
def test_shapes_in_a_row(model: RealModel) -> None:
    path = fetched(model)
    with gpu_engine.compile(path, device="cpu") as engine:
        for shape in model.shapes:
            feed = model.feed(*shape)
            assert_agrees(model, path, feed, engine.run(feed))


@pytest.mark.parametrize("model", PARAMETERS)
def test_three_requests_at_once(model: RealModel) -> None:
    path = fetched(model)
    three = model.feed(3, *model.shapes[0][1:])
    feeds = [{name: array[row : row + 1] for name, array in three.items()} for row in range(3)]
    with gpu_engine.compile(path, device="cpu", streams=1, batch=3, batch_timeout_ms=10_000) as engine:
        futures = [engine.submit(feed) for feed in feeds]
        for feed, future in zip(feeds, futures, strict=True):
            assert_agrees(model, path, feed, future.result())
        assert engine.statistics().batch_sizes == ({1: 3} if isinstance(model.source, OnnxData) else {3: 1})


def test_the_recognizer_reads() -> None:
    model = MODELS["ppocrv4_rec"]
    path = fetched(model)
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    alphabet = ["", *metadata["character"].splitlines(), " "]
    widest = max(text_line(sentence).shape[1] for sentence in SENTENCES)
    with gpu_engine.compile(path, device="cpu") as engine:
        outputs = engine.run({"x": text_lines(len(SENTENCES), 48, widest)})
    best = next(iter(outputs.values())).argmax(-1)
    kept = [row[np.diff(row, prepend=-1) != 0] for row in best]
    texts = ["".join(alphabet[index] for index in row if index).strip() for row in kept]
    assert texts == list(SENTENCES)
