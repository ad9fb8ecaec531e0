"""Text: tokens, their hashes, and what its generation needs."""

from __future__ import annotations

import re
from collections.abc import Callable
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


def _token_type(
    b: Builder,
    x: Value,
    *,
    separators: tuple[str, ...] = (),
    tokenexp: str = "",
    mincharnum: int,
    **_: Any,
) -> TensorType:
    if x.rank not in (1, 2) or bool(separators) == bool(tokenexp) or mincharnum < 1:
        raise InvalidModel(f"Tokenizer of {x.type} by separators {list(separators)} and tokenexp {tokenexp!r}")
    return TensorType(STRING, (*x.shape, b.fresh_dim()))


@array_operator("Tokenizer", since=1, domain=MICROSOFT, infer=_token_type, host=True)
def tokenizer(
    xp: Any,
    x: Any,
    *,
    mark: int,
    mincharnum: int,
    pad_value: str,
    separators: tuple[str, ...] = (),
    tokenexp: str = "",
) -> Any:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.Tokenizer

    Patterns are read by Python's re, with RE2's meaning of \\w and the like (ASCII) and its longest match. The result
    has an axis more than x even if that is empty.
    """
    if separators == ("",) or tokenexp == ".":
        cut: Callable[[str], list[str]] = list
    elif tokenexp:
        cut = _matching(re.compile(tokenexp, re.ASCII | re.DOTALL))
    else:
        cut = _between([re.compile(pattern, re.ASCII | re.DOTALL) for pattern in separators])
    rows = [[token for token in cut(text) if len(token) >= mincharnum] for text in x.ravel().tolist()]
    longest = max(map(len, rows), default=0)
    if mark and longest:
        rows, longest = [["\x02", *row, "\x03"] for row in rows], longest + 2
    found = np.full((len(rows), longest), pad_value, object)
    for line, row in zip(found, rows, strict=True):
        line[: len(row)] = row
    return found.reshape(*x.shape, longest)


def _matching(pattern: re.Pattern[str]) -> Callable[[str], list[str]]:
    def tokens(text: str) -> list[str]:
        return [text[start:end] for start, end in _spans(pattern, text)]

    return tokens


def _between(patterns: list[re.Pattern[str]]) -> Callable[[str], list[str]]:
    def tokens(text: str) -> list[str]:
        parts = [text]
        for pattern in patterns:
            parts = [piece for part in parts for piece in _pieces(pattern, part)]
        return parts

    return tokens


def _pieces(pattern: re.Pattern[str], text: str) -> list[str]:
    """What lies between the matches."""
    spans = _spans(pattern, text)
    ends = [0, *(end for _, end in spans)]
    starts = [*(start for start, _ in spans), len(text)]
    return [text[end:start] for end, start in zip(ends, starts, strict=True)]


def _spans(pattern: re.Pattern[str], text: str) -> list[tuple[int, int]]:
    """The matches from left to right, each as long as it can be, without empty ones."""
    found, place = [], 0
    while place <= len(text) and (match := pattern.search(text, place)):
        start, end = match.span()
        if "|" in pattern.pattern or "?" in pattern.pattern:
            end = next((stop for stop in range(len(text), end, -1) if pattern.fullmatch(text, start, stop)), end)
        if end > start:
            found.append((start, end))
        place = max(end, start + 1)
    return found


def _path_type(b: Builder, x: Value) -> TensorType:
    if x.rank not in (2, 3):
        raise InvalidModel(f"DynamicTimeWarping takes [M, N] or [1, M, N], not {x.type}")
    return TensorType(INT32, (2, b.fresh_dim()))


@array_operator("DynamicTimeWarping", since=1, domain=MICROSOFT, infer=_path_type, host=True)
def dynamic_time_warping(xp: Any, x: Any) -> Any:
    """https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.DynamicTimeWarping

    Of equal costs the step along the columns is taken, as in
    https://github.com/openai/whisper/blob/main/whisper/timing.py
    """
    costs = x.reshape(x.shape[-2:])
    rows, columns = costs.shape
    total = np.full((rows + 1, columns + 1), np.inf, np.float32)
    total[0, 0] = 0
    for i in range(1, rows + 1):
        for j in range(1, columns + 1):
            total[i, j] = costs[i - 1, j - 1] + min(total[i - 1, j - 1], total[i - 1, j], total[i, j - 1])
    i, j, path = rows, columns, []
    while i > 0 or j > 0:
        path.append((i - 1, j - 1))
        diagonal, above, left = total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]
        if i == 0 or j == 0:
            i, j = max(i - 1, 0), max(j - 1, 0)
        elif diagonal < above and diagonal < left:
            i, j = i - 1, j - 1
        elif above < diagonal and above < left:
            i -= 1
        else:
            j -= 1
    return np.array(path[::-1], np.int32).T.reshape(2, -1)
