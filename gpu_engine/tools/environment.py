"""What a measurement was taken on: processor, cores, memory, versions, and the engine's effective settings."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cpu_fallback.cores import usable_cores
from cpu_fallback.native import host
from gpu_engine.runtime.engine import Engine

PACKAGES = ("gpu-engine", "numpy", "onnx", "llvmlite", "triton", "cupy-cuda13x", "cupy-cuda12x")


@dataclass(frozen=True)
class Environment:
    """The machine and the software; `cores` says how many of them this process may use and why, `quota` is in cores."""

    date: str
    processor: str
    cores: int
    logical_cores: int
    quota: float | None
    memory_nbytes: int
    system: str
    python: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Settings:
    """What an engine came to use, whatever was asked for: see `BatchPlan` for `limiting_factor`.

    `in_flight` requests are kept in flight by a closed loop; `rows` is what one request holds.
    """

    device: str
    streams: int
    batch: int
    batch_reason: str
    limiting_factor: str
    in_flight: int
    rows: int
    weights_nbytes: int
    activations_nbytes: int


def environment(packages: Sequence[str] = ()) -> Environment:
    """This machine and these packages beside the engine's own."""
    cores = usable_cores()
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        processor=processor(),
        cores=len(cores.numbers),
        logical_cores=os.cpu_count() or 1,
        quota=cores.quota,
        memory_nbytes=_memory(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        versions={name: found for name in (*PACKAGES, *packages) if (found := installed_version(name))},
    )


def settings(engine: Engine, in_flight: int, rows: int) -> Settings:
    """The settings of an engine that has run a request, with the memory that its plan takes."""
    plan, memory = engine.explain_batching(), engine.memory_plan()
    return Settings(
        device=engine.device,
        streams=engine.streams,
        batch=plan.batch,
        batch_reason=plan.reason,
        limiting_factor=plan.limiting_factor,
        in_flight=in_flight,
        rows=rows,
        weights_nbytes=memory.weights,
        activations_nbytes=memory.activations,
    )


def processor() -> str:
    """The processor's name as the system tells it, and as LLVM does."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return f"{found[1].strip()} ({host().cpu})" if found else host().cpu


def _memory() -> int:
    names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
    return os.sysconf(names[0]) * os.sysconf(names[1]) if all(name in os.sysconf_names for name in names) else 0


def installed_version(package: str) -> str:
    """The version of a package; "" if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
