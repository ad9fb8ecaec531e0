"""Attention in all its forms, losses, random numbers and optimizer steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from gpu_engine.errors import InvalidModel
from gpu_engine.ir.ops import Iota, Map, MatMul, Softmax
from tests.reference import run_graph
from tests.test_operators_nn import agree, numbers
from tests.test_operators_tensor import graph_of, model_of, run

Array = NDArray[Any]


@pytest.mark.parametrize(
    "attributes",
    [{}, {"scale": 0.3}, {"softcap": 2.0}, {"is_causal": 1}, {"is_causal": 1, "softcap": 3.0, "scale": 0.2}],
)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_attention(attributes: dict[str, Any], groups: int, packed: bool) -> None:
    q, k, v = numbers(2, 4, 5, 8), numbers(2, groups, 5, 8, seed=1), numbers(2, groups, 5, 6, seed=2)
    fixed = dict(attributes)
    if packed:
        q, k, v = (np.ascontiguousarray(x.swapaxes(1, 2)).reshape(2, 5, -1) for x in (q, k, v))
        fixed |= {"q_num_heads": 4, "kv_num_heads": groups}
    agree("Attention", {"q": q, "k": k, "v": v}, opset=23, **fixed)


@pytest.mark.parametrize("mask", ["float", "bool", "heads"])
@pytest.mark.parametrize("mode", [0, 1, 3])
def test_attention_with_a_cache_and_a_mask(mask: str, mode: int) -> None:
    q, k, v = numbers(2, 2, 3, 4), numbers(2, 2, 3, 4, seed=1), numbers(2, 2, 3, 4, seed=2)
    masks = {"float": numbers(3, 5), "bool": numbers(3, 5) < 1, "heads": numbers(2, 2, 3, 5) < 1}
    past = {"pk": numbers(2, 2, 2, 4, seed=3), "pv": numbers(2, 2, 2, 4, seed=4)}
    inputs = {"q": q, "k": k, "v": v, "m": masks[mask], **past}
    agree("Attention", inputs, opset=23, outputs=4, softcap=2.0, qk_matmul_output_mode=mode)


def expected_attention(q: Array, k: Array, v: Array, allowed: Array) -> Array:
    scores = np.where(allowed, q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]), -np.inf)
    most = np.where(allowed.any(-1, keepdims=True), scores.max(-1, keepdims=True), 0)
    weights = np.exp(scores - most)
    return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30) @ v  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", ["static", "symbolic"])
def test_a_row_that_sees_nothing_is_zero(form: str) -> None:
    q, k, v = numbers(1, 1, 3, 4), numbers(1, 1, 5, 4, seed=1), numbers(1, 1, 5, 4, seed=2)
    mask = np.array([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]], bool)
    found = run("Attention", {"q": q, "k": k, "v": v, "m": mask}, 24, form=form)
    np.testing.assert_allclose(found, expected_attention(q, k, v, mask), atol=1e-5)
    assert not found[0, 0, 1].any()


@pytest.mark.parametrize("form", ["static", "symbolic"])
def test_windows_and_valid_keys(form: str) -> None:
    q, k, v = numbers(2, 1, 2, 4), numbers(2, 1, 6, 4, seed=1), numbers(2, 1, 6, 4, seed=2)
    lengths = np.array([3, 6])
    position = np.arange(2) + lengths[:, None, None, None] - 2
    keys = np.arange(6)
    position = position.swapaxes(-1, -2)
    inside = (keys <= position) & (keys >= position - 1) & (keys < lengths[:, None, None, None])
    inputs = {"q": q, "k": k, "v": v, "m": None, "pk": None, "pv": None, "n": lengths}
    found = run("Attention", inputs, 25, form=form, is_causal=1, left_window_size=1)
    np.testing.assert_allclose(found, expected_attention(q, k, v, inside), atol=1e-5)


def test_attention_is_two_products_around_a_softmax() -> None:
    q, k, v = numbers(1, 2, 3, 4), numbers(1, 2, 3, 4), numbers(1, 2, 3, 4)
    graph = graph_of(model_of("Attention", {"q": q, "k": k, "v": v}, {"is_causal": 1}, 23, 1))
    kinds = [type(node.op) for node in graph.nodes if not isinstance(node.op, Map | Iota)]
    assert kinds == [MatMul, Softmax, MatMul]


def modifier(operation: str, value: float) -> onnx.GraphProto:
    """A graph attribute that applies `operation` with a constant."""
    port = helper.make_tensor_value_info("s", TensorProto.FLOAT, [None] * 4)
    result = helper.make_tensor_value_info("t", TensorProto.FLOAT, [None] * 4)
    constant = onnx.numpy_helper.from_array(np.array(value, np.float32), "c")
    node = helper.make_node(operation, ["s", "c"], ["t"])
    return helper.make_graph([node], "modifier", [port], [result], [constant])


def test_flex_attention_runs_its_modifiers() -> None:
    q, k, v = numbers(1, 4, 3, 4), numbers(1, 2, 5, 4, seed=1), numbers(1, 2, 5, 4, seed=2)
    attributes = {"score_mod": modifier("Mul", 0.5), "prob_mod": modifier("Add", 1.0)}
    inputs = {"q": q, "k": k, "v": v}
    model = model_of("ai.onnx.preview::FlexAttention", inputs, attributes, 1, 1)
    wide = [np.repeat(x, 2, axis=1) for x in (k, v)]
    everything = np.ones((3, 5), bool)
    plain = expected_attention(q * 0.5, wide[0], wide[1], everything)
    expected = plain + wide[1].sum(axis=2, keepdims=True)
    np.testing.assert_allclose(run_graph(graph_of(model), inputs)["y0"], expected, atol=1e-5)


@pytest.mark.parametrize("form", ["static", "known"])
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_a_causal_convolution_continues_where_it_stopped(form: str, activation: str) -> None:
    x, w, bias = numbers(2, 3, 9), numbers(3, 1, 4, seed=1), numbers(3, seed=2)
    inputs = {"x": x, "w": w, "b": bias}
    whole, state = run("CausalConvWithState", inputs, 27, 2, form=form, activation=activation)
    first, carried = run("CausalConvWithState", {**inputs, "x": x[:, :, :2]}, 27, 2, activation=activation)
    rest = {**inputs, "x": x[:, :, 2:], "s": carried}
    second, last = run("CausalConvWithState", rest, 27, 2, activation=activation)
    np.testing.assert_allclose(np.concatenate([first, second], axis=2), whole, atol=1e-6)
    np.testing.assert_array_equal(last, state)


def test_linear_attention_by_its_body() -> None:
    q, k, v = numbers(1, 4, 6), numbers(1, 4, 6, seed=1), numbers(1, 4, 6, seed=2)
    attributes = {"q_num_heads": 2, "kv_num_heads": 2, "update_rule": "linear", "scale": 1.0}
    found, state = run("LinearAttention", {"q": q, "k": k, "v": v}, 27, 2, **attributes)
    heads = [x.reshape(1, 4, 2, 3).transpose(0, 2, 1, 3) for x in (q, k, v)]
    causal = np.tril(heads[0] @ heads[1].swapaxes(-1, -2)) @ heads[2]
    np.testing.assert_allclose(found, causal.transpose(0, 2, 1, 3).reshape(1, 4, 6), atol=1e-5)
    np.testing.assert_allclose(state, heads[1].swapaxes(-1, -2) @ heads[2], atol=1e-5)


def test_random_numbers() -> None:
    normal = run("RandomNormal", {}, form="static", shape=[40, 50], mean=2.0, scale=0.5, seed=3.0)
    again = run("RandomNormal", {}, form="static", shape=[40, 50], mean=2.0, scale=0.5, seed=3.0)
    np.testing.assert_array_equal(normal, again)
    assert abs(normal.mean() - 2) < 0.05 and abs(normal.std() - 0.5) < 0.05
    free = [run("RandomUniform", {}, form="static", shape=[100], low=-3.0, high=-1.0) for _ in range(2)]
    assert (free[0] != free[1]).any() and free[0].min() >= -3 and free[0].max() <= -1
    like = run("RandomUniformLike", {"x": numbers(3, 4)}, form="symbolic", dtype=TensorProto.DOUBLE)
    assert (like.shape, like.dtype) == ((3, 4), np.float64)
    coins = run("Bernoulli", {"x": np.full((2000,), 0.25, np.float32)}, seed=1.0, dtype=TensorProto.BOOL)
    assert coins.dtype == bool and 0.2 < coins.mean() < 0.3
    weights = np.log(np.array([[0.7, 0.3, 0], [0, 0.5, 0.5]]) + 1e-30).astype(np.float32)
    drawn = run("Multinomial", {"x": weights}, sample_size=1000, seed=2.0)
    assert (drawn[0] != 2).all() and (drawn[1] != 0).all() and 0.6 < (drawn[0] == 0).mean() < 0.8


def test_dropout() -> None:
    x = np.ones((100, 50), np.float32)
    y, mask = run("Dropout", {"x": x}, outputs=2, form="symbolic")
    assert mask.dtype == bool and mask.all() and (y == x).all()
    assert run("Dropout", {"x": x}, 7, 2)[1].dtype == np.float32
    inputs = {"x": x, "r": np.array(0.75, np.float32), "t": np.array(True)}
    for known in ((), ("r", "t")):
        y, mask = run("Dropout", inputs, outputs=2, known=known, seed=5)
        assert 0.2 < mask.mean() < 0.3
        np.testing.assert_array_equal(y, np.where(mask, np.float32(4), 0))


def test_losses_by_their_bodies() -> None:
    scores, labels = numbers(4, 3, 5), np.random.default_rng(0).integers(0, 3, (4, 5))
    weights = np.array([0.5, 1.0, 2.0], np.float32)
    for reduction in ("none", "sum", "mean"):
        attributes = {"reduction": reduction, "ignore_index": 1}
        inputs = {"s": scores, "l": labels, "w": weights}
        agree("SoftmaxCrossEntropyLoss", inputs, opset=13, outputs=2, **attributes)
        agree("NegativeLogLikelihoodLoss", inputs, opset=13, **attributes)


def test_momentum_descends_a_parabola() -> None:
    x, v = np.array([3.0, -2.0], np.float32), np.zeros(2, np.float32)
    attributes = {"alpha": 0.5, "beta": 1.0, "norm_coefficient": 0.0, "mode": "nesterov"}
    for t in range(60):
        inputs = {"r": np.array(0.1, np.float32), "t": np.array(t), "x": x, "g": 2 * x, "v": v}
        x, v = run("ai.onnx.preview.training::Momentum", inputs, 1, 2, **attributes)
    assert abs(x).max() < 1e-3


def test_causal_is_a_truth_value() -> None:
    with pytest.raises(InvalidModel, match="is_causal is 0 or 1, not 2"):
        run("Attention", {name: numbers(1, 1, 2, 4) for name in "qkv"}, 23, is_causal=2)
