"""How a step of a matrix product multiplies its factors: by matrix instructions, bytes at a time, or one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gpu_engine.gpu.float8 import FIRST_ARCH, FLOAT8, decoded
from gpu_engine.gpu.kernel import language_dtype
from gpu_engine.gpu.text import KernelText
from gpu_engine.gpu.tiles import GemmTile
from gpu_engine.ir.dtypes import FLOAT32, INT8, INT16, INT32, UINT8, UINT16, DType


@dataclass(frozen=True)
class Step:
    """How the factors of a step, a [BLOCK_M, BLOCK_K] and b [BLOCK_K, BLOCK_N], are multiplied and added up in `sums`.

    `start` writes what precedes the first step; `add` the lines of a step, for `a` and `b` as memory holds them;
    `total` gives the sums of what lay in [low, high). Elements outside are loaded as `others`.
    """

    name: str
    sums: DType
    start: Callable[[KernelText, GemmTile], None]
    add: Callable[[KernelText], None]
    total: str = "acc"
    others: tuple[str, str] = ("0", "0")


def dot_step(sums: DType, factor: DType, given: tuple[DType, DType], precision: str = "ieee") -> Step:
    """Matrix instructions for floats, which are converted to `factor` first."""
    kind = language_dtype(sums)
    a, b = (
        name if dtype == factor else f"{name}.to({language_dtype(factor)})"
        for name, dtype in zip("ab", given, strict=True)
    )

    def start(text: KernelText, tile: GemmTile) -> None:
        text.line(f"acc = tl.zeros(({tile.block_m}, {tile.block_n}), {kind})")

    def add(text: KernelText) -> None:
        text.line(f'acc = tl.dot({a}, {b}, acc, input_precision="{precision}", out_dtype={kind})')

    name = precision if factor.itemsize == 4 else str(factor)
    return Step(name, sums, start, add, others=("0.0", "0.0"))


FLOAT8_PRODUCTS = 32
"""After so many products of float8 sums are added up in float32. With 0, Triton 3.6 makes float16 of them on sm_90."""


def float8_step(given: tuple[DType, DType], arch: int) -> Step:
    """Matrix instructions for float8 where there are such, else for float16, which holds them all; sums in float32.

    Those of sm_90 keep about 14 bits of the products that they add up, however the sums go on
    (https://arxiv.org/abs/2412.19437, 3.3.2).
    """
    native = arch >= FIRST_ARCH
    options = f", max_num_imprecise_acc={FLOAT8_PRODUCTS}" if native else ""
    a, b = (
        f"{name}.to({FLOAT8[dtype].name}, bitcast=True)" if native else decoded(name, dtype)
        for name, dtype in zip("ab", given, strict=True)
    )

    def start(text: KernelText, tile: GemmTile) -> None:
        text.line(f"acc = tl.zeros(({tile.block_m}, {tile.block_n}), tl.float32)")

    def add(text: KernelText) -> None:
        text.line(f"acc = tl.dot({a}, {b}, acc{options}, out_dtype=tl.float32)")

    return Step("float8" if native else "float8_half", FLOAT32, start, add)


def sum_step(sums: DType, given: tuple[DType, DType]) -> Step:
    """Products one by one, in the type of the sums."""
    kind = language_dtype(sums)
    a, b = _as_type(sums, given)

    def start(text: KernelText, tile: GemmTile) -> None:
        text.line(f"acc = tl.zeros(({tile.block_m}, {tile.block_k}, {tile.block_n}), {kind})")

    def add(text: KernelText) -> None:
        text.line(f"acc += {a}[:, :, None] * {b}[None, :, :]")

    return Step(f"sum_{sums}", sums, start, add, "tl.sum(acc, 1)")


def _as_type(dtype: DType, given: tuple[DType, DType]) -> list[str]:
    kinds = zip("ab", given, strict=True)
    return [name if kind == dtype else f"{name}.to({language_dtype(dtype)})" for name, kind in kinds]


@dataclass(frozen=True)
class Planes:
    """An integer as a sum of int8 numbers times 1, 256, the least first, and of a centre: `forms` of `x` give them."""

    forms: tuple[str, ...]
    centre: int = 0


PLANES: dict[DType, Planes] = {
    INT8: Planes(("x",)),
    UINT8: Planes(("(x ^ 128).to(tl.int8)",), 128),
    INT16: Planes(("((x & 255) ^ 128).to(tl.int8)", "(x >> 8).to(tl.int8)"), 128),
    UINT16: Planes(("((x & 255) ^ 128).to(tl.int8)", "((x >> 8) ^ 128).to(tl.int8)"), 128 * 257),
}


def byte_step(given: tuple[DType, DType]) -> Step:
    """Matrix instructions for int8, which multiply the parts of wider or unsigned integers; exact modulo 2**32.

    (a' + p) (b' + q) = a' b' + p b' + q a' + p q: what is centred is corrected by sums of rows and columns.
    """
    left, right = (PLANES[dtype] for dtype in given)
    degrees = len(left.forms) + len(right.forms) - 1

    def start(text: KernelText, tile: GemmTile) -> None:
        for degree in range(degrees):
            text.line(f"acc{degree} = tl.zeros(({tile.block_m}, {tile.block_n}), tl.int32)")
        if right.centre:
            text.line(f"a_sums = tl.zeros(({tile.block_m},), tl.int32)")
        if left.centre:
            text.line(f"b_sums = tl.zeros(({tile.block_n},), tl.int32)")

    def add(text: KernelText) -> None:
        if right.centre:
            text.line(f"a_sums += tl.sum(a.to(tl.int32) - {left.centre}, 1)")
        if left.centre:
            text.line(f"b_sums += tl.sum(b.to(tl.int32) - {right.centre}, 0)")
        parts = [
            [text.let(name, form.replace("x", name)) for form in planes.forms]
            for name, planes in (("a", left), ("b", right))
        ]
        for i, a in enumerate(parts[0]):
            for j, b in enumerate(parts[1]):
                text.line(f"acc{i + j} = tl.dot({a}, {b}, acc{i + j}, out_dtype=tl.int32)")

    terms = [f"acc{degree} * {256**degree}" if degree else "acc0" for degree in range(degrees)]
    terms += [f"b_sums[None, :] * {left.centre}"] * bool(left.centre)
    terms += [f"a_sums[:, None] * {right.centre}"] * bool(right.centre)
    if left.centre and right.centre:
        terms.append(f"(high - low) * tl.full([], {left.centre * right.centre}, tl.int32)")
    total = f"({' + '.join(terms)}).to(tl.int32)"
    name = "_".join(map(str, given))
    return Step(name, INT32, start, add, total, (str(left.centre), str(right.centre)))
