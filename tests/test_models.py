"""Real models against ONNX Runtime, on inputs as their clients make them, over batches and shapes in a row.

`python -m pytest -m "models or not models" tests/test_models.py` runs them all; the default leaves out the large ones.
Requests share an execution where the catalogue says so: not where If, Loop or quantised recurrence meets their data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import gpu_engine
from benchmarks.fetch import Unavailable
from benchmarks.inputs import SENTENCES, Array, Feed, text_line, text_lines
from benchmarks.models import MODELS
from benchmarks.real_model import RealModel

PARAMETERS = [
    pytest.param(model, id=model.name, marks=[pytest.mark.models] if model.large else []) for model in MODELS.values()
]


def fetched(model: RealModel) -> str:
    try:
        return str(model.path())
    except Unavailable as reason:
        pytest.skip(str(reason))


def session_of(model: str | bytes) -> onnxruntime.InferenceSession:
    """ONNX Runtime with int8 products that do not saturate, and as near to the file as that allows: exact products are
    the work of one of its extended optimisations, so only networks without products of integers go without any."""
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_EXTENDED if has_products(model) else levels.ORT_DISABLE_ALL
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def has_products(model: str | bytes) -> bool:
    """Whether integers are multiplied as such."""
    read = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model, load_external_data=False)
    return any(node.op_type in ("MatMulInteger", "DynamicQuantizeLSTM") for node in read.graph.node)


@cache
def reference(path: str) -> onnxruntime.InferenceSession:
    return session_of(path)


@pytest.fixture(autouse=True, scope="module")
def _forget_references() -> Iterator[None]:
    yield
    reference.cache_clear()


def assert_agrees(model: RealModel, path: str, feed: Feed, outputs: dict[str, Any]) -> None:
    session = reference(path)
    names = [port.name for port in session.get_outputs()]
    assert list(outputs) == names
    for name, expected in zip(names, session.run(names, feed), strict=True):
        if isinstance(expected, list):
            assert_maps_agree(model, outputs[name], expected)
        else:
            assert_arrays_agree(model, name, outputs[name], expected)


def assert_maps_agree(model: RealModel, outputs: Any, expected: list[dict[int, float]]) -> None:
    assert [list(output) for output in outputs] == [list(row) for row in expected]
    for output, row in zip(outputs, expected, strict=True):
        for key, value in row.items():
            np.testing.assert_allclose(output[key], value, model.tolerance.rtol, model.tolerance.atol, err_msg=str(key))


def assert_arrays_agree(model: RealModel, name: str, output: Array, expected: Array) -> None:
    assert output.dtype == expected.dtype and output.shape == expected.shape
    np.testing.assert_allclose(output, expected, model.tolerance.rtol, model.tolerance.atol, err_msg=name)
    assert model.tolerance.mean == math.inf or np.abs(output - expected).mean() <= model.tolerance.mean


def one_row(model: RealModel, feed: Feed, row: int) -> Feed:
    axes = {name: model.row_axes.get(name, 0) for name in feed}
    return {
        name: array if (axis := axes[name]) is None else np.take(array, [row], axis) for name, array in feed.items()
    }


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
    feeds = [one_row(model, three, row) for row in range(3)]
    with gpu_engine.compile(path, device="cpu", streams=1, batch=3, batch_timeout_ms=10_000) as engine:
        futures = [engine.submit(feed) for feed in feeds]
        for feed, future in zip(feeds, futures, strict=True):
            assert_agrees(model, path, feed, future.result())
        assert engine.statistics().batch_sizes == ({3: 1} if model.one_batch else {1: 3})


@pytest.mark.parametrize("model", [parameter for parameter in PARAMETERS if parameter.values[0].state])
def test_state_follows_over_five_calls(model: RealModel) -> None:
    """Each engine is fed the state that it returned; the last must differ from what a fresh state gives."""
    path = fetched(model)
    session = reference(path)
    names = [port.name for port in session.get_outputs()]
    with gpu_engine.compile(path, device="cpu") as engine:
        for shape in model.shapes[:3:2]:
            ours, theirs = model.feed(*shape, 0), model.feed(*shape, 0)
            for call in range(5):
                outputs = engine.run(ours)
                expected = dict(zip(names, session.run(names, theirs), strict=True))
                for name in names:
                    assert_arrays_agree(model, f"{name}, call {call}", outputs[name], expected[name])
                fresh = model.feed(*shape, call + 1)
                ours = fresh | {given: outputs[name] for name, given in model.state.items()}
                theirs = fresh | {given: expected[name] for name, given in model.state.items()}
            followed, forgetful = engine.run(ours), engine.run(fresh)
            assert any(np.abs(followed[name] - forgetful[name]).max() > 1e-3 for name in names)


@pytest.mark.models
def test_the_roundings_of_a_quantized_block() -> None:
    """Up to the first attention block's end, each given what was rounded before: one that falls the other way moves
    everything behind it."""
    model = MODELS["smart_turn_v3_2_int8"]
    proto = onnx.load(fetched(model))
    rounding = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"][:18]
    rounded = [node.output[0] for node in rounding]
    del proto.graph.output[:]
    for name in rounded:
        proto.graph.output.add(name=name).type.tensor_type.elem_type = onnx.TensorProto.UINT8
    feed = model.feed(1)
    expected = dict(zip(rounded, session_of(proto.SerializeToString()).run(rounded, feed), strict=True))
    del proto.graph.output[:]
    for node, name in zip(rounding, rounded, strict=True):
        node.output[0] = f"{name} of what was before"
        proto.graph.output.add(name=node.output[0]).type.tensor_type.elem_type = onnx.TensorProto.UINT8
        shape = expected[name].shape
        proto.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, shape))
    with gpu_engine.compile(proto, device="cpu") as engine:
        outputs = engine.run({**feed, **expected})
    for node, name in zip(rounding, rounded, strict=True):
        steps = np.abs(outputs[node.output[0]].astype(int) - expected[name])
        assert steps.max() <= 1 and (steps > 0).mean() <= 1e-4, name


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


SAME_BITS = ("oww_embedding", "minilm_l6_int8", "magika_v3_3", "ppocrv4_rec", "mobilenetv2", "vit_tiny", "resnet18_qdq")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.models] if i else []) for i, name in enumerate(SAME_BITS)]
)
def test_bits_of_a_row_do_not_depend_on_its_batch(name: str) -> None:
    """With `deterministic`, in every run of neighbours among seven rows, in both orders."""
    model = MODELS[name]
    path, shape = fetched(model), model.shapes[0]
    rows = [{key: np.roll(array, i, axis=-1) for key, array in model.feed(*shape).items()} for i in range(7)]
    options: dict[str, Any] = {"device": "cpu", "streams": 1, "batch": 8, "deterministic": True, "warmup": False}
    with gpu_engine.compile(path, **options) as engine:
        alone = [engine.run(row) for row in rows]
        for count in range(2, 8):
            for first in range(8 - count):
                for chosen in (range(first, first + count), range(first + count - 1, first - 1, -1)):
                    together = engine.run({key: np.concatenate([rows[i][key] for i in chosen]) for key in rows[0]})
                    for key, found in together.items():
                        expected = np.concatenate([alone[i][key] for i in chosen])
                        assert found.tobytes() == expected.tobytes(), f"{key} of rows {list(chosen)}"
