"""The registry against the specification: every operator from opset 7 on, its inputs, attributes and their defaults."""

from __future__ import annotations

from inspect import Parameter
from typing import Any

import onnx
import pytest
from onnx.defs import OpSchema

from gpu_engine.frontend import operators
from gpu_engine.frontend.reader import SpecificationFunctions
from gpu_engine.frontend.registry import Operator, lookup

ABSENT = {"Gradient"}
"""Automatic differentiation, for training."""
OPTIONAL_BY_MISTAKE = {
    ("CategoryMapper", "cats_int64s"),
    ("CategoryMapper", "cats_strings"),
    ("LinearRegressor", "coefficients"),
}
"""Attributes that the specification forgets to require."""
EQUAL_DEFAULTS = {("GridSample", "mode"), ("RNN", "activations")}
"""Defaults that mean what the specification's do in other words."""


def schemas() -> list[tuple[OpSchema, int]]:
    """Every form of every operator that a model of opset 7 or newer can use, and an opset that has it."""
    history = [schema for schema in onnx.defs.get_all_schemas_with_history() if not schema.deprecated]
    newest = {(s.domain, s.name): s.since_version for s in history if s.domain == "" and s.since_version <= 7}
    for s in history:
        if s.domain == "" and s.since_version <= 7:
            newest[s.domain, s.name] = max(newest[s.domain, s.name], s.since_version)
    return [
        (s, s.since_version if s.domain else max(7, s.since_version))
        for s in history
        if s.domain or s.since_version >= newest.get((s.domain, s.name), 0)
    ]


def default_of(attribute: OpSchema.Attribute) -> Any:
    """The default as Python sees it, None if there is none."""
    if not attribute.default_value.type:
        return None
    value = onnx.helper.get_attribute_value(attribute.default_value)
    if isinstance(value, list):
        return tuple(item.decode() if isinstance(item, bytes) else item for item in value)
    return value.decode() if isinstance(value, bytes) else value


def registered() -> list[tuple[OpSchema, Operator]]:
    found = [(schema, lookup(schema.domain, schema.name, version)) for schema, version in schemas()]
    return [(schema, entry) for schema, entry in found if entry is not None]


def test_every_operator_has_a_form() -> None:
    assert operators
    bodies = SpecificationFunctions()
    missing = {
        schema.name if schema.name != "Scan" else f"Scan-{schema.since_version}"
        for schema, version in schemas()
        if lookup(schema.domain, schema.name, version) is None and not bodies.has(schema.domain, schema.name, version)
    }
    assert missing == ABSENT


def test_every_input_and_attribute_is_taken() -> None:
    for schema, entry in registered():
        assert set(schema.attributes) <= set(entry.attributes), f"{schema.name}-{schema.since_version}"
        variadic = any(port.option == OpSchema.FormalParameterOption.Variadic for port in schema.inputs)
        assert entry.variadic or variadic or len(schema.inputs) <= len(entry.inputs), (
            f"{schema.name}-{schema.since_version}"
        )


def test_defaults_are_the_specifications() -> None:
    for schema, entry in registered():
        for name, attribute in schema.attributes.items():
            ours, theirs = entry.attributes[name], default_of(attribute)
            if (schema.name, name) in EQUAL_DEFAULTS | OPTIONAL_BY_MISTAKE:
                continue
            assert attribute.required or ours is not Parameter.empty, f"{schema.name}-{schema.since_version}.{name}"
            if theirs is not None:
                expected = pytest.approx(theirs, rel=1e-6) if isinstance(theirs, float) else theirs
                assert ours == expected, f"{schema.name}-{schema.since_version}.{name}"
