"""CUDA C kernels: for what a thread does by itself and Triton has no words for. Text, its writer and its launch.

The text knows the types of `C_TYPES`, the built-in variables and the functions that `shim/` has for the host; it
includes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import dedent, indent

from gpu_engine.gpu.kernel import C_TYPES, TRITON_TYPES, Argument, CudaKernel, c_type
from gpu_engine.gpu.launches import Launch, is_multiple
from gpu_engine.ir.dims import Dim
from gpu_engine.plan.lower import Lowering
from gpu_engine.plan.words import Address, Word


class CudaText:
    """Lines of one kernel's body. Addresses become parameters, and so do extents that are not known yet."""

    def __init__(self, lowering: Lowering, name: str) -> None:
        self._lowering, self.name = lowering, name
        self._words: dict[Word, str] = {}
        self._lines: list[str] = []

    def buffer(self, buffer: int) -> str:
        """The parameter that holds the address of a buffer, of its C type."""
        return self._words.setdefault(Address(buffer), f"p{len(self._words)}")

    def number(self, dim: Dim) -> str:
        """A number as a literal, or the parameter that holds it."""
        return str(dim) if isinstance(dim, int) else self.parameter(dim)

    def parameter(self, dim: Dim) -> str:
        """The parameter that holds a number, known or not: kernels that differ in it alone are one."""
        return self._words.setdefault(dim, f"n{len(self._words)}")

    def element(self, buffer: int) -> str:
        """The C type of a buffer's elements."""
        return C_TYPES[TRITON_TYPES[self._lowering.buffers[buffer].dtype]]

    def lines(self, text: str) -> None:
        """Lines of the body."""
        self._lines.append(indent(dedent(text).strip("\n"), "    "))

    def launch(
        self,
        grid: Sequence[Dim],
        threads: int,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        *,
        scratch: tuple[int, ...] = (),
        before: str = "",
    ) -> None:
        """Append the launch to the plan; `before` is text in front of the kernel, types and functions.

        `inputs` are the buffers that the kernel reads, `outputs` and `scratch` those that it also writes.
        """
        arguments = tuple(map(self._argument, self._words))
        parameters = ", ".join(
            f"{c_type(argument.type)} {name}" for argument, name in zip(arguments, self._words.values(), strict=True)
        )
        head = f'extern "C" __global__ void __launch_bounds__({threads}) {self.name}({parameters}) {{'
        body = "\n".join([dedent(before).strip("\n"), head, *self._lines, "}", ""]).lstrip("\n")
        padded = (*grid, 1, 1)
        kernel = CudaKernel(self.name, body, arguments, threads)
        launch = Launch(kernel, (padded[0], padded[1], padded[2]), tuple(self._words))
        self._lowering.emit(launch, inputs, outputs, scratch=scratch)

    def _argument(self, word: Word) -> Argument:
        if isinstance(word, Address):
            return Argument("*" + TRITON_TYPES[self._lowering.buffers[word.buffer].dtype], True)
        return Argument("i32", is_multiple(word))
