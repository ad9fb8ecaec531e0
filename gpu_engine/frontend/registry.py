"""The registry of ONNX operators: one function per operator and version range, filled at import.

    @pointwise("Gelu", since=20)                 one Expr per element: devices, folding and fusion follow
    def gelu(x, *, approximate="none"): ...

    @operator("Softmax", since=13)               made of engine operations
    def softmax(b, x, *, axis=-1): return b.emit(ops.Softmax(...), x)

    @array_operator("NonZero", since=9, infer=rule)   the long tail, over an array module
    def non_zero(xp, x): ...

A function's signature is the operator's: positional parameters are the inputs (default None: optional; `*xs`:
variadic), keyword-only parameters are the attributes with the specification's defaults (no default: required). Three
names are not attributes: `output_count` receives how many outputs the node asks for, `version` that of the opset,
`bodies` what emits graph attributes. A function serves every opset from `since` until the next registration of the
same name, or to the newest.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.attributes import kind_of, of_kind
from gpu_engine.frontend.sequences import Emitted
from gpu_engine.ir import expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import STRING, DType
from gpu_engine.ir.graph import Builder, TensorType, Value
from gpu_engine.ir.ops.array import Array, unbound_symbols
from gpu_engine.ir.ops.pointwise import Map

Emit = Callable[..., Emitted | Sequence[Emitted | None]]
Emitter = TypeVar("Emitter", bound=Emit)
SPECIAL = ("output_count", "version", "bodies")


@dataclass(frozen=True)
class Operator:
    """A registered operator: how it reads inputs and attributes, what emits it, and the function it is written as."""

    domain: str
    name: str
    since: int
    lowering: str
    emit: Emit
    function: Callable[..., Any]
    inputs: tuple[str, ...]
    required: int
    variadic: bool
    attributes: Mapping[str, Any]
    special: tuple[str, ...]
    document: str


REGISTRY: dict[tuple[str, str], list[Operator]] = {}
"""Operators by (domain, name), ascending in `since`."""


def lookup(domain: str, name: str, version: int) -> Operator | None:
    """The operator that serves opset `version`, or None."""
    serving = [entry for entry in REGISTRY.get((domain, name), ()) if entry.since <= version]
    return serving[-1] if serving else None


def operator(name: str, *, since: int, domain: str = "") -> Callable[[Emitter], Emitter]:
    """Register `function(b, *inputs, *, attributes)`, which emits engine operations through the builder `b`."""

    def register(function: Emitter) -> Emitter:
        _register(name, since, domain, "composed", function, function, skip=1)
        return function

    return register


def pointwise(
    name: str, *, since: int, domain: str = ""
) -> Callable[[Callable[..., expr.Expr]], Callable[..., expr.Expr]]:
    """Register a function of Exprs; inputs broadcast and the result is one Map."""

    def register(function: Callable[..., expr.Expr]) -> Callable[..., expr.Expr]:
        def emit(b: Builder, *inputs: Value | None, **attributes: Any) -> Value:
            return emit_map(b, function, *inputs, **attributes)

        _register(name, since, domain, "pointwise", emit, function, skip=0)
        return function

    return register


def array_operator(
    name: str,
    *,
    since: int,
    infer: Callable[..., TensorType | tuple[TensorType, ...]],
    domain: str = "",
    host: bool = False,
    deterministic: bool = True,
    mixes: tuple[int, ...] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function over `xp`; `infer(b, *inputs, **attributes)` gives the output types (b.fresh_dim() for an
    extent that only running tells). For `mixes` see `ir.ops.array.Array`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def emit(b: Builder, *inputs: Value | None, **attributes: Any) -> Sequence[Value]:
            return emit_array(
                b, function, infer, inputs, attributes, host=host, deterministic=deterministic, mixes=mixes
            )

        _register(name, since, domain, "host" if host else "array", emit, function, skip=1)
        return function

    return register


def emit_array(
    b: Builder,
    function: Callable[..., Any],
    infer: Callable[..., TensorType | tuple[TensorType, ...]],
    inputs: Sequence[Value | None],
    attributes: Mapping[str, Any],
    *,
    host: bool = False,
    deterministic: bool = True,
    mixes: tuple[int, ...] | None = None,
    aligned: int = 1,
) -> tuple[Value, ...]:
    """One Array node of `function`, with the output types that `infer` tells."""
    types = infer(b, *inputs, **attributes)
    outputs = types if isinstance(types, tuple) else (types,)
    given = tuple(value for value in inputs if value is not None)
    op = Array(
        function,
        outputs,
        attributes=tuple(attributes.items()),
        present=tuple(value is not None for value in inputs),
        binds=unbound_symbols(outputs, tuple(value.type for value in given)),
        deterministic=deterministic,
        host=host or any(value.dtype == STRING for value in given),
        mixes=mixes,
        aligned=aligned,
    )
    return b.emit_all(op, *given)


def emit_map(b: Builder, function: Callable[..., expr.Expr], *inputs: Value | None, **attributes: Any) -> Value:
    """One Map of `function` over the inputs' elements; constants of one element become literals."""
    given = [value for value in inputs if value is not None]
    operands = [value for value in given if not _is_literal(value, given)] or given[:1]
    exprs: list[expr.Expr | None] = []
    for value in inputs:
        if value is None:
            exprs.append(None)
        elif value in operands:
            exprs.append(expr.arg(operands.index(value), value.dtype))
        else:
            assert value.known is not None
            exprs.append(expr.const(value.known.ravel()[0], value.dtype))
    try:
        return b.emit(Map(function(*exprs, **attributes)), *operands)
    except TypeError as error:
        raise InvalidModel(f"{b.source}: {error}") from error


def _is_literal(value: Value, given: Sequence[Value]) -> bool:
    constant = value.constant
    if constant is None or constant.size != 1 or value.dtype == STRING:
        return False
    return value.rank <= max((other.rank for other in given if other.constant is None), default=-1)


def constant_ints(value: Value | None, what: str) -> list[Dim] | None:
    """The extents that a 1-d or 0-d integer value is known to hold, None if absent; InvalidModel if not known."""
    if value is None:
        return None
    if value.known is None:
        raise InvalidModel(f"{what} must be known when the model is compiled")
    return [item if value.symbolic else int(item) for item in value.known.ravel()]


def normal_axis(axis: int, rank: int) -> int:
    """axis in [0, rank); InvalidModel outside [-rank, rank)."""
    if not -rank <= axis < max(rank, 1):
        raise InvalidModel(f"axis {axis} is outside a tensor of {rank} axes")
    return axis + rank if axis < 0 else axis


def scalar(b: Builder, value: float | int | bool, dtype: DType) -> Value:
    """A 0-d constant."""
    return b.constant(expr.const(value, dtype).value)


def _register(
    name: str, since: int, domain: str, lowering: str, emit: Emit, function: Callable[..., Any], skip: int
) -> None:
    parameters = list(inspect.signature(function).parameters.values())[skip:]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    entry = Operator(
        domain=domain,
        name=name,
        since=since,
        lowering=lowering,
        emit=emit,
        function=function,
        inputs=tuple(p.name for p in positional),
        required=sum(p.default is p.empty for p in positional),
        variadic=any(p.kind is p.VAR_POSITIONAL for p in parameters),
        attributes={p.name: p.default for p in keywords if p.name not in SPECIAL},
        special=tuple(p.name for p in keywords if p.name in SPECIAL),
        document=(function.__doc__ or "").strip(),
    )
    entries = REGISTRY.setdefault((domain, name), [])
    if any(other.since == since for other in entries):
        raise ValueError(f"{domain}::{name} since {since} is registered twice")
    entries.append(entry)
    entries.sort(key=lambda other: other.since)


def bind_attributes(entry: Operator, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments for `entry.emit`; InvalidModel for an attribute it lacks or misses, or of another kind."""
    unknown = sorted(set(given) - set(entry.attributes))
    if unknown:
        raise InvalidModel(f"attribute {', '.join(unknown)} is not one of {entry.name} (opset {entry.since})")
    missing = [n for n, default in entry.attributes.items() if default is inspect.Parameter.empty and n not in given]
    if missing:
        raise InvalidModel(f"{entry.name} needs the attribute {', '.join(missing)}")
    for attribute, value in given.items():
        if not of_kind(entry.function, attribute, value):
            raise InvalidModel(f"attribute {attribute} of {entry.name} is {kind_of(value)}, which it cannot be")
    return dict(given)
