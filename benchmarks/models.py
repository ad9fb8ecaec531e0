"""The catalogue of real models that tests and benchmarks share, by name."""

from __future__ import annotations

from benchmarks.exported import EXPORTS
from benchmarks.packaged import LIGHT, TASHKEEL, VOICE, WAKEWORDS, WHEELS

MODELS = {model.name: model for model in (*WHEELS, *VOICE, *TASHKEEL, *WAKEWORDS, *LIGHT, *EXPORTS)}
