"""Convert scikit-learn estimators: `python -m benchmarks.estimators NAME FILE`; needs scikit-learn and skl2onnx."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from skl2onnx import to_onnx
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def forest() -> tuple[Any, dict[Any, Any]]:
    """A TreeEnsembleClassifier: labels and an array of probabilities."""
    model = RandomForestClassifier(50, max_depth=8, random_state=0)
    return model, {id(model): {"zipmap": False}}


def logistic() -> tuple[Any, dict[Any, Any]]:
    """Scaler, LinearClassifier, ZipMap: labels and a sequence of maps from label to probability."""
    return make_pipeline(StandardScaler(), LogisticRegression()), {}


ESTIMATORS: dict[str, Callable[[], tuple[Any, dict[Any, Any]]]] = {
    "sklearn_forest": forest,
    "sklearn_logistic_zipmap": logistic,
}


def export(name: str, path: str) -> None:
    """[rows, 4] float to label int64 [rows] and probabilities of three classes."""
    estimator, options = ESTIMATORS[name]()
    features, labels = load_iris(return_X_y=True)
    features = features.astype(np.float32)
    estimator.fit(features, labels)
    Path(path).write_bytes(to_onnx(estimator, features[:1], options=options).SerializeToString())


if __name__ == "__main__":
    export(*sys.argv[1:3])
