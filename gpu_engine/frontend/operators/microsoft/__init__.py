"""The domain com.microsoft: what ONNX Runtime's optimiser and quantiser write into models, and its exporters."""

from gpu_engine.frontend.operators.microsoft import (
    activation,
    attention,
    group_query,
    normalization,
    products,
    quantized,
    quantized_products,
    retired,
    rotary,
)

__all__ = [
    "activation",
    "attention",
    "group_query",
    "normalization",
    "products",
    "quantized",
    "quantized_products",
    "retired",
    "rotary",
]
