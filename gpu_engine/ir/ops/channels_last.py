"""Operations over images whose channels are the last axis: what the layout pass puts in place of ONNX's forms.

An image is [N, spatial..., C]; weights stay as ONNX has them. Every operation knows the ONNX form it stands for, which
infers and evaluates on transposed values.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import DType
from gpu_engine.ir.expr import Expr
from gpu_engine.ir.graph import Op, TensorType
from gpu_engine.ir.ops.linear import Conv, ConvTranspose
from gpu_engine.ir.ops.pointwise import Map
from gpu_engine.ir.ops.pooling import Pool

Shape = tuple[Dim, ...]


def to_last(rank: int) -> tuple[int, ...]:
    """The permutation from channels first to channels last."""
    return (0, *range(2, rank), 1)


def to_first(rank: int) -> tuple[int, ...]:
    """The permutation back."""
    return (0, rank - 1, *range(1, rank - 1))


def permuted(shape: Shape, perm: tuple[int, ...]) -> Shape:
    return tuple(shape[axis] for axis in perm)


@dataclass(frozen=True)
class LastConv:
    """Conv of x [N, spatial..., C]; of x [N, C, spatial...] if `planar`. Operands of the epilogue broadcast to the
    result [N, spatial..., M]. Integers are summed in `accumulate`."""

    strides: tuple[int, ...]
    before: tuple[Dim, ...]
    after: tuple[Dim, ...]
    dilations: tuple[int, ...]
    group: int
    epilogue: Expr | None
    planar: bool
    accumulate: DType | None = None

    @property
    def form(self) -> Conv:
        """Without the epilogue."""
        return Conv(
            self.strides, self.before, self.after, self.dilations, self.group, accumulate=self.accumulate
        )  # fmt: skip

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        return _infer(self.form, self.epilogue, inputs, planar=self.planar)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        return _evaluate(self.form, self.epilogue, xp, arrays, planar=self.planar)


@dataclass(frozen=True)
class LastConvTranspose:
    """ConvTranspose of x [N, spatial..., C]; operands of the epilogue broadcast to the result [N, spatial..., M]."""

    strides: tuple[int, ...]
    before: tuple[Dim, ...]
    after: tuple[Dim, ...]
    dilations: tuple[int, ...]
    output_padding: tuple[Dim, ...]
    group: int
    epilogue: Expr | None

    @property
    def form(self) -> ConvTranspose:
        """Without the epilogue."""
        return ConvTranspose(
            self.strides, self.before, self.after, self.dilations, self.output_padding, self.group
        )  # fmt: skip

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        return _infer(self.form, self.epilogue, inputs)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        return _evaluate(self.form, self.epilogue, xp, arrays)


@dataclass(frozen=True)
class LastPool:
    """Pool of x [N, spatial..., C]."""

    kind: str
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    before: tuple[Dim, ...]
    after: tuple[Dim, ...]
    dilations: tuple[int, ...]
    ceil_mode: bool
    count_include_pad: bool

    @property
    def form(self) -> Pool:
        return Pool(**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        return _infer(self.form, None, inputs)

    def evaluate(self, xp: Any, *arrays: Any) -> tuple[Any, ...]:
        return _evaluate(self.form, None, xp, arrays)


def _infer(
    form: Op, epilogue: Expr | None, inputs: tuple[TensorType, ...], *, planar: bool = False
) -> tuple[TensorType, ...]:  # fmt: skip
    x, *rest = inputs
    operands, extras = (rest[:1], rest[1:]) if not isinstance(form, Pool) else ([], rest)
    first = x if planar else TensorType(x.dtype, permuted(x.shape, to_first(x.rank)))
    (result,) = form.infer(first, *operands)
    product = TensorType(result.dtype, permuted(result.shape, to_last(x.rank)))
    if epilogue is None:
        return (product,)
    (finished,) = Map(epilogue).infer(product, *extras)
    return (TensorType(finished.dtype, product.shape),)


def _evaluate(
    form: Op, epilogue: Expr | None, xp: Any, arrays: tuple[Any, ...], *, planar: bool = False
) -> tuple[Any, ...]:
    x, *rest = arrays
    operands, extras = (rest[:1], rest[1:]) if not isinstance(form, Pool) else ([], rest)
    (result,) = form.evaluate(xp, x if planar else x.transpose(to_first(x.ndim)), *operands)
    product = xp.ascontiguousarray(result.transpose(to_last(x.ndim)))
    return (product,) if epilogue is None else Map(epilogue).evaluate(xp, product, *extras)
