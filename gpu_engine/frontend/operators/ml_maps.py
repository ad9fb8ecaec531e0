"""Maps of the domain ai.onnx.ml, which exist as outputs only."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.operators.ml_features import ML
from gpu_engine.frontend.registry import emit_array, operator
from gpu_engine.ir.dtypes import STRING
from gpu_engine.ir.graph import Builder, TensorType, Value
from gpu_engine.ir.ops import Reshape


@operator("ZipMap", since=1, domain=ML)
def zip_map(
    b: Builder, x: Value, *, classlabels_int64s: tuple[int, ...] = (), classlabels_strings: tuple[str, ...] = ()
) -> Value:
    """https://onnx.ai/onnx/operators/onnx_aionnxml_ZipMap.html

    The sequence of maps is an array of dicts, one for each row.
    """
    labels = classlabels_strings or classlabels_int64s
    rows = x if x.rank == 2 else b.emit(Reshape((1, *x.shape)), x)
    if isinstance(rows.shape[1], int) and rows.shape[1] != len(labels):
        raise InvalidModel(f"{len(labels)} labels for the columns of {x.type}")
    kind = TensorType(STRING, rows.shape[:1])
    return emit_array(b, zipped, lambda b, x, **_: kind, (rows,), {"labels": labels}, host=True, mixes=(1,))[0]


def zipped(xp: Any, x: Any, *, labels: tuple[Any, ...]) -> Any:
    maps = np.empty(x.shape[0], object)
    maps[:] = [dict(zip(labels, row, strict=True)) for row in x.tolist()]
    return maps
