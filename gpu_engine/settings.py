"""Options given by OpenVINO's property names: turned into our own, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any

from gpu_engine.options import Options, validated
from gpu_engine.runtime.device import Device
from gpu_engine.runtime.properties import (
    FIXED,
    PER_DEVICE,
    ExecutionMode,
    known,
    refuse_without_effect,
    spelled,
)

PRECISIONS: MappingProxyType[str, str] = MappingProxyType(
    {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "tf32": "tf32"} | {p: p for p in ("fp32", "fp16")}
)
MODES: MappingProxyType[ExecutionMode, str] = MappingProxyType(
    {ExecutionMode.ACCURACY: "fp32", ExecutionMode.PERFORMANCE: "tf32"}
)
"""What a GPU multiplies in under EXECUTION_MODE_HINT; tf32 keeps the range of float32."""


def with_properties(options: Options, properties: Mapping[str, Any]) -> Options:
    """Options with those that `properties` name; ValueError for an unknown one, for a value that cannot be, and where
    an option says something else."""
    merged = options
    for name, value in properties.items():
        if known(name) in _OPTIONS:
            option, read = _OPTIONS[name]
            asked = getattr(validated(**{option: read(name, value)}), option)
            given = getattr(options, option)
            if given not in (_DEFAULTS[option], asked):
                raise ValueError(f"{option}={_shown(given)} and {name}={value!r} collide: give one of them")
            merged = replace(merged, **{option: asked})
        elif name not in _AT_COMPILE:
            raise ValueError(f"{name} can be read, but not set")
    return merged


def precision_of(precision: str | None, properties: Mapping[str, Any]) -> str | None:
    """The precision that is asked for: INFERENCE_PRECISION_HINT, else what EXECUTION_MODE_HINT means, else `precision`.

    ValueError where `precision` and INFERENCE_PRECISION_HINT disagree; it beats the mode.
    """
    asked = None
    if "INFERENCE_PRECISION_HINT" in properties:
        hint = properties["INFERENCE_PRECISION_HINT"]
        asked = PRECISIONS.get(str(hint).lower())
        if asked is None:
            raise ValueError(f"INFERENCE_PRECISION_HINT must be one of {', '.join(PRECISIONS)}, given {hint!r}")
        if precision not in (None, asked):
            raise ValueError(f"precision={precision!r} and INFERENCE_PRECISION_HINT={hint!r} collide: give one of them")
    mode = _mode(properties["EXECUTION_MODE_HINT"]) if "EXECUTION_MODE_HINT" in properties else None
    return asked or precision or (None if mode is None else MODES[mode])


def refuse_ineffective(properties: Mapping[str, Any], device: Device) -> None:
    """ValueError for the first property that would change nothing on the device that was opened."""
    if not properties:
        return
    facts = device.properties()
    for name, value in properties.items():
        if name in FIXED or name in PER_DEVICE:
            refuse_without_effect(
                name, _flag(name, value) if isinstance(_effective(name, facts), bool) else value, device
            )
        if name == "INFERENCE_NUM_THREADS" and _count(name, value) and not facts["USES_THREADS"]:
            raise ValueError(f"{name}={value!r} would have no effect on {device.name}, which computes without threads")
    wants = precision_of(None, properties)
    if wants is not None and PRECISIONS[facts["INFERENCE_PRECISION_HINT"]] != wants:
        names = [name for name in ("INFERENCE_PRECISION_HINT", "EXECUTION_MODE_HINT") if name in properties]
        raise ValueError(
            f"{names[0]}={properties[names[0]]!r} would have no effect on {device.name}, which computes in "
            f"{facts['INFERENCE_PRECISION_HINT']}"
        )


def _effective(name: str, facts: Mapping[str, Any]) -> Any:
    return facts[name] if name in PER_DEVICE else FIXED[name][0]


def _mode(value: Any) -> ExecutionMode:
    if isinstance(value, ExecutionMode):
        return value
    if str(value).upper() not in ExecutionMode.__members__:
        raise ValueError(f"EXECUTION_MODE_HINT must be 'PERFORMANCE' or 'ACCURACY', given {value!r}")
    return ExecutionMode[str(value).upper()]


def _as_it_is(name: str, value: Any) -> Any:
    return value


def _count(name: str, value: Any) -> Any:
    """A number, which may be spelled out."""
    return int(value) if isinstance(value, str) and value.strip().lstrip("-").isdigit() else value


def _flag(name: str, value: Any) -> Any:
    """True or False, which may be spelled as OpenVINO does."""
    words = {"YES": True, "TRUE": True, "NO": False, "FALSE": False}
    if isinstance(value, str) and value.upper() not in words:
        raise ValueError(f"{name} must be True or False, given {value!r}")
    return words[value.upper()] if isinstance(value, str) else value


def _shown(given: Any) -> str:
    return given.name if hasattr(given, "name") else repr(given)


_OPTIONS: dict[str, tuple[str, Callable[[str, Any], Any]]] = {
    "NUM_STREAMS": ("streams", _count),
    "PERFORMANCE_HINT": ("hint", _as_it_is),
    "PERFORMANCE_HINT_NUM_REQUESTS": ("requests", _count),
    "ALLOW_AUTO_BATCHING": ("auto_batching", _flag),
    "AUTO_BATCH_TIMEOUT": ("batch_timeout_ms", spelled),
    "INFERENCE_NUM_THREADS": ("all_threads", _count),
}
_AT_COMPILE = (*_OPTIONS, *FIXED, *PER_DEVICE, "INFERENCE_PRECISION_HINT", "EXECUTION_MODE_HINT")
_DEFAULTS = {field.name: field.default for field in fields(Options)}
