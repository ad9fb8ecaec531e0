"""ONNX operators, in files named as the specification groups them; importing this package fills the registry."""

from gpu_engine.frontend.operators import activation, arithmetic

__all__ = ["activation", "arithmetic"]
