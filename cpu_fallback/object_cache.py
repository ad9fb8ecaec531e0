"""Machine code on disk, by the content that it was made from.

Objects are run as they are, so that the folder must belong to the user and be closed to everybody else's writing. They
are checked by digest, written under another name first, and dropped from the least recently used on. The environment
variable GPU_ENGINE_CACHE names the folder; "off" keeps nothing.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

VARIABLE = "GPU_ENGINE_CACHE"
OFF = ("off", "0", "none")
LIMIT_NBYTES = 256 << 20
STALE_S = 3600.0
MAGIC = b"gpu_engine object 1\n"
SUFFIX, UNFINISHED = ".object", ".unfinished"
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class ObjectCache:
    """Objects in `folder`, at most `limit_nbytes` of them together."""

    folder: Path
    limit_nbytes: int = LIMIT_NBYTES

    def load(self, key: str) -> bytes | None:
        """What was stored under `key`; None if there is nothing, or something else than was written."""
        path = self._path(key)
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
            with open(descriptor, "rb") as file:
                contents = file.read() if _is_private(os.fstat(descriptor)) else b""
            os.utime(path)
        except OSError:
            return None
        data = contents[len(MAGIC) + hashlib.sha256().digest_size :]
        if contents[: -len(data) or None] == _head(data):
            return data
        _LOGGER.warning("%s is damaged or not the user's own; its kernels are compiled anew", path)
        return None

    def store(self, key: str, data: bytes) -> None:
        """Keep `data` under `key`; says so in the log if that fails."""
        try:
            descriptor, name = tempfile.mkstemp(UNFINISHED, dir=self.folder)
            try:
                with open(descriptor, "wb") as file:
                    file.write(_head(data) + data)
                os.replace(name, self._path(key))
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
            self._prune()
        except OSError as error:
            _LOGGER.warning("compiled kernels are not kept: %s", error)

    def _path(self, key: str) -> Path:
        return self.folder / (key + SUFFIX)

    def _prune(self) -> None:
        """Drop what was used least recently until the rest fits, and what writers left behind."""
        found = sorted(_entries(self.folder), reverse=True)
        total, now = 0, time.time()
        for used, nbytes, path in found:
            total += nbytes
            too_much = total > self.limit_nbytes if path.suffix == SUFFIX else now - used > STALE_S
            if too_much:
                path.unlink(missing_ok=True)


def digest(*parts: str) -> str:
    """A key for what is made from `parts`."""
    found = hashlib.sha256()
    for part in parts:
        encoded = part.encode()
        found.update(len(encoded).to_bytes(8, "little"))
        found.update(encoded)
    return found.hexdigest()


def object_cache() -> ObjectCache | None:
    """The cache of this process; None where it is turned off, or where there is no safe place for it."""
    return _opened(os.environ.get(VARIABLE, ""))


@lru_cache(maxsize=4)
def _opened(setting: str) -> ObjectCache | None:
    if setting.lower() in OFF:
        return None
    try:
        folder = Path(setting).expanduser() if setting else _default_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for place in (folder, *folder.resolve().parents):
            _refuse_unsafe(place, own=place == folder)
    except (OSError, RuntimeError) as error:
        _LOGGER.warning("compiled kernels are not kept: %s", error)
        return None
    return ObjectCache(folder)


def _default_folder() -> Path:
    if sys.platform == "win32":
        home = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        home = Path.home() / "Library" / "Caches"
    else:
        named = Path(os.environ.get("XDG_CACHE_HOME") or "")
        home = named if named.is_absolute() else Path.home() / ".cache"
    return home / "gpu_engine" / "objects"


def _refuse_unsafe(folder: Path, *, own: bool) -> None:
    """PermissionError if somebody else could put a file into `folder`, or another folder in its place."""
    found = folder.stat()
    shared = bool(found.st_mode & stat.S_ISVTX) and not own
    if own and not _is_private(found):
        raise PermissionError(f"{folder} belongs to another user, or others may write there; it is not used")
    if os.name == "posix" and found.st_mode & 0o022 and not shared:
        raise PermissionError(f"others may rename what lies in {folder}; the folder below it is not used")


def _is_private(found: os.stat_result) -> bool:
    """Whether a file or folder is the user's own and no one else may write to it."""
    return os.name != "posix" or (found.st_uid == os.geteuid() and not found.st_mode & 0o022)


def _head(data: bytes) -> bytes:
    return MAGIC + hashlib.sha256(data).digest()


def _entries(folder: Path) -> Iterable[tuple[float, int, Path]]:
    """(last use, bytes, path) of every file that a cache wrote."""
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                if entry.name.endswith((SUFFIX, UNFINISHED)) and entry.is_file(follow_symlinks=False):
                    found = entry.stat(follow_symlinks=False)
                    yield found.st_mtime, found.st_size, Path(entry.path)
            except OSError:
                continue
