"""The domain com.microsoft: what ONNX Runtime's optimiser and quantiser write into models, and its exporters."""

from gpu_engine.frontend.operators.microsoft import activation, attention, normalization, products, retired

__all__ = ["activation", "attention", "normalization", "products", "retired"]
