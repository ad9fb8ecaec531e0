"""Every option that a user may give, validated once into a frozen dataclass."""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum, IntEnum
from typing import Any

AUTO = -1
NUMA = -2


class Scheduler(str, Enum):  # noqa: UP042 - StrEnum would change str() and so the read-back of DeepSparse's clients
    """How requests meet streams; equal to its own string, as DeepSparse's scheduler guide promises."""

    single_stream = "single_stream"
    default = "single_stream"
    multi_stream = "multi_stream"
    elastic = "elastic"

    @classmethod
    def of(cls, value: object) -> Scheduler:
        """The member that a spelling names; "" and None are the default; ValueError for anything else."""
        if value is None or value == "":
            return cls.default
        if isinstance(value, cls):
            return value
        if not isinstance(value, str):
            raise ValueError(f"unsupported type for scheduler: {type(value).__name__}")
        if value.lower() not in _SCHEDULERS:
            raise ValueError(f"unsupported Scheduler: {value}")
        return _SCHEDULERS[value.lower()]


_SCHEDULERS = {
    **dict.fromkeys(("sync", "single", "single_stream", "default"), Scheduler.single_stream),
    **dict.fromkeys(("async", "multi", "multi_stream"), Scheduler.multi_stream),
    "elastic": Scheduler.elastic,
}


class PerformanceMode(IntEnum):
    """What an engine is tuned for; numbered as OpenVINO's PERFORMANCE_HINT."""

    LATENCY = 1
    THROUGHPUT = 2
    CUMULATIVE_THROUGHPUT = 3

    @classmethod
    def of(cls, value: object) -> PerformanceMode:
        """The mode that `value` names in any letter case; ValueError or TypeError for anything else."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, str):
            raise TypeError(f"hint must be a string or a PerformanceMode, given {type(value).__name__}")
        if value.upper() not in cls.__members__:
            raise ValueError(f"unsupported hint {value!r}{suggestion(value.upper(), cls.__members__, str.lower)}")
        return cls[value.upper()]


class TimeoutAction(str, Enum):  # noqa: UP042 - as Scheduler
    """What becomes of a request that waited longer than its timeout; as Triton Inference Server's timeout_action."""

    REJECT = "REJECT"
    DELAY = "DELAY"

    @classmethod
    def of(cls, value: object) -> TimeoutAction:
        """The member that `value` names in any letter case; ValueError or TypeError for anything else."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, str):
            raise TypeError(f"timeout_action must be a string or a TimeoutAction, given {type(value).__name__}")
        if value.upper() not in cls.__members__:
            raise ValueError(f"timeout_action must be 'REJECT' or 'DELAY', given {value!r}")
        return cls[value.upper()]


class BatchPolicy(str, Enum):  # noqa: UP042 - as Scheduler
    """How many rows share an execution where `batch` does not say: by the formula, or as OpenVINO's BATCH device."""

    formula = "formula"
    openvino = "openvino"


class Partial(str, Enum):  # noqa: UP042 - as Scheduler
    """How a batch that is not full runs: as one execution, or each of its requests alone, as OpenVINO does."""

    together = "together"
    individual = "individual"


class OutputPlace(str, Enum):  # noqa: UP042 - as Scheduler
    """Where outputs lie: NumPy arrays in the host's memory, or tensors in that of the device."""

    host = "host"
    device = "device"


@dataclass(frozen=True)
class Options:
    """What the caller asked for, normalized; `None` means that it was not given.

    streams           lanes that run at the same time, on each device: a count, "auto" (-1, or 0), "numa" (-2)
    requests          how many requests the caller keeps in flight; 0 or None: unknown
    batch             rows per execution; 0 or None: chosen from requests and streams
    hint              LATENCY or THROUGHPUT; giving streams, requests or batch implies THROUGHPUT
    threads           cores per stream; 0 or None: chosen by the device
    all_threads       cores of all streams together, from which `threads` follows unless it is given
    scheduler         single_stream ignores `streams` and uses one; the others run several
    batch_timeout_ms  how long the oldest request of a batch may wait for the batch to fill; 0: never
    max_queue_size    requests that may wait before submit() raises QueueFull; 0: no limit
    priority_levels   how many priorities there are, 1 the highest; 0: none
    default_timeout   seconds that a request may wait in the queue; 0: for ever
    timeout_action    REJECT: a request that waited longer fails; DELAY: it runs after all that did not
    allow_override    whether a request's own timeout may exceed `default_timeout`
    auto_batching     whether requests may share an execution; None: unless the hint is LATENCY
    memory_fraction   the share of free memory that the arenas of all slots may take together
    memory_limit      bytes that weights and arenas may take on each device; 0 or None: no limit
    batch_policy      "formula", or "openvino": as many rows as requests, which is never fewer than 3 unless it is 1
    partial           "together", or "individual": the requests of a batch that is not full run one after another
    deterministic     a row's bits do not depend on the batch it travelled in
    outputs           "host": NumPy arrays; "device": in the device's memory, where that is not the host's
    warmup            rows are compared singly and together, and batches timed, before or as requests come
    """

    streams: int | None = None
    requests: int | None = None
    batch: int | None = None
    hint: PerformanceMode | None = None
    threads: int | None = None
    all_threads: int | None = None
    scheduler: Scheduler | None = None
    batch_timeout_ms: float = 0.0
    max_queue_size: int = 0
    priority_levels: int = 0
    default_timeout: float = 0.0
    timeout_action: TimeoutAction = TimeoutAction.REJECT
    allow_override: bool = False
    auto_batching: bool | None = None
    memory_fraction: float = 0.9
    memory_limit: int | None = None
    batch_policy: BatchPolicy = BatchPolicy.formula
    partial: Partial = Partial.together
    deterministic: bool = False
    outputs: OutputPlace = OutputPlace.host
    warmup: bool = True


def validated(
    *,
    streams: int | str | None = None,
    requests: int | None = None,
    batch: int | None = None,
    hint: str | PerformanceMode | None = None,
    threads: int | None = None,
    all_threads: int | None = None,
    scheduler: str | Scheduler | None = None,
    batch_timeout_ms: float = 0.0,
    max_queue_size: int = 0,
    priority_levels: int = 0,
    default_timeout: float = 0.0,
    timeout_action: str | TimeoutAction = TimeoutAction.REJECT,
    allow_override: bool = False,
    auto_batching: bool | None = None,
    memory_fraction: float = 0.9,
    memory_limit: int | None = None,
    batch_policy: str | BatchPolicy = BatchPolicy.formula,
    partial: str | Partial = Partial.together,
    deterministic: bool = False,
    outputs: str | OutputPlace = OutputPlace.host,
    warmup: bool = True,
) -> Options:
    """The options checked and normalized; TypeError for a wrong type (a bool is no number), ValueError for a value."""
    return Options(
        streams=_streams(streams),
        requests=_count("requests", requests) or None,
        batch=_count("batch", batch) or None,
        hint=None if hint is None else PerformanceMode.of(hint),
        threads=_count("threads", threads) or None,
        all_threads=_count("all_threads", all_threads) or None,
        scheduler=None if scheduler is None else Scheduler.of(scheduler),
        batch_timeout_ms=milliseconds("batch_timeout_ms", batch_timeout_ms),
        max_queue_size=_count("max_queue_size", max_queue_size) or 0,
        priority_levels=_count("priority_levels", priority_levels) or 0,
        default_timeout=seconds("default_timeout", default_timeout),
        timeout_action=TimeoutAction.of(timeout_action),
        allow_override=_flag("allow_override", allow_override) or False,
        auto_batching=_flag("auto_batching", auto_batching),
        memory_fraction=_fraction("memory_fraction", memory_fraction),
        memory_limit=_count("memory_limit", memory_limit) or None,
        batch_policy=BatchPolicy(_choice("batch_policy", batch_policy, BatchPolicy)),
        partial=Partial(_choice("partial", partial, Partial)),
        deterministic=_flag("deterministic", deterministic) or False,
        outputs=output_place(outputs),
        warmup=_flag("warmup", warmup) or False,
    )


@dataclass(frozen=True)
class DeviceChoice:
    """A device string taken apart: "auto", "cpu" or "cuda", its index, the batch it fixed, whether it said BATCH, and
    which `others` it named beside the index, or whether it named `every` one."""

    kind: str
    index: int = 0
    batch: int | None = None
    batched: bool = False
    others: tuple[int, ...] = ()
    every: bool = False


_DEVICE = re.compile(
    r"(?P<batched>batch:)?(?P<kind>[a-z]+)(?:[:.](?P<index>all|\d+(?:,\d+)*))?(?P<count>\(.*)?", re.DOTALL
)
_KINDS = {"auto": "auto", "cpu": "cpu", "cuda": "cuda", "gpu": "cuda", "interpret": "interpret"}


def parse_device(text: str) -> DeviceChoice:
    """The device that "cuda", "cuda:0", "GPU.1", "cpu", "auto", "BATCH:GPU", "GPU(8)" name, in any letter case, or the
    devices that "cuda:0,2" and "cuda:all" name.

    ValueError if it names none, one twice, or several that are no GPUs, or if a batch in parentheses is not a number
    above 0; TypeError if it is no string.
    """
    if not isinstance(text, str):
        raise TypeError(f"device must be a string, given {type(text).__name__}")
    match = _DEVICE.fullmatch(text.strip().lower())
    if match is None or match["kind"] not in _KINDS:
        near = suggestion(re.sub(r"[^a-z].*", "", text.lower().removeprefix("batch:")), _KINDS)
        raise ValueError(
            f"unknown device {text!r}{near}; devices are auto, cpu, cuda, cuda:N, cuda:N,M, cuda:all and interpret"
        )
    batch = None if match["count"] is None else _device_batch(match["kind"].upper(), match["count"])
    kind, every = _KINDS[match["kind"]], match["index"] == "all"
    index, *others = (0,) if every else map(int, (match["index"] or "0").split(","))
    if kind != "cuda" and (every or others):
        raise ValueError(f"{text!r} names several devices, and only cuda has several")
    if len({index, *others}) <= len(others):
        raise ValueError(f"{text!r} names a device twice")
    return DeviceChoice(kind, index, batch, match["batched"] is not None, tuple(others), every)


def one_batch(device: DeviceChoice, batch: int | None) -> int | None:
    """The batch that the device string or `batch=` fixes; ValueError if they disagree."""
    if device.batch is not None and batch not in (None, 0, device.batch):
        raise ValueError(f"the device string asks for batch {device.batch} and batch= for {batch}: give one of them")
    return device.batch if device.batch is not None else batch


def output_place(value: object) -> OutputPlace:
    """The place that "host" or "device" names; ValueError for anything else."""
    return OutputPlace(_choice("outputs", value, OutputPlace))


def numa_nodes() -> int:
    """How many NUMA nodes this machine has: what "numa" streams count; 1 where the system does not say."""
    return max(1, len(glob.glob("/sys/devices/system/node/node[0-9]*")))


def suggestion(word: str, known: Iterable[str], shown: Any = str) -> str:
    """ "; did you mean ...?" for the closest of the known words, or nothing."""
    by_lower = {name.lower(): name for name in known}
    near = get_close_matches(word.lower(), by_lower, n=1, cutoff=0.5)
    return f"; did you mean {shown(by_lower[near[0]])!r}?" if near else ""


def _device_batch(name: str, text: str) -> int:
    number = re.fullmatch(r"\(\s*(-?\d+)\s*\)", text)
    if number is None:
        raise ValueError(f"Batch value for {name!r} must be a number in parentheses, given {text!r}")
    if int(number[1]) <= 0:
        raise ValueError(f"Batch value for {name!r} must be > 0")
    return int(number[1])


def _count(name: str, value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, given {type(value).__name__}")
    count = int(value.__index__())
    if count < 0:
        raise ValueError(f"{name} must not be negative, given {count}")
    return count


def _choice(name: str, value: object, members: type[Enum]) -> str:
    known = [str(member.value) for member in members]
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, given {value!r}")
    return str(members(value).value)


def _flag(name: str, value: object) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{name} must be True, False or None, given {type(value).__name__}")
    return value


def _streams(value: object) -> int | None:
    if isinstance(value, str):
        if value.lower() not in ("auto", "numa"):
            raise ValueError(f"streams must be a count, 'auto' or 'numa', given {value!r}")
        return AUTO if value.lower() == "auto" else NUMA
    if value is None or (value in (AUTO, NUMA) and not isinstance(value, bool)):
        return None if value is None else int(value)
    return _count("streams", value) or AUTO


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        raise TypeError(f"{name} must be a number, given {type(value).__name__}")
    return float(value)  # type: ignore[arg-type]


def milliseconds(name: str, value: object) -> float:
    """The number, checked; TypeError if it is none, ValueError if it is negative, infinite or NaN."""
    return _time(name, value, "milliseconds")


def seconds(name: str, value: object) -> float:
    """As `milliseconds`."""
    return _time(name, value, "seconds")


def _time(name: str, value: object, unit: str) -> float:
    number = _number(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be a finite number of {unit}, at least 0, given {number}")
    return number


def _fraction(name: str, value: object) -> float:
    number = _number(name, value)
    if not 0 < number <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, given {number}")
    return number
