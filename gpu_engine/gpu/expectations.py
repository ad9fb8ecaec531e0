"""What a compiled kernel should have become: the matrix instructions of its architecture, and loads of 16 bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from gpu_engine.gpu.kernel import Argument, TritonKernel

WARP_GROUP_ROWS = 64
"""Rows that one matrix instruction of a warp group has: a tile of fewer cannot use it.
https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions"""
VECTOR_NBYTES = 16
_DOT = re.compile(r"tt\.dot (?P<options>[^:]*): tensor<(?P<rows>\d+)x\d+x(?P<kind>\w+)> \*")
POINTWISE = ("map", "copy", "cut")
"""Kernels that read what they compute from, element by element."""
_HEAD = re.compile(r"def \w+\((.*?)\):")
_LET = re.compile(r"^\s*(\w+) = (.+)$", re.MULTILINE)
_LANES = re.compile(r"tl\.arange\(0, (\d+)\)(\[None, :\]|\[:, None\])?$")
_LOAD = re.compile(r"tl\.load\((p\d+) \+ \(([^()]+)\)(?:, mask=(\w+))?\)")
_BITS = re.compile(r"\*[a-z]+(\d+)")


@dataclass(frozen=True)
class Dot:
    """A product of a kernel: rows of its tile, and the type of its factors, "tf32" for float32 rounded to it."""

    rows: int
    kind: str


def dots(ttir: str) -> list[Dot]:
    """The products in Triton's own form of a kernel."""
    return [Dot(int(found["rows"]), _kind(found["kind"], found["options"])) for found in _DOT.finditer(ttir)]


def _kind(kind: str, options: str) -> str:
    """Triton says tf32 of integers too."""
    return "tf32" if kind == "f32" and "tf32" in options else kind


def matrix_instruction(dot: Dot, arch: int) -> str | None:
    """What multiplies on an architecture: its largest instruction that the tile has rows for, where from Hopper on
    float8 in few rows is converted; None where there is none."""
    if dot.kind == "f32":
        return None
    if dot.kind == "f64":
        return "DMMA"
    wide = dot.rows >= WARP_GROUP_ROWS or arch < 90
    letter = "I" if dot.kind == "i8" else "Q" if dot.kind.startswith("f8") and wide else "H"
    if dot.rows >= WARP_GROUP_ROWS and 90 <= arch < 100:
        return f"{letter}GMMA"
    if dot.rows >= WARP_GROUP_ROWS and 100 <= arch < 120 and letter != "I":
        return f"UTC{letter}MMA"
    return f"{letter}MMA"


def expects_vectors(kernel: TritonKernel) -> bool:
    """Whether a pointwise kernel reads some operand whose neighbours it computes side by side, from aligned memory,
    with as many of them for a thread as 16 bytes hold."""
    head = _HEAD.match(kernel.text)
    if kernel.name not in POINTWISE or head is None:
        return False
    arguments = dict(zip(head[1].split(", "), kernel.arguments, strict=True))
    lets = dict(_LET.findall(kernel.text))
    threads = 32 * kernel.num_warps
    return any(_is_wide(arguments, lets, threads, *found) for found in _LOAD.findall(kernel.text))


def _is_wide(
    arguments: Mapping[str, Argument], lets: Mapping[str, str], threads: int, pointer: str, place: str, mask: str
) -> bool:  # fmt: skip
    """Whether one load can be of 16 bytes: a row of lanes, all other terms and bounds multiples of so many elements."""
    bits = _BITS.match(arguments[pointer].type)
    if bits is None:
        return False
    vector = VECTOR_NBYTES * 8 // int(bits[1])

    def is_aligned(number: str) -> bool:
        return int(number) % vector == 0 if number.isdigit() else number in arguments and arguments[number].divisible

    rows, columns, inner = 1, 0, ""
    for name, _, factor in (term.partition(" * ") for term in place.split(" + ")):
        lanes = _LANES.search(lets.get(name, ""))
        if lanes and lanes[2] != "[:, None]" and not factor:
            columns, inner = int(lanes[1]), name
        elif not is_aligned(factor or name):
            return False
        elif lanes:
            rows = int(lanes[1])
    bound = re.search(rf"\b{inner} < (\w+)", lets.get(mask, "")) if inner else None
    return rows * columns >= vector * threads and columns >= vector and (bound is None or is_aligned(bound[1]))


def shortfalls(
    kernel: TritonKernel, ttir: str, arch: int, load_bits: int, count: Callable[[str], int]
) -> Iterator[str]:  # fmt: skip
    """What a kernel should have become and did not; `load_bits` is its widest load, `count(name)` how often a machine
    instruction occurs."""
    for dot in dict.fromkeys(dots(ttir)):
        wanted = matrix_instruction(dot, arch)
        if wanted is not None and not count(wanted):
            yield f"no {wanted} for tl.dot of {dot.rows} rows of {dot.kind}"
    if load_bits < 8 * VECTOR_NBYTES and expects_vectors(kernel):
        yield f"loads of {load_bits} bits where 128 are possible"
