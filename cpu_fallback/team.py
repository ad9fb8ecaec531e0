"""Teams: the parked native threads that help whoever leads one of a stream's runs.

Workers are no Python threads. They hold no lock of the interpreter and never run its code, so that the garbage
collector may end them from anywhere; between runs they sleep.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_fallback.native import compile_module, host
from cpu_fallback.team_code import CORE, CURRENT, FUTEX, LINE, LINES, PARTS, TEAM, THREAD, THREADS, team_module

_LOGGER = logging.getLogger(__name__)
_LOCK = threading.Lock()
_FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT}

Lead = Callable[[int], None]
Stop = Callable[[int], None]


def can_have_teams() -> bool:
    """Whether this system has what teams are made of."""
    return sys.platform == "linux" and platform.machine() in FUTEX


class Team:
    """The threads of a stream: whoever calls `lead`, and workers that are made when `start` is called.

    Call from one thread at a time. `cores` are where they run, one for each thread; else wherever the system likes.
    """

    def __init__(self, threads: int, cores: Sequence[int]) -> None:
        assert threads > 1 and can_have_teams()
        self._cores = tuple(cores) if len(cores) == threads else ()
        self._memory = np.zeros(LINES + LINE * (threads + 1), np.uint8)
        self.address = -(-int(self._memory.__array_interface__["data"][0]) // LINE) * LINE
        ctypes.c_uint64.from_address(self.address + CURRENT).value = 1
        self._core = ctypes.c_int32.from_address(self.address + CORE)
        self._core.value = self._settled = -1
        self._workers: list[int] = []
        self.threads = threads
        self._end: weakref.finalize[Any, Team] | None = None

    def start(self) -> bool:
        """Whether workers are there now, whom the first call makes."""
        if self._end is None and self.threads > 1:
            ctypes.c_int64.from_address(self.address + THREADS).value = self.threads
            end = partial(_stop, _native().stop, self._memory, self.address, self._workers, os.getpid())
            self._end = weakref.finalize(self, end)
            try:
                with _no_signals():
                    for thread in range(1, self.threads):
                        self._workers.append(self._worker(thread))
            except OSError as error:
                _LOGGER.warning("a stream runs on one thread, because no more can be made: %s", error)
                self.close()
                self.threads = 1
        return self.threads > 1

    @property
    def lead(self) -> Lead:
        """lead(address of {table, steps, shares, team}): run a table as `walk` does, with the workers' help."""
        return _native().lead

    def parts(self) -> list[int]:
        """How many parts of steps each thread has done so far."""
        own = (self.address + LINES + LINE * thread for thread in range(self.threads))
        return [ctypes.c_int64.from_address(line + PARTS).value for line in own]

    def settle(self) -> None:
        """After a run: keep workers off the core that leads, and threads apart."""
        core = self._core.value
        if core != self._settled:
            self._settled = core
            others = [each for each in self._cores if each != core]
            for worker, each in zip(self._workers, others, strict=False):
                _pin(worker, each)

    def close(self) -> None:
        """End the workers. Nobody leads any more."""
        if self._end is not None:
            self._end()

    def _worker(self, thread: int) -> int:
        own = self.address + LINES + LINE * thread
        ctypes.c_uint64.from_address(own + TEAM).value = self.address
        ctypes.c_int64.from_address(own + THREAD).value = thread
        handle = ctypes.c_ulong()
        error = _system().pthread_create(ctypes.byref(handle), None, _native().serve, ctypes.c_void_p(own))
        if error:
            raise OSError(error, os.strerror(error))
        with suppress(AttributeError):
            _system().pthread_setname_np(handle, f"gpu-engine {thread}".encode())
        return handle.value


def _stop(stop: Stop, memory: NDArray[Any], address: int, workers: list[int], pid: int) -> None:
    """Workers end when no run is under way, if need be at the interpreter's exit, before their code is unmapped. In
    the child of a fork there are none."""
    if os.getpid() == pid:
        stop(address)
        for worker in workers:
            _system().pthread_join(ctypes.c_ulong(worker), None)
    workers.clear()


def _pin(worker: int, core: int) -> None:
    """Where the system forbids it, the thread stays as it is."""
    mask = (1 << core).to_bytes(max(128, core // 8 + 1), "little")
    with suppress(AttributeError):
        _system().pthread_setaffinity_np(ctypes.c_ulong(worker), ctypes.c_size_t(len(mask)), mask)


@contextmanager
def _no_signals() -> Iterator[None]:
    """Threads made inside leave signals to others, but for those that say that they failed themselves."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - _FAULTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@lru_cache(maxsize=1)
def _system() -> Any:
    """What the C library exports."""
    return ctypes.CDLL(None)


@dataclass(frozen=True)
class _Native:
    """The functions of `team_code`, and what owns their code."""

    lead: Lead
    stop: Stop
    serve: ctypes.c_void_p
    engine: Any


@lru_cache(maxsize=1)
def _compiled() -> _Native:
    target = host()
    engine = compile_module(team_module(target, platform.machine()), target)
    addresses = {name: engine.get_function_address(name) for name in ("lead", "stop", "serve")}
    word = ctypes.c_void_p
    lead = ctypes.CFUNCTYPE(None, word)(addresses["lead"])
    stop = ctypes.CFUNCTYPE(None, word)(addresses["stop"])
    return _Native(lead, stop, word(addresses["serve"]), engine)


def _native() -> _Native:
    with _LOCK:
        return _compiled()
