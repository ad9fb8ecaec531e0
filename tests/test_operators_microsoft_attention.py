"""Attention and MultiHeadAttention of com.microsoft against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpu_engine.errors import InvalidModel, UnsupportedModel
from gpu_engine.passes.pipeline import optimize
from tests.microsoft_models import Array, Inputs, agree, integers, node_model, numbers, onnxruntime_exactly
from tests.one_node import graph_of
from tests.reference import kinds

B, S, N, D = 2, 4, 2, 4
H = N * D


def whole(*values: Any) -> Array:
    return np.array(values, np.int32)


MASKS: dict[str, Array | None] = {
    "none": None,
    "ends": whole(4, 2),
    "ends and starts": whole(4, 3, 0, 1),
    "cumulated": whole(4, 3, 0, 4, 8, 0, 4, 8),
    "raw": whole([1, 1, 1, 0], [0, 1, 0, 0]),
    "nothing": whole([0, 0, 0, 0], [0, 1, 0, 0]),
    "dummy": whole([1], [1]),
    "3d": integers(0, 2, B, S, S, dtype=np.int32),
}


def packed(**more: Array | None) -> Inputs:
    given = {"x": numbers(B, S, 6), "w": numbers(6, 3 * H, seed=1), "b": numbers(3 * H, seed=2)}
    return {**given, "m": None, "p": None, "a": None, **more}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("attributes", [{}, {"unidirectional": 1}, {"scale": 0.3, "mask_filter_value": -3.0}])
def test_attention(mask: str, attributes: dict[str, Any]) -> None:
    agree("Attention", packed(m=MASKS[mask]), known=("w", "b"), num_heads=N, **attributes)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("shape", [(B, N, S, S), (1, N, S, S), (B, 1, S, S), (1, 1, S, S)])
def test_attention_with_a_bias(outputs: int, shape: tuple[int, ...]) -> None:
    inputs = packed(a=numbers(*shape, seed=3), m=MASKS["raw"])
    agree("Attention", inputs, outputs, known=("w", "b"), num_heads=N, unidirectional=1)


@pytest.mark.parametrize("mask", [None, whole(7, 5), integers(0, 2, B, 7, dtype=np.int32),
                                  integers(0, 2, B, S, 7, dtype=np.int32)])  # fmt: skip
@pytest.mark.parametrize("unidirectional", [0, 1])
def test_attention_with_a_past(mask: Array | None, unidirectional: int) -> None:
    inputs = packed(p=numbers(2, B, N, 3, D, seed=4), m=mask)
    agree("Attention", inputs, 2, known=("w", "b"), num_heads=N, unidirectional=unidirectional)


def test_attention_of_other_sizes() -> None:
    sizes = [H, H, 10]
    inputs = {"x": numbers(B, S, 6), "w": numbers(6, sum(sizes), seed=1), "b": numbers(sum(sizes), seed=2)}
    agree("Attention", inputs, known=("w", "b"), num_heads=N, qkv_hidden_sizes=sizes)


def test_attention_without_a_bias() -> None:
    """onnxruntime 1.31 ends the process."""
    inputs = packed(b=np.zeros(3 * H, np.float32))
    expected = onnxruntime_exactly(node_model("Attention", inputs, {"num_heads": N}), given(inputs))
    agree("Attention", packed(b=None), known=("w",), expected=expected, num_heads=N)


def test_a_mask_of_every_position_there_may_be() -> None:
    """onnxruntime has it on CUDA only: the rows of the queries from a mask [B, 1, M, M]."""
    mask, past = integers(0, 2, B, 1, 9, 9, dtype=np.int32), numbers(2, B, N, 3, D, seed=4)
    cut = mask[:, 0, 3 : 3 + S, : 3 + S].copy()
    expected = onnxruntime_exactly(
        node_model("Attention", packed(m=cut, p=past), {"num_heads": N}, 2), given(packed(m=cut, p=past))
    )
    agree("Attention", packed(m=mask, p=past), 2, known=("w", "b"), expected=expected, num_heads=N)


def given(inputs: Inputs) -> dict[str, Array]:
    return {name: array for name, array in inputs.items() if array is not None}


L = 5
KEYS: dict[str, Array | None] = {
    "none": None,
    "ends": whole(5, 3),
    "cumulated": whole(5, 3, 0, 4, 8, 0, 5, 10),
    "raw": whole([1, 1, 1, 0, 1], [0, 0, 1, 0, 0]),
    "nothing": whole([0, 0, 0, 0, 0], [0, 0, 1, 0, 0]),
    "3d": integers(0, 2, B, S, L, dtype=np.int32),
}


def apart(length: int = L, value: int = H, **more: Array | None) -> Inputs:
    """Query, key and value apart, with the inputs in their order."""
    held = {"q": numbers(B, S, H), "k": numbers(B, length, H, seed=1), "v": numbers(B, length, value, seed=2)}
    return {**held, **dict.fromkeys(("b", "m", "a", "pk", "pv", "pl", "ci")), **more}


@pytest.mark.parametrize("mask", KEYS)
@pytest.mark.parametrize("attributes", [{}, {"unidirectional": 1}, {"scale": 0.3, "mask_filter_value": -3.0}])
def test_multi_head_attention(mask: str, attributes: dict[str, Any]) -> None:
    agree("MultiHeadAttention", apart(m=KEYS[mask]), 3, num_heads=N, **attributes)


@pytest.mark.parametrize("length", [1, S, 7])
def test_multi_head_attention_looks_back_only(length: int) -> None:
    inputs = apart(length, b=numbers(3 * H, seed=3), a=numbers(1, N, S, length, seed=4))
    agree("MultiHeadAttention", inputs, known=("b",), num_heads=N, unidirectional=1)


@pytest.mark.parametrize("value", [H, 10])
@pytest.mark.parametrize("bias", [False, True])
def test_multi_head_attention_with_a_bias_for_the_projections(value: int, bias: bool) -> None:
    inputs = apart(value=value, b=numbers(2 * H + value, seed=3) if bias else None)
    agree("MultiHeadAttention", inputs, 3, known=("b",), num_heads=N)


@pytest.mark.parametrize("bias", [False, True])
def test_multi_head_attention_of_finished_keys(bias: bool) -> None:
    finished = {"k": numbers(B, N, L, D, seed=1), "v": numbers(B, N, L, D, seed=2)}
    inputs = {**apart(b=numbers(3 * H, seed=3) if bias else None), **finished}
    agree("MultiHeadAttention", inputs, known=("b",), num_heads=N)


@pytest.mark.parametrize("bias", [False, True])
def test_multi_head_attention_of_packed_tensors(bias: bool) -> None:
    """onnxruntime packs on CUDA only."""
    inputs = apart(S, b=numbers(3 * H, seed=3) if bias else None)
    model = node_model("MultiHeadAttention", inputs, {"num_heads": N}, 3)
    expected = onnxruntime_exactly(model, given(inputs))
    q, k, v = (x.reshape(B, S, N, D) for x in (inputs["q"], inputs["k"], inputs["v"]) if x is not None)
    pair = {**inputs, "k": np.stack([k, v], axis=3), "v": None}
    triple = {**inputs, "q": np.stack([q, k, v], axis=3), "k": None, "v": None}
    for form in (pair, triple):
        agree("MultiHeadAttention", form, 3, known=("b",), expected=expected, num_heads=N)


@pytest.mark.parametrize("mask", [None, whole(9, 6), integers(0, 2, B, 9, dtype=np.int32),
                                  integers(0, 2, B, S, 9, dtype=np.int32)])  # fmt: skip
@pytest.mark.parametrize("unidirectional", [0, 1])
def test_multi_head_attention_with_a_past(mask: Array | None, unidirectional: int) -> None:
    """Every row sees some key: sums with -10000 depend on their order."""
    past = {"pk": numbers(B, N, 5, D, seed=5), "pv": numbers(B, N, 5, D, seed=6)}
    if mask is not None and mask.ndim > 1:
        mask[..., 0] = 1
    inputs = apart(S, m=mask, b=numbers(3 * H, seed=3), a=numbers(B, N, S, 9, seed=4), **past)
    agree("MultiHeadAttention", inputs, 3, known=("b",), num_heads=N, unidirectional=unidirectional)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("mask", [None, "raw", "ends"])
@pytest.mark.parametrize("unidirectional", [0, 1])
def test_multi_head_attention_with_a_buffer(length: int, mask: str | None, unidirectional: int) -> None:
    first = 4
    masks = {"raw": integers(0, 2, B, first + length, dtype=np.int32), "ends": whole(first + length, 3)}
    masks["raw"][:, 0] = 1
    inputs = {name: numbers(B, length, H, seed=i) for i, name in enumerate(("q", "k", "v"))} | {
        "b": numbers(3 * H, seed=3),
        "m": masks.get(mask or ""),
        "a": numbers(B, N, length, first + length, seed=4),
        "pk": numbers(B, N, 9, D, seed=5),
        "pv": numbers(B, N, 9, D, seed=6),
        "pl": whole(first),
    }
    agree("MultiHeadAttention", inputs, 3, known=("b",), num_heads=N, unidirectional=unidirectional)


def test_weights_are_an_output() -> None:
    q, k = numbers(B, S, H), numbers(B, L, H, seed=1)
    heads = [x.reshape(B, -1, N, D).transpose(0, 2, 1, 3) for x in (q, k)]
    scores = heads[0] @ heads[1].swapaxes(-1, -2) / np.sqrt(D)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    agree("MultiHeadAttention", apart(), (3,), expected=[weights.astype(np.float32)], num_heads=N)


@pytest.mark.parametrize("name", ["Attention", "MultiHeadAttention"])
@pytest.mark.parametrize("mask", [None, MASKS["raw"]])
def test_the_whole_becomes_one_operation(name: str, mask: Array | None) -> None:
    inputs = packed(m=mask) if name == "Attention" else apart(S, m=mask)
    model = node_model(name, inputs, {"num_heads": N, "unidirectional": 1}, 1, ("w", "b"))
    found = kinds(optimize(graph_of(model)))
    assert "Attention" in found and "Softmax" not in found


def test_what_cannot_be_is_refused() -> None:
    for attributes in ({"do_rotary": 1}, {"past_present_share_buffer": 1}):
        with pytest.raises(UnsupportedModel, match="Attention"):
            graph_of(node_model("Attention", packed(), {"num_heads": N, **attributes}))
    with pytest.raises(InvalidModel, match="packed"):
        graph_of(node_model("MultiHeadAttention", apart(v=None), {"num_heads": N}))
    with pytest.raises(UnsupportedModel, match="beam"):
        graph_of(node_model("MultiHeadAttention", apart(ci=integers(0, 1, B, 1, 9, dtype=np.int32)), {"num_heads": N}))
