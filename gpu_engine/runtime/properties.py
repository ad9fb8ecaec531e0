"""OpenVINO's property names: what each says about an engine, and what becomes of it when it is set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Any

from gpu_engine.options import Options, PerformanceMode, milliseconds, suggestion
from gpu_engine.plan.plan import Plan
from gpu_engine.runtime.device import Device
from gpu_engine.runtime.memory import budget_of
from gpu_engine.runtime.sizing import HEURISTIC_BATCH, Sizes, is_latency, memory_cap

LIVE = "AUTO_BATCH_TIMEOUT"


class ExecutionMode(IntEnum):
    """Numbered as OpenVINO's EXECUTION_MODE_HINT."""

    PERFORMANCE = 1
    ACCURACY = 2


@dataclass(frozen=True)
class Facts:
    """What properties are read from; `timeout_ms` and `threads` as they are now."""

    options: Options
    sizes: Sizes
    device: Device
    plan: Plan
    timeout_ms: float
    threads: int
    name: str


def read_property(name: str, facts: Facts) -> Any:
    """The value in effect; ValueError for an unknown name."""
    return _READ[known(name)](facts)


def checked_change(name: str, value: Any) -> float:
    """The AUTO_BATCH_TIMEOUT, in milliseconds, that is set on a live engine; ValueError for any other property.

    OpenVINO's is 1000 unless it is set, and 0 switches batching off; ours is 0, at which a free slot takes what waits.
    """
    if known(name) != LIVE:
        raise ValueError(f"only {LIVE} can be changed on a compiled engine, not {name}: compile the model again")
    return milliseconds(LIVE, spelled(LIVE, value))


def spelled(name: str, value: Any) -> Any:
    """The milliseconds that a string spells, as OpenVINO takes them; ValueError if it spells none."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{name} must be a number of milliseconds, given {value!r}") from None


def known(name: str) -> str:
    """The name, if it is one; else ValueError with the closest."""
    if name not in _READ:
        raise ValueError(f"Unsupported config key: {name}{suggestion(str(name), _READ)}")
    return name


def refuse_without_effect(name: str, value: Any, device: Device) -> None:
    """ValueError if a property that nothing here changes is asked to be another than it is."""
    effective = device.properties()[name] if name in PER_DEVICE else FIXED[name][0]
    if str(value).upper() != str(effective).upper():
        reason = PER_DEVICE[name] if name in PER_DEVICE else FIXED[name][1]
        raise ValueError(f"{name}={value!r} would have no effect on {device.name}, where it is {effective!r}: {reason}")


FIXED: MappingProxyType[str, tuple[Any, str]] = MappingProxyType(
    {
        "COMPILATION_NUM_THREADS": (1, "all kernels of a model are compiled together, by one thread"),
        "MODEL_PRIORITY": (
            "MEDIUM",
            "models do not know of each other; requests have priorities, see priority_levels=",
        ),
        "PERF_COUNT": (False, "engines that serve requests do not time single steps"),
        "ENABLE_HYPER_THREADING": (False, "kernels keep a core's arithmetic busy with one thread"),
        "SCHEDULING_CORE_TYPE": ("ANY_CORE", "restrict the process's affinity mask instead"),
        "ENABLE_MMAP": (True, "model files and external data are always mapped"),
        "LOG_LEVEL": ("LOGGING", "levels are those of logging.getLogger('gpu_engine')"),
        "CACHE_MODE": ("OPTIMIZE_SIZE", "kept kernels never hold weights"),
    }
)
"""Compile-time properties with one value on every device, and why."""
PER_DEVICE: MappingProxyType[str, str] = MappingProxyType(
    {
        "CACHE_DIR": "the environment variable GPU_ENGINE_CACHE sets the folder for the whole process",
        "ENABLE_CPU_PINNING": "threads are pinned exactly where no other process shares the cores",
    }
)
"""Compile-time properties that devices have and cannot change, and why."""
DEVICE_FACTS = (
    "LOADED_FROM_CACHE",
    "FULL_DEVICE_NAME",
    "DEVICE_ARCHITECTURE",
    "DEVICE_UUID",
    "OPTIMIZATION_CAPABILITIES",
)


def _hint(facts: Facts) -> PerformanceMode:
    return facts.options.hint or (PerformanceMode.LATENCY if is_latency(facts.options) else PerformanceMode.THROUGHPUT)


def _stream_range(facts: Facts) -> tuple[int, int]:
    return 1, facts.device.stream_limit or max(2, facts.device.auto_streams())


def _request_range(facts: Facts) -> tuple[int, int, int]:
    return 1, facts.sizes.optimal_requests // (facts.sizes.batch.batch * facts.sizes.streams), 1


def _max_batch(facts: Facts) -> int:
    """The most rows that fit the free memory; 1 where other extents decide, or batching is refused."""
    plan = facts.plan
    if plan.batching.refused or plan.symbols != (plan.batching.symbol,):
        return 1
    weights, row_nbytes = facts.device.memory(plan, (1,))
    room = budget_of(facts.options).room(facts.device.free_memory(), weights, loaded=True)
    return memory_cap(room, 0, row_nbytes, facts.sizes.slots_per_device) or 1


def _optimal_batch(facts: Facts) -> int:
    """A power of two: what the device would choose of itself, within the memory; 1 where batching is refused."""
    own = min(HEURISTIC_BATCH, facts.device.batch_limit or HEURISTIC_BATCH)
    best = 1 if facts.plan.batching.refused else own
    if facts.plan.symbols == (facts.plan.batching.symbol,):
        best = min(best, _max_batch(facts))
    return 1 << (best.bit_length() - 1)


def _mode(facts: Facts) -> ExecutionMode:
    exact = facts.device.properties()["INFERENCE_PRECISION_HINT"] == "f32"
    return ExecutionMode.ACCURACY if exact else ExecutionMode.PERFORMANCE


def _of_device(name: str) -> Callable[[Facts], Any]:
    return lambda facts: facts.device.properties()[name]


def _fixed(name: str) -> Callable[[Facts], Any]:
    return lambda facts: FIXED[name][0]


_READ: dict[str, Callable[[Facts], Any]] = {
    "SUPPORTED_PROPERTIES": lambda facts: {name: "RW" if name == LIVE else "RO" for name in _READ},
    "NUM_STREAMS": lambda facts: facts.sizes.streams,
    "PERFORMANCE_HINT": _hint,
    "PERFORMANCE_HINT_NUM_REQUESTS": lambda facts: facts.options.requests or 0,
    "ALLOW_AUTO_BATCHING": lambda facts: facts.sizes.shared,
    LIVE: lambda facts: facts.timeout_ms,
    "INFERENCE_NUM_THREADS": lambda facts: facts.threads,
    "INFERENCE_PRECISION_HINT": _of_device("INFERENCE_PRECISION_HINT"),
    "EXECUTION_MODE_HINT": _mode,
    **{name: _fixed(name) for name in FIXED},
    **{name: _of_device(name) for name in (*PER_DEVICE, *DEVICE_FACTS)},
    "OPTIMAL_NUMBER_OF_INFER_REQUESTS": lambda facts: facts.sizes.optimal_requests,
    "RANGE_FOR_STREAMS": _stream_range,
    "RANGE_FOR_ASYNC_INFER_REQUESTS": _request_range,
    "OPTIMAL_BATCH_SIZE": _optimal_batch,
    "MAX_BATCH_SIZE": _max_batch,
    "NETWORK_NAME": lambda facts: facts.name,
    "EXECUTION_DEVICES": lambda facts: facts.device.properties().get("EXECUTION_DEVICES", (facts.device.name,)),
}
