"""Writing a kernel: its lines, its parameters in the order in which they are first needed, and its launch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from textwrap import dedent, indent

from gpu_engine.gpu.float8 import FLOAT8
from gpu_engine.gpu.kernel import DIVISIBILITY, TRITON_TYPES, Argument, TritonKernel
from gpu_engine.gpu.launches import Launch, is_multiple
from gpu_engine.gpu.printing import loaded, print_expr, stored
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import BITS, DType
from gpu_engine.ir.expr import Expr
from gpu_engine.plan.lower import Lowering
from gpu_engine.plan.words import Address, Word


def array_dtype(dtype: DType) -> DType:
    """What the device's array module calls elements of `dtype`: unsigned integers where it does not know them."""
    return dtype if dtype.isbuiltin == 1 else BITS[dtype.itemsize]


class KernelText:
    """Lines of one kernel. Addresses and extents that are not known yet become parameters; known extents literals."""

    def __init__(self, lowering: Lowering, name: str, *, bits: bool = False, widest: int = DIVISIBILITY) -> None:
        """With `bits`, elements are unsigned integers of their width, whatever they mean. A load of 16 bytes has
        `widest` elements at most."""
        self._lowering, self.name, self._bits, self.widest = lowering, name, bits, widest
        self._words: dict[tuple[Word, str, bool], str] = {}
        self._role = ""
        self._lines: list[str] = []
        self._depth = 1
        self._fresh = 0

    def buffer(self, buffer: int, offset: Dim = 0) -> str:
        """The parameter that holds the address of a buffer, from `offset` bytes on."""
        return self._words.setdefault((Address(buffer, offset), "", True), f"p{len(self._words)}")

    def number(self, dim: Dim) -> str:
        """A number as a literal, or the parameter that holds it."""
        return str(dim) if isinstance(dim, int) else self.parameter(dim)

    def parameter(self, dim: Dim, *, hint: bool = True) -> str:
        """The parameter that holds a number, known or not: kernels that differ in it alone are one.

        Without `hint` they are so even if it is a multiple of 16 in one of them only, and Triton learns nothing of it.
        """
        return self._words.setdefault((dim, self._role, hint), f"n{len(self._words)}")

    @contextmanager
    def apart(self, role: str) -> Iterator[None]:
        """Numbers asked for in a role have parameters of their own: that some happen to equal numbers in other roles
        makes no kernel of its own."""
        before, self._role = self._role, role
        yield
        self._role = before

    def unravelled(self, index: str, extents: Sequence[Dim], *, shared: bool = False) -> list[str]:
        """Names of the indices along axes of which `index` counts the points; `shared`: with extents as parameters."""
        names: list[str] = []
        for extent in reversed(extents[1:]):
            divisor = self.parameter(extent) if shared else self.number(extent)
            names.insert(0, self.let("i", f"{index} % {divisor}"))
            index = self.let("i", f"{index} // {divisor}")
        return [index, *names] if extents else []

    def fresh(self, prefix: str) -> str:
        """A name that no line has yet."""
        self._fresh += 1
        return f"{prefix}_{self._fresh}"

    def line(self, text: str) -> None:
        """One line, or several with the indentation between them."""
        self._lines.append(indent(dedent(text).strip("\n"), "    " * self._depth))

    def let(self, prefix: str, text: str) -> str:
        """The name of a value that gets its own line."""
        name = self.fresh(prefix)
        self.line(f"{name} = {text}")
        return name

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """Lines inside `head`, a `for` or `if`."""
        self.line(head)
        self._depth += 1
        yield
        self._depth -= 1

    def load(self, buffer: int, index: str, mask: str | None = None, other: str | None = None) -> str:
        """The name of elements in computing form. `index` counts elements; without `mask` all lanes are inside.

        Lanes that the mask leaves out hold `other`, or garbage.
        """
        dtype = self._dtype(buffer)
        options = "" if mask is None else f", mask={mask}" + (f", other={other}" if other is not None else "")
        raw = f"tl.load({self.buffer(buffer)} + ({index}){options})"
        return self.let("x", loaded(self.let("bits", raw) if dtype in FLOAT8 else raw, dtype))

    def store(self, buffer: int, index: str, value: str, mask: str | None = None) -> None:
        """Write elements that are in computing form."""
        dtype = self._dtype(buffer)
        tail = "" if mask is None else f", mask={mask}"
        self.line(f"tl.store({self.buffer(buffer)} + ({index}), {stored(value, dtype)}{tail})")

    def evaluate(self, root: Expr, operands: Mapping[int, str]) -> str:
        """The name of an expression's value, of operands in computing form."""
        lines, name = print_expr(root, operands, self.fresh("t") + "_")
        for line in lines:
            self.line(line)
        return name

    def kernel(self, num_warps: int = 4, num_stages: int = 3) -> TritonKernel:
        """What the lines so far make."""
        head = f"def {self.name}({', '.join(self._words.values())}):"
        arguments = tuple(self._argument(word, hint) for word, _, hint in self._words)
        return TritonKernel(self.name, "\n".join([head, *self._lines, ""]), arguments, num_warps, num_stages)

    def launch(
        self,
        grid: Sequence[Dim],
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        *,
        num_warps: int = 4,
        num_stages: int = 3,
        scratch: tuple[int, ...] = (),
        in_place: tuple[int, ...] = (),
        zeroed: tuple[int, ...] = (),
    ) -> None:
        """Append the launch to the plan.

        `inputs` are the buffers that the kernel reads, `outputs` and `scratch` those that it also writes; it touches no
        others. `zeroed` as in `Launch`. Only the first extent of the grid may pass 65535.
        """
        padded = (*grid, 1, 1)
        words = tuple(word for word, _, _ in self._words)
        launch = Launch(self.kernel(num_warps, num_stages), (padded[0], padded[1], padded[2]), words, zeroed)
        self._lowering.emit(launch, inputs, outputs, scratch=scratch, in_place=in_place)

    def _argument(self, word: Word, hint: bool) -> Argument:
        if isinstance(word, Address):
            return Argument("*" + TRITON_TYPES[self._dtype(word.buffer)], is_multiple(word.offset))
        return Argument("i32", hint and is_multiple(word))

    def _dtype(self, buffer: int) -> DType:
        dtype = self._lowering.buffers[buffer].dtype
        return BITS[dtype.itemsize] if self._bits else dtype


def power_of_two(extent: int) -> int:
    """The least power of two that is no less."""
    return 1 << max(0, extent - 1).bit_length()
