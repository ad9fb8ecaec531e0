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
    """What onnxruntime computes, without saturating sums of products of bytes, and without fusing where there are none.

    Exact products of bytes are the work of one of its extended transformations, others of which fuse, or crash.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_EXTENDED if _has_bytes(model) else levels.ORT_DISABLE_ALL
    options.add_session_config_entry("session.x64quantprecision", "1")
    first = next(iter(inputs.values()), np.empty(0))
    known = {name: array for name, array in inputs.items() if np.int8 == array.dtype != first.dtype}
    session = onnxruntime.InferenceSession(
        _knowing(model, known).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, {name: array for name, array in inputs.items() if name not in known}))


def _knowing(model: onnx.ModelProto, known: Mapping[str, Array]) -> onnx.ModelProto:
    """The model with some inputs as weights: it is those whose products that transformation makes exact."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    ports = [port for port in result.graph.input if port.name not in known]
    del result.graph.input[:]
    result.graph.input.extend(ports)
    result.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in known.items())
    return result


def _has_bytes(model: onnx.ModelProto) -> bool:
    kinds = [tensor.data_type for tensor in model.graph.initializer]
    kinds += [port.type.tensor_type.elem_type for port in model.graph.input]
    return onnx.TensorProto.INT8 in kinds


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
