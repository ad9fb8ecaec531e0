"""Maps of the domain ai.onnx.ml: dicts that a caller brings, and lists of dicts that it gets."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators.conversion import convert
from gpu_engine.frontend.operators.ml_features import ML, look_up_text
from gpu_engine.frontend.registry import emit_array, operator
from gpu_engine.frontend.sequences import MapsValue, PairsValue
from gpu_engine.ir.dtypes import FLOAT32, INT64, STRING, DType
from gpu_engine.ir.graph import Builder, TensorType, Value
from gpu_engine.ir.ops import Reshape

CASTS: dict[str, DType] = {"TO_FLOAT": FLOAT32, "TO_INT64": INT64, "TO_STRING": STRING}


@operator("ZipMap", since=1, domain=ML)
def zip_map(
    b: Builder, x: Value, *, classlabels_int64s: tuple[int, ...] = (), classlabels_strings: tuple[str, ...] = ()
) -> tuple[MapsValue]:
    """https://onnx.ai/onnx/operators/onnx_aionnxml_ZipMap.html"""
    labels = classlabels_strings or classlabels_int64s
    rows = x if x.rank == 2 else b.emit(Reshape((1, *x.shape)), x)
    if isinstance(rows.shape[1], int) and rows.shape[1] != len(labels):
        raise InvalidModel(f"{len(labels)} labels for the columns of {x.type}")
    return (MapsValue(rows, labels),)


@operator("CastMap", since=1, domain=ML)
def cast_map(
    b: Builder, x: PairsValue, *, cast_to: str = "TO_FLOAT", map_form: str = "DENSE", max_map: int = 1
) -> Value:
    """https://onnx.ai/onnx/operators/onnx_aionnxml_CastMap.html

    The result has one row, as in ONNX Runtime. A sparse form leaves out keys below 0; one of max_map or more is an
    error.
    """
    if cast_to not in CASTS or map_form not in ("DENSE", "SPARSE"):
        raise InvalidModel(f"CastMap knows {', '.join(CASTS)} and DENSE or SPARSE, not {cast_to} and {map_form}")
    values = convert(b, x.values, CASTS[cast_to])
    if map_form == "DENSE":
        return b.emit(Reshape((1, *values.shape)), values)
    if max_map < 1:
        raise InvalidModel(f"CastMap to {max_map} columns")
    kind = TensorType(values.dtype, (1, max_map))
    return emit_array(b, spread, lambda b, *_, **__: kind, (x.keys, values), {"size": max_map}, host=True, mixes=())[0]


@operator("DictVectorizer", since=1, domain=ML)
def dict_vectorizer(
    b: Builder, x: PairsValue, *, int64_vocabulary: tuple[int, ...] = (), string_vocabulary: tuple[str, ...] = ()
) -> Value:
    """https://onnx.ai/onnx/operators/onnx_aionnxml_DictVectorizer.html"""
    words = string_vocabulary or int64_vocabulary
    if bool(string_vocabulary) == bool(int64_vocabulary):
        raise InvalidModel("DictVectorizer needs a vocabulary, of integers or of strings")
    if (x.keys.dtype == STRING) != bool(string_vocabulary):
        raise InvalidModel(f"DictVectorizer looks up a vocabulary of {type(words[0]).__name__} in {x.keys.type}")
    kind, vocabulary = TensorType(x.values.dtype, (1, len(words))), np.array([words], x.keys.dtype)
    operands = (b.constant(vocabulary), x.keys, x.values, b.constant(_blank(x.values.dtype)))
    return emit_array(b, look_up_text, lambda b, *_: kind, operands, {}, host=True, mixes=())[0]


def _blank(dtype: DType) -> NDArray[Any]:
    """What stands where a map has nothing."""
    return np.array("" if dtype == STRING else 0, dtype)


def spread(xp: Any, keys: Any, values: Any, *, size: int) -> Any:
    """A row of `size` elements with each value at its key."""
    if keys.size and keys.max() >= size:
        raise ValueError(f"key {keys.max()} of a map that is cast to {size} columns")
    result = np.full((1, size), _blank(values.dtype))
    result[0, keys[keys >= 0]] = values[keys >= 0]
    return result
