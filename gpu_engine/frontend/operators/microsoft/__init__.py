"""The domain com.microsoft: what ONNX Runtime's optimiser and quantiser write into models, and its exporters."""

from gpu_engine.frontend.operators.microsoft import activation, products, retired

__all__ = ["activation", "products", "retired"]
