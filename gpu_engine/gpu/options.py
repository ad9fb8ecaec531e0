"""What a GPU plan is made for: the precision of float32 products, and the architecture whose tiles are chosen."""

from __future__ import annotations

from dataclasses import dataclass

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
OLDEST_ARCH = 80
"""That kernels run on."""


@dataclass(frozen=True)
class GpuOptions:
    """Every lowering may read these.

    precision: in what factors of float32 products are multiplied; sums are float32 always. "fp32" is exact, "tf32"
    keeps 10 bits of a factor's mantissa, "fp16" (up to 65504) and "bf16" convert factors to that type first.
    arch: 90 for sm_90.
    """

    precision: str = "fp32"
    arch: int = 90

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r}; one of {', '.join(PRECISIONS)}")
