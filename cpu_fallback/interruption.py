"""How a native loop is interrupted: now and then it has Python handle signals, and the run ends if a handler raises.

A callback could not do that: its own frame is where a handler's exception would be raised, and be lost.
https://docs.python.org/3/c-api/exceptions.html#c.PyErr_CheckSignals
"""

from __future__ import annotations

import ctypes
import threading

from cpu_fallback.code import Code, Reg, i64

PERIOD = 1 << 12
"""Iterations between two looks; a power of two."""
_FUNCTIONS = ("PyGILState_Ensure", "PyErr_CheckSignals", "PyErr_Fetch", "PyGILState_Release")
_STATE = (ctypes.c_int64 * (len(_FUNCTIONS) + 3))(
    *(ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value or 0 for name in _FUNCTIONS)
)
"""Addresses of these functions, then type, value and traceback of what a handler raised."""
_TYPE, _VALUE, _TRACEBACK = range(len(_FUNCTIONS), len(_STATE))
STATE = ctypes.addressof(_STATE)


def write_look(code: Code, state: Reg) -> Reg:
    """Have signals handled that came to the main thread; an i64 other than 0 if that raised."""
    ensure, check, fetch, release = (code.load("ptr", code.at(state, i64(8 * i)), 8) for i in range(len(_FUNCTIONS)))
    held = code.let("i32", f"call i32 {ensure.name}()")
    raised = code.convert("sext", code.let("i32", f"call i32 {check.name}()"), "i64")

    def keep() -> list[Reg]:
        places = ", ".join(str(code.at(state, i64(8 * i))) for i in (_TYPE, _VALUE, _TRACEBACK))
        code.do(f"call void {fetch.name}({places})")
        return []

    code.either(code.compare("icmp ne", raised, i64(0)), keep, lambda: [])
    code.do(f"call void {release.name}({held})")
    return raised


def raise_pending() -> None:
    """Raise what ended a loop: only the main thread handles signals, so only one of its loops can have ended so."""
    if _STATE[_TYPE] and threading.current_thread() is threading.main_thread():
        kind, value, _ = [_taken(place) for place in (_TYPE, _VALUE, _TRACEBACK)]
        if isinstance(value, BaseException):
            raise value
        assert isinstance(kind, type) and issubclass(kind, BaseException)
        raise kind(*([] if value is None else [value]))


def _taken(place: int) -> object:
    """The object that the state owns there, which gives it up."""
    address, _STATE[place] = _STATE[place], 0
    if not address:
        return None
    found: object = ctypes.cast(address, ctypes.py_object).value
    ctypes.pythonapi.Py_DecRef(ctypes.py_object(found))
    return found
