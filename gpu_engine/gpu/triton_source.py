"""From a kernel's text to a function that Triton compiles or interprets."""

from __future__ import annotations

import linecache
from functools import cache
from typing import Any

import triton
import triton.language as tl
from triton.language.extra import libdevice

from gpu_engine.gpu.kernel import TritonKernel


@cache
def jit_function(kernel: TritonKernel) -> Any:
    """The `triton.JITFunction` that the kernel's text defines."""
    names = {"tl": tl, "libdevice": libdevice, "multiply": multiply}
    return _defined(kernel.name, f"{kernel.name}-{kernel.digest}", kernel.text, names)


def _defined(name: str, place: str, text: str, names: dict[str, Any]) -> Any:
    """Triton reads a function's text back through `linecache`, where an entry without a modification time is never
    dropped; so no file is needed, errors point at the generated line, and equal texts share Triton's compile cache."""
    filename = f"<{place}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(True), filename)
    scope: dict[str, Any] = {"__name__": place.replace("-", "_"), **names}
    exec(compile(text, filename, "exec"), scope)
    return triton.jit(scope[name])


multiply = _defined("multiply", "multiply", "def multiply(a, b):\n    return a * b\n", {})
"""What `tl.reduce` folds with for a product."""
