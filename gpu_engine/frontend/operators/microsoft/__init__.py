"""The domain com.microsoft: what ONNX Runtime's optimiser and quantiser write into models, and its exporters."""

from gpu_engine.frontend.operators.microsoft import (
    activation,
    attention,
    experts,
    group_query,
    images,
    normalization,
    products,
    quantized,
    quantized_products,
    retired,
    rotary,
    shaping,
    tokens,
    transforms,
    weights,
)

__all__ = [
    "activation",
    "attention",
    "experts",
    "group_query",
    "images",
    "normalization",
    "products",
    "quantized",
    "quantized_products",
    "retired",
    "rotary",
    "shaping",
    "tokens",
    "transforms",
    "weights",
]
