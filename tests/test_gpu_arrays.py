"""The interpreted GPU's array module: what it refuses, what it notes, and what runs on the host instead."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from gpu_engine.frontend import operators
from gpu_engine.gpu.device_arrays import LIBRARY, METHODS, MISSING, WAITING, DeviceArray, DeviceModule, UndefinedResult
from gpu_engine.gpu.launches import ArrayCall
from gpu_engine.ir.dtypes import BY_ONNX_NUMBER, FLOAT32, STRING
from gpu_engine.ir.expr import arg, erf
from gpu_engine.ir.graph import TensorType
from gpu_engine.ir.ops import Map, Reduce
from gpu_engine.ir.ops.array import Array
from tests.gpu_runner import execute, graph_of, lowered


@pytest.fixture
def xp() -> DeviceModule:
    return DeviceModule()


def device(xp: DeviceModule, values: Any) -> DeviceArray:
    made: DeviceArray = xp.on_device(np.array(values))
    return made


def host(xp: DeviceModule, array: DeviceArray) -> Any:
    assert type(array) is DeviceArray
    return xp.on_host(array)


def test_what_it_computes_stays_on_the_device(xp: DeviceModule) -> None:
    x = device(xp, [[1.0, 2.0], [3.0, 4.0]])
    for found, expected in (
        (np.float64(2) * x + 1, [[3, 5], [7, 9]]), (np.exp(x - x), [[1, 1], [1, 1]]), (x.sum(axis=1), [3, 7]),
        (x.max(), 4), (x[0, 1], 2), (x.T[1], [2, 4]), (xp.where(x > 2, x, 0), [[0, 0], [3, 4]]),
        (np.where(x > 2, x, 0), [[0, 0], [3, 4]]), (xp.stack([x[0], x[1]]), [[1, 2], [3, 4]]),
        (x[xp.arange(2), device(xp, [1, 0])], [2, 3]), (xp.fft.fft(x[0]).real, [3, -1]),
    ):  # fmt: skip
        np.testing.assert_array_equal(host(xp, found), expected)
    x += 1
    x[0] = 0
    np.testing.assert_array_equal(host(xp, x), [[0, 0], [4, 5]])
    assert not xp.notes


REFUSED: list[tuple[type[Exception], str, Callable[[DeviceModule, DeviceArray], Any]]] = [
    (TypeError, "implicit conversion", lambda xp, x: np.asarray(x)),
    (TypeError, "of the host", lambda xp, x: x + np.ones(3)),
    (TypeError, "of the host", lambda xp, x: np.add(x, [1, 2, 3])),
    (TypeError, "of the host", lambda xp, x: x[np.array([0, 1])]),
    (TypeError, "of the host", lambda xp, x: x[[0, 1]]),
    (TypeError, "of the host", lambda xp, x: x.__setitem__(0, np.ones(3))),
    (TypeError, "of the host", lambda xp, x: xp.concatenate([x, np.ones(3)])),
    (TypeError, "use stack", lambda xp, x: xp.asarray([x[0], x[1]])),
    (TypeError, "takes no", lambda xp, x: x.max(initial=0.0)),
    (NotImplementedError, "cupy.maximum.reduce", lambda xp, x: np.maximum.reduce(x)),
    (NotImplementedError, "cupy.multiply.at", lambda xp, x: np.multiply.at(x, device(xp, [0]), 2.0)),
    (NotImplementedError, "cupy.subtract.accumulate", lambda xp, x: xp.subtract.accumulate(x)),
    (AttributeError, "no insert", lambda xp, x: np.insert(x, 0, 1)),
    (AttributeError, "no unstack", lambda xp, x: xp.unstack),
    (AttributeError, r"no linalg\.vector_norm", lambda xp, x: xp.linalg.vector_norm),
    (AttributeError, "no tofile", lambda xp, x: x.tofile),
    (IndexError, "out of bounds", lambda xp, x: x[device(xp, [3])]),
    (IndexError, "out of bounds", lambda xp, x: xp.take(x, device(xp, [-4]))),
    (UndefinedResult, "to one place", lambda xp, x: x.__setitem__(device(xp, [1, 1]), device(xp, [1.0, 2.0]))),
    (UndefinedResult, "does not hold", lambda xp, x: (x / 0).astype(np.int32)),
    (UndefinedResult, "does not hold", lambda xp, x: (-x).astype(np.uint8)),
    (UndefinedResult, "does not hold", lambda xp, x: xp.asarray(x * 1e19, np.int64)),
]


@pytest.mark.parametrize(("kind", "text", "use"), REFUSED)
def test_what_it_refuses(xp: DeviceModule, kind: type[Exception], text: str, use: Any) -> None:
    with np.errstate(all="ignore"), pytest.raises(kind, match=text):
        use(xp, device(xp, [1.0, 2.0, 3.0]))


NOTED: list[tuple[tuple[str, str], Callable[[DeviceModule, DeviceArray], Any]]] = [
    (("waits", "bool()"), lambda xp, x: bool(x[0])),
    (("waits", "int()"), lambda xp, x: int(x[0])),
    (("waits", "float()"), lambda xp, x: float(x[0])),
    (("waits", "index"), lambda xp, x: [1, 2][device(xp, 1)]),
    (("waits", "item()"), lambda xp, x: x[0].item()),
    (("waits", "tolist()"), lambda xp, x: x.tolist()),
    (("waits", "nonzero"), lambda xp, x: xp.nonzero(x)),
    (("waits", "nonzero"), lambda xp, x: x.nonzero()),
    (("waits", "where"), lambda xp, x: xp.where(x > 1)),
    (("waits", "unique"), lambda xp, x: np.unique(x)),
    (("waits", "boolean mask"), lambda xp, x: x[x > 1]),
    (("waits", "boolean mask"), lambda xp, x: x.__setitem__(x > 1, device(xp, [1.0, 1.0]))),
    (("waits", "repeat"), lambda xp, x: xp.repeat(x, device(xp, [1, 2, 0]))),
    (("library", "matmul"), lambda xp, x: x @ x),
    (("library", "einsum"), lambda xp, x: xp.einsum("i,i", x, x)),
    (("library", "linalg.det"), lambda xp, x: xp.linalg.det(x.reshape(1, 3).T * x)),
    (("uploads", "asarray"), lambda xp, x: xp.asarray(np.ones(3))),
]


@pytest.mark.parametrize(("note", "use"), NOTED)
def test_what_it_notes(xp: DeviceModule, note: tuple[str, str], use: Any) -> None:
    x = device(xp, [1.0, 2.0, 3.0])
    use(xp, x)
    assert note in xp.notes


def test_a_mask_that_one_value_fills_waits_for_nothing(xp: DeviceModule) -> None:
    x = device(xp, [1.0, 2.0, 3.0])
    x[x > 1] = 0
    assert not xp.notes and host(xp, x).tolist() == [1, 0, 0]


def test_the_lists_are_those_of_the_cupy_that_is_installed() -> None:
    cupy = pytest.importorskip("cupy")
    places = {"": (np, cupy), "linalg.": (np.linalg, cupy.linalg), "fft.": (np.fft, cupy.fft)}
    for place, (ours, theirs) in places.items():
        functions = {
            name for name in dir(ours)
            if not name.startswith("_") and callable(getattr(ours, name)) and not isinstance(getattr(ours, name), type)
        }  # fmt: skip
        lacking = {name for name in functions if not hasattr(theirs, name)} - {"test"}
        assert lacking <= {name.removeprefix(place) for name in MISSING if name.startswith(place)}, place
    assert all(hasattr(cupy, name) for name in LIBRARY)
    assert all(hasattr(cupy.ndarray, name) for name in METHODS)
    assert {name for name in WAITING if hasattr(np, name) and not hasattr(cupy, name)} <= {
        "average", "quantile", "percentile", "isin", "unique_all", "unique_counts", "unique_inverse", "unique_values",
    }  # fmt: skip


def reason(op: Any, *kinds: TensorType) -> str:
    """Why the one step of an operation runs on the host; empty if it does not."""
    (step,) = lowered(graph_of(op, kinds)).steps
    return step.kernel.host if isinstance(step.kernel, ArrayCall) else ""


def test_why_a_reference_runs_on_the_host() -> None:
    floats = TensorType(FLOAT32, (3,))
    narrow = TensorType(BY_ONNX_NUMBER[19], (3,))
    strings = TensorType(STRING, (3,))

    def doubled(xp: Any, x: Any) -> Any:
        return x + x

    assert reason(Array(doubled, (floats,)), floats) == ""
    assert reason(Array(doubled, (floats,), host=True), floats) == "written for the host"
    assert reason(Array(doubled, (strings,)), strings) == "strings"
    assert reason(Array(doubled, (narrow,)), narrow) == "CuPy has no float8_e5m2"
    assert reason(Array(doubled, (floats,), (("reduction", "mul"),)), floats) == "CuPy has no multiply.at"
    curved = Reduce("prod", (0,), False, erf(arg(0, BY_ONNX_NUMBER[1])))
    step = lowered(graph_of(curved, [floats])).steps[0]
    assert not isinstance(step.kernel, ArrayCall) or step.kernel.host == "CuPy has no erf"


def test_elements_that_cupy_does_not_know_come_and_go_as_bits() -> None:
    for number in (16, 17, 19, 22):
        dtype = BY_ONNX_NUMBER[number]
        values = np.array([0, 1, 2], np.float32).astype(dtype)
        plan = lowered(graph_of(Map(arg(0, dtype)), [TensorType(dtype, (3,))]))
        (found,) = execute(plan, [values])
        assert found.dtype == dtype
        np.testing.assert_array_equal(found.view(np.uint8), values.view(np.uint8))


HOSTED = {
    "_align_rois": "loops over regions",
    "_bernoulli": "NumPy's stream of random numbers",
    "_decode_image": "Pillow decodes",
    "_drop": "NumPy's stream of random numbers",
    "_equal_strings": "strings",
    "_mel_weights": "a table made from a few numbers",
    "_multinomial": "NumPy's stream of random numbers",
    "_pick": "strings",
    "_pool_rois": "loops over regions",
    "_sample": "NumPy's stream of random numbers",
    "_where_strings": "strings",
    "conversion.function": "strings",
    "DynamicTimeWarping": "a path through a table, place after place",
    "encode": "strings, or an error for a category that is missing",
    "look_up_text": "strings",
    "ml_features.function": "strings",
    "NonMaxSuppression": "loops over boxes where it has no limit; else a kernel",
    "pick_columns": "strings",
    "RegexFullMatch": "strings",
    "spread": "strings",
    "StringConcat": "strings",
    "StringNormalizer": "strings",
    "StringSplit": "strings",
    "TfIdfVectorizer": "strings",
    "Tokenizer": "strings",
}
"""What is written for the host, and why."""


def test_what_is_written_for_the_host() -> None:
    found = set()
    for path in Path(operators.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and any(keyword.arg == "host" for keyword in node.keywords):
                named = node.args[1] if ast.unparse(node.func) == "emit_array" else node.args[0]
                name = named.value if isinstance(named, ast.Constant) else ast.unparse(named)
                found.add(f"{path.stem}.function" if name == "function" else name)
    assert found == set(HOSTED)
