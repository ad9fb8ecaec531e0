"""GroupQueryAttention and the rotary embeddings of com.microsoft against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpu_engine.errors import InvalidModel, UnsupportedModel
from tests.microsoft_models import Array, Inputs, agree, close, integers, node_model, numbers, onnxruntime_exactly
from tests.one_node import graph_of
from tests.reference import run_graph

B, S, N, G, D = 2, 4, 4, 2, 32
CACHES = ("c", "s")


def caches(width: int, dtype: Any = np.float32) -> dict[str, Array]:
    angle = numbers(12, width, seed=7)
    return {"c": np.cos(angle).astype(dtype), "s": np.sin(angle).astype(dtype)}


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("shape", [(B, S, N * D), (B, N, S, D)])
@pytest.mark.parametrize("places", [integers(0, 12, B, S), np.array([5])], ids=["each", "first"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rotary_embedding(interleaved: int, shape: tuple[int, ...], places: Array, dtype: Any) -> None:
    inputs = {"x": numbers(*shape, dtype=dtype), "p": places, **caches(D // 2, dtype)}
    tolerance = {"rtol": 2e-3, "atol": 4e-3} if dtype == np.float16 else {}
    agree("RotaryEmbedding", inputs, known=CACHES, interleaved=interleaved, scale=2.0, **tolerance)
    part = {**inputs, **caches(8, dtype)}
    attributes = {"num_heads": N, "rotary_embedding_dim": 16, "interleaved": interleaved}
    agree("RotaryEmbedding", part, known=CACHES, **attributes, **tolerance)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("shape", [(B, S, N * 16), (B, N, S, 16)])
def test_multimodal_rotary_embedding(interleaved: int, layout: int, shape: tuple[int, ...]) -> None:
    inputs = {"x": numbers(*shape), "p": integers(0, 12, 3, B, S), **caches(8)}
    attributes = {"interleaved": interleaved, "mrope_layout": layout, "num_heads": N}
    agree("MRotaryEmbedding", inputs, known=CACHES, mrope_section=[3, 3, 2], **attributes)
    part = {**inputs, **caches(4)}
    attributes |= {"rotary_embedding_dim": 8}
    agree("MRotaryEmbedding", part, known=CACHES, mrope_section=[2, 1, 1], **attributes)


def test_gemma_rotary_embedding() -> None:
    emb = numbers(B, S, D)
    q, q_rot, k, k_rot = (numbers(B, N, S, D, seed=i, dtype=np.float16) for i in range(4))
    sine, cosine = (f(emb).astype(np.float16)[:, None] for f in (np.sin, np.cos))
    expected = [q * cosine + q_rot * sine, k * cosine + k_rot * sine]
    inputs = {"e": emb, "q": q, "qr": q_rot, "k": k, "kr": k_rot}
    agree("GemmaRotaryEmbedding", inputs, 2, expected=expected, rtol=2e-3, atol=4e-3)


def call(batch: int, length: int, past: int | None, total: list[int], **more: Array | None) -> Inputs:
    """A call of `length` tokens after a cache that is `past` long; total[b] tokens then belong to row b."""
    cache = {} if past is None else {"pk": numbers(batch, G, past, D, seed=3), "pv": numbers(batch, G, past, D, seed=4)}
    optional = ("c", "s", "pos", "a", "sink", "ks", "vs", "qn", "kn")
    return {
        "q": numbers(batch, length, N * D),
        "k": numbers(batch, length, G * D, seed=1),
        "v": numbers(batch, length, G * D, seed=2),
        **{"pk": None, "pv": None, **cache},
        "n": np.array(total, np.int32) - 1,
        "t": np.array(max(total), np.int32),
        **dict.fromkeys(optional),
        **more,
    }


HEADS = {"num_heads": N, "kv_num_heads": G}
CALLS: dict[str, Inputs] = {
    "prompt": call(2, 4, None, [4, 4]),
    "prompt with an empty cache": call(2, 4, 0, [4, 4]),
    "prompt with room": call(2, 4, 9, [4, 4]),
    "next token": call(2, 1, 5, [6, 6]),
    "next token of rows of several lengths": call(3, 1, 5, [6, 4, 2]),
    "next token with room": call(2, 1, 9, [6, 4]),
    "several tokens": call(1, 3, 5, [8]),
    "several tokens with room": call(1, 3, 11, [8]),
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"local_window_size": 3},
    {"softcap": 1.5, "scale": 0.4},
    {"smooth_softmax": 1},
    {"causal": 0},
]


SOME = ("prompt", "next token with room", "several tokens")
CASES = [(name, OPTIONS[0]) for name in CALLS] + [(name, options) for name in SOME for options in OPTIONS[1:]]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_group_query_attention(name: str, options: dict[str, Any]) -> None:
    agree("GroupQueryAttention", CALLS[name], 3, **HEADS, **options)


TURNS = [(name, 0, D // 2) for name in CALLS] + [
    ("next token", 1, D // 2),
    ("prompt", 0, D // 4),
    ("prompt", 1, D // 4),
]


@pytest.mark.parametrize(("name", "interleaved", "width"), TURNS)
def test_group_query_attention_turns(name: str, interleaved: int, width: int) -> None:
    inputs = {**CALLS[name], **caches(width)}
    attributes = {"do_rotary": 1, "rotary_interleaved": interleaved, **HEADS}
    agree("GroupQueryAttention", inputs, 3, known=CACHES, **attributes)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("heads", [1, N])
def test_group_query_attention_with_more_operands(name: str, heads: int) -> None:
    inputs = CALLS[name]
    batch, length = np.shape(inputs["q"])[:2]
    total = int(np.asarray(inputs["t"]))
    bias = numbers(1, heads, length, total, seed=8)
    more = {"a": bias, "sink": numbers(N, seed=9)}
    agree("GroupQueryAttention", {**inputs, **more}, 3, softcap=2.0, **HEADS)
    wide = {"a": np.repeat(bias, batch, axis=0), "t": np.reshape(inputs["t"], 1)}
    agree("GroupQueryAttention", {**inputs, **wide}, 3, **HEADS)


@pytest.mark.parametrize("output", [1, 2])
@pytest.mark.parametrize("name", SOME)
def test_scores_or_weights_are_an_output(output: int, name: str) -> None:
    """onnxruntime leaves the scores beyond the end of a row unwritten: all rows are as long here."""
    inputs = call(2, 1, 9, [6, 6]) if "room" in name else CALLS[name]
    agree("GroupQueryAttention", inputs, 4, qk_output=output, softcap=2.0, **HEADS)


@pytest.mark.parametrize("name", ["prompt", "next token", "next token with room"])
def test_group_query_attention_of_packed_projections(name: str) -> None:
    inputs = CALLS[name]
    packed = np.concatenate([np.asarray(inputs[key]) for key in "qkv"], axis=-1)
    given = {**inputs, "q": packed, "k": None, "v": None, **caches(D // 2)}
    agree("GroupQueryAttention", given, 3, known=CACHES, do_rotary=1, **HEADS)


@pytest.mark.parametrize("name", ["prompt", "next token with room"])
def test_positions_may_be_given(name: str) -> None:
    inputs = CALLS[name]
    batch, length = np.shape(inputs["q"])[:2]
    places = np.broadcast_to(np.arange(length) + (0 if length > 1 else 5), (batch, length)).copy()
    agree("GroupQueryAttention", {**inputs, "pos": places, **caches(D // 2)}, 3, known=CACHES, do_rotary=1, **HEADS)


def test_rows_of_a_prompt_that_end_early() -> None:
    """What the queries beyond a row's end give is left open."""
    inputs = {key: array for key, array in call(3, 4, None, [4, 2, 3]).items() if array is not None}
    model = node_model("GroupQueryAttention", call(3, 4, None, [4, 2, 3]), HEADS, 3)
    expected, found = onnxruntime_exactly(model, inputs), list(run_graph(graph_of(model), inputs).values())
    for row, length in enumerate((4, 2, 3)):
        close(found[0][row, :length], expected[0][row, :length], 1e-4, 2e-5)
    close(found[1], expected[1], 0, 0)


def test_norms_of_queries_and_keys() -> None:
    """onnxruntime has them on CUDA and WebGPU only."""
    inputs = call(2, 4, None, [4, 4])
    weights = {"qn": numbers(D, seed=5), "kn": numbers(D, seed=6)}

    def normed(x: Array, weight: Array) -> Array:
        heads = x.reshape(2, 4, -1, D)
        return (heads / np.sqrt((heads**2).mean(-1, keepdims=True) + 1e-6) * weight).reshape(x.shape)

    plain = {
        **inputs,
        "q": normed(np.asarray(inputs["q"]), weights["qn"]),
        "k": normed(np.asarray(inputs["k"]), weights["kn"]),
    }
    given = {key: array for key, array in plain.items() if array is not None}
    expected = onnxruntime_exactly(node_model("GroupQueryAttention", plain, HEADS, 3), given)
    agree("GroupQueryAttention", {**inputs, **weights}, 3, expected=expected, **HEADS)


def test_what_cannot_be_is_refused() -> None:
    for attributes in ({"sliding_window_cache": 1, "local_window_size": 3}, {"k_quant_type": "PER_TENSOR"}):
        with pytest.raises(UnsupportedModel, match="GroupQueryAttention"):
            graph_of(node_model("GroupQueryAttention", CALLS["next token"], {**HEADS, **attributes}))
    inputs = {"x": numbers(B, S, N * D), "p": integers(0, 12, 3, B, S), **caches(D // 2)}
    for sections in ([2, 2], [2, 2, 2], [D, -D // 2, 0]):
        with pytest.raises(InvalidModel, match="sections"):
            graph_of(node_model("MRotaryEmbedding", inputs, {"mrope_section": sections}))
