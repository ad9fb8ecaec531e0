"""The registry against onnxruntime's schemas of com.microsoft: inputs, attributes and their defaults."""

from __future__ import annotations

from inspect import Parameter
from typing import Any

import onnx
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as onnxruntime_state

from gpu_engine.frontend import operators
from gpu_engine.frontend.registry import REGISTRY, Operator

DOMAIN = "com.microsoft"
SCHEMAS = {s.name: s for s in onnxruntime_state.get_all_operator_schema() if s.domain == DOMAIN}
ENTRIES = [entries[0] for (domain, _), entries in sorted(REGISTRY.items()) if domain == DOMAIN]
ABSENT = {
    "BeamSearch", "GreedySearch", "Sampling", "WhisperBeamSearch", "DecoderMaskedMultiHeadAttention",
    "BifurcationDetector",
    "SparseAttention", "SparseToDenseMatMul", "NGramHashMapping", "VarlenNGramHashMapping",
    "AttnLSTM", "WordConvEmbedding", "MaxpoolWithMask", "MatMulFpQ4", "SampleOp",
}  # fmt: skip
"""Operators that onnxruntime's CPU kernels have and the engine lacks: loops of generation that run graphs of their own
and what serves inside them, block-sparse layouts and sparse tensors, hashes of n-grams, and operators that no exporter
writes."""
MEANT = {
    ("Attention", "mask_filter_value"): -10000.0,
    ("MultiHeadAttention", "mask_filter_value"): -10000.0,
    ("QAttention", "mask_filter_value"): -10000.0,
    ("RotaryEmbedding", "scale"): 1.0,
    ("MRotaryEmbedding", "scale"): 1.0,
    ("EmbedLayerNormalization", "mask_index_type"): 1,
    ("DequantizeLinear", "axis"): 1,
    ("QuantizeLinear", "axis"): 1,
}
"""Defaults that the schema tells in words only, or the kernels have."""

LEFT_OUT = {"QMoE": 6}
"""How many of the last inputs have no place: the scales of weights in fp4 and fp8."""


def default_of(attribute: Any) -> Any:
    """The default as Python sees it, None if there is none."""
    proto = onnx.AttributeProto.FromString(attribute._default_value)
    if not proto.type:
        return None
    value = onnx.helper.get_attribute_value(proto)
    return value.decode() if isinstance(value, bytes) else value


def test_only_these_operators_are_missing() -> None:
    assert operators
    kernels = {d.op_name for d in onnxruntime_state.get_all_opkernel_def() if
               d.domain == DOMAIN and d.provider == "CPUExecutionProvider"}  # fmt: skip
    assert kernels - {entry.name for entry in ENTRIES} == ABSENT


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_signatures_are_the_schemas(entry: Operator) -> None:
    schema = SCHEMAS[entry.name]
    kinds = [str(given.option).rpartition(".")[2] for given in schema.inputs]
    assert entry.variadic == ("Variadic" in kinds)
    assert len(entry.inputs) + LEFT_OUT.get(entry.name, 0) == len([kind for kind in kinds if kind != "Variadic"])
    required = max((i + 1 for i, kind in enumerate(kinds) if kind == "Single"), default=0)
    assert entry.required <= required


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_attributes_are_the_schemas(entry: Operator) -> None:
    schema = SCHEMAS[entry.name]
    assert set(entry.attributes) == set(schema.attributes)
    for name, attribute in schema.attributes.items():
        ours, theirs = entry.attributes[name], default_of(attribute)
        if attribute.required:
            assert ours is Parameter.empty, name
            continue
        wanted = MEANT.get((entry.name, name), theirs)
        if wanted is None:
            assert ours in (None, 0, 0.0, (), "", "NONE"), f"{name} is {ours!r}"
        else:
            assert ours == pytest.approx(wanted) if isinstance(wanted, float) else ours == wanted, f"{name} is {ours!r}"
