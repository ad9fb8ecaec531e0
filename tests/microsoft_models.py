"""Models of one com.microsoft node: onnxruntime, the reference and the optimised graph must agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from gpu_engine.passes.pipeline import optimize
from tests.one_node import graph_of, model_of
from tests.reference import run_graph

Array = NDArray[Any]
Inputs = Mapping[str, Array | None]
DOMAIN = "com.microsoft::"
TIES = 0.05
"""How many of the quantised results may round the other way."""


def numbers(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def integers(low: int, high: int, *shape: int, seed: int = 0, dtype: Any = np.int64) -> Array:
    """From [low, high)."""
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def node_model(
    name: str,
    inputs: Inputs,
    attributes: Mapping[str, Any],
    outputs: int | Sequence[int] = 1,
    known: Sequence[str] = (),
    free: Sequence[str] = (),
    version: int = 1,
) -> onnx.ModelProto:
    """As model_of; `outputs` are a count or the numbers of the outputs that are asked for."""
    wanted = range(outputs) if isinstance(outputs, int) else outputs
    full = name if "::" in name else DOMAIN + name
    model = model_of(full, inputs, attributes, version, max(wanted) + 1, known, free)
    for number in set(range(max(wanted) + 1)) - set(wanted):
        model.graph.node[0].output[number] = ""
    ports = [model.graph.output[number] for number in wanted]
    del model.graph.output[:]
    model.graph.output.extend(ports)
    return model


def onnxruntime_exactly(model: onnx.ModelProto, inputs: Mapping[str, Array]) -> list[Any]:
    """What onnxruntime computes, without fusing and without saturating sums of products of bytes."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(inputs)))


def agree(
    name: str,
    inputs: Inputs,
    outputs: int | Sequence[int] = 1,
    known: Sequence[str] = (),
    *,
    rtol: float = 1e-4,
    atol: float = 2e-5,
    steps: int = 0,
    version: int = 1,
    fixed: Sequence[str] = (),
    expected: Sequence[Array] | None = None,
    **attributes: Any,
) -> None:
    """onnxruntime (or `expected`) and the node give the same: with the extents of the inputs given and left open, with
    `known` inputs as initializers or not, with those in `fixed` always, as imported and as optimised. A few integers
    may differ by `steps`."""
    given = {key: array for key, array in inputs.items() if array is not None}

    def fed(held: Sequence[str]) -> dict[str, Array]:
        return {key: array for key, array in given.items() if key not in held}

    if expected is None:
        model = node_model(name, inputs, attributes, outputs, fixed, (), version)
        expected = onnxruntime_exactly(model, fed(fixed))
    known = (*fixed, *known)
    for held, free in ((known, ()), (known, tuple(fed(known))), (fixed, ()), (tuple(given), ())):
        graph = graph_of(node_model(name, inputs, attributes, outputs, held, free, version))
        for form in (graph, optimize(graph)):
            for actual, wanted in zip(run_graph(form, fed(held)).values(), expected, strict=True):
                close(actual, wanted, rtol, atol, steps)


def close(actual: Array, wanted: Array, rtol: float, atol: float, steps: int = 0) -> None:
    """The same type and shape; integers at most `steps` apart, and few so, floats within the tolerance."""
    assert (actual.dtype, actual.shape) == (wanted.dtype, wanted.shape)
    if wanted.dtype == object:
        assert actual.tolist() == wanted.tolist()
    elif wanted.dtype.kind in "iub":
        apart = np.abs(actual.astype(np.int64) - wanted.astype(np.int64))
        assert apart.max(initial=0) <= steps, f"{(apart > steps).sum()} of {apart.size} differ by up to {apart.max()}"
        assert np.count_nonzero(apart) <= max(2, apart.size * TIES), f"{np.count_nonzero(apart)} of {apart.size} differ"
    else:
        wide = np.float64 if wanted.dtype != ml_dtypes.bfloat16 else np.float32
        np.testing.assert_allclose(actual.astype(wide), wanted.astype(wide), rtol=rtol, atol=atol)
