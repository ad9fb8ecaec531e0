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
    """The `triton.JITFunction` that the kernel's text defines.

    Triton reads a function's text back through `linecache`, where an entry without a modification time is never
    dropped; so no file is needed, errors point at the generated line, and equal texts share Triton's compile cache.
    """
    filename = f"<{kernel.name}-{kernel.digest}>"
    linecache.cache[filename] = (len(kernel.text), None, kernel.text.splitlines(True), filename)
    scope: dict[str, Any] = {"__name__": f"{kernel.name}_{kernel.digest}", "tl": tl, "libdevice": libdevice}
    exec(compile(kernel.text, filename, "exec"), scope)
    return triton.jit(scope[kernel.name])
