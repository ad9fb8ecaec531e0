"""The caller's side of a model: an array, list or dict comes in and arrays in port order go on; outputs go back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_engine.errors import InputError
from gpu_engine.ir.dtypes import BOOL, STRING, DType, is_float, is_integer, limits
from gpu_engine.ir.structure import Maps, Structure, nest
from gpu_engine.options import suggestion
from gpu_engine.plan.plan import Port
from gpu_engine.runtime.device_tensors import DeviceDType, Intake, take
from gpu_engine.runtime.dlpack import exported, on_host

Array = NDArray[Any]
Wrap = Callable[[Sequence[Array]], Any]


class Ports:
    """The inputs and outputs of a model as callers see them.

    A single array is taken by a model of one input and gives back the single output, or a list of several; a list or
    tuple holds the inputs in order and gives a list; a dict is keyed by names and gives a dict.
    """

    def __init__(
        self,
        inputs: Sequence[Port],
        outputs: Sequence[Port],
        structures: Sequence[tuple[str, Structure]] = (),
        device: str = "the host",
        intake: Intake | None = None,
    ) -> None:
        """Tensors in a device's memory come in by `intake`; InputError for those that lie elsewhere than `device`."""
        self._device, self._intake = device, intake
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.input_names = tuple(port.name for port in inputs)
        self.output_names = tuple(name for name, _ in structures) or tuple(port.name for port in outputs)
        self._structures = tuple(structure for _, structure in structures)
        flat = all(isinstance(structure, int | Maps) for structure in self._structures)
        self._maps = [(i, kind.keys) for i, kind in enumerate(self._structures) if isinstance(kind, Maps)]
        self._as_list: Wrap = list if not structures else self._flat if flat else self._nested
        self._as_given: Wrap = _single if len(outputs) == 1 and not structures else self._as_list
        self._as_dict: Wrap = self._named
        self._strings = any(port.dtype == STRING for port in inputs)

    def arrange(self, inputs: Any) -> tuple[Sequence[Array], Wrap]:
        """The arrays in the order of the inputs, and what turns outputs into the caller's kind.

        Dtypes and shapes of arrays are not checked here. InputError for a wrong name or number of inputs, or a value
        that is no array.
        """
        if type(inputs) is np.ndarray and len(self.inputs) == 1 and not self._strings:
            return (inputs,), self._as_given
        if type(inputs) is dict or isinstance(inputs, Mapping):
            return self._checked(self._ordered(inputs)), self._as_dict
        if isinstance(inputs, list | tuple):
            if len(inputs) != len(self.inputs):
                raise InputError(f"the model takes {self._listing()}, given a {type(inputs).__name__} of {len(inputs)}")
            return self._checked(inputs), self._as_list
        if len(self.inputs) != 1:
            raise InputError(f"the model takes {self._listing()}: give a list or a dict, not {_kind(inputs)}")
        return self._checked((inputs,)), self._as_given

    def check_dtypes(self, arrays: Sequence[Array]) -> None:
        """InputError for the first array whose dtype is not its port's: nothing is cast silently."""
        for array, port in zip(arrays, self.inputs, strict=True):
            given: Any = array.dtype
            if isinstance(given, DeviceDType):
                if given.element != port.dtype:
                    raise InputError(
                        f"input {port.name!r} is {given}, but the model takes {port.dtype}: convert it there"
                    )
            elif given != port.dtype:
                raise InputError(
                    f"input {port.name!r} is {given}, but the model takes {port.dtype}: "
                    f"convert it with .astype({port.dtype.name!r})"
                )

    def _named(self, outputs: Sequence[Array]) -> dict[str, Any]:
        values = self._as_list(outputs) if self._structures else outputs
        return dict(zip(self.output_names, values))  # noqa: B905 - `strict` costs a tenth of a request

    def _nested(self, outputs: Sequence[Array]) -> list[Any]:
        tensors = iter(outputs)
        return [nest(structure, tensors) for structure in self._structures]

    def _flat(self, outputs: Sequence[Array]) -> list[Any]:
        """Tensors, and sequences of maps from a tensor each."""
        result: list[Any] = list(outputs)
        for place, keys in self._maps:
            result[place] = [dict(zip(keys, row)) for row in result[place].tolist()]  # noqa: B905 - as above
        return result

    def _ordered(self, inputs: Mapping[Any, Any]) -> list[Any]:
        """The values in the order of the inputs; InputError for names too many or too few."""
        if len(inputs) == len(self.input_names):
            try:
                return [inputs[name] for name in self.input_names]
            except KeyError:
                pass
        for name in inputs:
            if name not in self.input_names:
                near = suggestion(str(name), self.input_names)
                raise InputError(f"the model has no input {name!r}{near}; it takes {self._listing()}")
        missing = [name for name in self.input_names if name not in inputs]
        raise InputError(f"missing input{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))}")

    def _checked(self, values: Sequence[Any]) -> Sequence[Array]:
        if self._strings:
            return [self._array(value, port) for value, port in zip(values, self.inputs, strict=True)]
        for value in values:
            if type(value) is not np.ndarray:
                break
        else:
            return values
        return [
            value if type(value) is np.ndarray else self._array(value, port)
            for value, port in zip(values, self.inputs, strict=True)
        ]

    def _array(self, value: Any, port: Port) -> Any:
        """An array of the host, or a GivenTensor in the device's memory."""
        if isinstance(value, np.ndarray | list | tuple):
            return as_array(value, port)
        tensor = take(value, port.name, self._device, self._intake)
        return as_array(value, port) if tensor is None else tensor

    def _listing(self) -> str:
        return f"{len(self.inputs)} input{'s' * (len(self.inputs) != 1)} ({'; '.join(map(str, self.inputs))})"


def as_array(value: Any, port: Port) -> Array:
    """One input as an array: arrays and objects of the array protocols as they are, lists and scalars converted.

    Numbers are converted to the port's dtype only if none of them changes kind: no float becomes an integer, and no
    integer leaves the range of its dtype.
    """
    if port.dtype == STRING:
        return _strings(value, port)
    if isinstance(value, np.ndarray):
        return np.asarray(value)
    if isinstance(value, list | tuple | int | float | complex | np.generic):
        return _numbers(value, port)
    if hasattr(value, "__dlpack__") or hasattr(value, "__array__"):
        return _foreign(value, port)
    raise InputError(f"input {port.name!r} is {_kind(value)}, but the model takes an array, {port}")


def _single(outputs: Sequence[Array]) -> Array:
    return outputs[0]


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"


def _foreign(value: Any, port: Port) -> Array:
    """The array that an object of DLPack or NumPy's array protocol gives, without a copy where it can."""
    reasons = []
    for method, convert in (("__dlpack__", _from_dlpack), ("__array__", np.asarray)):
        if hasattr(value, method):
            try:
                return convert(value)
            except (TypeError, ValueError, RuntimeError, BufferError, AttributeError) as error:
                reasons.append(str(error))
    raise InputError(f"input {port.name!r} is {_kind(value)} that gives no array: {'; '.join(reasons)}")


def _from_dlpack(value: Any) -> Array:
    """Also of elements that NumPy itself does not know, as bfloat16."""
    return on_host(exported(value))


def _nested(value: Any, port: Port) -> Array:
    try:
        return np.asarray(value)
    except ValueError as error:
        raise InputError(f"input {port.name!r}: nested lists of uneven lengths; the model takes {port}") from error


def _numbers(value: Any, port: Port) -> Array:
    array = _nested(value, port)
    if array.size and not _keeps_kind(array, port.dtype):
        raise InputError(f"input {port.name!r}: values of {array.dtype} do not convert to {port.dtype} unchanged")
    return array.astype(port.dtype)


def _keeps_kind(array: Array, dtype: DType) -> bool:
    if array.dtype == dtype:
        return True
    if dtype == BOOL:
        return False
    if is_integer(dtype):
        low, high = limits(dtype)
        return array.dtype.kind in "biu" and bool(low <= array.min() and array.max() <= high)
    return array.dtype.kind in "biuf" if is_float(dtype) else array.dtype.kind in "biufc"


def _strings(value: Any, port: Port) -> Array:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InputError(
            f"input {port.name!r}: the nested lists have uneven lengths; the model takes {port}"
        ) from error
    if array.dtype.kind in "UT":
        return array.astype(object)
    if array.dtype == STRING and all(isinstance(item, str) for item in array.flat):
        return array
    if array.size == 0 and not isinstance(value, np.ndarray):
        return array.astype(object)
    raise InputError(f"input {port.name!r} must hold strings, given {_kind(value)} of {array.dtype}")
