"""float8 in kernels: bytes in memory, float32 or float16 in registers, converted by integer arithmetic on every GPU.

GPUs before sm_89 have no instructions for it, so Triton refuses even the type there. Decoding is exact; rounding is to
nearest even, as ml_dtypes has it. https://arxiv.org/abs/2209.05433
"""

from __future__ import annotations

from dataclasses import dataclass

from gpu_engine.ir.dtypes import DType, from_onnx

FIRST_ARCH = 89
"""GPUs from sm_89 on multiply float8."""


@dataclass(frozen=True)
class Form:
    """A float8 type: its name in kernels, bits of its mantissa, its least normal number, its greatest number, and what
    numbers beyond that become."""

    name: str
    mantissa: int
    least: float
    greatest: float
    beyond: str


FLOAT8: dict[DType, Form] = {
    from_onnx(17): Form("tl.float8e4nv", 3, 2.0**-6, 448.0, "nan"),
    from_onnx(19): Form("tl.float8e5", 2, 2.0**-14, 57344.0, "inf"),
}


def decoded(name: str, dtype: DType) -> str:
    """The bytes called `name` as float16, which holds every float8."""
    if FLOAT8[dtype].mantissa == 2:
        return f"({name}.to(tl.uint16) << 8).to(tl.float16, bitcast=True)"
    parts = f"(({name} & 127).to(tl.uint16) << 7) | (({name} & 128).to(tl.uint16) << 8)"
    return f'tl.where(({name} & 127) == 127, float("nan"), ({parts}).to(tl.float16, bitcast=True) * 256.0)'


def encoded(text: str, dtype: DType) -> str:
    """float32 numbers that float8 holds, as bytes."""
    if FLOAT8[dtype].mantissa == 2:
        return f"(({text}).to(tl.float16).to(tl.uint16, bitcast=True) >> 8).to(tl.uint8)"
    half = f"(({text}) * {2.0**-8}).to(tl.float16).to(tl.uint16, bitcast=True)"
    return f"tl.where({text} != {text}, 127, (({half} >> 8) & 128) | (({half} >> 7) & 127)).to(tl.uint8)"


def rounded(name: str, dtype: DType, *, saturate: bool) -> str:
    """float32 numbers called `name`, rounded to what float8 holds; clipped to its finite range first if `saturate`.

    Adding and subtracting a number whose last bit is worth as much as the float8's last bit rounds to that.
    """
    form = FLOAT8[dtype]
    most = form.greatest if saturate else 2 * form.greatest
    clipped = f"tl.clamp({name}, {-most!r}, {most!r}, propagate_nan=tl.PropagateNan.ALL)"
    power = f"(tl.maximum(tl.abs({clipped}), {form.least!r}).to(tl.int32, bitcast=True) & 0x7F800000)"
    large = f"{power}.to(tl.float32, bitcast=True) * {1.5 * 2.0 ** (23 - form.mantissa)!r}"
    result = f"libdevice.copysign(({clipped} + {large}) - {large}, {name})"
    if saturate:
        return result
    limit = f"libdevice.copysign(tl.full([], float('{form.beyond}'), tl.float32), {name})"
    return f"tl.where(tl.abs({result}) > {form.greatest!r}, {limit}, {result})"
