"""The folder that a fuzzed model lies in, full of traps, and a watch over every file that the process opens."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

CANARY = 13371337.0
"""What every file outside the model's folder holds, as float32."""
LOCATIONS = (
    "w.bin", "w.bin", "./w.bin", "sub/w.bin", "sub/./w.bin", "sub/../w.bin", "", ".", "..", "../secret.bin",
    "/secret.bin",
    "sub/../../secret.bin", "link.bin", "folder-link/secret.bin", "hard.bin", "fifo", "sub", "missing.bin",
    "/etc/passwd", "/dev/zero", "/proc/self/environ", "/proc/self/mem", "file:///etc/passwd", "..\\secret.bin",
    "w.bin\0/../../secret.bin", "~/.profile", "$HOME/.profile", "a" * 300, "/".join(["sub"] * 3000), "m.onnx",
)  # fmt: skip
SYSTEM = ("/sys/fs/cgroup/", "/sys/devices/system/cpu/", "/proc/meminfo", "/proc/self/cgroup", "/proc/self/mountinfo",
          "/proc/self/maps")  # fmt: skip
"""Where the engine itself looks for cores, caches and memory."""


def prepare(root: Path) -> Path:
    """The model's folder inside `root`, beside what it must not read."""
    folder = root / "model"
    (folder / "sub").mkdir(parents=True)
    weights = np.linspace(-1, 1, 4096, dtype=np.float32).tobytes()
    (folder / "w.bin").write_bytes(weights)
    (folder / "sub" / "w.bin").write_bytes(weights)
    (root / "secret.bin").write_bytes(np.full(4096, CANARY, np.float32).tobytes())
    (folder / "link.bin").symlink_to(root / "secret.bin")
    (folder / "folder-link").symlink_to(root)
    os.link(root / "secret.bin", folder / "hard.bin")
    os.mkfifo(folder / "fifo")
    return folder


class Watch:
    """Notes every file opened while `folder` is set that neither lies in it nor belongs to Python or the system."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.found: list[str] = []
        self._own = tuple(
            os.path.realpath(entry) + os.sep for entry in {*sys.path, sys.prefix, sys.base_prefix} if entry
        )
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: Sequence[Any]) -> None:
        if event != "open" or self.folder is None or isinstance(arguments[0], int):
            return
        path, _, flags = arguments
        text = os.fsdecode(path) if isinstance(path, str | bytes) else str(path)
        if not self._allowed(text, flags):
            self.found.append(text)

    def _allowed(self, path: str, flags: int) -> bool:
        """An absolute path must lie in the folder; a relative one, which `os.open` takes below another folder that was
        judged before, must be one plain name that is no link."""
        if not os.path.isabs(path):
            return os.sep not in path and path not in ("", "..") and bool(flags & os.O_NOFOLLOW)
        real = os.path.realpath(path)
        inside = real == str(self.folder) or real.startswith(f"{self.folder}{os.sep}")
        return inside or path.startswith(SYSTEM) or (real.startswith(self._own) and not real.endswith(".bin"))
