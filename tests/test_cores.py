"""Cores and memory that a process may use, from files as systems write them."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from cpu_fallback import cores
from cpu_fallback.blas import cap_threads
from cpu_fallback.cores import cpu_quota, group_folders, neighbours, partition, partition_by_node, usable_cores

V1 = """31 23 0:28 / {root} rw - tmpfs tmpfs rw
32 31 0:29 {top} {root}/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
34 31 0:31 / {root}/cpuset rw - cgroup cgroup rw,cpuset
36 31 0:33 / {root}/memory rw - cgroup cgroup rw,memory
"""
V2 = "41 31 0:38 {top} {root}/unified rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_version_2_quota_of_an_ancestor(tmp_path: Path) -> None:
    mounts, groups = V2.format(top="/", root=tmp_path), "0::/outer/inner\n"
    folders = group_folders("cpu", mounts, groups)
    assert folders == [tmp_path / "unified" / name for name in ("outer/inner", "outer", "")]
    write(tmp_path / "unified/outer/inner", cpu__max="max 100000\n")
    assert cpu_quota(folders) is None
    write(tmp_path / "unified/outer", cpu__max="250000 100000\n")
    assert cpu_quota(folders) == 2.5
    write(tmp_path / "unified/outer/inner", cpu__max="50000 100000\n")
    assert cpu_quota(folders) == 0.5


def test_version_1_controllers_are_names_not_substrings(tmp_path: Path) -> None:
    mounts = V1.format(top="/", root=tmp_path)
    groups = "9:name=systemd:/\n4:memory:/jobs/a\n3:cpuset:/wrong\n2:cpu,cpuacct:/jobs/a\n"
    folders = group_folders("cpu", mounts, groups)
    assert folders == [tmp_path / "cpu,cpuacct" / name for name in ("jobs/a", "jobs", "")]
    write(tmp_path / "cpu,cpuacct/jobs/a", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    assert cpu_quota(folders) is None
    write(tmp_path / "cpu,cpuacct/jobs", cpu__cfs_quota_us="150000\n", cpu__cfs_period_us="100000\n")
    assert cpu_quota(folders) == 1.5
    assert group_folders("memory", mounts, groups)[0] == tmp_path / "memory/jobs/a"


def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    """The mount shows the hierarchy from the container's group on."""
    mounts = V2.format(top="/docker/abc", root=tmp_path)
    assert group_folders("cpu", mounts, "0::/docker/abc/job\n")[0] == tmp_path / "unified/job"
    assert group_folders("cpu", mounts, "0::/docker/abc\n") == [tmp_path / "unified"]


def test_quotas_round_down_and_leave_one_core(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 2, 3}, raising=False)
    monkeypatch.setattr(cores, "TOPOLOGY", tmp_path)
    for quota, count in ((None, 3), (0.5, 1), (1.9, 1), (2.0, 2), (1e6, 3)):
        monkeypatch.setattr(cores, "cpu_quota", lambda _, quota=quota: quota)
        found = usable_cores()
        assert found.numbers == (2, 3, 5)[:count] and found.affinity == 3
        assert found.own == (count == 3), "others with the same quota would pin to the same cores"
        assert ("no quota" in str(found)) == (quota is None)


def machine(folder: Path, siblings: dict[int, str], last_cache: dict[int, str]) -> Path:
    """A machine as the system describes it: hardware threads of a core, and who shares the last cache."""
    for number, text in siblings.items():
        write(folder / f"cpu{number}" / "topology", thread_siblings_list=f"{text}\n")
        write(folder / f"cpu{number}" / "cache" / "index0", shared_cpu_list=f"{text}\n")
        write(folder / f"cpu{number}" / "cache" / "index3", shared_cpu_list=f"{last_cache[number]}\n")
    return folder


def test_one_number_for_each_physical_core(tmp_path: Path) -> None:
    """4 cores of 2 hardware threads each, numbered as most systems do."""
    siblings = {i: f"{i % 4},{i % 4 + 4}" for i in range(8)}
    folder = machine(tmp_path, siblings, dict.fromkeys(range(8), "0-7"))
    assert neighbours(range(8), folder) == [0, 1, 2, 3]
    assert neighbours([7, 1, 5], folder) == [1, 7]
    assert neighbours([4, 5, 6, 7], folder) == [4, 5, 6, 7]


def test_cores_of_one_cache_are_neighbours(tmp_path: Path) -> None:
    """Two caches whose cores have alternating numbers."""
    caches = {i: ("0,2,4,6", "1,3,5,7")[i % 2] for i in range(8)}
    folder = machine(tmp_path, {i: str(i) for i in range(8)}, caches)
    assert neighbours(range(8), folder) == [0, 2, 4, 6, 1, 3, 5, 7]
    assert partition(neighbours(range(8), folder), 4) == [(0, 2), (4, 6), (1, 3), (5, 7)]
    assert neighbours([3, 4, 5], folder) == [4, 3, 5]


def two_nodes(tmp_path: Path, cores: int = 8) -> Path:
    """Two NUMA nodes whose cores have alternating numbers, with two caches each."""
    caches = {i: ",".join(str(j) for j in range(cores) if j % 4 == i % 4) for i in range(cores)}
    folder = machine(tmp_path, {i: str(i) for i in range(cores)}, caches)
    for i in range(cores):
        (folder / f"cpu{i}" / f"node{i % 2}").mkdir()
    return folder


def test_cores_of_one_node_are_neighbours(tmp_path: Path) -> None:
    assert neighbours(range(8), two_nodes(tmp_path)) == [0, 4, 2, 6, 1, 5, 3, 7]


@pytest.mark.parametrize(
    ("streams", "expected"),
    [
        (1, [(0, 4, 2, 6, 1, 5, 3, 7)]),
        (2, [(0, 4, 2, 6), (1, 5, 3, 7)]),
        (3, [(0, 4), (2, 6), (1, 5, 3, 7)]),
        (4, [(0, 4), (2, 6), (1, 5), (3, 7)]),
        (5, [(0, 4), (2,), (6,), (1, 5), (3, 7)]),
    ],
)
def test_shares_by_node_span_none(tmp_path: Path, streams: int, expected: list[tuple[int, ...]]) -> None:
    folder = two_nodes(tmp_path)
    assert partition_by_node(neighbours(range(8), folder), streams, folder) == expected


def test_a_system_that_says_nothing(tmp_path: Path) -> None:
    assert neighbours([3, 1, 2], tmp_path) == [1, 2, 3]


def test_memory_is_what_the_tightest_group_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", memory__max="1000\n", memory__current="900\n", memory__stat="anon 1\ninactive_file 50\n")
    write(tmp_path / "b", memory__max="max\n", memory__current="900\n")
    write(tmp_path / "c", memory__limit_in_bytes="5000\n", memory__usage_in_bytes="100\n")
    for names, free in (("a", 150), ("ab", 150), ("c", 4900), ("abc", 150)):
        monkeypatch.setattr(cores, "group_folders", lambda _, names=names: [tmp_path / name for name in names])
        assert cores.free_memory() == free
    monkeypatch.setattr(cores, "group_folders", lambda _: [tmp_path / "b"])
    assert cores.free_memory() > 1 << 20


def blas_threads() -> list[int]:
    from threadpoolctl import threadpool_info

    return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]


def test_the_least_cap_holds_and_leaves_no_trace() -> None:
    gc.collect()  # engines that earlier tests dropped have caps of their own
    before = blas_threads()
    release_two, release_one = cap_threads(2), cap_threads(1)
    assert set(blas_threads()) == {1}
    release_one()
    release_one()
    assert blas_threads() == [min(2, count) for count in before]
    release_two()
    assert blas_threads() == before
