"""Preparation of features in the domain ai.onnx.ml: scaling, encoding, imputing, choosing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators.conversion import convert
from gpu_engine.frontend.operators.movement import concat, cut, padded
from gpu_engine.frontend.registry import emit_array, emit_map, operator, pointwise
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import FLOAT32, FLOAT64, INT64, STRING, DType, is_float
from gpu_engine.ir.expr import Expr, cast
from gpu_engine.ir.graph import Builder, TensorType, Value
from gpu_engine.ir.ops import Gather, Reduce, Reshape

ML = "ai.onnx.ml"
Array = NDArray[Any]


def wide_enough(dtype: DType) -> DType:
    """The float dtype to compute in: float64 for what float32 does not hold."""
    return FLOAT64 if dtype in (FLOAT64, INT64) else FLOAT32


@operator("ArrayFeatureExtractor", since=1, domain=ML)
def array_feature_extractor(b: Builder, x: Value, y: Value) -> Value:
    """https://onnx.ai/onnx/operators/onnx_aionnxml_ArrayFeatureExtractor.html"""
    rows = x if x.rank > 1 else b.emit(Reshape((1, *x.shape)), x)
    picks = b.emit(Reshape((dims.product(y.shape),)), y)
    if x.dtype != STRING:
        return b.emit(Gather(rows.rank - 1), rows, picks)
    kind = TensorType(STRING, (*rows.shape[:-1], *picks.shape))
    return emit_array(b, pick_columns, lambda b, *_: kind, (rows, picks), {}, host=True, mixes=(rows.rank - 1,))[0]


def pick_columns(xp: Any, x: Any, indices: Any) -> Any:
    return x[..., indices]


@pointwise("Binarizer", since=1, domain=ML)
def binarizer(x: Expr, *, threshold: float = 0.0) -> Expr:
    """https://onnx.ai/onnx/operators/onnx_aionnxml_Binarizer.html"""
    wide = x if is_float(x.dtype) else cast(x, FLOAT64)
    return cast(wide > threshold, x.dtype)


@operator("Scaler", since=1, domain=ML)
def scaler(b: Builder, x: Value, *, offset: tuple[float, ...] = (0.0,), scale: tuple[float, ...] = (1.0,)) -> Value:
    """https://onnx.ai/onnx/operators/onnx_aionnxml_Scaler.html"""
    wide = wide_enough(x.dtype)
    offsets, scales = (b.constant(np.array(values, wide)) for values in (offset, scale))
    return emit_map(b, lambda e, o, s: cast((cast(e, wide) - o) * s, FLOAT32), x, offsets, scales)


@operator("Normalizer", since=1, domain=ML)
def normalizer(b: Builder, x: Value, *, norm: str = "MAX") -> Value:
    """https://onnx.ai/onnx/operators/onnx_aionnxml_Normalizer.html

    L1 sums magnitudes and L2 keeps the sign, as every implementation does.
    """
    wide, element = wide_enough(x.dtype), cast(expr.arg(0, x.dtype), wide_enough(x.dtype))
    axes, total = (x.rank - 1,), expr.arg(0, wide)
    folds = {
        "MAX": Reduce("max", axes, True, element),
        "L1": Reduce("sum", axes, True, abs(element)),
        "L2": Reduce("sum", axes, True, element * element, expr.sqrt(total)),
    }
    if norm not in folds:
        raise InvalidModel(f"Normalizer knows {', '.join(folds)}, not {norm}")
    return emit_map(
        b, lambda e, n: cast(cast(e, wide) / expr.where(expr.equal(n, 0), 1, n), FLOAT32), x, b.emit(folds[norm], x)
    )


@operator("FeatureVectorizer", since=1, domain=ML)
def feature_vectorizer(b: Builder, *inputs: Value, inputdimensions: tuple[int, ...] = ()) -> Value:
    """https://onnx.ai/onnx/operators/onnx_aionnxml_FeatureVectorizer.html"""
    parts = []
    for i, x in enumerate(inputs):
        rows = convert(b, x if x.rank == 2 else b.emit(Reshape((1, *x.shape)), x), FLOAT32)
        wanted, given = (inputdimensions[i] if i < len(inputdimensions) else rows.shape[1]), rows.shape[1]
        if isinstance(wanted, int) and isinstance(given, int) and wanted > given:
            rows = padded(b, rows, (0, 0, 0, wanted - given), (0, 1), "constant")
        elif wanted != given:
            rows = cut(b, rows, {1: (0, 1, wanted)})
        parts.append(rows)
    return concat(b, *parts, axis=1)


@operator("Imputer", since=1, domain=ML)
def imputer(
    b: Builder,
    x: Value,
    *,
    imputed_value_floats: tuple[float, ...] = (),
    imputed_value_int64s: tuple[int, ...] = (),
    replaced_value_float: float = 0.0,
    replaced_value_int64: int = 0,
) -> Value:
    """https://onnx.ai/onnx/operators/onnx_aionnxml_Imputer.html"""
    values: Sequence[float] = imputed_value_floats if is_float(x.dtype) else imputed_value_int64s
    replaced = replaced_value_float if is_float(x.dtype) else replaced_value_int64
    if not values:
        raise InvalidModel(f"Imputer has no values to put into {x.type}")

    def imputed(e: Expr, value: Expr) -> Expr:
        missing = expr.isnan(e) if replaced != replaced else expr.equal(e, replaced)
        return expr.where(missing, value, e)

    return emit_map(b, imputed, x, b.constant(np.array(values, x.dtype)))


@operator("OneHotEncoder", since=1, domain=ML)
def one_hot_encoder(
    b: Builder,
    x: Value,
    *,
    cats_int64s: tuple[int, ...] = (),
    cats_strings: tuple[str, ...] = (),
    zeros: int = 1,
) -> Value:
    """https://onnx.ai/onnx/operators/onnx_aionnxml_OneHotEncoder.html"""
    categories: tuple[Any, ...] = cats_strings if x.dtype == STRING else cats_int64s
    kind = TensorType(FLOAT32, (*x.shape, len(categories)))
    if x.dtype == STRING or not zeros:
        attributes = {"categories": categories, "zeros": bool(zeros)}
        return emit_array(b, encode, lambda b, x, **_: kind, (x,), attributes, host=True, mixes=())[0]
    apart = b.emit(Reshape((*x.shape, 1)), x)
    return emit_map(
        b, lambda e, c: cast(expr.equal(cast(e, INT64), c), FLOAT32), apart, b.constant(np.array(categories, INT64))
    )


def encode(xp: Any, x: Any, *, categories: tuple[Any, ...], zeros: bool) -> Any:
    """A row per element with a 1 where its category is; ValueError for one without, unless `zeros`."""
    columns = {category: column for column, category in enumerate(categories)}
    items = x.ravel() if x.dtype == STRING else x.ravel().astype(np.int64)
    found = np.array([columns.get(item, -1) for item in items.tolist()], np.int64)
    if not zeros and (found < 0).any():
        raise ValueError(f"no category for {items[found < 0][0]!r}")
    return (found[:, None] == np.arange(len(categories))).astype(np.float32).reshape(*x.shape, -1)


@operator("CategoryMapper", since=1, domain=ML)
def category_mapper(
    b: Builder,
    x: Value,
    *,
    cats_int64s: tuple[int, ...],
    cats_strings: tuple[str, ...],
    default_int64: int = -1,
    default_string: str = "_Unused",
) -> Value:
    """https://onnx.ai/onnx/operators/onnx_aionnxml_CategoryMapper.html"""
    numbers, words = np.array(cats_int64s, INT64), np.array([*cats_strings, None], object)[:-1]
    if x.dtype == STRING:
        return mapped(b, x, words, numbers, np.array(default_int64, INT64))
    return mapped(b, x, numbers, words, np.array(default_string, object))


@operator("LabelEncoder", since=1, domain=ML)
def label_encoder_1(
    b: Builder,
    x: Value,
    *,
    classes_strings: tuple[str, ...] = (),
    default_int64: int = -1,
    default_string: str = "_Unused",
) -> Value:
    """https://onnx.ai/onnx/operators/onnx_aionnxml_LabelEncoder.html (strings to their places and back)"""
    places = tuple(range(len(classes_strings)))
    return category_mapper(
        b,
        x,
        cats_int64s=places,
        cats_strings=classes_strings,
        default_int64=default_int64,
        default_string=default_string,
    )


@operator("LabelEncoder", since=2, domain=ML)
def label_encoder(
    b: Builder,
    x: Value,
    *,
    default_float: float = -0.0,
    default_int64: int = -1,
    default_string: str = "_Unused",
    default_tensor: Array | None = None,
    keys_floats: tuple[float, ...] | None = None,
    keys_int64s: tuple[int, ...] | None = None,
    keys_strings: tuple[str, ...] | None = None,
    keys_tensor: Array | None = None,
    values_floats: tuple[float, ...] | None = None,
    values_int64s: tuple[int, ...] | None = None,
    values_strings: tuple[str, ...] | None = None,
    values_tensor: Array | None = None,
) -> Value:
    """https://onnx.ai/onnx/operators/onnx_aionnxml_LabelEncoder.html"""
    keys = _one_table("keys", keys_floats, keys_int64s, keys_strings, keys_tensor)
    values = _one_table("values", values_floats, values_int64s, values_strings, values_tensor)
    if keys.dtype != x.dtype or keys.size != values.size:
        raise InvalidModel(f"{keys.size} keys of {keys.dtype} and {values.size} values for {x.type}")
    plain = {"f": default_float, "i": default_int64, "O": default_string}[values.dtype.kind]
    default = np.array(plain, values.dtype) if default_tensor is None else default_tensor.reshape(())
    return mapped(b, x, keys, values, default)


def _one_table(
    what: str,
    floats: tuple[float, ...] | None,
    integers: tuple[int, ...] | None,
    strings: tuple[str, ...] | None,
    tensor: Array | None,
) -> Array:
    pairs = ((floats, FLOAT32), (integers, INT64), (strings, STRING))
    tables = [np.array([*items, None], object)[:-1].astype(dtype) for items, dtype in pairs if items is not None]
    tables += [tensor.ravel()] if tensor is not None else []
    if len(tables) != 1:
        raise InvalidModel(f"{len(tables)} attributes give {what}, not one")
    return tables[0]


def mapped(b: Builder, x: Value, keys: Array, values: Array, default: Array) -> Value:
    """Every element of x replaced by the value of the last key that equals it, or by the default."""
    kind = TensorType(values.dtype, x.shape)
    operands = (x, *map(b.constant, (keys, values, default)))
    host = STRING in (keys.dtype, values.dtype)
    function = look_up_text if host else look_up
    return emit_array(b, function, lambda b, *_: kind, operands, {}, host=host, mixes=())[0]


def look_up_text(xp: Any, x: Any, keys: Any, values: Any, default: Any) -> Any:
    numbers = {key: number for number, key in enumerate(keys.tolist())}
    found = np.array([numbers.get(item, len(values)) for item in x.ravel().tolist()], np.int64)
    return np.append(values, default[()])[found].reshape(x.shape)


def look_up(xp: Any, x: Any, keys: Any, values: Any, default: Any) -> Any:
    order = xp.argsort(keys, kind="stable")
    ascending = keys[order]
    place = xp.maximum(xp.searchsorted(ascending, x, side="right") - 1, 0)
    nearest = ascending[place]
    hit = (nearest == x) | ((nearest != nearest) & (x != x))
    return xp.where(hit, values[order][place], default)
