"""Native code: the host's vector features, the one function that compiles, and the process-wide cache of kernels.

All kernels of a plan are one module: llvmlite holds a lock of its own around every call into LLVM, so that compiling
several modules on threads would gain nothing. Processes would: two save a third of a second of the one that a large
network takes, the first time that a machine loads it. `object_cache` saves all of it every other time.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import llvmlite
import llvmlite.binding as llvm

from cpu_fallback.code import Code
from cpu_fallback.object_cache import digest, object_cache
from cpu_fallback.walk_code import walk_module

VERSIONS = ("1", llvmlite.__version__, ".".join(map(str, llvm.llvm_version_info)))
"""What machine code depends on besides its text: the passes of `_object`, counted, and the compiler."""
SIGNATURE = "ptr %block, i64 %thread, i64 %threads"
Walk = Callable[[int], None]


@dataclass(frozen=True)
class Target:
    """The machine that code is made for.

    A vector has `vector_nbytes`. With `masked`, loads and stores under a mask cost nothing (AVX-512); else the tail of
    an axis goes through the stack. `halves` says that float16 converts in hardware; there are `registers` for vectors.
    `x86` allows that family's own intrinsics.
    """

    cpu: str
    features: str
    vector_nbytes: int
    masked: bool
    halves: bool
    registers: int = 16
    x86: bool = True


class Kernel(Protocol):
    """A native function by content: equal kernels are one piece of machine code.

    Signature of the function: (block of 8-byte argument words, thread, threads); every thread does its share.
    """

    def write(self, code: Code, target: Target) -> None: ...


@lru_cache(maxsize=1)
def host() -> Target:
    """The machine that this process runs on."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    wide = all(features.get(name) for name in ("avx512f", "avx512bw", "avx512dq", "avx512vl"))
    triple = llvm.get_default_triple()
    arm, x86 = triple.startswith(("aarch64", "arm64")), triple.startswith(("x86_64", "amd64"))
    nbytes = 64 if wide else 32 if features.get("avx2") and features.get("fma") else 16
    halves = arm or bool(features.get("f16c"))
    registers = 32 if wide or arm else 16
    return Target(llvm.get_host_cpu_name(), features.flatten(), nbytes, wide, halves, registers, x86)


class Library:
    """Machine code made so far, by target and kernel; nothing is ever compiled twice or thrown away."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._addresses: dict[tuple[Target, Any], int] = {}
        self._engines: list[Any] = []
        self.compiled = 0
        """Modules that were not on disk."""
        self._walk: tuple[Walk, Walk] | None = None

    def addresses(self, kernels: Iterable[Kernel], target: Target) -> dict[Any, int]:
        """The address of every kernel, compiling those that are new, together in one module."""
        wanted = dict.fromkeys(kernels)
        with self._lock:
            missing = [kernel for kernel in wanted if (target, kernel) not in self._addresses]
            if missing:
                names = {kernel: f"kernel{i}" for i, kernel in enumerate(missing)}
                engine = self._compile(_module_text(names, target), target)
                for kernel, name in names.items():
                    self._addresses[target, kernel] = engine.get_function_address(name)
            return {kernel: self._addresses[target, kernel] for kernel in wanted}

    def walker(self) -> Walk:
        """walk(address of {table, steps}): one call for many steps, without the GIL, which `walk_code` takes in turn.

        The table holds {function pointer, argument block pointer} for each step; null for `jumps.Jump`. One argument:
        converting each costs as much as a small step.
        """
        return self._walks()[0]

    def holding_walker(self) -> Walk:
        """The same with the GIL held, for what takes less time than to give it away and take it back."""
        return self._walks()[1]

    def _walks(self) -> tuple[Walk, Walk]:
        with self._lock:
            if self._walk is None:
                turns = takes_turns()
                engine = self._compile(walk_module(host().x86, turns), host())
                plain = engine.get_function_address("walk")
                free = engine.get_function_address("walk_in_turn") if turns else plain
                word = ctypes.c_void_p
                self._walk = ctypes.CFUNCTYPE(None, word)(free), ctypes.PYFUNCTYPE(None, word)(plain)
            return self._walk

    def _compile(self, text: str, target: Target) -> Any:
        engine = compile_module(text, target)
        self._engines.append(engine)
        return engine


LIBRARY = Library()


def takes_turns() -> bool:
    """Whether threads that come back to Python may find its lock taken by one that runs meanwhile."""
    locked = bool(getattr(sys, "_is_gil_enabled", lambda: True)())
    known = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
    return locked and known and (os.cpu_count() or 1) > 1


def compile_module(text: str, target: Target) -> Any:
    """Machine code of a module of LLVM IR, from disk where it was compiled before. Needs `host()` first."""
    machine = llvm.Target.from_default_triple().create_target_machine(cpu=target.cpu, features=target.features, opt=2)
    cache = object_cache()
    key = digest(*VERSIONS, llvm.get_default_triple(), target.cpu, target.features, text)
    code = None if cache is None else cache.load(key)
    if code is None:
        LIBRARY.compiled += 1
        code = _object(text, machine)
        if cache is not None:
            cache.store(key, code)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine


def _object(text: str, machine: Any) -> bytes:
    """The only place that compiles anything on the CPU."""
    module = llvm.parse_assembly(text)
    module.triple, module.data_layout = llvm.get_default_triple(), str(machine.target_data)
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    passes = llvm.create_new_function_pass_manager()
    passes.add_instruction_combine_pass()
    passes.add_new_gvn_pass()
    passes.add_simplify_cfg_pass()
    for function in module.functions:
        if not function.is_declaration:
            passes.run(function, builder)
    code: bytes = machine.emit_object(module)
    return code


def _module_text(names: dict[Kernel, str], target: Target) -> str:
    declarations: dict[str, str] = {}
    definitions: dict[str, str] = {}
    functions = []
    for kernel, name in names.items():
        code = Code()
        code.declarations, code.definitions = declarations, definitions
        kernel.write(code, target)
        functions.append(code.text(name, SIGNATURE, attributes(target)))
    return "\n".join([*declarations.values(), *definitions.values(), *functions])


def attributes(target: Target) -> str:
    """What every function says about itself."""
    bits = target.vector_nbytes * 8
    return f'nounwind "prefer-vector-width"="{bits}" "min-legal-vector-width"="{bits}"'
