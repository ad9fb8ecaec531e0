"""A sample of the opset matrix: networks and PyTorch exports as onnx's own converter writes them for other opsets."""

from __future__ import annotations

import pytest

from tests.conformance_cases import Case, collect
from tests.conformance_check import check
from tests.opset_matrix import NEWEST, OLDEST, conversions, excluded, opset_of

SAMPLE = (OLDEST, 9, 13, NEWEST)
EXPORTS = {
    case.name: case
    for i, case in enumerate(collect(("pytorch-converted", "pytorch-operator")))
    if i % 8 == 0 and not excluded(f"{case.name}@{NEWEST}")
}
NETWORKS = {case.name: case for case in collect(("light",)) if case.name in ("test_squeezenet", "test_shufflenet")}


@pytest.mark.parametrize("name", EXPORTS)
def test_exports_at_other_opsets(name: str) -> None:
    found = list(conversions(EXPORTS[name], SAMPLE))
    assert len(found) >= 3
    for case in found:
        assert check(case, "cpu") == "", case.label


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_at_other_opsets(name: str) -> None:
    found = list(conversions(NETWORKS[name], (13, NEWEST)))
    assert [opset_of(case) for case in found] == [13, NEWEST]
    for case in found:
        assert check(case, "cpu") == "", case.label


def test_what_the_converter_refuses_is_left_out() -> None:
    (case,) = collect(("light",))[:1]
    assert isinstance(case, Case)
    assert [opset_of(found) for found in conversions(case, (OLDEST, 8, 9, 10))] == [9, 10]
