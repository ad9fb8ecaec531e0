"""Hashes of features and what the generation of text needs."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators.microsoft.domain import MICROSOFT
from gpu_engine.frontend.registry import array_operator
from gpu_engine.ir.dtypes import FLOAT32, FLOAT64, INT32, INT64, STRING, UINT32, UINT64
from gpu_engine.ir.graph import Builder, TensorType, Value

MASK = 0xFFFFFFFF
HASHED = (INT32, UINT32, INT64, UINT64, FLOAT32, FLOAT64, STRING)


def _hash_type(b: Builder, x: Value, *, positive: int = 1, seed: int = 0) -> TensorType:
    if x.dtype not in HASHED:
        raise InvalidModel(f"MurmurHash3 of {x.type}")
    return TensorType(UINT32 if positive else INT32, x.shape)


@array_operator("MurmurHash3", since=1, domain=MICROSOFT, infer=_hash_type, mixes=())
def murmur_hash3(xp: Any, x: Any, *, positive: int = 1, seed: int = 0) -> Any:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MurmurHash3

    MurmurHash3_x86_32 of the bytes of every element: https://github.com/aappleby/smhasher/wiki/MurmurHash3
    """
    if x.dtype == STRING:
        found = [hash_of(item.encode(), seed & MASK) for item in x.ravel().tolist()]
        result = np.array(found, np.uint32).reshape(x.shape)
    else:
        words = xp.ascontiguousarray(x).reshape(-1).view(np.uint32).reshape(-1, x.dtype.itemsize // 4)
        hashed = xp.full(words.shape[0], seed & MASK, np.uint32)
        for i in range(words.shape[1]):
            hashed = _turned(hashed ^ _scrambled(words[:, i]), 13) * np.uint32(5) + np.uint32(0xE6546B64)
        result = _finished(hashed ^ np.uint32(x.dtype.itemsize)).reshape(x.shape)
    return result if positive else result.view(np.int32)


def _turned(words: Any, bits: int) -> Any:
    return (words << np.uint32(bits)) | (words >> np.uint32(32 - bits))


def _scrambled(words: Any) -> Any:
    return _turned(words * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)


def _finished(words: Any) -> Any:
    words = (words ^ (words >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return words ^ (words >> np.uint32(16))


def hash_of(data: bytes, seed: int) -> int:
    """MurmurHash3_x86_32 of some bytes."""
    whole = len(data) // 4 * 4
    hashed = np.full(1, seed, np.uint32)
    for word in np.frombuffer(data[:whole], "<u4"):
        hashed = _turned(hashed ^ _scrambled(word.reshape(1)), 13) * np.uint32(5) + np.uint32(0xE6546B64)
    if len(data) > whole:
        hashed = hashed ^ _scrambled(np.array([int.from_bytes(data[whole:], "little")], np.uint32))
    return int(_finished(hashed ^ np.uint32(len(data)))[0])


def _score_type(b: Builder, input_ids: Value, scores: Value, *, ngram_size: int) -> TensorType:
    if ngram_size < 1 or input_ids.rank != 2 or scores.rank != 2:
        raise InvalidModel(f"{ngram_size} tokens of {input_ids.type} for {scores.type}")
    return scores.type


@array_operator("NGramRepeatBlock", since=1, domain=MICROSOFT, infer=_score_type)
def ngram_repeat_block(xp: Any, input_ids: Any, scores: Any, *, ngram_size: int) -> Any:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.NGramRepeatBlock"""
    length, result = input_ids.shape[1], scores.copy()
    count = length - ngram_size + 1
    if count < 1:
        return result
    grams = input_ids[:, xp.arange(count)[:, None] + xp.arange(ngram_size)]
    tail = input_ids[:, length - ngram_size + 1 :]
    row, place = xp.nonzero((grams[..., :-1] == tail[:, None]).all(axis=-1))
    tokens = grams[row, place, -1]
    if tokens.size and (tokens.min() < 0 or tokens.max() >= scores.shape[1]):
        raise ValueError(f"a token outside the {scores.shape[1]} that have a score")
    result[row, tokens] = -np.inf
    return result
