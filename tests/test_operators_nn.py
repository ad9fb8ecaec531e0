"""Neural-network operators against onnxruntime or NumPy, with extents given and open."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators.resize import scaled_extent
from gpu_engine.ir import dims
from gpu_engine.ir.ops import Conv, Map, Pool, Resize
from tests.reference import run_graph
from tests.test_operators_tensor import graph_of, model_of, onnxruntime_of, run

Array = NDArray[Any]
Inputs = Mapping[str, Array | None]


def numbers(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def agree(
    name: str,
    inputs: Inputs,
    opset: int = 21,
    outputs: int = 1,
    known: Sequence[str] = (),
    atol: float = 2e-5,
    **attributes: Any,
) -> None:
    """onnxruntime and the graph give the same, with the extents of the inputs given and open."""
    given = {key: array for key, array in inputs.items() if array is not None}
    expected = onnxruntime_of(model_of(name, inputs, attributes, opset, outputs), given)
    for form in ("known", "symbolic"):
        found = run(name, inputs, opset, outputs, known, form, **attributes)
        for actual, wanted in zip([found] if outputs == 1 else found, expected, strict=True):
            assert (actual.dtype, actual.shape) == (wanted.dtype, wanted.shape)
            np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=atol)


CONVOLUTIONS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"strides": [2, 1], "pads": [1, 0, 2, 1]}),
    (1, {"dilations": [2, 1], "strides": [1, 3]}),
    (1, {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    (1, {"auto_pad": "SAME_LOWER", "strides": [2, 3]}),
    (1, {"auto_pad": "VALID", "strides": [2, 2]}),
    (2, {"pads": [1, 1, 1, 1]}),
    (4, {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
]


@pytest.mark.parametrize(("group", "attributes"), CONVOLUTIONS)
def test_conv(group: int, attributes: dict[str, Any]) -> None:
    weights = numbers(8, 4 // group, 3, 2, seed=1)
    inputs = {"x": numbers(2, 4, 7, 9), "w": weights, "b": numbers(8, seed=2)}
    agree("Conv", inputs, known=("w", "b"), group=group, **attributes)


@pytest.mark.parametrize("spatial", [(9,), (4, 5, 6)])
def test_conv_over_other_ranks(spatial: tuple[int, ...]) -> None:
    weights = numbers(4, 3, *(2 for _ in spatial), seed=1)
    agree("Conv", {"x": numbers(1, 3, *spatial), "w": weights}, opset=11, known=("w",), pads=[1] * 2 * len(spatial))


@pytest.mark.parametrize(
    ("group", "attributes"),
    [
        (1, {}),
        (1, {"strides": [2, 3], "pads": [1, 0, 0, 1], "output_padding": [1, 2]}),
        (2, {"strides": [2, 2], "dilations": [2, 1]}),
        (1, {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
        (1, {"strides": [2, 2], "auto_pad": "SAME_LOWER"}),
        (1, {"strides": [2, 2], "output_shape": [9, 11]}),
        (1, {"strides": [3, 2], "output_shape": [16, 13], "auto_pad": "SAME_UPPER"}),
    ],
)
def test_conv_transpose(group: int, attributes: dict[str, Any]) -> None:
    weights = numbers(4, 6 // group, 3, 3, seed=1)
    inputs = {"x": numbers(2, 4, 5, 6), "w": weights, "b": numbers(6, seed=2)}
    agree("ConvTranspose", inputs, known=("w", "b"), group=group, **attributes)


POOLS: list[dict[str, Any]] = [
    {"kernel_shape": [3, 2]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    {"kernel_shape": [3, 3], "strides": [2, 3], "pads": [0, 1, 2, 0], "ceil_mode": 1},
    {"kernel_shape": [2, 2], "strides": [3, 3], "ceil_mode": 1},
    {"kernel_shape": [2, 3], "dilations": [2, 2], "pads": [1, 1, 0, 1]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
    {"kernel_shape": [3, 2], "strides": [2, 1], "auto_pad": "SAME_LOWER"},
]


@pytest.mark.parametrize("attributes", POOLS)
def test_pools(attributes: dict[str, Any]) -> None:
    x = {"x": numbers(2, 3, 8, 7)}
    agree("MaxPool", x, opset=12, **attributes)
    agree("MaxPool", x, opset=12, outputs=2, storage_order=1, **attributes)
    agree("LpPool", x, opset=18, p=3, **attributes)
    for counted in (0, 1):
        agree("AveragePool", x, opset=19, count_include_pad=counted, **attributes)


def test_max_pool_of_bytes_and_of_padding_alone() -> None:
    x = np.arange(-60, 60, dtype=np.int8).reshape(1, 2, 6, 10)
    agree("MaxPool", {"x": x}, opset=12, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    pooled = run("MaxPool", {"x": np.full((1, 1, 2, 2), np.nan, np.float32)}, kernel_shape=[2, 2])
    assert np.isnan(pooled).all()


def test_global_pools_keep_open_extents() -> None:
    for name in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"):
        agree(name, {"x": numbers(2, 3, 5, 4)})


def opened(model: onnx.ModelProto, shape: Sequence[int | str]) -> onnx.ModelProto:
    """The model with its first input declared with this shape."""
    kind = model.graph.input[0].type.tensor_type
    del model.graph.input[0].type.tensor_type.shape.dim[:]
    for extent in shape:
        kind.shape.dim.add(**{"dim_value" if isinstance(extent, int) else "dim_param": extent})  # type: ignore[arg-type]
    return model


def test_extents_of_same_padding_stay_exact() -> None:
    """Two ways to halve an image must give equal symbolic extents, or a residual sum could not be checked."""
    height, width = dims.symbol("h"), dims.symbol("w")
    weights = {"w": numbers(4, 4, 3, 3), "x": numbers(1, 4, 9, 9)}
    attributes = {"strides": [2, 2], "auto_pad": "SAME_UPPER"}
    model = model_of("Conv", {"x": weights["x"], "w": weights["w"]}, attributes, 21, 1, ("w",), ("x",))
    graph = graph_of(opened(model, ["n", 4, "h", "w"]))
    assert graph.outputs[0].shape[2:] == (dims.ceil_div(height, 2), dims.ceil_div(width, 2))
    attributes = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
    pooled = graph_of(opened(model_of("MaxPool", {"x": weights["x"]}, attributes, 21, 1), ["n", 4, "h", "w"]))
    assert pooled.outputs[0].shape[2] == dims.ceil_div(height, 2)
    assert isinstance(pooled.nodes[0].op, Pool)


def test_batch_normalization_of_constants_is_one_map() -> None:
    inputs = {"x": numbers(2, 3, 4, 5), **{name: abs(numbers(3, seed=i)) for i, name in enumerate("sbmv")}}
    agree("BatchNormalization", inputs, opset=15, known=tuple("sbmv"), epsilon=1e-3)
    graph = graph_of(model_of("BatchNormalization", inputs, {}, 15, 1, tuple("sbmv"), ("x",)))
    assert [type(node.op) for node in graph.nodes] == [Map]


def test_batch_normalization_in_training_and_by_element() -> None:
    inputs = {"x": numbers(4, 3, 5), **{name: abs(numbers(3, seed=i)) for i, name in enumerate("sbmv")}}
    y, mean, var = run("BatchNormalization", inputs, 15, 3, training_mode=1, momentum=0.7)
    axes, (s, b, m, v) = (0, 2), (inputs[name] for name in "sbmv")
    batch_mean, batch_var = inputs["x"].mean(axes), inputs["x"].var(axes)
    np.testing.assert_allclose(mean, 0.7 * m + 0.3 * batch_mean, rtol=1e-5)
    np.testing.assert_allclose(var, 0.7 * v + 0.3 * batch_var, rtol=1e-5)
    normal = (inputs["x"] - batch_mean[:, None]) / np.sqrt(batch_var + 1e-5)[:, None]
    np.testing.assert_allclose(y, normal * s[:, None] + b[:, None], rtol=1e-4, atol=1e-5)
    apart = {"x": numbers(2, 3, 5), **{name: abs(numbers(3, 5, seed=i)) for i, name in enumerate("sbmv")}}
    y = run("BatchNormalization", apart, 7, spatial=0)
    expected = (apart["x"] - apart["m"]) / np.sqrt(apart["v"] + 1e-5) * apart["s"] + apart["b"]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_normalizations() -> None:
    x, scale, bias = numbers(2, 4, 3, 5), numbers(4, seed=1), numbers(4, seed=2)
    agree("InstanceNormalization", {"x": x, "s": scale, "b": bias})
    agree("LRN", {"x": x}, size=3, alpha=0.2, beta=0.6, bias=2.0)
    agree("MeanVarianceNormalization", {"x": x}, axes=[0, 2, 3])
    for p, axis in ((1, 1), (2, -1)):
        agree("LpNormalization", {"x": x}, p=p, axis=axis)
    agree("LayerNormalization", {"x": x, "s": numbers(3, 5), "b": numbers(3, 5, seed=3)}, outputs=3, axis=2)
    agree("GroupNormalization", {"x": x, "s": scale, "b": bias}, known=("s", "b"), num_groups=2)
    grouped = run("GroupNormalization", {"x": x, "s": scale[:2], "b": bias[:2]}, 18, num_groups=2)
    parts = x.reshape(2, 2, -1)
    normal = (parts - parts.mean(2, keepdims=True)) / np.sqrt(parts.var(2, keepdims=True) + 1e-5)
    np.testing.assert_allclose(
        grouped, (normal * scale[:2, None] + bias[:2, None]).reshape(x.shape), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax", "Hardmax"])
def test_softmax_over_one_axis_and_over_all_behind_it(name: str) -> None:
    for opset, axis in itertools.product((11, 13), (0, 1, 2)):
        agree(name, {"x": numbers(3, 4, 5)}, opset=opset, axis=axis)


COORDINATES = ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_resize(mode: str, coordinates: str) -> None:
    x, attributes = numbers(1, 2, 4, 7), {"mode": mode, "coordinate_transformation_mode": coordinates}
    for i, scales in enumerate(([1, 1, 2, 3], [1, 1, 0.6, 1.5], [1, 1, 0.5, 1])):
        nearest = ("round_prefer_floor", "round_prefer_ceil", "floor")[i]
        inputs = {"x": x, "roi": None, "scales": np.array(scales, np.float32)}
        agree("Resize", inputs, known=("scales",), nearest_mode=nearest, **attributes)
    sizes = {"x": x, "roi": None, "scales": None, "sizes": np.array([1, 2, 3, 11])}
    agree("Resize", sizes, known=("sizes",), **attributes)
    agree("Resize", {**sizes, "sizes": np.array([9, 5])}, known=("sizes",), axes=[2, 3], **attributes)


@pytest.mark.parametrize("policy", ["not_larger", "not_smaller"])
def test_resize_that_keeps_the_aspect_ratio(policy: str) -> None:
    inputs = {"x": numbers(1, 2, 6, 8), "roi": None, "scales": None, "sizes": np.array([9, 9])}
    attributes = {"mode": "linear", "axes": [2, 3], "keep_aspect_ratio_policy": policy}
    agree("Resize", inputs, known=("sizes",), **attributes)


def test_resize_by_what_only_running_tells() -> None:
    x, scales = numbers(1, 1, 4, 6), np.array([1, 1, 2, 0.5], np.float32)
    agree("Resize", {"x": x, "roi": None, "scales": scales}, mode="linear")
    roi = np.array([0, 0, 0.2, 0.1, 1, 1, 0.7, 1.2], np.float32)
    inputs = {"x": x, "roi": roi, "scales": scales}
    attributes = {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 5.0}
    agree("Resize", inputs, known=("roi", "scales"), **attributes)
    agree("Resize", inputs, **attributes)
    agree("Upsample", {"x": x, "scales": np.array([1, 1, 2, 3], np.float32)}, opset=9, known=("scales",))


def test_scaled_extents_are_exact() -> None:
    h = dims.symbol("h")
    assert scaled_extent(h, 2.0) == 2 * h
    assert scaled_extent(h, float(np.float32(1 / 3))) == dims.floor_div(h, 3)
    assert scaled_extent(h, float(np.float32(0.6))) == dims.floor_div(3 * h, 5)
    assert scaled_extent(10, float(np.float32(0.7))) == 7
    inputs = {"x": numbers(1, 1, 2, 2), "roi": None, "scales": np.array([1, 1, 2, 0.5], np.float32)}
    graph = graph_of(opened(model_of("Resize", inputs, {}, 13, 1, ("scales",)), ["n", 1, "h", "w"]))
    assert isinstance(graph.nodes[0].op, Resize)
    assert graph.outputs[0].shape == (dims.symbol("n"), 1, 2 * h, dims.floor_div(dims.symbol("w"), 2))


RECURRENT: list[tuple[str, str, dict[str, Any]]] = [
    ("LSTM", "forward", {}),
    ("LSTM", "bidirectional", {"clip": 0.5, "input_forget": 1}),
    ("LSTM", "reverse", {"activations": ["HardSigmoid", "Elu", "Softsign"], "activation_alpha": [0.3, 0.7]}),
    ("GRU", "bidirectional", {"linear_before_reset": 1}),
    ("GRU", "reverse", {"activations": ["Sigmoid", "LeakyRelu"], "activation_alpha": [0.2]}),
    ("RNN", "bidirectional", {"activations": ["Affine", "Tanh"], "activation_alpha": [0.4], "activation_beta": [0.1]}),
]


@pytest.mark.parametrize(("kind", "direction", "attributes"), RECURRENT)
@pytest.mark.parametrize("full", [False, True])
def test_recurrent(kind: str, direction: str, attributes: dict[str, Any], full: bool) -> None:
    steps, rows, width, hidden = 5, 3, 4, 6
    gates, directions = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind], 2 if direction == "bidirectional" else 1
    inputs: dict[str, Array | None] = {
        "x": numbers(steps, rows, width),
        "w": numbers(directions, gates * hidden, width, seed=1),
        "r": numbers(directions, gates * hidden, hidden, seed=2),
    }
    if full:
        inputs["b"] = numbers(directions, 2 * gates * hidden, seed=3)
        inputs["lengths"] = np.array([5, 2, 3], np.int32)
        inputs["h"] = numbers(directions, rows, hidden, seed=4)
    if full and kind == "LSTM":
        inputs |= {"c": numbers(directions, rows, hidden, seed=5), "p": numbers(directions, 3 * hidden, seed=6)}
    outputs = 3 if kind == "LSTM" else 2
    fixed = {"hidden_size": hidden, "direction": direction, **attributes}
    agree(kind, inputs, opset=14, outputs=outputs, known=("w", "r", "b", "p"), **fixed)


def test_recurrent_with_rows_first() -> None:
    x, w, r = numbers(3, 5, 4), numbers(1, 24, 4, seed=1), numbers(1, 24, 6, seed=2)
    first = run("LSTM", {"x": x, "w": w, "r": r}, 14, 3, hidden_size=6, layout=1)
    second = run("LSTM", {"x": x.swapaxes(0, 1), "w": w, "r": r}, 14, 3, hidden_size=6)
    np.testing.assert_array_equal(first[0], second[0].transpose(2, 0, 1, 3))
    np.testing.assert_array_equal(first[2], second[2].swapaxes(0, 1))


def test_recurrent_of_no_steps_and_no_rows() -> None:
    w, r = numbers(1, 8, 3), numbers(1, 8, 2)
    y, h, c = run("LSTM", {"x": np.zeros((0, 2, 3), np.float32), "w": w, "r": r}, 14, 3, hidden_size=2)
    assert y.shape == (0, 1, 2, 2)
    assert not h.any() and not c.any()
    assert run("LSTM", {"x": np.zeros((4, 0, 3), np.float32), "w": w, "r": r}, 14, 3, hidden_size=2)[0].size == 0


@pytest.mark.parametrize("directions", [1, 2])
def test_dynamically_quantized_lstm(directions: int) -> None:
    """One thread, as onnxruntime quantises the rows of each thread on their own, and exact sums of products."""
    random, hidden, width = np.random.default_rng(0), 6, 7
    x = numbers(4, 3, width)
    weights: dict[str, Array] = {
        "w": random.integers(-128, 127, (directions, width, 4 * hidden)).astype(np.int8),
        "r": random.integers(-128, 127, (directions, hidden, 4 * hidden)).astype(np.int8),
        "b": numbers(directions, 8 * hidden, seed=1),
        "ws": np.full(directions, 0.01, np.float32),
        "wz": np.full(directions, 3, np.int8),
        "rs": np.full(directions, 0.02, np.float32),
        "rz": np.full(directions, -2, np.int8),
    }
    node = helper.make_node(
        "DynamicQuantizeLSTM",
        ["x", "w", "r", "b", "", "", "", "", "ws", "wz", "rs", "rz"],
        ["y", "h", "c"],
        domain="com.microsoft",
        hidden_size=hidden,
        direction="bidirectional" if directions == 2 else "forward",
    )
    port = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", "B", width])
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "yhc"]
    held = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "g", [port], results, held)
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = run_graph(graph_of(model), {"x": x})
    for name, wanted in zip("yhc", session.run(None, {"x": x}), strict=True):
        np.testing.assert_allclose(found[name], wanted, atol=1e-6)


def test_image_decoder() -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    encoded = np.frombuffer(stream.getvalue(), np.uint8)
    np.testing.assert_array_equal(run("ImageDecoder", {"x": encoded}), pixels)
    np.testing.assert_array_equal(run("ImageDecoder", {"x": encoded}, pixel_format="BGR"), pixels[:, :, ::-1])
    assert run("ImageDecoder", {"x": encoded[:20]}).shape == (0, 0, 3)
    assert run("ImageDecoder", {"x": encoded}, pixel_format="Grayscale").shape == (4, 4, 1)


@pytest.mark.parametrize(
    ("name", "inputs", "attributes"),
    [
        ("Conv", {"x": numbers(1, 3, 5, 5), "w": numbers(2, 3, 3, 3)}, {"kernel_shape": [2, 2]}),
        ("Conv", {"x": numbers(1, 3, 5, 5), "w": numbers(2, 3, 3, 3)}, {"auto_pad": "SAME"}),
        ("MaxPool", {"x": numbers(1, 3, 5, 5)}, {"kernel_shape": [2]}),
        ("MaxPool", {"x": numbers(1, 3, 5, 5)}, {"kernel_shape": [2, 2], "strides": [0, 1]}),
        ("LSTM", {"x": numbers(1, 1, 3), "w": numbers(1, 8, 3), "r": numbers(1, 8, 2)}, {"direction": "up"}),
        ("RNN", {"x": numbers(1, 1, 3), "w": numbers(1, 2, 3), "r": numbers(1, 2, 2)}, {"activations": ["Sin"]}),
        ("DepthToSpace", {"x": numbers(1, 3, 2, 2)}, {"blocksize": 2}),
        ("GroupNormalization", {"x": numbers(1, 3, 2), "s": numbers(3), "b": numbers(3)}, {"num_groups": 2}),
    ],
)
def test_what_cannot_be_is_refused(name: str, inputs: Inputs, attributes: dict[str, Any]) -> None:
    with pytest.raises(InvalidModel, match=name):
        run(name, inputs, **attributes)


def test_a_bias_is_a_map_behind_the_convolution() -> None:
    inputs = {"x": numbers(1, 3, 5, 5), "w": numbers(2, 3, 3, 3), "b": numbers(2)}
    graph = graph_of(model_of("Conv", inputs, {}, 21, 1, ("w", "b"), ("x",)))
    assert [type(node.op) for node in graph.nodes] == [Conv, Map]
