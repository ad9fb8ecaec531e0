"""Tensors of the device in and out of a slot: read where they lie or copied there, and results that callers own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from gpu_engine.errors import InputError
from gpu_engine.gpu.driver import Copy, Driver, Piece
from gpu_engine.gpu.kernel import DIVISIBILITY
from gpu_engine.gpu.lending import Lender
from gpu_engine.gpu.steps import End
from gpu_engine.ir.dtypes import DType
from gpu_engine.runtime.device import Cut
from gpu_engine.runtime.device_tensors import DeviceTensor, GivenTensor, one_behind_the_other


@dataclass(frozen=True)
class Place:
    """A device by its name, and as DLPack calls it, with the memory that it lends."""

    name: str
    dlpack: tuple[int, int]
    lender: Lender


class Result(NamedTuple):
    """An output: where the slot has it, and whether it carries the batch."""

    piece: Piece
    shape: tuple[int, ...]
    dtype: DType
    carries: bool


class Exchange:
    """What is to come and go between `stage` and `wait`."""

    def __init__(self, driver: Driver, place: Place | None) -> None:
        self._driver, self._place = driver, place
        self.tensors: dict[int, Sequence[GivenTensor]] = {}
        self.cuts: Sequence[Cut] = ()
        self._outputs: list[list[Any]] = []
        self._rows = 0
        self._held: list[Any] = []

    def stage(self) -> None:
        """Nothing is known of the next execution. What an interrupted wait left behind is still held."""
        self.tensors, self.cuts, self._outputs = {}, (), []

    def read(self, position: int, tensors: Sequence[GivenTensor]) -> None:
        """See `runtime.device.TensorSlot`."""
        self.tensors[position] = tensors

    def give(self, rows: int, cuts: Sequence[Cut]) -> None:
        """See `runtime.device.TensorSlot`."""
        self._rows, self.cuts = rows, cuts

    def given(self) -> Sequence[Sequence[DeviceTensor]]:
        """See `runtime.device.TensorSlot`."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def ended(self) -> None:
        """Nothing reads the callers' tensors any more, and results are the callers'."""
        self.tensors, self.cuts = {}, ()
        self._held.clear()

    def wait_for_producers(self) -> None:
        """Put what follows behind what callers did to their tensors, which are held from now on."""
        tensors = [tensor for tensors in self.tensors.values() for tensor in tensors]
        self._held += tensors
        for ready in dict.fromkeys(tensor.ready for tensor in tensors):
            if ready is not None:
                self._driver.wait(ready)

    def in_place(self) -> dict[int, int]:
        """{position: address} of the inputs that kernels can read where they lie."""
        return {
            position: tensors[0].address
            for position, tensors in self.tensors.items()
            if tensors[0].address % DIVISIBILITY == 0
            and tensors[0].nbytes
            and all(map(self._is_here, tensors))
            and one_behind_the_other(tensors)
        }

    def others(self, end: End) -> list[Copy]:
        """The copies of the inputs that come from the host."""
        arrays = [end.arrays[position] for position in self.tensors]
        read = {int(array.__array_interface__["data"][0]) for array in arrays if array.nbytes}
        return [copy for copy in end.copies if copy.host not in read]

    def copy_in(self, position: int, target: Piece) -> None:
        """Copy an input, one tensor behind the other, to where the slot has it."""
        address = target[0]
        for tensor in self.tensors[position]:
            if not tensor.nbytes:
                continue
            if tensor.strides is None:
                self._driver.move(address, tensor.address, tensor.nbytes)
            elif not self._is_here(tensor):
                raise InputError(
                    f"a tensor with gaps, {tensor.dtype}, is not copied to another GPU: make it contiguous"
                )
            else:
                self._driver.gather(address, tensor.address, tensor.shape, tensor.strides, tensor.dtype.element)
            address += tensor.nbytes

    def copy_out(self, results: Sequence[Result]) -> None:
        """Copy to every cut its part of the results."""
        self._outputs = [[self._cut(cut, i, *result) for i, result in enumerate(results)] for cut in self.cuts]

    def _cut(self, cut: Cut, i: int, source: Piece, shape: tuple[int, ...], dtype: DType, carries: bool) -> Any:
        row_nbytes = math.prod(shape) * dtype.itemsize // max(self._rows, 1) if carries else 0
        rows = cut.stop - cut.start
        address, nbytes = source[0] + cut.start * row_nbytes, rows * row_nbytes if carries else source[1]
        whole_rows = rows if cut.whole is None else cut.whole.rows
        if carries and self._rows:
            shape = (shape[0] // self._rows * whole_rows, *shape[1:])
        make = partial(self._new, shape, dtype)
        tensor = make() if cut.whole is None else cut.whole.output(i, make)
        loan: Any = tensor.loan
        for signal in loan.after:
            self._driver.wait(signal)
        if nbytes and (carries or not cut.first):
            self._driver.move(loan.address + cut.first * row_nbytes, address, nbytes)
            loan.written_by(self._driver)
        return tensor

    def _is_here(self, tensor: GivenTensor) -> bool:
        return self._place is not None and tensor.dtype.device == self._place.name

    def _new(self, shape: tuple[int, ...], dtype: DType) -> DeviceTensor:
        assert self._place is not None, "a slot of a device that lends nothing"
        loan = self._place.lender.lend(math.prod(shape) * dtype.itemsize)
        return DeviceTensor(loan, shape, dtype, self._place.name, self._place.dlpack)
