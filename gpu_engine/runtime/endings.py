"""What ends a pool that nobody closes: the exit of the interpreter and a fork, which leaves its threads behind."""

from __future__ import annotations

import atexit
import functools
import os
import weakref
from collections.abc import Callable
from typing import Protocol

_EXIT_TIMEOUT_S = 5.0
CLOSED = "the engine was closed"
EXPIRED = "Request timeout expired"
FORKED = "the engine was made before this process was forked: compile the model in the child"


class Ending(Protocol):
    """What threads serve."""

    def close(self, drain: bool, timeout_s: float | None) -> None: ...

    def after_fork(self) -> None:
        """Called in the child."""
        ...


def watch_endings(pool: Ending) -> Callable[[], None]:
    """Have the pool told of both, while it lives; calling what is returned takes the exit back."""
    reference = weakref.ref(pool)
    at_exit = functools.partial(_close_at_exit, reference)
    atexit.register(at_exit)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=functools.partial(_forget_threads, reference))
    return functools.partial(atexit.unregister, at_exit)


def _close_at_exit(pool: weakref.ref[Ending]) -> None:
    """Threads must be gone before the interpreter is: a kernel that returns later would find its memory unmapped."""
    alive = pool()
    if alive is not None:
        alive.close(drain=False, timeout_s=_EXIT_TIMEOUT_S)


def _forget_threads(pool: weakref.ref[Ending]) -> None:
    alive = pool()
    if alive is not None:
        alive.after_fork()
