"""Operators on strings; they run on the host everywhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.registry import array_operator
from gpu_engine.ir.dtypes import BOOL, FLOAT32, INT64, STRING
from gpu_engine.ir.graph import Builder, TensorType, Value
from gpu_engine.ir.ops.pointwise import broadcast_shapes


def _concat_type(b: Builder, x: Value, y: Value) -> TensorType:
    return TensorType(STRING, broadcast_shapes(x.shape, y.shape))


@array_operator("StringConcat", since=20, infer=_concat_type, host=True)
def string_concat(xp: Any, x: Any, y: Any) -> Any:
    """https://onnx.ai/onnx/operators/onnx__StringConcat.html"""
    return np.asarray(x + y, object)


def _split_types(b: Builder, x: Value, **_: Any) -> tuple[TensorType, ...]:
    return TensorType(STRING, (*x.shape, b.fresh_dim())), TensorType(INT64, x.shape)


@array_operator("StringSplit", since=20, infer=_split_types, host=True)
def string_split(xp: Any, x: Any, *, delimiter: str = "", maxsplit: int = -1) -> Any:
    """https://onnx.ai/onnx/operators/onnx__StringSplit.html"""
    parts = [text.split(delimiter or None, maxsplit) for text in x.ravel()]
    counts = np.array([len(part) for part in parts], np.int64)
    rows = np.full((x.size, int(counts.max(initial=0))), "", object)
    for row, part in zip(rows, parts, strict=True):
        row[: len(part)] = part
    return rows.reshape(*x.shape, rows.shape[1]), counts.reshape(x.shape)


def _normalized_type(b: Builder, x: Value, **_: Any) -> TensorType:
    if x.rank not in (1, 2):
        raise InvalidModel(f"StringNormalizer takes [C] or [1, C], not {x.type}")
    return TensorType(STRING, (*x.shape[:-1], b.fresh_dim()))


@array_operator("StringNormalizer", since=10, infer=_normalized_type, host=True)
def string_normalizer(
    xp: Any,
    x: Any,
    *,
    case_change_action: str = "NONE",
    is_case_sensitive: int = 0,
    locale: str = "en_US",
    stopwords: tuple[str, ...] = (),
) -> Any:
    """https://onnx.ai/onnx/operators/onnx__StringNormalizer.html

    Case follows Unicode, whatever `locale` says.
    """
    if x.ndim == 2 and x.shape[0] != 1:
        raise ValueError(f"StringNormalizer takes [C] or [1, C], not {list(x.shape)}")
    changes: dict[str, Callable[[str], str]] = {"NONE": str, "LOWER": str.lower, "UPPER": str.upper}
    if case_change_action not in changes:
        raise InvalidModel(f"StringNormalizer knows {', '.join(changes)}, not {case_change_action}")
    compared = changes["NONE" if is_case_sensitive else "LOWER"]
    stops = {compared(word) for word in stopwords}
    kept = [changes[case_change_action](word) for word in x.ravel() if compared(word) not in stops]
    return np.array(kept or [""], object).reshape(*x.shape[:-1], -1)


def _match_type(b: Builder, x: Value, **_: Any) -> TensorType:
    return TensorType(BOOL, x.shape)


@array_operator("RegexFullMatch", since=20, infer=_match_type, host=True, mixes=())
def regex_full_match(xp: Any, x: Any, *, pattern: str = "") -> Any:
    """https://onnx.ai/onnx/operators/onnx__RegexFullMatch.html

    Patterns are read by Python's re, which knows RE2's syntax but for its Unicode classes such as \\pN.
    """
    matches = re.compile(pattern).fullmatch
    return np.array([matches(text) is not None for text in x.ravel()], bool).reshape(x.shape)


def _tf_idf_type(b: Builder, x: Value, *, ngram_indexes: tuple[int, ...], **_: Any) -> TensorType:
    if x.rank not in (1, 2):
        raise InvalidModel(f"TfIdfVectorizer takes [C] or [N, C], not {x.type}")
    return TensorType(FLOAT32, (*x.shape[:-1], max(ngram_indexes) + 1))


@array_operator("TfIdfVectorizer", since=9, infer=_tf_idf_type, host=True, mixes=(1,))
def tf_idf_vectorizer(
    xp: Any,
    x: Any,
    *,
    max_gram_length: int,
    max_skip_count: int,
    min_gram_length: int,
    mode: str,
    ngram_counts: tuple[int, ...],
    ngram_indexes: tuple[int, ...],
    pool_int64s: tuple[int, ...] = (),
    pool_strings: tuple[str, ...] = (),
    weights: tuple[float, ...] = (),
) -> Any:
    """https://onnx.ai/onnx/operators/onnx__TfIdfVectorizer.html"""
    if mode not in ("TF", "IDF", "TFIDF"):
        raise InvalidModel(f"TfIdfVectorizer knows TF, IDF and TFIDF, not {mode}")
    grams = _pool(pool_int64s or pool_strings, ngram_counts)
    columns = {gram: ngram_indexes[i] for gram, i in grams.items()}
    scale = np.ones(max(ngram_indexes) + 1, np.float32)
    if weights and mode != "TF":
        scale[list(ngram_indexes)] = weights
    rows = x.reshape(-1, x.shape[-1])
    counts = np.zeros((len(rows), len(scale)), np.float32)
    for row, count in zip(rows.tolist(), counts, strict=True):
        for length in range(min_gram_length, max_gram_length + 1):
            for step in range(1, max_skip_count + 2 if length > 1 else 2):
                for start in range(len(row) - (length - 1) * step):
                    column = columns.get(tuple(row[start : start + (length - 1) * step + 1 : step]))
                    if column is not None:
                        count[column] += 1
    counts = np.minimum(counts, 1) if mode == "IDF" else counts
    return (counts * scale).reshape(*x.shape[:-1], -1)


def _pool(pool: tuple[Any, ...], starts: tuple[int, ...]) -> dict[tuple[Any, ...], int]:
    """The n-grams of a pool, which lists those of one item, then of two, ..., and their numbers in its order."""
    grams: dict[tuple[Any, ...], int] = {}
    number = 0
    for size, (start, end) in enumerate(zip(starts, (*starts[1:], len(pool)), strict=True), 1):
        for first in range(start, end - size + 1, size):
            grams[pool[first : first + size]] = number
            number += 1
    return grams
