"""A writer of LLVM IR as text: registers, blocks, loops.

https://llvm.org/docs/LangRef.html. Text is several times faster to write from Python than building objects, and what
LLVM parses anyway.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Reg(NamedTuple):
    """An SSA value or a constant: its text and its LLVM type."""

    name: str
    type: str

    def __str__(self) -> str:
        return f"{self.type} {self.name}"


PTR, I64 = "ptr", "i64"


def i64(value: int) -> Reg:
    return Reg(str(value), I64)


class Code:
    """One function under construction. Values are registers; control flow is by nested Python callbacks."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.declarations: dict[str, str] = {}
        self.definitions: dict[str, str] = {}
        self.allocations: list[str] = []
        self.label = "entry"
        self._count = 0

    def let(self, kind: str, text: str) -> Reg:
        """A new register of type `kind` that holds the instruction's result."""
        self._count += 1
        name = f"%r{self._count}"
        self.lines.append(f"  {name} = {text}")
        return Reg(name, kind)

    def do(self, text: str) -> None:
        self.lines.append(f"  {text}")

    def binary(self, op: str, a: Reg, b: Reg) -> Reg:
        return self.let(a.type, f"{op} {a}, {b.name}")

    def compare(self, condition: str, a: Reg, b: Reg) -> Reg:
        """`condition` is "icmp slt", "fcmp oeq", ..."""
        return self.let(mask_type(a.type), f"{condition} {a}, {b.name}")

    def select(self, condition: Reg, yes: Reg, no: Reg) -> Reg:
        return self.let(yes.type, f"select {condition}, {yes}, {no}")

    def convert(self, op: str, x: Reg, kind: str) -> Reg:
        """bitcast, fpext, zext, ... to `kind`."""
        return x if x.type == kind else self.let(kind, f"{op} {x} to {kind}")

    def call(self, kind: str, name: str, *args: Reg) -> Reg:
        """A call of an intrinsic or library function, declared as its arguments are."""
        self.declarations[name] = f"declare {kind} @{name}({', '.join(a.type for a in args)})"
        text = f"call {kind} @{name}({', '.join(map(str, args))})"
        if kind == "void":
            self.do(text)
            return Reg("", "void")
        return self.let(kind, text)

    def alloca(self, kind: str, align: int = 64, *, zero: bool = True) -> Reg:
        """Stack memory of the whole call, zero at first unless told otherwise."""
        self._count += 1
        name = f"%s{self._count}"
        self.allocations.append(f"  {name} = alloca {kind}, align {align}")
        if zero:
            self.allocations.append(f"  store {kind} zeroinitializer, ptr {name}, align {align}")
        return Reg(name, PTR)

    def at(self, pointer: Reg, nbytes: Reg) -> Reg:
        return self.let(PTR, f"getelementptr i8, {pointer}, {nbytes}")

    def load(self, kind: str, pointer: Reg, align: int) -> Reg:
        return self.let(kind, f"load {kind}, {pointer}, align {align}")

    def store(self, value: Reg, pointer: Reg, align: int) -> None:
        self.do(f"store {value}, {pointer}, align {align}")

    def fresh_label(self, hint: str) -> str:
        self._count += 1
        return f"{hint}{self._count}"

    def start(self, label: str) -> None:
        """Begin the block `label`; the one before must have been ended."""
        self.lines.append(f"{label}:")
        self.label = label

    def branch(self, label: str) -> None:
        self.do(f"br label %{label}")

    def branch_if(self, condition: Reg, yes: str, no: str) -> None:
        self.do(f"br {condition}, label %{yes}, label %{no}")

    def phi(self, kind: str, incoming: Sequence[tuple[Reg, str]]) -> Reg:
        return self.let(kind, f"phi {kind} " + ", ".join(f"[ {value.name}, %{label} ]" for value, label in incoming))

    def loop(
        self,
        start: Reg,
        stop: Reg,
        step: Reg,
        body: Callable[[Reg, list[Reg]], Sequence[Reg]],
        carries: Sequence[Reg] = (),
    ) -> list[Reg]:
        """for i in range(start, stop, step): carries = body(i, carries); the carries after it."""
        before, head, inside, done = self.label, *(self.fresh_label(hint) for hint in ("head", "body", "done"))
        self.branch(head)
        self.start(head)
        place = len(self.lines)
        self._count += 1
        index = Reg(f"%r{self._count}", I64)
        carried = []
        for carry in carries:
            self._count += 1
            carried.append(Reg(f"%r{self._count}", carry.type))
        self.branch_if(self.compare("icmp slt", index, stop), inside, done)
        self.start(inside)
        results = body(index, carried)
        following = self.let(I64, f"add nuw nsw {index}, {step.name}")
        latch = self.label
        self.branch(head)
        self.lines[place:place] = [
            f"  {new.name} = phi {new.type} [ {first.name}, %{before} ], [ {later.name}, %{latch} ]"
            for new, first, later in zip(
                [index, *carried], [start, *carries], [following, *results], strict=True
            )
        ]  # fmt: skip
        self.start(done)
        return carried

    def either(self, condition: Reg, yes: Callable[[], Sequence[Reg]], no: Callable[[], Sequence[Reg]]) -> list[Reg]:
        """The values of `yes()` or of `no()`, each computed in a branch of its own."""
        labels = [self.fresh_label(hint) for hint in ("yes", "no", "join")]
        self.branch_if(condition, labels[0], labels[1])
        ends = []
        for label, side in ((labels[0], yes), (labels[1], no)):
            self.start(label)
            ends.append((list(side()), self.label))
            self.branch(labels[2])
        self.start(labels[2])
        (first, first_label), (second, second_label) = ends
        return [
            self.phi(a.type, [(a, first_label), (b, second_label)]) for a, b in zip(first, second, strict=True)
        ]  # fmt: skip

    def define(self, name: str, parameters: str, attributes: str, write: Callable[[Code], None]) -> None:
        """A function for this one to call, written once per module: equal names must mean equal functions."""
        if name not in self.definitions:
            inner = Code()
            inner.declarations, inner.definitions = self.declarations, self.definitions
            write(inner)
            self.definitions[name] = inner.text(name, parameters, attributes, "internal ")

    def text(self, name: str, parameters: str, attributes: str, linkage: str = "") -> str:
        """The function; parameters as LLVM spells them."""
        body = "\n".join([*self.allocations, *self.lines])
        return f"define {linkage}void @{name}({parameters}) {attributes} {{\nentry:\n{body}\n  ret void\n}}\n"


def lane_count(kind: str) -> int:
    """N of "<N x T>", 1 of a scalar type."""
    return int(kind[1:].split()[0]) if kind.startswith("<") else 1


def vector(lanes: int, kind: str) -> str:
    return f"<{lanes} x {kind}>" if lanes > 1 else kind


def element(kind: str) -> str:
    return kind[1:-1].split(" x ")[1] if kind.startswith("<") else kind


def retyped(kind: str, scalar: str) -> str:
    """As many lanes of `scalar` as `kind` has."""
    return vector(lane_count(kind), scalar)


def mask_type(kind: str) -> str:
    return retyped(kind, "i1")


def literal(kind: str, value: float | int | bool) -> Reg:
    """A constant in every lane of `kind`."""
    scalar = element(kind)
    if scalar == "float":
        text = _hexadecimal(struct.unpack("f", struct.pack("f", value))[0])
    elif scalar == "double":
        text = _hexadecimal(float(value))
    elif scalar == "i1":
        text = "true" if value else "false"
    else:
        text = str(int(value))
    return Reg(f"splat ({scalar} {text})" if kind.startswith("<") else text, kind)


def _hexadecimal(value: float) -> str:
    return f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"
