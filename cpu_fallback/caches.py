"""Sizes of the processor's caches, which blocks of matrices are cut to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

FOLDER = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Caches:
    """Bytes of the data caches that one core sees."""

    l1: int = 32 << 10
    l2: int = 512 << 10


@lru_cache(maxsize=1)
def caches() -> Caches:
    """Of the first core; modest values where the system does not tell."""
    found = {level: nbytes for folder in sorted(FOLDER.glob("index*")) for level, nbytes in _cache(folder)}
    return Caches(**{f"l{level}": nbytes for level, nbytes in found.items() if level in (1, 2)})


def _cache(folder: Path) -> list[tuple[int, int]]:
    """[(level, bytes)], or [] of an instruction cache and of what cannot be read."""
    try:
        kind, level, size = ((folder / name).read_text().strip() for name in ("type", "level", "size"))
        unit = {"K": 1 << 10, "M": 1 << 20}.get(size[-1:], 1)
        return [] if kind == "Instruction" else [(int(level), int(size.rstrip("KM")) * unit)]
    except (OSError, ValueError):
        return []
