"""The array module of the interpreted GPU: NumPy that refuses what CuPy refuses and notes what a GPU would wait for.

Refused: functions and ufunc methods that CuPy 14 lacks, arrays of the host among those of the device, conversions to
the host that nobody spelled out, and what CuPy answers with a silent number of its own choice: indices out of range,
two stores to one place, floats that no integer of the type holds.

Noted, in `DeviceModule.notes`: "waits" (the host needs a result of the device before it can go on), "library" (cuBLAS
and cuSOLVER, which no CUDA graph can hold) and "uploads" (arrays made on the host).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import NDArray

Host = NDArray[Any]
Kind = Literal["waits", "library", "uploads"]

_MISSING = """
    asmatrix block bmat busday_count busday_offset datetime_as_string datetime_data einsum_path errstate frompyfunc
    fromregex geomspace get_include getbufsize geterr geterrcall histogram_bin_edges info insert is_busday isnat matvec
    nanpercentile nanquantile ndenumerate nditer nested_iters polyder polydiv polyint setbufsize seterr seterrcall
    show_runtime spacing test unstack vecdot vecmat
    linalg.diagonal linalg.matrix_norm linalg.multi_dot linalg.outer linalg.svdvals linalg.tensordot linalg.trace
    linalg.vecdot linalg.vector_norm
"""
MISSING = frozenset(_MISSING.split())
"""What NumPy has and CuPy 14 has not."""
NOT_VECTORIZED = frozenset({"vectorize", "apply_along_axis", "apply_over_axes", "piecewise", "fromfunction"})
"""What would run Python on the device's elements."""
_WAITING = """
    allclose argwhere array_equal array_equiv array2string array_repr array_str asnumpy average bincount compress
    digitize extract flatnonzero histogram histogram2d histogramdd interp isin nonzero percentile quantile save savez
    unique unique_all unique_counts unique_inverse unique_values
"""
WAITING = frozenset(_WAITING.split())
LIBRARY = frozenset({"matmul", "dot", "tensordot", "einsum", "inner", "outer", "vdot", "kron", "convolve", "correlate"})
CREATING = frozenset({"array", "asarray", "ascontiguousarray", "asanyarray", "asfortranarray"})
"""The doors for arrays of the host."""
UFUNC_METHODS: dict[str, frozenset[str]] = {
    "reduce": frozenset({"add", "multiply"}),
    "accumulate": frozenset({"add", "multiply"}),
    "reduceat": frozenset({"add"}),
    "at": frozenset({"add", "subtract", "maximum", "minimum", "bitwise_and", "bitwise_or", "bitwise_xor"}),
}
_METHODS = """
    all any argmax argmin argpartition argsort astype choose clip compress copy cumprod cumsum diagonal dot fill
    flatten max mean min nonzero partition prod put ravel repeat reshape round searchsorted sort squeeze std sum
    swapaxes take trace transpose var view
"""
METHODS = frozenset(_METHODS.split())
WAITING_METHODS = frozenset({"nonzero", "compress"})


class UndefinedResult(ValueError):
    """What the device answers with some number or other, and NumPy with one that it would not repeat."""


class DeviceArray(NDArrayOperatorsMixin):
    """An array of the device, with CuPy's rules; `DeviceModule.on_device` makes them."""

    __slots__ = ("_host", "_module")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, module: DeviceModule, host: Host) -> None:
        self._module, self._host = module, host

    shape = property(lambda self: self._host.shape)
    strides = property(lambda self: self._host.strides)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    itemsize = property(lambda self: self._host.itemsize)
    nbytes = property(lambda self: self._host.nbytes)
    flags = property(lambda self: self._host.flags)
    T = property(lambda self: DeviceArray(self._module, self._host.T))
    real = property(lambda self: DeviceArray(self._module, self._host.real))
    imag = property(lambda self: DeviceArray(self._module, self._host.imag))

    def __getattr__(self, name: str) -> Any:
        if name not in METHODS:
            raise AttributeError(f"cupy.ndarray has no {name}, or operations have had no use for it")
        return lambda *args, **options: self._module.method(self, name, args, options)

    def __array__(self, *args: Any, **options: Any) -> Host:
        raise TypeError("implicit conversion of a device's array to NumPy")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        return self._module.ufunc(ufunc, method, inputs, options)

    def __array_function__(self, function: Any, types: Any, args: Any, options: Any) -> Any:
        place = function.__module__.removeprefix("numpy").lstrip(".")
        name = f"{place}.{function.__name__}" if place in ("linalg", "fft") else function.__name__
        return self._module.call(name, function, args, options)

    def __getitem__(self, key: Any) -> DeviceArray:
        parts = key if isinstance(key, tuple) else (key,)
        if any(isinstance(part, DeviceArray) and part.dtype == bool for part in parts):
            self._module.note("waits", "boolean mask")
        return DeviceArray(self._module, np.asarray(self._host[self._module.index(key)]))

    def __setitem__(self, key: Any, value: Any) -> None:
        place = self._module.index(key)
        single = not isinstance(value, DeviceArray) or value.ndim == 0
        parts = key if isinstance(key, tuple) else (key,)
        indices = [part for part in parts if isinstance(part, DeviceArray) and part.ndim]
        if any(part.dtype == bool for part in indices) and not single:
            self._module.note("waits", "boolean mask")
        elif indices and not single:
            _refuse_repeats(self._host.shape, place)
        stored = self._module.on_host(value, scalars=True)
        if isinstance(stored, np.ndarray | np.generic):
            _refuse_lossy(np.asarray(stored), self._host.dtype)
        self._host[place] = stored

    def __len__(self) -> int:
        return len(self._host)

    def __iter__(self) -> Iterator[DeviceArray]:
        return (self[i] for i in range(len(self)))

    def __bool__(self) -> bool:
        return bool(self._fetched("bool()"))

    def __int__(self) -> int:
        return int(self._fetched("int()").item())

    def __float__(self) -> float:
        return float(self._fetched("float()").item())

    def __index__(self) -> int:
        return int(self._fetched("index").item())

    def item(self, *place: Any) -> Any:
        return self._fetched("item()").item(*place)

    def tolist(self) -> Any:
        return self._fetched("tolist()").tolist()

    def __repr__(self) -> str:
        return f"device array {self.dtype}{list(self.shape)}"

    def _fetched(self, how: str) -> Host:
        self._module.note("waits", how)
        return self._host


class DeviceModule:
    """What operations know as `xp`. `notes` counts (kind, what) since it was cleared."""

    ndarray = DeviceArray

    def __init__(self, place: str = "", notes: Counter[tuple[str, str]] | None = None) -> None:
        self._place = place
        self.notes: Counter[tuple[str, str]] = Counter() if notes is None else notes

    def __getattr__(self, name: str) -> Any:
        full = self._place + name
        if name.startswith("__") or full in MISSING:
            raise AttributeError(f"cupy has no {full}")
        found: Any = np
        for part in full.split("."):
            found = getattr(found, part)
        if full in ("linalg", "fft", "lib", "lib.stride_tricks"):
            return DeviceModule(full + ".", self.notes)
        if isinstance(found, np.ufunc):
            return _Ufunc(self, found)
        if isinstance(found, type) or not callable(found):
            return found
        return lambda *args, **options: self.call(full, found, args, options)

    def note(self, kind: Kind, what: str) -> None:
        self.notes[kind, what] += 1

    def on_device(self, value: Any) -> Any:
        """Results as the device keeps them: a single element is an array of no axes."""
        if isinstance(value, np.ndarray | np.generic):
            return DeviceArray(self, np.asarray(value))
        if isinstance(value, list | tuple):
            return (
                type(value)(map(self.on_device, value))
                if type(value) in (list, tuple)
                else tuple(map(self.on_device, value))
            )
        return value

    def on_host(self, value: Any, *, scalars: bool = False) -> Any:
        """Operands as NumPy takes them; TypeError for arrays of the host, with `scalars` also for lists."""
        if isinstance(value, DeviceArray):
            return value._host
        if isinstance(value, np.ndarray) and not value.ndim:
            return value[()]
        if isinstance(value, np.ndarray) or (scalars and isinstance(value, list)):
            raise TypeError("an array of the host among those of the device")
        if isinstance(value, list | tuple) and type(value) in (list, tuple):
            return type(value)([self.on_host(item) for item in value])
        return value

    def index(self, key: Any) -> Any:
        """A key as NumPy takes it; a list is an array of the host."""
        if isinstance(key, tuple):
            return tuple([self.on_host(part, scalars=True) for part in key])
        return self.on_host(key, scalars=True)

    def ufunc(self, ufunc: np.ufunc, method: str, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """`getattr(ufunc, method)` on the device."""
        name = ufunc.__name__
        if name in MISSING or name not in UFUNC_METHODS.get(method, {name}):
            raise NotImplementedError(f"cupy.{name}{'' if method == '__call__' else '.' + method}")
        if name in LIBRARY:
            self.note("library", name)
        operands = [self.on_host(x, scalars=True) for x in inputs]
        if method in ("at", "reduceat"):
            operands[1] = self.index(inputs[1])
        out = options.get("out")
        result = getattr(ufunc, method)(*operands, **{key: self.on_host(x) for key, x in options.items()})
        return (out[0] if isinstance(out, tuple) else out) if out is not None else self.on_device(result)

    def call(self, name: str, function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """A function of NumPy's on the device."""
        if name in MISSING or name in NOT_VECTORIZED:
            raise AttributeError(f"cupy has no {name}")
        if name in CREATING:
            return self._created(function, args, options)
        if name in LIBRARY or name.startswith("linalg."):
            self.note("library", name)
        alone = name == "where" and len(args) == 1
        counted = name == "repeat" and isinstance(args[1], DeviceArray)
        if name in WAITING or alone or counted:
            self.note("waits", name)
        operands = [self.on_host(x) for x in args]
        return self.on_device(function(*operands, **{name: self.on_host(x) for name, x in options.items()}))

    def method(self, array: DeviceArray, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """A method of an array."""
        if name in WAITING_METHODS or (name == "repeat" and isinstance(args[0], DeviceArray)):
            self.note("waits", name)
        if name == "dot":
            self.note("library", name)
        if name == "astype":
            _refuse_lossy(array._host, np.dtype(args[0] if args else options["dtype"]))
            if options.get("copy") is False and array.dtype == (args[0] if args else options["dtype"]):
                return array
        if {"where", "initial"} & options.keys():
            raise TypeError(f"cupy.ndarray.{name} takes no {', '.join(options)}")
        operands = [self.on_host(x) for x in args]
        named = {key: self.on_host(x) for key, x in options.items()}
        return self.on_device(getattr(array._host, name)(*operands, **named))

    def _created(self, function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        source, *rest = args
        if isinstance(source, DeviceArray):
            dtype = np.dtype(rest[0] if rest else options.get("dtype") or source.dtype)
            _refuse_lossy(source._host, dtype)
            made = function(source._host, *rest, **options)
            return source if made is source._host else DeviceArray(self, made)
        if _mentions_device(source):
            self.note("waits", "array of arrays")
            raise TypeError("cupy.asarray of a list of device arrays: use stack")
        self.note("uploads", function.__name__)
        return DeviceArray(self, np.array(source, *rest, **{k: v for k, v in options.items() if k != "copy"}))


class _Ufunc:
    """A ufunc of the device's."""

    def __init__(self, module: DeviceModule, ufunc: np.ufunc) -> None:
        self._module, self._ufunc = module, ufunc
        self.__name__ = ufunc.__name__

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self._module.ufunc(self._ufunc, "__call__", inputs, options)

    def __getattr__(self, name: str) -> Any:
        if name not in UFUNC_METHODS:
            raise AttributeError(f"cupy.ufunc has no {name}")
        return lambda *inputs, **options: self._module.ufunc(self._ufunc, name, inputs, options)


def _mentions_device(value: Any) -> bool:
    return isinstance(value, DeviceArray) or (isinstance(value, list | tuple) and any(map(_mentions_device, value)))


def _refuse_repeats(shape: tuple[int, ...], place: Any) -> None:
    """UndefinedResult if an index names an element twice: which store comes last is anybody's guess."""
    chosen = np.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape)[place].ravel()
    if len(np.unique(chosen)) != len(chosen):
        raise UndefinedResult("two elements are stored to one place")


def _refuse_lossy(source: Host, dtype: np.dtype[Any]) -> None:
    """UndefinedResult if a float becomes an integer that its type does not hold."""
    if source.dtype.kind != "f" or dtype.kind not in "iu" or not source.size:
        return
    low, high = float(np.iinfo(dtype).min), float(np.iinfo(dtype).max)
    whole = np.trunc(source.astype(np.float64))
    if not ((whole >= low) & ((whole < high) | (whole == high if high < 2**53 else False))).all():
        raise UndefinedResult(f"{source.dtype} that {dtype} does not hold is converted to it")
