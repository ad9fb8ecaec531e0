"""Runs kernels on the host, on plain addresses, through Triton's own interpreter with the GPU's semantics put right.

As shipped, that interpreter wants torch tensors and an environment variable that makes compiling impossible in the same
process, and computes some things that no GPU does (triton 3.6 to 3.9):

* bfloat16 is computed in float32 and rounded to nearest even, not as integers (triton issue 11584);
* `tl.maximum`, `minimum` and `clamp` drop NaN unless the kernel says otherwise;
* a float32 `tl.dot` without input_precision="ieee" loses 13 bits of both factors;
* `tl.cumsum` and `cumprod` of integers wrap in the type that they have;
* `tl.dot` keeps the GPU's least extents and knows every precision that the GPU knows;
* libdevice has functions instead of stubs;
* lanes that a load masks off, without `other`, hold garbage;
* what tensor descriptors load and store is checked lane by lane, as pointers are;
* a kernel sees the names of its own module only.
"""

from __future__ import annotations

import itertools
import math
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import min_dot_size
from triton.language.extra import libdevice
from triton.runtime import interpreter as shipped
from triton.runtime.interpreter import TensorHandle
from triton.runtime.jit import JITFunction

from gpu_engine.errors import ExecutionError
from gpu_engine.gpu.kernel import TritonKernel
from gpu_engine.gpu.triton_source import jit_function, multiply

Spans = tuple[NDArray[np.uint64], NDArray[np.uint64]]
"""Sorted first addresses, and the ends that belong to them."""
PRECISIONS = ("tf32", "tf32x3", "ieee", "bf16x3", "bf16x6")


class AccessError(ExecutionError):
    """A kernel touched memory that its step does not declare: a bug of ours."""


def spans(pieces: Sequence[tuple[int, int]]) -> Spans:
    """From pieces of memory as (address, bytes)."""
    ordered = sorted(pieces)
    starts = np.array([start for start, _ in ordered], np.uint64)
    return starts, np.array([start + nbytes for start, nbytes in ordered], np.uint64)


def interpret(
    kernel: TritonKernel,
    grid: tuple[int, int, int],
    values: Sequence[int],
    reads: Spans | None = None,
    writes: Spans | None = None,
    shuffle: random.Random | None = None,
) -> None:
    """Run every program of the grid, one after the other, in an order that `shuffle` chooses.

    `values` are the kernel's arguments: host addresses and numbers. AccessError if a lane loads from outside `reads`
    and `writes`, or stores outside `writes`, where these are given.
    """
    arguments = [_argument(value, kind.type) for value, kind in zip(values, kernel.arguments, strict=True)]
    programs = list(itertools.product(*map(range, reversed(grid))))
    if shuffle is not None:
        shuffle.shuffle(programs)
    with interpreting() as builder, np.errstate(all="ignore"):
        body = _interpretable(jit_function(kernel).fn)
        builder.permit(reads, writes, kernel.name)
        try:
            builder.set_grid_dim(*grid)
            for z, y, x in programs:
                builder.set_grid_idx(x, y, z)
                body(*arguments)
        finally:
            builder.permit(None, None, "")


@contextmanager
def interpreting() -> Iterator[Any]:
    """Triton's language as the interpreter's; afterwards compiling works again. One thread at a time, reentrant."""
    with _LOCK:
        builder = shipped.interpreter_builder
        if isinstance(builder, _Builder):
            yield builder
            return
        scope, before, call = _patched_language(), builder.__class__, JITFunction.__call__
        minimum, options = builder.codegen_fns.get("min_dot_size"), builder.options
        builder.__class__ = _Builder
        builder.permit(None, None, "")
        builder.codegen_fns["min_dot_size"] = min_dot_size(GPUTarget("cuda", 90, 32))
        # checks of overflow assert in debugging only, and take two fifths of the time whether they assert or not
        builder.options = shipped.InterpreterOptions(allowed_dot_input_precisions=PRECISIONS, sanitize_overflow=False)
        JITFunction.__call__ = _call
        try:
            yield builder
        finally:
            JITFunction.__call__, builder.__class__, builder.options = call, before, options
            builder.codegen_fns["min_dot_size"] = minimum
            scope.restore()


_LOCK = threading.RLock()


def _patched_language() -> Any:
    names = type("Names", (), {"__globals__": {"tl": tl, "core": tl.core}})
    scope = shipped._patch_lang(names)
    # NumPy 2.4 takes no int() of an array of shape (1,), which triton before 3.9 asks for in `range(0, tl.cdiv(k, 16))`
    scope.set_attr(tl.tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))
    scope.set_attr(shipped.ReduceOps, "sum", _sum)
    scope.set_attr(shipped.ReduceOps, "min_max", _min_max)
    scope.set_attr(shipped.ReduceOps, "generic_reduce", _reduce)
    scope.set_attr(shipped.ScanOps, "cumsum", _scan(np.cumsum))
    scope.set_attr(shipped.ScanOps, "cumprod", _scan(np.cumprod))
    for name, function in LIBDEVICE.items():
        scope.set_attr(libdevice, name, _library_function(name, function))
    return scope


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """tl.sum and other functions of Triton's that an interpreted kernel calls."""
    return _interpretable(self.fn)(*args, **kwargs)


class _Rewriter(shipped.FunctionRewriter):  # type: ignore[misc]
    """The shipped one copies all of its own names into the kernel's module, which hides what is missing there."""

    def _compile_and_exec(self, tree: Any) -> Any:
        names = {**self.fn.__globals__, "interpreter_semantic": shipped.interpreter_semantic}
        defined: dict[str, Any] = {}
        exec(compile(tree, self.filename, "exec"), names, defined)
        return defined[self.fn.__name__]


_REWRITTEN: dict[Any, Any] = {}


def _interpretable(function: Any) -> Any:
    found = _REWRITTEN.get(function)
    if found is None:
        found = _REWRITTEN[function] = _Rewriter(function).rewrite_ast()
    return found


def _argument(value: int, kind: str) -> Any:
    if kind.startswith("*"):
        dtype = tl.pointer_type(_language_type(kind[1:]))
        return tl.tensor(TensorHandle(np.array([value], np.uint64), dtype), dtype)
    dtype = _language_type(kind)
    return tl.tensor(TensorHandle(np.array([value], shipped._get_np_dtype(dtype)), dtype), dtype)


def _language_type(kind: str) -> Any:
    return tl.str_to_ty(kind, None)


class _Descriptor(shipped.TensorDescHandle):  # type: ignore[misc]
    """A block's pointers and mask, this a block as well, which before triton 3.9 it is not."""

    def validate(self) -> None:
        super().validate()
        assert all(extent.data.item() > 0 for extent in self.shape), "a descriptor describes no empty tensor"

    def materialize_pointers(self, offsets: Any) -> tuple[Any, Any]:
        pointers, mask = super().materialize_pointers(offsets)
        return pointers, mask if isinstance(mask, TensorHandle) else TensorHandle(mask, tl.int1)


class _Builder(shipped.InterpreterBuilder):  # type: ignore[misc]
    """Every operation of the language ends in one of its methods. Their argument lists differ between versions."""

    def permit(self, reads: Spans | None, writes: Spans | None, name: str) -> None:
        """What the running kernel may touch; None: anything."""
        self._reads, self._writes, self._name = reads, writes, name

    def create_masked_load(self, pointers: Any, mask: Any, other: Any, *rest: Any, **options: Any) -> Any:
        self._check(self._reads, pointers, mask.data, "load")
        if other is None:
            kind = np.dtype(shipped._get_np_dtype(pointers.get_element_ty()))
            garbage = np.full((*pointers.data.shape, kind.itemsize), 1 if kind.kind == "b" else 0xFF, np.uint8)
            other = TensorHandle(garbage.view(kind)[..., 0], pointers.get_element_ty())
        return super().create_masked_load(pointers, mask, other, *rest, **options)

    def create_masked_store(self, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        self._check(self._writes, pointers, mask.data, "store")
        return super().create_masked_store(pointers, value, mask, *rest)

    def create_atomic_rmw(self, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        self._check(self._writes, pointers, mask.data, "atomic")
        return super().create_atomic_rmw(operation, pointers, value, mask, *rest)

    def create_atomic_cas(self, pointers: Any, *rest: Any) -> Any:
        self._check(self._writes, pointers, np.ones(pointers.data.shape, bool), "atomic")
        return super().create_atomic_cas(pointers, *rest)

    def create_make_tensor_descriptor(
        self, base: Any, shape: Any, strides: Any, block: Any, is_signed: Any, *rest: Any
    ) -> Any:  # fmt: skip
        made = _Descriptor(base, shape, strides, block, *rest)
        made.validate()
        return made

    def _check(self, allowed: Spans | None, pointers: Any, mask: Any, what: str) -> None:
        if allowed is None:
            return
        nbytes = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        addresses = np.broadcast_to(pointers.data, mask.shape)[mask != 0]  # a scalar as a block is no array of bools
        if not addresses.size:
            return
        starts, ends = allowed
        low, high = addresses.min(), addresses.max() + nbytes
        place = int(np.searchsorted(starts, low, side="right")) - 1
        if place >= 0 and high <= ends[place]:
            return
        places = np.searchsorted(starts, addresses, side="right").astype(np.int64) - 1
        inside = (places >= 0) & (addresses + nbytes <= ends[np.maximum(places, 0)])
        if not inside.all():
            count = int((~inside).sum())
            raise AccessError(
                f"{self._name}, program {self.grid_idx}: {what} outside the declared buffers in {count} of "
                f"{addresses.size} lanes"
            )

    def cast_impl(self, source: Any, target: Any) -> Any:
        into, out_of = target.scalar == tl.bfloat16, _is_bfloat16(source)
        if into and not out_of:
            return TensorHandle(_to_bfloat16(source.data), tl.bfloat16)
        if out_of and not into:
            wide = _widened(source)
            return wide if target.scalar == tl.float32 else super().cast_impl(wide, target)
        return super().cast_impl(source, target)

    def create_fp_to_fp(self, source: Any, target: Any, rounding: Any) -> Any:
        if _is_bfloat16(source) or target.scalar == tl.bfloat16:
            return self.cast_impl(source, target)
        narrow = _FLOAT8.get(str(target.scalar))
        if narrow is not None and source.data.dtype in (np.float16, np.float32):
            return TensorHandle(source.data.astype(narrow).view(np.uint8), target.scalar)
        return super().create_fp_to_fp(source, target, rounding)

    def get_bf16(self, value: float) -> Any:
        return TensorHandle(_to_bfloat16(np.array([value])), tl.bfloat16)

    def create_dot(self, a: Any, b: Any, accumulator: Any, input_precision: Any, *rest: Any) -> Any:
        if input_precision == ir.INPUT_PRECISION.TF32:
            a, b = _as_tf32(a), _as_tf32(b)
        a, b = (_widened(_decoded(factor)) for factor in (a, b))
        return super().create_dot(a, b, accumulator, input_precision, *rest)

    def create_maxnumf(self, left: Any, right: Any) -> Any:
        return self._without_nan(np.fmax, left, right)

    def create_minnumf(self, left: Any, right: Any) -> Any:
        return self._without_nan(np.fmin, left, right)

    def _without_nan(self, function: Any, left: Any, right: Any) -> Any:
        result = self.binary_op(_widened(left), _widened(right), function)
        return _narrowed(result) if _is_bfloat16(left) else result

    def create_clampf(self, value: Any, low: Any, high: Any, propagate_nan: Any) -> Any:
        if propagate_nan == ir.PROPAGATE_NAN.NONE:
            return self.create_minnumf(self.create_maxnumf(value, low), high)
        clipped = self.ternary_op(_widened(value), _widened(low), _widened(high), np.clip)
        return _narrowed(clipped) if _is_bfloat16(value) else clipped


def _through_float32(name: str) -> None:
    original, compares = getattr(shipped.InterpreterBuilder, name), name.startswith("create_fcmp")

    def method(self: Any, *args: Any) -> Any:
        if not any(map(_is_bfloat16, args)):
            return original(self, *args)
        result = original(self, *map(_widened, args))
        return result if compares else _narrowed(result)

    setattr(_Builder, name, method)


_FLOAT_OPERATIONS = """
    fadd fsub fmul fdiv frem fneg minimumf maximumf fma fabs precise_divf approx_divf exp exp2 log log2 sin cos sqrt
    precise_sqrt rsqrt floor ceil erf
"""
for _name in _FLOAT_OPERATIONS.split():
    if hasattr(shipped.InterpreterBuilder, f"create_{_name}"):
        _through_float32(f"create_{_name}")
for _name in dir(shipped.InterpreterBuilder):
    if _name.startswith("create_fcmp"):
        _through_float32(_name)

_FLOAT8 = {"fp8e4nv": ml_dtypes.float8_e4m3fn, "fp8e5": ml_dtypes.float8_e5m2}


def _decoded(handle: Any) -> Any:
    """float8 as float32, also NaN, which the shipped conversion takes for a number."""
    narrow = _FLOAT8.get(str(handle.dtype.scalar))
    return handle if narrow is None else TensorHandle(handle.data.view(narrow).astype(np.float32), tl.float32)


def _is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _to_bfloat16(values: NDArray[Any]) -> NDArray[np.uint16]:
    """Bits, rounded to nearest even."""
    return values.astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)


def _widened(handle: Any) -> Any:
    if not _is_bfloat16(handle):
        return handle
    bits = np.ascontiguousarray(handle.data).astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)


def _narrowed(handle: Any) -> Any:
    return TensorHandle(_to_bfloat16(handle.data), tl.bfloat16) if handle.data.dtype == np.float32 else handle


def _as_tf32(handle: Any) -> Any:
    """Without the 13 low bits, which the tensor core does not read."""
    if handle.data.dtype != np.float32:
        return handle
    bits = np.ascontiguousarray(handle.data).view(np.uint32) & np.uint32(0xFFFFE000)
    return TensorHandle(bits.view(np.float32), handle.dtype)


_SHIPPED_SUM = shipped.ReduceOps.sum
_SHIPPED_MIN_MAX = shipped.ReduceOps.min_max
_SHIPPED_REDUCE = shipped.ReduceOps.generic_reduce
_QUIET = {np.nanmax: np.fmax.reduce, np.nanmin: np.fmin.reduce}
"""NumPy's functions that warn of nothing but NaN, by those that do not."""


def _min_max(self: Any, tensor: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
    return _SHIPPED_MIN_MAX(self, tensor, _QUIET.get(val_reduce_op, val_reduce_op), idx_reduce_op)


def _sum(self: Any, tensor: Any) -> Any:
    if tensor.dtype in (tl.bfloat16, tl.float16):
        raise TypeError(f"tl.sum of {tensor.dtype} adds up in that type on the GPU: convert to float32 first")
    return _SHIPPED_SUM(self, tensor)


def _reduce(self: Any, tensors: Any) -> Any:
    """A product at once, where the shipped one calls a function for each element."""
    if self.combine_fn is not multiply:
        return _SHIPPED_REDUCE(self, tensors)
    values = tensors[0].handle.data
    folded = np.prod(values, axis=self.axis, keepdims=self.keep_dims, dtype=values.dtype)
    return self.to_tensor(folded, tensors[0].dtype)


def _scan(function: Callable[..., Any]) -> Callable[[Any, Any], list[Any]]:
    """NumPy adds up narrow integers in wide ones, a GPU in their own type."""

    def scan(self: Any, tensor: Any) -> list[Any]:
        values = tensor.handle.data
        return [self.to_tensor(function(values, axis=self.axis, dtype=values.dtype), tensor.dtype)]

    return scan


def _by_element(function: Callable[[float], float]) -> Callable[..., Any]:
    vectorized = np.vectorize(function, otypes=[np.float64])
    return lambda x: vectorized(x.astype(np.float64))


LIBDEVICE: dict[str, Callable[..., Any]] = {
    "acos": np.arccos, "acosh": np.arccosh, "asin": np.arcsin, "asinh": np.arcsinh, "atan": np.arctan,
    "atan2": np.arctan2, "atanh": np.arctanh, "copysign": np.copysign, "cos": np.cos, "cosh": np.cosh,
    "erf": _by_element(math.erf), "exp": np.exp, "expm1": np.expm1, "fmod": np.fmod, "isinf": np.isinf,
    "isnan": np.isnan, "log": np.log, "log1p": np.log1p, "pow": np.power, "rint": np.rint, "sin": np.sin,
    "sinh": np.sinh, "tan": np.tan, "tanh": np.tanh, "trunc": np.trunc,
}  # fmt: skip
"""What kernels may call of libdevice: float32 and float64 only, as on the GPU."""


def _library_function(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def interpreted(*args: Any) -> Any:
        tensors = [x if isinstance(x, tl.tensor) else shipped.interpreter_semantic.to_tensor(x) for x in args]
        dtype = tensors[0].dtype
        if dtype not in (tl.float32, tl.float64):
            raise TypeError(f"libdevice.{name} takes float32 or float64, not {dtype}")
        data = np.asarray(function(*(tensor.handle.data for tensor in tensors)))
        dtype = tl.int1 if data.dtype == bool else dtype
        data = data.astype(shipped._get_np_dtype(dtype))
        blocks = any(tensor.type.is_block() for tensor in tensors)
        return tl.tensor(TensorHandle(data, dtype), tl.block_type(dtype, list(data.shape)) if blocks else dtype)

    return interpreted
