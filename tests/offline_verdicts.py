"""What became of a kernel on an architecture, and verdicts of earlier runs, so that a run that was cut off goes on."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from gpu_engine.gpu import binary, expectations, nvrtc, offline
from gpu_engine.gpu.kernel import CudaKernel, Kernel
from gpu_engine.gpu.nvrtc import compile_cuda
from gpu_engine.gpu.offline import Resources, compiled, cubin_resources, parameters_of, problems, resources

FOLDER = Path(".cache/offline")


@dataclass(frozen=True)
class Verdict:
    """What one kernel takes on one architecture, None if it did not compile, and what is wrong with it."""

    used: Resources | None
    wrong: tuple[str, ...]


def inspected(kernel: Kernel, arch: int) -> Verdict:
    """Compile one kernel and read its machine code."""
    try:
        if isinstance(kernel, CudaKernel):
            used = cubin_resources(compile_cuda(kernel, arch).cubin)
            return Verdict(used, ("spills",) if used.spills or used.stack_nbytes else ())
        made = compiled(kernel, arch)
        parameters_of(kernel, made)
        used = resources(made)
    except Exception as error:
        return Verdict(None, (str(error).strip().splitlines()[-1][:200],))
    return Verdict(used, tuple(problems(kernel, made, used, arch)))


class Verdicts:
    """Verdicts on disk, a line each, of one version of Triton and of the checks; kernels that did not compile are
    tried again."""

    def __init__(self, folder: Path = FOLDER) -> None:
        sources = [inspect.getsource(module) for module in (binary, expectations, nvrtc, offline)]
        version = hashlib.sha256("".join([triton.__version__, *sources, inspect.getsource(inspected)]).encode())
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{version.hexdigest()[:16]}.jsonl"
        self._known: dict[tuple[str, str, int], Verdict] = {}
        for line in self._path.read_text().splitlines() if self._path.exists() else ():
            if line.endswith("}"):  # the last one may be cut off
                name, digest, arch, verdict = _read(json.loads(line))
                self._known[name, digest, arch] = verdict

    def get(self, kernel: Kernel, arch: int) -> Verdict | None:
        return self._known.get((kernel.name, kernel.digest, arch))

    def add(self, kernel: Kernel, arch: int, verdict: Verdict) -> None:
        self._known[kernel.name, kernel.digest, arch] = verdict
        if verdict.used is None:
            return
        row = {
            "name": kernel.name, "digest": kernel.digest, "arch": arch, "wrong": verdict.wrong,
            "registers": verdict.used.registers, "stack": verdict.used.stack_nbytes,
            "shared": verdict.used.shared_nbytes, "instructions": verdict.used.instructions,
        }  # fmt: skip
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _read(row: dict[str, Any]) -> tuple[str, str, int, Verdict]:
    used = Resources(row["registers"], row["stack"], row["shared"], Counter(row["instructions"]))
    return row["name"], row["digest"], row["arch"], Verdict(used, tuple(row["wrong"]))
