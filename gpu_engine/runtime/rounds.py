"""What the thread of a slot does with a batch: whether rows may share it, the run, the wait for callers to return."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from gpu_engine.runtime.execution import Worker, clock, execute
from gpu_engine.runtime.requests import Part, Request
from gpu_engine.runtime.scheduler import Batch, Batcher

RETURN_SHARE, RETURN_S = 0.1, 0.5e-3
"""How long callers have to come back: this part of what their batch took, and no longer (`benchmarks.batching`)."""
_STEP_S = 20e-6


class Rounds:
    """`may_share` is asked before a batch; `individual`: requests of a batch that is not full run one after another."""

    def __init__(self, batcher: Batcher[Request], batched_outputs: Sequence[bool], closed: Callable[[], bool]) -> None:
        self._batcher, self._batched_outputs, self._closed = batcher, tuple(batched_outputs), closed
        self.may_share: Callable[[Worker, Sequence[Part]], bool] | None = None
        self.individual = False

    def run(self, worker: Worker, batch: Batch[Request]) -> None:
        """Run a batch and settle its requests; never raises."""
        started = clock()
        self.execute(worker, batch)
        if len(batch.parts) > 1:
            self._await_callers(len(batch.parts), RETURN_SHARE * (clock() - started))

    def execute(self, worker: Worker, batch: Batch[Request]) -> None:
        """Run a batch and nothing else."""
        if self.may_share is not None and not self.may_share(worker, batch.parts):
            self._execute_apart(worker, batch)
        elif self.individual and batch.reason != "full":
            for part in batch.parts:
                execute(worker, [part], self._batched_outputs)
        else:
            execute(worker, batch.parts, self._batched_outputs)

    def _execute_apart(self, worker: Worker, batch: Batch[Request]) -> None:
        """Run every request of a batch as it is, as one row that nothing cuts; parts cut before are void."""
        for request, _, _ in batch.parts:
            if not request.future.done():
                execute(worker, [(replace(request, join=None, rows=1), 0, 1)], self._batched_outputs)

    def _await_callers(self, answered: int, longest_s: float) -> None:
        """After a batch of several requests, let those that waited for it come back before the next one is formed.

        Threads that wake up need the interpreter one after another; taking the queue at once would find the first of
        them alone, and batches of 1 and of all others would take turns. A lone request is never held back.
        """
        ends = clock() + min(longest_s, RETURN_S)
        while self._batcher.size < answered and not self._closed() and clock() < ends:
            time.sleep(_STEP_S)
