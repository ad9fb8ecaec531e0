"""Buckets: executions of a few sizes only, for devices that prepare each size, and for bits that never differ.

The slots here stand before a device's own. An execution of n rows runs as the smallest bucket that holds n; the rows
behind the last repeat it, so that they are inputs like any other, and results are cut to n rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gpu_engine.plan.plan import Plan
from gpu_engine.runtime.arrays import Array
from gpu_engine.runtime.device import Cut, Slot, StepTimes, Stream
from gpu_engine.runtime.device_tensors import DeviceTensor, GivenTensor

Extents = tuple[int, ...]
Sizes = Callable[[Extents], Sequence[int]]
"""The buckets, ascending, of executions at these extents."""


REPEATS = 2
"""Devices prepare a size when it comes again."""


def powers(batch: int) -> tuple[int, ...]:
    """The powers of two below `batch`, and `batch`."""
    return (*[1 << i for i in range((batch - 1).bit_length())], batch)


def bucket(rows: int, sizes: Sequence[int]) -> int:
    """The smallest size that holds `rows`; `rows` itself where none does, or where there are none."""
    return next((size for size in sizes if size >= rows), rows) if rows else rows


class BucketSlot:
    """A slot whose executions have the sizes of buckets. See `runtime.device.Slot`."""

    def __init__(self, slot: Slot, plan: Plan, sizes: Sizes) -> None:
        self._slot, self._batching, self._sizes = slot, plan.batching, sizes
        self._place = plan.symbols.index(plan.batching.symbol or "")
        self._rows = self._bucket = 0
        self._inputs: Sequence[Array] = ()
        self._read: set[int] = set()
        self.padded_rows = 0

    def stage(self, extents: Extents) -> Sequence[Array]:
        self._rows = extents[self._place]
        self._bucket = bucket(self._rows, self._sizes(extents))
        padded = (*extents[: self._place], self._bucket, *extents[self._place + 1 :])
        self._inputs = self._slot.stage(padded)
        self._read.clear()
        return self._cut(self._inputs, self._batching.inputs)

    def read(self, position: int, tensors: Sequence[GivenTensor]) -> None:
        """See `runtime.device.TensorSlot`."""
        self._read.add(position)
        missing = self._bucket - self._rows
        if missing and self._batching.inputs[position]:
            block = sum(map(len, tensors)) // self._rows
            tensors = [*tensors, *[tensors[-1][len(tensors[-1]) - block :]] * missing]
        slot: Any = self._slot
        slot.read(position, tensors)

    def give(self, rows: int, cuts: Sequence[Cut]) -> None:
        slot: Any = self._slot
        slot.give(self._bucket, cuts)

    def given(self) -> Sequence[Sequence[DeviceTensor]]:
        slot: Any = self._slot
        found: Sequence[Sequence[DeviceTensor]] = slot.given()
        return found

    def launch(self) -> None:
        rows, missing = self._rows, self._bucket - self._rows
        for i, (array, carries) in enumerate(zip(self._inputs, self._batching.inputs, strict=True)):
            if carries and missing and i not in self._read:
                block = len(array) // self._bucket
                repeated = array[rows * block :].reshape(missing, block, *array.shape[1:])
                repeated[...] = array[(rows - 1) * block : rows * block]
        self.padded_rows += missing
        self._slot.launch()

    def wait(self) -> Sequence[Array]:
        outputs = self._slot.wait()
        return self._cut(outputs, self._batching.outputs) if outputs else outputs

    def step_times(self) -> StepTimes | None:
        return self._slot.step_times()

    def prepare(self, extents: Extents, row: Sequence[Array]) -> None:
        """Run every bucket of executions at these extents, the largest first, until the device has prepared it; all
        rows are copies of one, of which each input is given. Raises what the device raises."""
        for size in reversed(self._sizes(extents)):
            for _ in range(REPEATS):
                staged = self.stage((*extents[: self._place], size, *extents[self._place + 1 :]))
                for target, source, carries in zip(staged, row, self._batching.inputs, strict=True):
                    whole = target.reshape(size, *source.shape) if carries else target
                    whole[...] = source
                self.launch()
                self.wait()

    def _cut(self, arrays: Sequence[Array], batched: Sequence[bool]) -> Sequence[Array]:
        """The arrays without the rows that were added."""
        if self._rows == self._bucket:
            return arrays
        rows, size = self._rows, self._bucket
        return [
            array[: len(array) // size * rows] if carries else array
            for array, carries in zip(arrays, batched, strict=True)
        ]


class BucketStream:
    """A stream of such slots. See `runtime.device.Stream`."""

    def __init__(self, stream: Stream, plan: Plan, sizes: Sizes) -> None:
        self._stream, self.threads = stream, stream.threads
        self.slots = [BucketSlot(slot, plan, sizes) for slot in stream.slots]

    def enter(self) -> None:
        self._stream.enter()

    def prepare(self, extents: Extents, row: Sequence[Array]) -> None:
        """See `BucketSlot.prepare`; of all slots, none of which anybody uses."""
        for slot in self.slots:
            slot.prepare(extents, row)

    def close(self) -> None:
        self.slots.clear()
        self._stream.close()

    @property
    def padded_rows(self) -> int:
        """Rows that were run only to fill a bucket."""
        return sum(slot.padded_rows for slot in self.slots)
