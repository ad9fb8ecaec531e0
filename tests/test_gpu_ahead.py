"""Kernels that are compiled side by side before they are loaded."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from gpu_engine.errors import DeviceError
from gpu_engine.gpu.ahead import compiled_ahead
from gpu_engine.gpu.binary import Binary
from gpu_engine.gpu.kernel import Kernel, TritonKernel

KERNELS = tuple(TritonKernel(f"k{i}", "text", ()) for i in range(6))


def binary(kernel: Kernel, arch: int) -> Binary:
    return Binary(kernel.name, arch, b"", 128, 0, 0, ())


def test_kernels_are_compiled_at_the_same_time_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    together, asked = threading.Barrier(3, timeout=30), []

    def source(kernel: Kernel, arch: int) -> Binary:
        asked.append((kernel, arch))
        together.wait()
        return binary(kernel, arch)

    known = compiled_ahead((*KERNELS, *KERNELS), 90, source)
    assert sorted(kernel.name for kernel, _ in asked) == [kernel.name for kernel in KERNELS]
    with ThreadPoolExecutor(1) as alone:
        assert list(alone.map(known, KERNELS, [90] * 6)) == [binary(kernel, 90) for kernel in KERNELS]


def test_others_are_asked_for_when_they_are_needed() -> None:
    known = compiled_ahead(KERNELS[:2], 90, binary)
    assert known(KERNELS[4], 90) == binary(KERNELS[4], 90)
    assert known(KERNELS[0], 80) == binary(KERNELS[0], 80)
    assert compiled_ahead((), 90, binary) is binary


def test_a_kernel_that_does_not_compile_says_so() -> None:
    def source(kernel: Kernel, arch: int) -> Binary:
        raise DeviceError(f"{kernel.name} does not compile")

    with pytest.raises(DeviceError, match="k0 does not compile"):
        compiled_ahead(KERNELS, 90, source)
