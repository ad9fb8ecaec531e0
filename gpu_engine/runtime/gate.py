"""Whether an engine takes requests, and why not: it was closed, lost its device, or stayed behind a fork."""

from __future__ import annotations

from gpu_engine.errors import DeviceLost, EngineClosed, ForkedEngineError


class Gate:
    """Open until `shut`; the first reason stays, unless the process was forked."""

    __slots__ = ("_kind", "is_shut", "reason")

    def __init__(self) -> None:
        self.is_shut, self.reason = False, ""
        self._kind: type[EngineClosed | DeviceLost] = EngineClosed

    @property
    def forked(self) -> bool:
        """Whether this is the child of a fork."""
        return self._kind is ForkedEngineError

    @property
    def lost(self) -> bool:
        """Whether the device is lost."""
        return self._kind is DeviceLost

    def shut(self, kind: type[EngineClosed | DeviceLost], reason: str) -> None:
        """From now on refuse requests with an error of this kind."""
        if not self.is_shut or kind is ForkedEngineError:
            self._kind, self.reason = kind, reason
        self.is_shut = True

    def check(self) -> None:
        """Raise the refusal, if there is one."""
        if self.is_shut:
            raise self._kind(self.reason)
