"""The onnx wheel's node tests through the CUDA device over a recorded GPU: `python -m tests.recorded_conformance 60`.

Each case runs three times: its launches plainly, captured, and replayed. Nothing may be left on the GPU afterwards. It
takes the cases in random order, for so many seconds.
"""

from __future__ import annotations

import gc
import random
import sys
import time
from collections.abc import Sequence
from typing import Any

from gpu_engine import compiler
from gpu_engine.runtime.late import KERNEL_COMPILER, load
from tests import conformance_manifest as manifest
from tests.conformance_cases import Case, collect
from tests.conformance_check import check
from tests.fake_cupy import binary_source, fake_cupy
from tests.recording_cuda import Gpu

REPEATS = 3


def main(arguments: Sequence[str] | None = None) -> int:
    seconds = float((sys.argv[1:] if arguments is None else arguments)[0])
    groups, cases, failures = manifest.read(), collect(["node"]), []
    random.shuffle(cases)
    ends, count, captured = time.monotonic() + seconds, 0, 0
    for case in cases:
        if time.monotonic() > ends:
            break
        gpu = Gpu(nbytes=1 << 34, late=bool(random.getrandbits(1)))
        failed = verdict(case, gpu)
        if failed and manifest.group_of(groups, case) is None:
            failures.append(f"{case.label}, late={gpu.late}: {failed}")
        count, captured = count + 1, captured + len(gpu.of("graphInstantiate"))
    print(*failures, f"{count - len(failures)} / {count} as expected, with {captured} graphs", sep="\n")
    return 1 if failures else 0


def verdict(case: Case, gpu: Gpu) -> str:
    """What went wrong, if anything."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "cupy" or name == "gpu_engine.gpu.cuda"]:
        del sys.modules[name]
    sys.modules.update(fake_cupy(gpu))
    compiler.load = _load  # type: ignore[attr-defined]
    try:
        wrong = check(case, "cuda", REPEATS)
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    gc.collect()
    left = [len(found) for found in (gpu.blocks, gpu.lanes, gpu.events, gpu.graphs)]
    return wrong or "; ".join(gpu.violations) or (f"left behind: {left}" if any(left) else "")


def _load(place: str) -> Any:
    return binary_source if place == KERNEL_COMPILER else load(place)


if __name__ == "__main__":
    sys.exit(main())
