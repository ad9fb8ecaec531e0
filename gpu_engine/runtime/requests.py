"""Requests: their rows go into the inputs of an execution and come back out of its outputs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import InvalidStateError
from dataclasses import dataclass
from typing import Any

from gpu_engine.errors import GpuEngineError
from gpu_engine.plan.signature import Fit
from gpu_engine.runtime.arrays import Array, Wrap
from gpu_engine.runtime.device_tensors import DeviceTensor
from gpu_engine.runtime.future import Future
from gpu_engine.runtime.rooms import Rooms


@dataclass(frozen=True, slots=True)
class Placed:
    """Which inputs lie in the device's memory, and whether the outputs are to."""

    inputs: tuple[bool, ...]
    outputs: bool


@dataclass(slots=True, eq=False)
class Request:
    """What one call asks for; for what the batcher reads and writes see `scheduler.Waiting`.

    `number` is given by who observes executions.
    """

    arrays: Sequence[Array]
    wrap: Wrap
    fit: Fit
    rows: int
    limit: int
    key: Hashable
    arrival: float
    deadline: float | None
    future: Future[Any]
    join: Join | None = None
    level: int = 0
    placed: Placed | None = None
    gone: int = 0
    place: int = -1
    claimed: bool = False
    number: int | None = None

    def cancelled(self) -> bool:
        """See `scheduler.Waiting.cancelled`."""
        return self.future.done()

    def claim(self) -> bool:
        """See `scheduler.Waiting.claim`."""
        if self.claimed:
            return not self.future.done()
        self.claimed = True
        return self.future.set_running_or_notify_cancel()

    def succeed(self, result: Any) -> bool:
        """Give the result to the caller, unless the request was ended meanwhile; True if it has callbacks to run."""
        try:
            return self.future.put_result(result)
        except InvalidStateError:
            return False

    def fail(self, error: BaseException) -> None:
        """Give an error to the caller, unless the request was ended meanwhile."""
        try:
            self.future.set_exception(error)
        except InvalidStateError:
            return


def fail_all(requests: Iterable[Request], error: GpuEngineError) -> None:
    """Fail requests that run or wait, unless they were cancelled."""
    for request in requests:
        if request.claimed or request.claim():
            request.fail(error)


Part = tuple[Request, int, int]


class Join:
    """The outputs of a request that was cut into parts, filled by whichever threads run them."""

    def __init__(self, rows: int, batched: Sequence[bool], rooms: Rooms) -> None:
        self.outputs: list[Any] = []
        self._tensors: dict[int, DeviceTensor] = {}
        self._rows, self._left, self._batched, self._rooms = rows, rows, batched, rooms
        self._filled: set[int] = set()
        self._lock = threading.Lock()

    @property
    def rows(self) -> int:
        """See `device.Whole`."""
        return self._rows

    def output(self, position: int, make: Callable[[], DeviceTensor]) -> DeviceTensor:
        """See `device.Whole`. Never called together with `put`."""
        with self._lock:
            found = self._tensors.get(position)
            if found is None:
                found = self._tensors[position] = make()
                self.outputs = [self._tensors[i] for i in sorted(self._tensors)]
        return found

    def put(self, outputs: Sequence[Array], start: int, stop: int) -> bool:
        """Copy in what rows `start` to `stop` gave, again if they were run again; True if none lacks any more."""
        with self._lock:
            if not self.outputs:
                self.outputs = [self._room(part, stop - start, i) for i, part in enumerate(outputs)]
        for target, part, batched in zip(self.outputs, outputs, self._batched, strict=True):
            if batched:
                block = len(part) // (stop - start)
                target[start * block : stop * block] = part
        return self.done(start, stop)

    def done(self, start: int, stop: int) -> bool:
        """Count rows that are there; True if none lacks any more."""
        with self._lock:
            self._left -= stop - start if start not in self._filled else 0
            self._filled.add(start)
            return self._left == 0

    def _room(self, part: Array, rows: int, i: int) -> Array:
        if not self._batched[i]:
            return part.copy()
        return self._rooms.empty((len(part) // rows * self._rows, *part.shape[1:]), part.dtype)


def gather(parts: Sequence[Part], blocks: Sequence[int]) -> list[Array | list[Array]]:
    """For each input what an execution reads: one array, or several to be concatenated along axis 0.

    `blocks` is how much of axis 0 a row takes in each input, 0 for an input that all parts share.
    """
    if len(parts) == 1 and parts[0][2] - parts[0][1] == parts[0][0].rows:
        return list(parts[0][0].arrays)
    return [
        [_rows(request.arrays[i], request.rows, start, stop, block) for request, start, stop in parts]
        if block
        else parts[0][0].arrays[i]
        for i, block in enumerate(blocks)
    ]


def gather_rows(parts: Sequence[Part], blocks: Sequence[int]) -> list[list[Array]]:
    """What each row of all parts brings of each input; an input that all rows share is whole."""
    return [
        [array_rows(array, row, row + 1, block) for array, block in zip(request.arrays, blocks, strict=True)]
        for request, start, stop in parts
        for row in range(start, stop)
    ]


def array_rows(array: Array, start: int, stop: int, block: int) -> Array:
    """Rows of an input, of which each takes `block` of axis 0; all of it if rows take none."""
    return array[start * block : stop * block] if block else array


def scatter(
    outputs: Sequence[Array], parts: Sequence[Part], rows: int, batched: Sequence[bool]
) -> Iterable[Sequence[Array]]:
    """The outputs of each part: owned copies, except that those of a part of a larger request are still views."""
    if len(parts) == 1:
        return [outputs if parts[0][0].join else [output.copy() for output in outputs]]
    return zip(
        *(
            _pieces(output, parts, rows) if carries else [output.copy() for _ in parts]
            for output, carries in zip(outputs, batched, strict=True)
        ),
        strict=True,
    )


def _pieces(output: Array, parts: Sequence[Part], rows: int) -> list[Array]:
    if rows == len(parts):
        # One row each: walking a reshaped array makes views in half the time of slicing.
        return [piece.copy() for piece in output.reshape(rows, len(output) // rows, *output.shape[1:])]
    block, done, pieces = len(output) // rows, 0, []
    for request, start, stop in parts:
        end = done + stop - start
        piece = output[done * block : end * block]
        pieces.append(piece if request.join else piece.copy())
        done = end
    return pieces


def _rows(array: Array, rows: int, start: int, stop: int, block: int) -> Array:
    return array if stop - start == rows else array[start * block : stop * block]
