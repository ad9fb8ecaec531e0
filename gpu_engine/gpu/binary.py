"""A compiled kernel as data: machine code for one architecture, and how its parameters are packed.

The layout of the parameters is read off the PTX that Triton made, whose own parameters follow the kernel's: global
scratch, and in newer versions a profiler's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from gpu_engine.errors import DeviceError
from gpu_engine.gpu.kernel import Kernel

_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
_ENTRY = re.compile(r"\.entry\s+\w+\s*\((.*?)\)\s*\n", re.DOTALL)
_READ = re.compile(r"\[\w+_param_(\d+)[\]+]")
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.[busf](8|16|32|64)\b[^,\[]*(?:\[(\d+)\])?")


@dataclass(frozen=True)
class Binary:
    """`cubin` holds the function `entry` for the architecture `arch` (90: sm_90).

    A block has `threads` threads and `shared_nbytes` of dynamic shared memory. `parameters` are bytes of each, the
    kernel's own first. Every program needs `scratch_nbytes` of global scratch, whose address is the parameter numbered
    `scratch_parameter`; none: None.
    """

    entry: str
    arch: int
    cubin: bytes
    threads: int
    shared_nbytes: int
    scratch_nbytes: int
    parameters: tuple[int, ...]
    scratch_parameter: int | None = None


MEMORY_ALIGNMENT = 256
"""Bytes; what devices allocate begins at multiples of it."""
BinarySource = Callable[[Kernel, int], Binary]
"""source(kernel, arch) gives a kernel's binary, compiled now or ahead of time; DeviceError where it has none."""


def parameter_nbytes(ptx: str) -> tuple[int, ...]:
    """Bytes of every parameter of the one entry in `ptx`."""
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise DeviceError("the PTX has no entry whose parameters could be read")
    found = _PARAMETER.findall(entry[1])
    if len(found) != entry[1].count(".param"):
        raise DeviceError(f"parameters of an unknown kind: {' '.join(entry[1].split())}")
    return tuple(_SIZES[bits] * int(count or 1) for bits, count in found)


def scratch_parameter(ptx: str, own: int, scratch_nbytes: int) -> int | None:
    """Which parameter behind the kernel's `own` is the address of global scratch: the one that is read. None where
    programs need no scratch; DeviceError where that cannot be told."""
    read = sorted({number for found in _READ.findall(ptx) if (number := int(found)) >= own})
    if not scratch_nbytes:
        return None
    if len(read) != 1:
        raise DeviceError(f"global scratch is wanted, and of the parameters behind the {own} first {read} are read")
    return read[0]


def check_parameters(kernel: Kernel, parameters: tuple[int, ...]) -> None:
    """DeviceError unless the compiled kernel takes what is passed: its own arguments, then addresses only."""
    own = tuple(8 if argument.is_pointer or argument.type.endswith("64") else 4 for argument in kernel.arguments)
    extra = parameters[len(own) :]
    if parameters[: len(own)] != own or set(extra) - {8}:
        raise DeviceError(f"kernel {kernel.name} passes parameters of {list(own)} bytes, compiled: {list(parameters)}")
