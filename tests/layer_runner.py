"""Runs one convolution, channels last, on any target that this machine can execute, in poisoned and guarded memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_fallback.calls import Native
from cpu_fallback.conv_lowering import Layer, Operand, emit_conv, emit_transposed
from cpu_fallback.epilogues import finish_of
from cpu_fallback.native import Target
from gpu_engine.ir.dtypes import FLOAT32
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.ops import Conv, ConvTranspose, Map
from gpu_engine.ir.ops.channels_last import to_first, to_last
from gpu_engine.plan.lower import Lowering
from tests.kernel_runner import guarded, guards_hold, run_native

Array = NDArray[Any]
Emit = Callable[[Layer, Any, Array], None]


@dataclass(frozen=True)
class Case:
    """A convolution of x [N, C, spatial...] with ONNX's weights; extras broadcast to the result, channels last."""

    op: Conv | ConvTranspose
    x: Array
    w: Array
    epilogue: Expr | None = None
    extras: tuple[Array, ...] = ()
    planar: bool = False
    oracle: Array = field(init=False)

    def __post_init__(self) -> None:
        with np.errstate(all="ignore"):
            (product,) = self.op.evaluate(np, self.x.astype(np.float64), self.w.astype(np.float64))
            product = np.ascontiguousarray(product.transpose(to_last(product.ndim)))
            if self.epilogue is not None:
                (product,) = Map(self.epilogue).evaluate(np, product.astype(np.float32), *self.extras)
        object.__setattr__(self, "oracle", product)


def run(case: Case, target: Target, threads: int = 1, emit: Emit | None = None) -> Array:
    """The result [N, spatial..., M]; fails if a kernel writes where it must not."""
    lowering = Lowering(lambda *_: None)
    image = case.x if case.planar else np.ascontiguousarray(case.x.transpose(to_last(case.x.ndim)))
    given = {lowering.buffer(FLOAT32, array.shape): array for array in (image, *case.extras)}
    x, *extras = (Operand(buffer, array.shape) for buffer, array in given.items())
    out = Operand(lowering.buffer(FLOAT32, case.oracle.shape), case.oracle.shape)
    finish = finish_of(case.epilogue, extras, out.shape, target)
    assert finish is not None
    layer = Layer(lowering, target, x, out, finish, case.planar)
    emit = emit or (emit_transposed if isinstance(case.op, ConvTranspose) else emit_conv)
    emit(layer, case.op, case.w)
    return _run_steps(lowering, given, out.buffer, target, threads)


def _run_steps(lowering: Lowering, given: dict[int, Array], out: int, target: Target, threads: int) -> Array:
    arrays: list[Array] = []
    guards = []
    for i, buffer in enumerate(lowering.buffers):
        array = given.get(i, buffer.constant)
        if i in given:
            array, memory = guarded(given[i].shape, given[i].dtype)
            array[...] = given[i]
            guards.append(memory)
        elif array is None:
            array, memory = guarded(buffer.shape, buffer.dtype)  # type: ignore[arg-type]
            guards.append(memory)
        arrays.append(array)
    for step in lowering.steps:
        assert isinstance(step.kernel, Native)
        run_native(step.kernel, arrays, target, threads)
    assert all(map(guards_hold, guards)), "a kernel wrote outside its buffers"
    for i, array in given.items():
        np.testing.assert_array_equal(arrays[i], array, "a kernel wrote to its input")
    return arrays[out]


def error(found: Array, oracle: Array) -> float:
    """The largest difference over the largest result; not finite unless both agree where that is so."""
    finite = np.isfinite(oracle)
    if not np.array_equal(finite, np.isfinite(found)):
        return float("inf")
    same = np.array_equal(found[~finite], oracle[~finite].astype(found.dtype), equal_nan=True)
    scale = np.abs(oracle[finite]).max(initial=1e-30)
    return float(np.abs(found[finite] - oracle[finite]).max(initial=0) / scale) if same else float("inf")


def first(array: Array) -> Array:
    """Channels first again."""
    return array.transpose(to_first(array.ndim))


def normal(seed: int, shape: Sequence[int]) -> Array:
    return np.random.default_rng(seed).standard_normal(tuple(shape)).astype(np.float32)
