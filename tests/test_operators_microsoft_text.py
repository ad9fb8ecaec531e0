"""Tokens, alignments and linear attention of com.microsoft against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpu_engine.errors import InvalidModel, UnsupportedModel
from tests.microsoft_models import Array, Inputs, agree, node_model, numbers
from tests.one_node import graph_of

TEXTS = ("Hello World", "I love  computer science !", "", "é x", "foo, bar;baz", "aXbXXc", "日本 語", "über straße")
CUTS: list[dict[str, Any]] = [
    {"separators": [" "]},
    {"separators": [""]},
    {"separators": ["o", " "]},
    {"separators": ["[ol]+"]},
    {"separators": ["l+o", "l"]},
    {"separators": [",\\s*", ";", "X"]},
    {"separators": ["a|aX"]},
    {"tokenexp": "."},
    {"tokenexp": "[a-zA-Z0-9_]+"},
    {"tokenexp": "\\b\\w\\w+\\b"},
    {"tokenexp": "\\w+"},
    {"tokenexp": "l*"},
    {"tokenexp": "l|lo|ove"},
    {"tokenexp": "(?i)[b-o]+"},
]


CHARACTERS: list[dict[str, Any]] = [{"separators": [""]}, {"tokenexp": "."}]
"""Where every token is one character and onnxruntime refuses to wish for longer ones."""


def texts(*values: str) -> Array:
    return np.array([*values, None], object)[:-1]


@pytest.mark.parametrize(("cut", "least"), [(cut, least) for cut in CUTS for least in (1, 2)
                                            if least == 1 or cut not in CHARACTERS], ids=str)  # fmt: skip
@pytest.mark.parametrize("mark", [0, 1])
def test_tokenizer(cut: dict[str, Any], mark: int, least: int) -> None:
    attributes = {"mark": mark, "mincharnum": least, "pad_value": "#", **cut}
    agree("Tokenizer", {"x": texts(*TEXTS)}, **attributes)
    agree("Tokenizer", {"x": texts(*TEXTS).reshape(2, 4)}, **attributes)
    agree("Tokenizer", {"x": texts("", "")}, **attributes)


def test_no_texts_give_no_tokens() -> None:
    """onnxruntime drops the last axis then."""
    attributes = {"mark": 0, "mincharnum": 1, "pad_value": "#", "separators": [" "]}
    agree("Tokenizer", {"x": np.empty((2, 0), object)}, expected=[np.empty((2, 0, 0), object)], **attributes)


@pytest.mark.parametrize("shape", [(4, 5), (1, 6, 3), (1, 1), (7, 7)])
def test_dynamic_time_warping(shape: tuple[int, ...]) -> None:
    agree("DynamicTimeWarping", {"x": numbers(*shape)})
    agree("DynamicTimeWarping", {"x": np.zeros(shape, np.float32)})


B, T, QUERIES, KEYS, DK, DV = 2, 5, 4, 2, 8, 6


def state_inputs(rule: str, past: bool, per_key: bool, queries: int = QUERIES) -> Inputs:
    decay = -np.abs(numbers(B, T, KEYS * (DK if per_key else 1), seed=4))
    rate = 1 / (1 + np.exp(-numbers(B, T, KEYS if past else 1, seed=5)))
    return {
        "q": numbers(B, T, queries * DK),
        "k": numbers(B, T, KEYS * DK, seed=1) * np.float32(0.3),
        "v": numbers(B, T, KEYS * DV, seed=2),
        "s": numbers(B, KEYS, DK, DV, seed=3) if past else None,
        "g": decay if rule.startswith("gated") else None,
        "b": rate if rule.endswith("delta") else None,
    }


@pytest.mark.parametrize("rule", ["linear", "gated", "delta", "gated_delta"])
@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("per_key", [False, True])
def test_linear_attention(rule: str, past: bool, per_key: bool) -> None:
    attributes = {"update_rule": rule, "q_num_heads": QUERIES, "kv_num_heads": KEYS}
    agree("LinearAttention", state_inputs(rule, past, per_key), 2, **attributes)


def test_linear_attention_with_fewer_queries() -> None:
    attributes = {"update_rule": "linear", "q_num_heads": 1, "kv_num_heads": KEYS, "scale": 0.5}
    agree("LinearAttention", state_inputs("linear", True, False, queries=1), 2, **attributes)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_linear_attention_gate(dtype: Any) -> None:
    inputs = {
        "a": numbers(2, 3, 4, dtype=dtype) * dtype(8),
        "d": numbers(4, seed=1),
        "s": -np.abs(numbers(4, seed=2)),
        "b": numbers(2, 3, 4, seed=3, dtype=dtype),
    }
    tolerance = {"rtol": 2e-3, "atol": 1e-3} if dtype is np.float16 else {}
    agree("LinearAttentionGate", inputs, 2, known=("d", "s"), **tolerance)
    agree("LinearAttentionGate", {**inputs, "b": None}, known=("d", "s"), **tolerance)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("past", [False, True])
def test_causal_convolution(dilation: int, activation: str, last: int, past: bool) -> None:
    x, state = numbers(2, 4, 6), numbers(2, 4, 2 * dilation, seed=3)
    x, state = (part.transpose(0, 2, 1).reshape(2, -1, 2, 2) if last else part for part in (x, state))
    inputs = {"x": x, "w": numbers(4, 1, 3, seed=1), "b": numbers(4, seed=2), "s": state if past else None}
    attributes = {"dilation": dilation, "activation": activation, "channels_last": last}
    agree("CausalConvWithState", inputs, 2, fixed=("w", "b"), **attributes)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("gates", [(2, 3, 4), (2, 3, 4, 1), (2, 3, 4, 5)])
def test_hyper_connections(dtype: Any, gates: tuple[int, ...]) -> None:
    x, block, mix = numbers(2, 3, 4, 5, dtype=dtype), numbers(2, 3, 5, seed=1, dtype=dtype), numbers(*gates, seed=2)
    tolerance = {"rtol": 2e-3, "atol": 4e-3} if dtype is np.float16 else {}
    agree("HyperConnectionPreMix", {"x": x, "m": mix}, reduction_scale=0.5, **tolerance)
    agree("HyperConnectionPreMix", {"x": x.reshape(2, 3, 20), "m": mix}, num_branches=4, **tolerance)
    if gates[-1] == 5:
        flat = {"x": x.reshape(2, 3, 20), "m": mix.reshape(2, 3, 20)}
        agree("HyperConnectionPreMix", flat, num_branches=4, **tolerance)
    for between in (None, numbers(2, 3, 4, 4, seed=3)):
        inputs = {"x": x, "o": block, "m": mix, "s": between}
        agree("HyperConnectionPostMix", inputs, **tolerance)
        agree("HyperConnectionPostMix", {**inputs, "x": x.reshape(2, 3, 20)}, num_branches=4, **tolerance)


@pytest.mark.parametrize("outputs", [1, 2])
def test_engram_gate(outputs: int) -> None:
    shapes = {"k": (2, 3, 4, 8), "q": (2, 3, 4, 8), "v": (2, 3, 8), "ks": (4, 8), "qs": (4, 8), "cs": (4, 8)}
    inputs = {name: numbers(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    agree("EngramGate", inputs, outputs, fixed=("k", "ks", "qs", "cs"))


@pytest.mark.parametrize("both", [0, 1])
def test_relative_position_bias(both: int) -> None:
    """onnxruntime has it on CUDA only; https://arxiv.org/abs/1910.10683 describes the buckets, read in a loop here."""
    table, queries, keys = numbers(8, 3), 40, 40

    def bucket(distance: int) -> int:
        count, first = (4, 4 * (distance > 0)) if both else (8, 0)
        distance = abs(distance) if both else max(-distance, 0)
        if distance < count // 2:
            return first + distance
        far = np.log(np.float32(distance / (count // 2))) / np.log(20 / (count // 2)) * (count - count // 2)
        return first + min(count // 2 + int(far), count - 1)

    index = np.array([[bucket(j - i) for j in range(keys)] for i in range(queries)])
    inputs = {"t": table, "q": np.array([queries]), "k": np.array([keys])}
    expected = [table[index].transpose(2, 0, 1)[None]]
    agree("RelativePositionBias", inputs, fixed=("t",), expected=expected, max_distance=20, is_bidirectional=both)


@pytest.mark.parametrize(
    ("name", "inputs", "attributes", "error"),
    [
        ("Tokenizer", {"x": texts("a")}, {"mark": 0, "mincharnum": 1, "pad_value": ""}, InvalidModel),
        ("LinearAttention", state_inputs("linear", False, False), {"state_window": 2}, UnsupportedModel),
        ("LinearAttention", state_inputs("linear", False, False), {"update_rule": "gated"}, InvalidModel),
        ("CausalConvWithState", {"x": numbers(1, 2, 3), "w": numbers(2, 1, 2)}, {"ndim": 2}, UnsupportedModel),
    ],
)
def test_what_cannot_be_is_refused(name: str, inputs: Inputs, attributes: dict[str, Any], error: type) -> None:
    heads = {"q_num_heads": QUERIES, "kv_num_heads": KEYS} if name == "LinearAttention" else {}
    with pytest.raises(error, match=name):
        graph_of(node_model(name, inputs, {**heads, **attributes}, 1 if name == "Tokenizer" else 2))
