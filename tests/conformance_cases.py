"""The test suites that the onnx wheel carries, as plain picklable cases."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test.case.node import collect_testcases

SUITES = ("node", "simple", "pytorch-operator", "pytorch-converted", "light")
DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
CACHE = Path(__file__).parent.parent / ".cache"


@dataclass(frozen=True)
class Case:
    """One model with its data sets; each is (inputs by position, expected outputs), None where an optional is empty."""

    suite: str
    name: str
    operator: str
    model: bytes
    data_sets: tuple[tuple[tuple[Any, ...], tuple[Any, ...]], ...]
    rtol: float
    atol: float

    @property
    def label(self) -> str:
        return f"{self.suite}/{self.name}"


def collect(suites: Sequence[str] = SUITES) -> list[Case]:
    """All cases of the suites, ordered by suite and name."""
    return [case for suite in suites for case in sorted(_read(suite), key=lambda case: case.name)]


def matches(case: Case, pattern: str) -> bool:
    """Whether the pattern (a glob, or else a part) fits the case's `suite/name`, or is its operator's name."""
    if any(sign in pattern for sign in "*?["):
        return fnmatch(case.label, pattern) or fnmatch(case.name, pattern)
    return pattern in case.label or pattern == case.operator


def _read(suite: str) -> Iterator[Case]:
    if suite == "node":
        return iter(_node_cases())
    return _light_cases() if suite == "light" else _folder_cases(suite)


def _node_cases() -> list[Case]:
    """The generated cases; generating takes ten seconds, so they are kept in the ignored cache folder."""
    kept = CACHE / f"conformance-onnx{onnx.__version__}-numpy{np.__version__}.pickle"
    if kept.exists():
        cases: list[Case] = pickle.loads(kept.read_bytes())
        return cases
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generated = collect_testcases(None)
    cases = [_node_case(test, {other.name for other in generated}) for test in generated]
    CACHE.mkdir(exist_ok=True)
    partial = kept.with_suffix(".partial")
    partial.write_bytes(pickle.dumps(cases))
    partial.replace(kept)
    return cases


def _node_case(test: Any, names: set[str]) -> Case:
    operators = [node.op_type for node in test.model.graph.node]
    operator = operators[-1] if operators else "none"
    if "_expanded" in test.name:
        operator = f"{test.name.removeprefix('test_').split('_expanded')[0]} (function body)"
    data_sets = tuple((_arrays(inputs), _arrays(outputs)) for inputs, outputs in test.data_sets)
    return Case("node", test.name, operator, test.model.SerializeToString(), data_sets, test.rtol, test.atol)


def _arrays(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value for value in values)


def _folder_cases(suite: str) -> Iterator[Case]:
    for folder in (DATA / suite).iterdir():
        path = folder / "model.onnx"
        if not path.exists():
            continue
        model = onnx.load(path)
        settings = json.loads((folder / "data.json").read_text()) if (folder / "data.json").exists() else {}
        data_sets = tuple(
            (_protos(data, "input", model.graph.input), _protos(data, "output", model.graph.output))
            for data in sorted(folder.glob("test_data_set_*"))
        )
        operator = model.graph.node[-1].op_type if len(model.graph.node) == 1 else "several"
        tolerance = (settings.get("rtol", 1e-3), settings.get("atol", 1e-7))
        yield Case(suite, folder.name, operator, path.read_bytes(), data_sets, *tolerance)


def _protos(folder: Path, kind: str, ports: Sequence[onnx.ValueInfoProto]) -> tuple[Any, ...]:
    count = len(list(folder.glob(f"{kind}_*.pb")))
    return tuple(_proto((folder / f"{kind}_{i}.pb").read_bytes(), ports[i].type) for i in range(count))


def _proto(content: bytes, kind: onnx.TypeProto) -> Any:
    if kind.HasField("sequence_type"):
        return numpy_helper.to_list(onnx.SequenceProto.FromString(content))
    if kind.HasField("optional_type"):
        return numpy_helper.to_optional(onnx.OptionalProto.FromString(content))
    return numpy_helper.to_array(onnx.TensorProto.FromString(content))


def _light_cases() -> Iterator[Case]:
    """Whole networks over a ramp from 0 to 1; tolerances as the wheel states them for the full-size twins."""
    for path in (DATA / "light").glob("light_*.onnx"):
        model = onnx.load(path)
        weights = {tensor.name for tensor in model.graph.initializer}
        inputs = [port.type.tensor_type for port in model.graph.input if port.name not in weights]
        shapes = [tuple(dim.dim_value for dim in kind.shape.dim) for kind in inputs]
        ramps = tuple((np.arange(np.prod(s)).reshape(s) / np.prod(s)).astype(np.float32) for s in shapes)
        expected = onnx.TensorProto.FromString(path.with_name(f"{path.stem}_output_0.pb").read_bytes())
        data_sets = ((ramps, (numpy_helper.to_array(expected),)),)
        name = path.stem.replace("light_", "test_")
        settings = json.loads((DATA / "real" / name / "data.json").read_text())
        yield Case("light", name, "network", path.read_bytes(), data_sets, settings["rtol"], settings["atol"])
