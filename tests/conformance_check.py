"""Run one conformance case through the engine and say how the result differs from the expected one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

import gpu_engine
from tests.conformance_cases import Case


def check(case: Case, device: str, repeats: int = 1) -> str:
    """Empty if every data set gives the expected outputs each time, else what differs; raises what the engine
    raises."""
    model = onnx.load_model_from_string(case.model)
    weights = {tensor.name for tensor in model.graph.initializer}
    ports = [port.name for port in model.graph.input]
    required = [name for name in ports if name not in weights]
    outputs = [port.name for port in model.graph.output]
    with gpu_engine.compile(case.model, device=device) as engine:
        for inputs, expected in (data for _ in range(repeats) for data in case.data_sets):
            names = required if len(inputs) == len(required) else ports[: len(inputs)]
            result = engine.run(dict(zip(names, inputs, strict=True)))
            found = difference([result[name] for name in outputs], list(expected), case.rtol, case.atol)
            if found:
                return found
    return ""


def difference(actual: Any, expected: Any, rtol: float, atol: float, where: str = "outputs") -> str:
    """Empty if equal in kind, length, dtype, shape and, within the tolerance and with NaN equal to NaN, value."""
    if expected is None or actual is None:
        return "" if actual is expected else f"{where}: {_kind(actual)} instead of {_kind(expected)}"
    if isinstance(expected, Mapping):
        if not isinstance(actual, Mapping) or set(actual) != set(expected):
            return f"{where}: {_kind(actual)} instead of {_kind(expected)}"
        pairs = [(f"{where}[{key!r}]", actual[key], expected[key]) for key in expected]
    elif isinstance(expected, Sequence) and not isinstance(expected, str | bytes):
        if not isinstance(actual, list | tuple) or len(actual) != len(expected):
            return f"{where}: {_kind(actual)} instead of {_kind(expected)}"
        pairs = [(f"{where}[{i}]", a, e) for i, (a, e) in enumerate(zip(actual, expected, strict=True))]
    else:
        return _array_difference(actual, np.asarray(expected), rtol, atol, where)
    return next((found for name, a, e in pairs if (found := difference(a, e, rtol, atol, name))), "")


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray | np.generic):
        return f"{value.dtype}{list(value.shape)}"
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, Sequence | Mapping) else repr(value)


def _array_difference(actual: Any, expected: np.ndarray[Any, Any], rtol: float, atol: float, where: str) -> str:
    if not isinstance(actual, np.ndarray | np.generic):
        return f"{where}: {_kind(actual)} instead of an array"
    if expected.dtype.kind in "USO":
        return _string_difference(np.asarray(actual), expected, where)
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return f"{where}: {_kind(actual)} instead of {_kind(expected)}"
    if expected.size == 0 or (exact := np.asarray(actual) == expected).all():
        return ""
    if expected.dtype.kind == "b":
        return f"{where}: {int((~exact).sum())} of {expected.size} differ"
    wide = np.complex128 if expected.dtype.kind == "c" else np.float64
    a, e = np.asarray(actual).astype(wide), expected.astype(wide)
    rtol = max(rtol, 2**-6) if expected.dtype.name == "bfloat16" else rtol
    with np.errstate(invalid="ignore"):
        close = np.isclose(a, e, rtol=rtol, atol=atol, equal_nan=True) | exact
        if close.all():
            return ""
        worst = np.nanmax(np.where(close, 0, np.abs(a - e)))
    first = np.unravel_index(int(np.argmin(close)), close.shape)
    at = f"first at {[int(i) for i in first]}: {a[first]} instead of {e[first]}"
    return f"{where}: {int((~close).sum())} of {close.size} differ, at most by {worst:.3g}, {at}"


def _string_difference(actual: np.ndarray[Any, Any], expected: np.ndarray[Any, Any], where: str) -> str:
    texts = [[_text(item) for item in array.ravel()] for array in (actual, expected)]
    if actual.shape != expected.shape or actual.dtype.kind not in "UO":
        return f"{where}: {_kind(actual)} instead of strings{list(expected.shape)}"
    return "" if texts[0] == texts[1] else f"{where}: {texts[0][:4]} instead of {texts[1][:4]}"


def _text(item: Any) -> Any:
    return item.decode() if isinstance(item, bytes) else str(item) if isinstance(item, np.str_) else item
