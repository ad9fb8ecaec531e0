"""Maps of the domain ai.onnx.ml, which exist as outputs only."""

from __future__ import annotations

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators.ml_features import ML
from gpu_engine.frontend.registry import operator
from gpu_engine.frontend.sequences import MapsValue
from gpu_engine.ir.graph import Builder, Value
from gpu_engine.ir.ops import Reshape


@operator("ZipMap", since=1, domain=ML)
def zip_map(
    b: Builder, x: Value, *, classlabels_int64s: tuple[int, ...] = (), classlabels_strings: tuple[str, ...] = ()
) -> tuple[MapsValue]:
    """https://onnx.ai/onnx/operators/onnx_aionnxml_ZipMap.html"""
    labels = classlabels_strings or classlabels_int64s
    rows = x if x.rank == 2 else b.emit(Reshape((1, *x.shape)), x)
    if isinstance(rows.shape[1], int) and rows.shape[1] != len(labels):
        raise InvalidModel(f"{len(labels)} labels for the columns of {x.type}")
    return (MapsValue(rows, labels),)
