"""Compiled kernels on disk: kept by content, private, checked, limited in size, never in the way."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cpu_fallback import native, object_cache
from cpu_fallback.native import compile_module, host
from cpu_fallback.object_cache import MAGIC, VARIABLE, ObjectCache, digest
from cpu_fallback.walk_code import walk_module

KEY = digest("a kernel")
posix = pytest.mark.skipif(os.name != "posix", reason="owners and modes are those of POSIX")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for objects that the process will use, not there yet."""
    place = tmp_path / "cache" / "objects"
    monkeypatch.setenv(VARIABLE, str(place))
    object_cache._opened.cache_clear()
    return place


def opened() -> ObjectCache:
    found = object_cache.object_cache()
    assert found is not None
    return found


def test_what_was_stored_is_found_again(folder: Path) -> None:
    cache = opened()
    assert cache.load(KEY) is None
    for data in (b"machine code", b"", bytes(range(256)) * 999):
        cache.store(KEY, data)
        assert cache.load(KEY) == data
    assert cache.load(digest("another")) is None
    assert [path.suffix for path in folder.iterdir()] == [object_cache.SUFFIX]


def test_keys_tell_parts_apart() -> None:
    assert len({digest("ab", "c"), digest("a", "bc"), digest("abc"), digest("ab", "c", "")}) == 4


@posix
def test_folder_and_files_are_the_users_alone(folder: Path) -> None:
    opened().store(KEY, b"code")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in folder.iterdir())


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:-1] + b"?",
        lambda data: data[: len(MAGIC)],
        lambda data: b"",
        lambda data: b"x" + data[1:],
        lambda data: data + b"more",
    ],
    ids=["short", "changed", "head", "empty", "magic", "long"],
)
def test_what_is_damaged_is_not_used(folder: Path, damage: Any, caplog: pytest.LogCaptureFixture) -> None:
    cache = opened()
    cache.store(KEY, b"machine code")
    (path,) = folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert cache.load(KEY) is None and "damaged" in caplog.text
    cache.store(KEY, b"anew")
    assert cache.load(KEY) == b"anew"


@posix
def test_files_that_others_may_write_are_not_used(folder: Path) -> None:
    cache = opened()
    cache.store(KEY, b"machine code")
    (path,) = folder.iterdir()
    path.chmod(0o666)
    assert cache.load(KEY) is None
    path.chmod(0o600)
    assert cache.load(KEY) == b"machine code"
    path.rename(folder / "elsewhere")
    path.symlink_to(folder / "elsewhere")
    assert cache.load(KEY) is None


@posix
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_folder_that_others_may_write_is_refused(
    folder: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    folder.mkdir(parents=True)
    folder.chmod(mode)
    assert object_cache.object_cache() is None and "others may write" in caplog.text


@posix
def test_a_folder_that_others_could_exchange_is_refused(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.mkdir(parents=True, mode=0o700)
    folder.parent.chmod(0o777)
    assert object_cache.object_cache() is None and "may rename" in caplog.text
    folder.parent.chmod(0o1777)
    object_cache._opened.cache_clear()
    assert object_cache.object_cache() is not None


@posix
def test_a_folder_of_another_user_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert object_cache.object_cache() is None


@pytest.mark.parametrize("word", ["off", "OFF", "0", "none"])
def test_it_can_be_turned_off(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, word)
    assert object_cache.object_cache() is None


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="the XDG base directories are those of other systems")
def test_where_it_lies_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert object_cache._default_folder() == tmp_path / "xdg" / "gpu_engine" / "objects"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert object_cache._default_folder() == tmp_path / ".cache" / "gpu_engine" / "objects"


def test_what_was_used_least_recently_goes_first(folder: Path) -> None:
    opened()
    cache = ObjectCache(folder, limit_nbytes=3500)
    keys = [digest(str(i)) for i in range(5)]
    for i, key in enumerate(keys[:3]):
        cache.store(key, bytes(1000))
        os.utime(folder / (key + object_cache.SUFFIX), (1000 + i, 1000 + i))
    assert cache.load(keys[0]) is not None
    cache.store(keys[3], bytes(1000))
    assert [cache.load(key) is not None for key in keys] == [True, False, True, True, False]


def test_what_a_writer_left_behind_goes_after_a_while(folder: Path) -> None:
    cache = opened()
    old, new = (folder / (name + object_cache.UNFINISHED) for name in ("old", "new"))
    for path in (old, new, folder / "not ours"):
        path.write_bytes(b"half")
    os.utime(old, (1000, 1000))
    os.utime(folder / "not ours", (1000, 1000))
    cache.store(KEY, b"code")
    assert not old.exists() and new.exists() and (folder / "not ours").exists()


def test_a_failure_to_write_is_said_and_nothing_more(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = opened()
    folder.rmdir()
    cache.store(KEY, b"code")
    assert "not kept" in caplog.text and cache.load(KEY) is None


def test_a_place_that_is_a_file_is_said_and_nothing_more(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("a file")
    assert object_cache.object_cache() is None and "not kept" in caplog.text


def test_nothing_is_compiled_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    target = host()
    walk = walk_module(target.x86, turns=False)
    assert compile_module(walk, target).get_function_address("walk")
    compiled: list[str] = []
    original = native._object
    monkeypatch.setattr(native, "_object", lambda text, machine: compiled.append(text) or original(text, machine))
    assert compile_module(walk, target).get_function_address("walk") and not compiled
    changed = walk.replace("@walk", "@stroll")
    assert compile_module(changed, target).get_function_address("stroll") and compiled == [changed]
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    assert compile_module(walk, target).get_function_address("walk") and compiled == [changed, walk]
    assert compile_module(walk, target).get_function_address("walk") and len(compiled) == 2


def test_threads_and_processes_share_it(folder: Path) -> None:
    opened()
    program = (
        "import sys; from pathlib import Path; from cpu_fallback.object_cache import ObjectCache, digest\n"
        "cache = ObjectCache(Path(sys.argv[1]), 60_000)\n"
        "for i in range(200):\n"
        "    key, data = digest(str(i % 10)), bytes([i % 10]) * 9000\n"
        "    found = cache.load(key)\n"
        "    assert found in (None, data), 'another object'\n"
        "    cache.store(key, data)\n"
    )
    command = [sys.executable, "-W", "error", "-c", program, str(folder)]
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: subprocess.run(command, capture_output=True, text=True, check=False), range(4)))
    assert [(one.returncode, one.stderr) for one in done] == [(0, "")] * 4
    assert all(path.suffix == object_cache.SUFFIX for path in folder.iterdir())
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 60_000


def test_a_second_process_compiles_nothing(folder: Path) -> None:
    program = (
        "import sys, numpy as np, onnx.parser, gpu_engine\n"
        "from cpu_fallback import native\n"
        "count, original = [], native._object\n"
        "native._object = lambda *parts: count.append(parts) or original(*parts)\n"
        'text = \'<ir_version: 8, opset_import: ["": 17]> g (float[N, 8] x) => (float[N, 8] y) '
        "{ s = Softmax(x)  e = Exp(s)  y = Add(e, x) }'\n"
        "engine = gpu_engine.compile(onnx.parser.parse_model(text), device='cpu')\n"
        "y = engine.run({'x': np.zeros((2, 8), np.float32)})['y']\n"
        "np.testing.assert_allclose(y, np.exp(0.125), rtol=1e-6)\n"
        "engine.close(); print(len(count))\n"
    )
    counts = [
        int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
        for _ in range(2)
    ]
    assert counts[0] > 0 and counts[1] == 0
