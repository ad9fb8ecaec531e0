"""What CUDA's errors mean: which are of memory, which leave the device lost, and which concern one call alone."""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType, TracebackType

from gpu_engine.errors import DeviceError, DeviceLost, OutOfMemory

CUDA_ERRORS = ("CUDARuntimeError", "CUDADriverError")
"""CuPy's exceptions whose `status` is CUDA's number: the runtime's and the driver's are the same where both exist."""
MEMORY_ALLOCATION, INSUFFICIENT_DRIVER, NO_DEVICE, DRIVER_MISMATCH = 2, 35, 100, 803
STICKY: MappingProxyType[int, str] = MappingProxyType(
    {
        4: "the process ends, and CUDA with it",
        214: "memory has an error that could not be corrected",
        220: "an NVLink has an error that could not be corrected",
        226: "the GPU contained an error of its own or of a peer",
        700: "a kernel used an address that is not its own",
        702: "a kernel ran longer than the system lets it",
        709: "the context was destroyed",
        710: "a kernel's assertion failed",
        714: "a kernel's stack was damaged or overflowed",
        715: "a kernel ran an illegal instruction",
        716: "a kernel used a misaligned address",
        717: "a kernel used an address of the wrong memory space",
        718: "a kernel's program counter left its code",
        719: "a kernel failed",
        721: "a kernel did not free its tensor memory",
        810: "the server of a shared GPU ended this client",
        911: "a device outside of CUDA failed",
        999: "the driver failed in a way that it does not know",
    }
)
"""Errors after which a process cannot go on with the device, by number.

https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html says of most of them that they leave the process
in an inconsistent state, in which any further work returns the same error. It does not of 4, 214, 220, 709, 810 and
999; after these neither the context nor what its memory holds can be relied on.
"""


class CudaErrors:
    """`with` this, what CUDA says comes as an error of ours that names the device, and the ONNX node if it is known."""

    def __init__(self, device: str) -> None:
        self._device = device

    def __enter__(self) -> None:
        """Nothing has failed yet."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            found = self.typed(error)
            if found is not error:
                raise found from error

    def typed(self, error: Exception) -> Exception:
        """See `typed`."""
        return typed(error, self._device)


def typed(error: Exception, device: str) -> Exception:
    """The error in our terms: DeviceLost wherever a sticky one is behind it, OutOfMemory for memory; what is no error
    of CUDA's, or is ours already, as it is."""
    behind = next((each for each in _causes(error) if _status(each) is not None), None)
    status = None if behind is None else _status(behind)
    if isinstance(error, DeviceLost):
        return error
    if status is not None and status in STICKY:
        return DeviceLost(f"{device} is lost, because {STICKY[status]}: {error}: only a new process can use it again")
    if isinstance(error, OutOfMemory):
        return error
    if status == MEMORY_ALLOCATION or isinstance(error, MemoryError):
        return OutOfMemory(f"{device} is out of memory: {error}")
    return DeviceError(f"{device}: {error}") if behind is error else error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _status(error: BaseException) -> int | None:
    """CUDA's number of an exception of CuPy's."""
    status = getattr(error, "status", None)
    return status if type(error).__name__ in CUDA_ERRORS and isinstance(status, int) else None


def unusable(error: Exception, driver: int, cuda: int) -> str:
    """Why no GPU can be used, and what to do. `error` is what CUDA said when it was asked for GPUs, `driver` the newest
    CUDA that the driver knows (12040 for 12.4; 0: there is none), `cuda` the one that CuPy was built for."""
    status = _status(error)
    if not driver:
        reason = "no NVIDIA driver is installed, or this process does not see its libcuda: install the driver"
    elif status == INSUFFICIENT_DRIVER:
        reason = (
            f"the NVIDIA driver knows CUDA {version_text(driver)}, and CuPy is built for CUDA {version_text(cuda)}: "
            "update the driver, or install the CuPy that fits it"
        )
    elif status == NO_DEVICE:
        reason = "this process sees no GPU: none is there, or CUDA_VISIBLE_DEVICES or the container hides it"
    elif status == DRIVER_MISMATCH:
        reason = "the NVIDIA driver was updated while it ran: restart the machine"
    else:
        reason = "the GPUs do not answer"
    return f"no GPU can be used: {reason} ({error}); `gpu-engine doctor` says more"


def version_text(version: int) -> str:
    """12.4 for 12040."""
    return f"{version // 1000}.{version % 1000 // 10}"
