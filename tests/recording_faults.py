"""Errors of CUDA as CuPy raises them, and where a recorded GPU is told to raise them."""

from __future__ import annotations

from dataclasses import dataclass, field

ERRORS = {
    "cudaErrorInvalidValue": (1, "CUDA_ERROR_INVALID_VALUE"),
    "cudaErrorMemoryAllocation": (2, "CUDA_ERROR_OUT_OF_MEMORY"),
    "cudaErrorInsufficientDriver": (35, "CUDA_ERROR_STUB_LIBRARY"),
    "cudaErrorNoDevice": (100, "CUDA_ERROR_NO_DEVICE"),
    "cudaErrorECCUncorrectable": (214, "CUDA_ERROR_ECC_UNCORRECTABLE"),
    "cudaErrorInvalidResourceHandle": (400, "CUDA_ERROR_INVALID_HANDLE"),
    "cudaErrorIllegalAddress": (700, "CUDA_ERROR_ILLEGAL_ADDRESS"),
    "cudaErrorLaunchOutOfResources": (701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"),
    "cudaErrorLaunchTimeout": (702, "CUDA_ERROR_LAUNCH_TIMEOUT"),
    "cudaErrorAssert": (710, "CUDA_ERROR_ASSERT"),
    "cudaErrorIllegalInstruction": (715, "CUDA_ERROR_ILLEGAL_INSTRUCTION"),
    "cudaErrorMisalignedAddress": (716, "CUDA_ERROR_MISALIGNED_ADDRESS"),
    "cudaErrorLaunchFailure": (719, "CUDA_ERROR_LAUNCH_FAILED"),
    "cudaErrorStreamCaptureUnsupported": (900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"),
    "cudaErrorStreamCaptureInvalidated": (901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"),
}
"""{error of the runtime API: (number, the driver API's name of it)}"""
STICKY = frozenset({214, 700, 702, 710, 715, 716, 719})
"""After these every call fails: nothing of the process's context can be used any more."""
DRIVER_CALLS = frozenset({"launchKernel", "moduleLoadData", "funcSetAttribute"})
"""Calls of the driver API; all others are the runtime API's."""
_NAMES = {status: name for name, (status, _) in ERRORS.items()}


class CUDARuntimeError(RuntimeError):
    """What CuPy raises where the runtime API says no."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"{_NAMES[status]}: {_said(status)}")


class CUDADriverError(RuntimeError):
    """What CuPy raises where the driver API says no."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"{ERRORS[_NAMES[status]][1]}: {_said(status)}")


def cuda_error(kind: str, error: str) -> RuntimeError:
    """The exception of a call of this kind."""
    return (CUDADriverError if kind in DRIVER_CALLS else CUDARuntimeError)(ERRORS[error][0])


def _said(status: int) -> str:
    return f"said the recorded GPU ({status})"


@dataclass
class Fault:
    """An error that the call fails with that comes when `left` is 0."""

    left: int
    error: str


@dataclass
class Faults:
    """Which calls are to fail. `sticky` is the error that every call has failed with since it came up."""

    waiting: dict[str, list[Fault]] = field(default_factory=dict)
    sticky: str = ""

    def check(self, kind: str) -> None:
        """Count a call; raise its error."""
        faults = self.waiting.get(kind, [])
        for fault in faults:
            fault.left -= 1
        due = next((fault for fault in faults if not fault.left), None)
        if due is not None:
            faults.remove(due)
            if ERRORS[due.error][0] in STICKY:
                self.sticky = due.error
            raise cuda_error(kind, due.error)
        if self.sticky:
            raise cuda_error(kind, self.sticky)
