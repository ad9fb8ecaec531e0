"""Compiling kernels for a GPU that is not there, and reading what became of them.

Triton compiles without a driver, and its wheel brings the tools that read machine code. What registers a kernel takes
and whether they spilled is said by them alone: Triton's metadata have it only once a driver loaded the kernel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gpu_engine.errors import DeviceError
from gpu_engine.gpu.binary import MEMORY_ALIGNMENT, Binary, check_parameters, parameter_nbytes, scratch_parameter
from gpu_engine.gpu.elf import stack_nbytes
from gpu_engine.gpu.expectations import shortfalls
from gpu_engine.gpu.kernel import DIVISIBILITY, CudaKernel, Kernel, TritonKernel
from gpu_engine.gpu.nvrtc import compile_cuda
from gpu_engine.gpu.triton_source import jit_function

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMITS = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes of shared memory that one block can have.
https://docs.nvidia.com/cuda/cuda-c-programming-guide/#compute-capabilities"""
MATRIX_INSTRUCTIONS = ("HMMA", "IMMA", "QMMA", "DMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA")
RELIEFS: tuple[Mapping[str, str], ...] = (
    {}, {"ptx_options": "--register-usage-level=8"}, {"ptx_options": "--minnctapersm=1"},
)  # fmt: skip
"""Options of ptxas, which saves registers so that a multiprocessor has room for one more program, at the price of a few
that spill. The second saves fewer, the third none.
https://docs.nvidia.com/cuda/cuda-compiler-driver-nvcc/#options-for-steering-gpu-code-generation"""
_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+(?:\.[A-Za-z0-9_]+)*)", re.MULTILINE
)  # fmt: skip
_BLOCK = re.compile(r"tensordesc<(?:tensor<)?([\dx]+)x[a-z]")
_BUFFER = re.compile(r"memdesc<([\dx]+)x[a-z]")
_TF32_ON_BLACKWELL = re.compile(r"tc_gen5_mma.*memdesc<\d+x\d+xf32, #shared")
_CREATED = re.compile(r"ttng\.tensormap_create (%\w+), %\w+, \[([^\]]*)\]")
_SEEN = re.compile(r"ttng\.reinterpret_tensor_descriptor (%\w+) ")


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers of a thread, bytes of its stack and of a block's shared memory, and how
    often each machine instruction occurs."""

    registers: int
    stack_nbytes: int
    shared_nbytes: int
    instructions: Counter[str] = field(repr=False)

    def count(self, name: str) -> int:
        """Instructions called `name`, with or without modifiers: "HGMMA", "LDG.E.128"."""
        return sum(n for text, n in self.instructions.items() if text == name or text.startswith(f"{name}."))

    @property
    def spills(self) -> int:
        """Loads and stores of registers that did not fit."""
        return self.count("LDL") + self.count("STL")

    @property
    def matrix_instructions(self) -> dict[str, int]:
        return {name: count for name in MATRIX_INSTRUCTIONS if (count := self.count(name))}

    @property
    def load_bits(self) -> int:
        """The widest load from global memory, to registers or to shared memory."""
        found = (re.match(r"(?:LDG|LDGSTS)\.E\S*\.(64|128)\b", text) for text in self.instructions)
        widths = [int(width[1]) for width in found if width is not None]
        return max(widths, default=32 if self.count("LDG") or self.count("LDGSTS") else 0)


def compiled(kernel: TritonKernel, arch: int) -> Any:
    """Triton's `CompiledKernel` for an architecture such as 90 (sm_90), from its cache on disk where it is there; one
    that spills with less relief is compiled with more."""
    for relief in RELIEFS:
        made = _compiled(kernel, arch, relief)
        if not stack_nbytes(made.asm["cubin"]):
            break
    return made


def _compiled(kernel: TritonKernel, arch: int, relief: Mapping[str, str]) -> Any:
    function = jit_function(kernel)
    names = function.arg_names
    signature = {name: argument.type for name, argument in zip(names, kernel.arguments, strict=True)}
    divisible = {(i,): [["tt.divisibility", DIVISIBILITY]] for i, a in enumerate(kernel.arguments) if a.divisible}
    source = ASTSource(fn=function, signature=signature, constexprs={}, attrs=divisible)
    own = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={**own, **relief})


def compile_binary(kernel: Kernel, arch: int) -> Binary:
    """The kernel's machine code as data. DeviceError where Triton cannot compile it, or packs parameters in a way that
    launches do not know."""
    if isinstance(kernel, CudaKernel):
        return compile_cuda(kernel, arch)
    try:
        made = compiled(kernel, arch)
    except Exception as error:
        raise DeviceError(f"kernel {kernel.name} does not compile for sm_{arch}: {error}") from error
    parameters, scratch = parameters_of(kernel, made)
    metadata = made.metadata
    return Binary(
        metadata.name, arch, made.asm["cubin"], metadata.num_warps * 32, metadata.shared, metadata.global_scratch_size,
        parameters, scratch,
    )  # fmt: skip


def parameters_of(kernel: TritonKernel, binary: Any) -> tuple[tuple[int, ...], int | None]:
    """(bytes of every parameter of what `compiled` made, which of them is the address of global scratch, if one is);
    DeviceError where launches pass something else."""
    ptx, metadata = binary.asm["ptx"], binary.metadata
    parameters = parameter_nbytes(ptx)
    check_parameters(kernel, parameters)
    if metadata.global_scratch_size and MEMORY_ALIGNMENT % metadata.global_scratch_align:
        raise DeviceError(f"kernel {kernel.name} wants scratch at multiples of {metadata.global_scratch_align} bytes")
    return parameters, scratch_parameter(ptx, len(kernel.arguments), metadata.global_scratch_size)


def resources(binary: Any) -> Resources:
    """What `compiled` made, read from its machine code."""
    return cubin_resources(binary.asm["cubin"], int(binary.metadata.shared))


def cubin_resources(cubin: bytes, shared_nbytes: int = 0) -> Resources:
    """What machine code takes that asks for so much dynamic shared memory, besides its own."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        listing = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    counts = Counter(_INSTRUCTION.findall(listing))
    return Resources(int(found[1]), int(found[2]), shared_nbytes, counts)


def problems(kernel: TritonKernel, binary: Any, used: Resources, arch: int) -> list[str]:
    """Reasons not to launch a kernel, known without having run it."""
    found = []
    if used.stack_nbytes or used.spills:
        found.append(f"spills: {used.stack_nbytes} bytes of stack, {used.spills} local loads and stores")
    if used.shared_nbytes > SHARED_LIMITS[arch]:
        found.append(f"{used.shared_nbytes:,} bytes of shared memory, {SHARED_LIMITS[arch]:,} are there")
    found += shortfalls(kernel, binary.asm["ttir"], arch, used.load_bits, used.count)
    exact = 'input_precision="ieee"' in kernel.text
    if exact and any(map(_TF32_ON_BLACKWELL.search, binary.asm["ttgir"].splitlines())):
        found.append("a product of float32 became one of tf32")
    if "make_tensor_descriptor(" in kernel.text and not used.count("UTMALDG"):
        found.append("loads through descriptors did not become TMA copies")
    if getattr(binary.metadata, "tensordesc_meta", None):
        found.append("descriptors that the host makes: launches pass none")
    return found + box_problems(binary.asm["ttgir"])


def box_problems(ttgir: str) -> list[str]:
    """Descriptors whose boxes are not the blocks that are copied, and blocks that are not their buffers in shared
    memory: copies would overrun them, or their barriers wait for ever."""
    found, boxes = [], {}
    for line in ttgir.splitlines():
        if created := _CREATED.search(line):
            boxes[created[1]] = [int(extent) for extent in reversed(re.findall(r"%c(\d+)_i32", created[2]))]
        block, buffers = _BLOCK.search(line), _BUFFER.findall(line)
        if seen := _SEEN.search(line):
            extents = [int(extent) for extent in block[1].split("x")] if block else []
            *outer, inner = boxes.get(seen[1]) or [0]
            if not inner or outer != extents[:-1] or extents[-1] % inner:
                found.append(f"a descriptor's box of {[*outer, inner]} for blocks of {extents}")
        if "async_tma_copy" in line and not (block and buffers and block[1] == buffers[-1]):
            found.append(f"a TMA block of {block and block[1]} but a buffer of {buffers[-1:]}")
    return found


def _tool(name: str, option: str, path: str) -> str:
    return subprocess.run([TOOLS / name, option, path], capture_output=True, text=True, check=True).stdout
