"""A kernel for the GPU as a value: the text of a function in Triton or CUDA C, and the types of its arguments."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from gpu_engine.ir.dtypes import (
    BFLOAT16,
    BOOL,
    BY_ONNX_NUMBER,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INT8,
    INT16,
    INT32,
    INT64,
    UINT8,
    UINT16,
    UINT32,
    UINT64,
    DType,
)

DIVISIBILITY = 16
"""What Triton specialises on: addresses in bytes and integers that are multiples of it."""
TRITON_TYPES: dict[DType, str] = {
    FLOAT32: "fp32", FLOAT16: "fp16", BFLOAT16: "bf16", FLOAT64: "fp64",
    INT8: "i8", INT16: "i16", INT32: "i32", INT64: "i64",
    UINT8: "u8", UINT16: "u16", UINT32: "u32", UINT64: "u64", BOOL: "u8",
    BY_ONNX_NUMBER[17]: "u8", BY_ONNX_NUMBER[19]: "u8",
}  # fmt: skip
"""Elements as kernels find them in memory. A bool is a byte that is 0 or 1; a float8 is its bits (`gpu.float8`)."""
LANGUAGE_NAMES = {
    "fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64", "i8": "int8", "i16": "int16",
    "i32": "int32", "i64": "int64", "u8": "uint8", "u16": "uint16", "u32": "uint32", "u64": "uint64",
}  # fmt: skip

C_TYPES = {
    "fp32": "float", "fp64": "double", "i8": "signed char", "u8": "unsigned char", "i16": "short",
    "u16": "unsigned short", "i32": "int", "u32": "unsigned int", "i64": "long long", "u64": "unsigned long long",
    "fp16": "unsigned short", "bf16": "unsigned short",
}  # fmt: skip
"""By the types of arguments. Floats that C does not have are their bits."""


@dataclass(frozen=True)
class Argument:
    """A parameter of a kernel: `type` as Triton spells it ("*fp32" for an address, "i32" or "i64" for a number), and
    whether every launch passes a multiple of DIVISIBILITY."""

    type: str
    divisible: bool = False

    @property
    def is_pointer(self) -> bool:
        return self.type.startswith("*")


@dataclass(frozen=True)
class TritonKernel:
    """`text` defines the function `name` over `arguments`, in order. `tl`, `libdevice` and `multiply`, of two values,
    are at hand in it.

    Kernels with equal fields are the same kernel, compiled once. A program has `num_warps` * 32 threads.
    """

    name: str
    text: str
    arguments: tuple[Argument, ...]
    num_warps: int = 4
    num_stages: int = 3

    @cached_property
    def digest(self) -> str:
        """Tells kernels of one name apart."""
        fields = (self.text, self.arguments, self.num_warps, self.num_stages)
        return hashlib.sha256(repr(fields).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class CudaKernel:
    """`text` defines the `extern "C" __global__` function `name` over `arguments`, in order, for blocks of `threads`.

    Kernels with equal fields are the same kernel, compiled once.
    """

    name: str
    text: str
    arguments: tuple[Argument, ...]
    threads: int

    @cached_property
    def digest(self) -> str:
        """Tells kernels of one name apart."""
        return hashlib.sha256(repr((self.text, self.arguments, self.threads)).encode()).hexdigest()[:16]


Kernel = TritonKernel | CudaKernel
"""What launches launch."""


def language_dtype(dtype: DType) -> str:
    """The element type's name inside a kernel: "tl.float32"."""
    return f"tl.{LANGUAGE_NAMES[TRITON_TYPES[dtype]]}"


def c_type(kind: str) -> str:
    """The C type of an argument: "*fp32" is "float*"."""
    return f"{C_TYPES[kind[1:]]}*" if kind.startswith("*") else C_TYPES[kind]
