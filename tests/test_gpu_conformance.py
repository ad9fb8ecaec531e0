"""A third of the onnx wheel's node tests through the GPU's kernels, interpreted.

All of them: `python -m tests.conformance --device interpret --suite node --jobs 2`.
"""

from __future__ import annotations

import random

import pytest

pytest.importorskip("triton")

from tests import conformance_manifest as manifest
from tests.conformance import surprise
from tests.conformance_cases import collect
from tests.conformance_pool import run_cases

SHARE = 3


def test_a_third_of_the_node_tests_agrees_with_the_manifest() -> None:
    """Another third every time."""
    cases = collect(["node"])
    random.shuffle(cases)
    chosen = cases[: len(cases) // SHARE]
    groups = manifest.read()
    verdicts = list(run_cases(chosen, "interpret", jobs=2, limit_s=120))
    assert len(verdicts) == len(chosen)
    assert not [line for verdict in verdicts if (line := surprise(groups, verdict))]
