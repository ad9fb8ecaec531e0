"""The stack that a kernel's threads take, read from the ELF file of its machine code without any tool."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

ABOUT_KERNELS = ".nv.info"
"""The section of attributes: a format, a number, and two bytes that are the value, or the size of what follows."""
SIZED, FRAME_SIZE = 4, 0x11
"""A format whose value follows, and the attribute of a function (its symbol, bytes of its stack frame)."""


class _Section(NamedTuple):
    name: str
    start: int
    nbytes: int


def stack_nbytes(cubin: bytes) -> int:
    """Bytes of stack that a thread of the one kernel in a CUBIN takes: of registers that did not fit, as a rule."""
    about = next((section for section in _sections(cubin) if section.name == ABOUT_KERNELS), None)
    if about is None:
        return 0
    return max((frame for frame in _frames(cubin, about)), default=0)


def _sections(file: bytes) -> Iterator[_Section]:
    """https://man7.org/linux/man-pages/man5/elf.5.html, for 64 bits."""
    (table,) = struct.unpack_from("<Q", file, 0x28)
    nbytes, count, names_number = struct.unpack_from("<HHH", file, 0x3A)
    heads = [struct.unpack_from("<IIQQQQ", file, table + i * nbytes) for i in range(count)]
    names = heads[names_number][4] if heads else 0
    for name, _, _, _, start, size in heads:
        end = file.index(b"\0", names + name)
        yield _Section(file[names + name : end].decode(), start, size)


def _frames(file: bytes, about: _Section) -> Iterator[int]:
    at, end = about.start, about.start + about.nbytes
    while at < end:
        kind, number, size = struct.unpack_from("<BBH", file, at)
        if kind == SIZED and number == FRAME_SIZE:
            yield struct.unpack_from("<II", file, at + 4)[1]
        at += 4 + size * (kind == SIZED)
