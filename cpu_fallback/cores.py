"""Cores and memory that this process may really use: affinity, control groups, and what other limits leave.

A container's quota is no property of the machine: `os.cpu_count()` and even the affinity mask say nothing about it.
Quotas count on the process's own group and every ancestor, in version 1 and 2 hierarchies.
https://docs.kernel.org/admin-guide/cgroup-v2.html https://docs.kernel.org/scheduler/sched-bwc.html
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

UNLIMITED = 1 << 62
MOUNTS, GROUPS, MEMORY = Path("/proc/self/mountinfo"), Path("/proc/self/cgroup"), Path("/proc/meminfo")
TOPOLOGY = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Cores:
    """Core numbers to use, and how that came about.

    Only `own` cores are to be pinned to. Others share them: whoever has the same quota of the same cores would pin to
    the same first ones.
    """

    numbers: tuple[int, ...]
    affinity: int
    quota: float | None
    own: bool = True

    def __str__(self) -> str:
        quota = "no quota" if self.quota is None else f"a quota of {self.quota:g}"
        return f"{len(self.numbers)} of {self.affinity} cores in the affinity mask, {quota}"


def usable_cores() -> Cores:
    """max(1, min(physical cores in the affinity mask, floor(quota))) of them, neighbours in the same cache first."""
    mask = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    quota = cpu_quota(group_folders("cpu"))
    physical = neighbours(mask)
    count = len(physical) if quota is None else max(1, min(len(physical), int(quota)))
    return Cores(tuple(physical[:count]), len(mask), quota, own=count == len(physical))


def neighbours(numbers: Sequence[int], folder: Path | None = None) -> list[int]:
    """One number of each physical core, those of one NUMA node, and in it of one last cache, side by side; as they are
    where the system does not say."""
    folder = TOPOLOGY if folder is None else folder
    found: dict[tuple[int, int, int], int] = {}
    for number in sorted(numbers):
        own = folder / f"cpu{number}"
        siblings = _listed(own / "topology" / "thread_siblings_list") or [number]
        caches = [_listed(cache / "shared_cpu_list") for cache in sorted(own.glob("cache/index[0-9]"))]
        last = max(filter(None, caches), key=len, default=siblings)
        found.setdefault((node(number, folder), min(last), min(siblings)), number)
    return [found[place] for place in sorted(found)]


def node(number: int, folder: Path | None = None) -> int:
    """The NUMA node of a core; 0 where the system does not say."""
    own = (TOPOLOGY if folder is None else folder) / f"cpu{number}"
    return min((int(place.name[4:]) for place in own.glob("node[0-9]*")), default=0)


def _listed(path: Path) -> list[int]:
    """The numbers of "0-3,8"."""
    spans = [part.split("-") for part in _read(path).strip().split(",") if part]
    return [number for span in spans for number in range(int(span[0]), int(span[-1]) + 1)]


def partition(cores: Sequence[int], streams: int) -> list[tuple[int, ...]]:
    """Contiguous shares, the remainder to the first ones; with more streams than cores they take turns."""
    if streams > len(cores):
        return [(cores[i * len(cores) // streams],) for i in range(streams)]
    size, more = divmod(len(cores), streams)
    shares, start = [], 0
    for i in range(streams):
        stop = start + size + (i < more)
        shares.append(tuple(cores[start:stop]))
        start = stop
    return shares


def partition_by_node(cores: Sequence[int], streams: int, folder: Path | None = None) -> list[tuple[int, ...]]:
    """The same, but no share has cores of two NUMA nodes, unless there are fewer streams than nodes."""
    nodes = [list(group) for _, group in itertools.groupby(cores, lambda number: node(number, folder))]
    if streams < len(nodes):
        return partition(cores, streams)
    counts = map(len, partition(range(streams), len(nodes)))
    return [share for own, count in zip(nodes, counts, strict=True) for share in partition(own, count)]


def cpu_quota(folders: Sequence[Path]) -> float | None:
    """The least quota in cores that any of the groups sets; None if none does."""
    quotas = [quota for folder in folders for quota in (_quota_v2(folder), _quota_v1(folder)) if quota is not None]
    return min(quotas, default=None)


def _quota_v2(folder: Path) -> float | None:
    words = _read(folder / "cpu.max").split()
    if len(words) != 2 or words[0] == "max":
        return None
    return int(words[0]) / int(words[1])


def _quota_v1(folder: Path) -> float | None:
    quota, period = (_number(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    return quota / period if quota is not None and period and quota > 0 else None


def group_folders(controller: str, mounts: str | None = None, groups: str | None = None) -> list[Path]:
    """The folders of the process's own group for `controller` and of its ancestors, in every mounted hierarchy."""
    mounts = _read(MOUNTS) if mounts is None else mounts
    own = dict(_own_groups(_read(GROUPS) if groups is None else groups))
    folders = []
    for mount, top, controllers in _hierarchies(mounts):
        if controllers is not None and controller not in controllers:
            continue
        path = own.get("" if controllers is None else controller)
        if path is not None:
            folders += _with_ancestors(mount, top, path)
    return folders


def _own_groups(text: str) -> Iterator[tuple[str, str]]:
    """(controller, path) for version 1, ("", path) for version 2."""
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        yield from ((controller, path) for controller in controllers.split(","))


def _hierarchies(text: str) -> Iterator[tuple[Path, str, list[str] | None]]:
    """(mount point, its root inside the hierarchy, controllers or None for version 2)."""
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup2":
            yield Path(fields[4]), fields[3], None
        elif kind[0] == "cgroup":
            yield Path(fields[4]), fields[3], kind[2].split(",")


def _with_ancestors(mount: Path, top: str, path: str) -> list[Path]:
    inside = path[len(top) :] if top != "/" and path.startswith(top) else path if top == "/" else ""
    folder = mount / inside.lstrip("/")
    found = [folder]
    while folder != mount and mount in folder.parents:
        folder = folder.parent
        found.append(folder)
    return found


def free_memory() -> int:
    """Bytes that can still be allocated: what the system says is available, or less where a control group says so."""
    return min([_available(), *(_group_memory(folder) for folder in group_folders("memory"))])


def _available() -> int:
    for line in _read(MEMORY).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    pages = ("SC_AVPHYS_PAGES", "SC_PAGE_SIZE")
    return os.sysconf(pages[0]) * os.sysconf(pages[1]) if all(name in os.sysconf_names for name in pages) else UNLIMITED


def _group_memory(folder: Path) -> int:
    """What the group's limit leaves; files in the page cache count as free."""
    for limit_file, usage_file, inactive in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, usage = _number(folder / limit_file), _number(folder / usage_file)
        if limit is not None and usage is not None and limit < UNLIMITED:
            return max(0, limit - usage + _statistic(folder / "memory.stat", inactive))
    return UNLIMITED


def _statistic(path: Path, name: str) -> int:
    rows = (line.split() for line in _read(path).splitlines())
    return next((int(row[1]) for row in rows if len(row) == 2 and row[0] == name), 0)


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
