"""The thread pool of NumPy's BLAS, held to the cores of a stream while streams are open.

threadpoolctl does the talking: it finds whichever BLAS NumPy was built with (OpenBLAS, MKL, BLIS) and knows the entry
points of each, which a few lines of ctypes would know for one build of one library. The setting is process-wide, as
BLAS pools are; the least cap of all open engines holds, and closing the last restores what was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from threadpoolctl import ThreadpoolController

_LOCK = threading.RLock()  # the garbage collector may close a stream while this thread holds it
_CAPS: list[int] = []
_BEFORE: dict[str, int] = {}


def cap_threads(threads: int) -> Callable[[], None]:
    """Let BLAS use at most `threads` threads from now on; the returned function takes the cap away, once."""
    with _LOCK:
        _CAPS.append(threads)
        _apply()
    open_caps = [threads]

    def release() -> None:
        with _LOCK:
            if open_caps:
                _CAPS.remove(open_caps.pop())
                _apply()

    return release


@lru_cache(maxsize=1)
def _pools() -> list[Any]:
    """NumPy loads its BLAS when it is imported, so looking once is enough."""
    return list(ThreadpoolController().select(user_api="blas").lib_controllers)


def _apply() -> None:
    for library in _pools():
        before = _BEFORE.setdefault(library.filepath, library.get_num_threads())
        library.set_num_threads(min([before, *_CAPS]))
