"""The name of the domain.

The specification is ONNX Runtime's: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

MICROSOFT = "com.microsoft"
