"""How long requests may wait and which go first, as their callers say it and as the queue takes it."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_engine.options import Options, TimeoutAction, seconds
from gpu_engine.runtime.requests import Request
from gpu_engine.runtime.scheduler import Batcher


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """The rules of an engine; `timeout_s` (0: never) and `level` are those of a request that says nothing."""

    levels: int
    timeout_s: float
    allow_override: bool
    level: int

    def timeout(self, asked: float) -> float:
        """Seconds that a request may wait, 0: for ever. It may only shorten the default, unless overriding is allowed;
        what asks for more gets the default."""
        own = seconds("timeout", asked)
        if self.allow_override or not self.timeout_s:
            return own
        return min(own, self.timeout_s) if own else self.timeout_s

    def level_of(self, priority: int) -> int:
        """The level of a priority, which is a number from 1, the highest; ValueError or TypeError for another."""
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise TypeError(f"priority must be an integer, given {type(priority).__name__}")
        if not self.levels:
            raise ValueError(f"priority={priority} was given, but the engine was compiled without priority_levels=")
        if not 1 <= priority <= self.levels:
            raise ValueError(f"priority must be from 1, the highest, to {self.levels}, given {priority}")
        return priority - 1


def queue_policy(options: Options) -> QueuePolicy:
    """The policy that options ask for. A request without a priority has the middle one, the higher of two."""
    levels = options.priority_levels
    return QueuePolicy(levels, options.default_timeout, options.allow_override, max(0, levels - 1) // 2)


def new_batcher(options: Options) -> Batcher[Request]:
    """The queue that options ask for."""
    delays = options.timeout_action is TimeoutAction.DELAY
    return Batcher(
        options.batch_timeout_ms / 1000, options.max_queue_size, max(1, options.priority_levels), delays
    )  # fmt: skip
