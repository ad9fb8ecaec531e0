"""The conformance runner itself, and the onnx wheel's suites against the committed manifest."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import conformance_manifest as manifest
from tests.conformance import few_of_each, surprise
from tests.conformance_cases import SUITES, Case, collect, matches
from tests.conformance_check import difference
from tests.conformance_manifest import Group
from tests.conformance_pool import Verdict, run_cases

COUNTS = {"node": 1884, "simple": 23, "pytorch-operator": 35, "pytorch-converted": 82, "light": 9}


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return collect()


def test_every_suite_is_whole(cases: list[Case]) -> None:
    assert {suite: sum(case.suite == suite for case in cases) for suite in SUITES} == COUNTS
    assert len({case.label for case in cases}) == len(cases)


def test_the_manifest_names_cases_and_reasons(cases: list[Case]) -> None:
    groups = manifest.read()
    assert len({group.reason for group in groups}) == len(groups)
    for group in groups:
        assert len(group.reason) > 20, group.reason
        for label in group.labels:
            assert any(fnmatchcase(case.label, label) for case in cases), f"{label} names no case"
    for case in cases:
        given = [group.reason for group in groups if group.holds(case.label)]
        assert len(given) <= 1, f"{case.label} is excluded for {given}"


def test_the_suites_agree_with_the_manifest(cases: list[Case]) -> None:
    groups = manifest.read()
    verdicts = list(run_cases(cases, "cpu", jobs=2, limit_s=120))
    assert len(verdicts) == len(cases)
    assert not [line for verdict in verdicts if (line := surprise(groups, verdict))]


A, NAN = np.array([1.0, 2.0], np.float32), np.array([np.nan, np.inf], np.float32)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (A, A),
        (A + np.float32(1e-6), A),
        (NAN, NAN),
        (np.float32(3), np.float32(3)),
        (np.array(["a", ""], object), np.array(["a", ""])),
        (np.array(["a"], object), np.array([b"a"], object)),
        ([A, A[:0]], [A, A[:0]]),
        ([], []),
        (None, None),
        ({"k": A}, {"k": A}),
        (np.array([2**62], np.int64), np.array([2**62], np.int64)),
    ],
)
def test_equal_values_agree(actual: Any, expected: Any) -> None:
    assert difference(actual, expected, 1e-3, 1e-7) == ""


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (A + np.float32(0.01), A),
        (A.astype(np.float64), A),
        (A[None], A),
        (A[:1], A),
        (NAN, A),
        (A, NAN),
        (-NAN, NAN),
        (A.tolist(), A),
        (A, [A]),
        ([A], [A, A]),
        ([A], A),
        (None, A),
        (A, None),
        (np.array(["a", "b"], object), np.array(["a", ""])),
        (np.array([1, 2]), np.array(["1", "2"])),
        ({"k": A}, {"l": A}),
        (np.array([True]), np.array([False])),
        (np.array([1], np.uint8), np.array([255], np.uint8)),
    ],
)
def test_different_values_differ(actual: Any, expected: Any) -> None:
    assert difference(actual, expected, 1e-3, 1e-7)


def case(name: str, suite: str = "node") -> Case:
    return Case(suite, name, "Abs", b"", (), 1e-3, 1e-7)


REASON, CHANCE = "functions that the engine lacks", "random numbers have no expected value"
GROUPS = (
    Group(REASON, ("node/test_lacking*", "simple/test_b")),
    Group(CHANCE, ("node/test_random*",), varies=True),
)


def test_a_few_of_each_operator(cases: list[Case]) -> None:
    chosen = few_of_each(cases, 1)
    operators = {one.operator for one in cases if not one.operator.endswith("(function body)")}
    assert [one.operator for one in chosen] == list(dict.fromkeys(one.operator for one in chosen))
    assert {one.operator for one in chosen} == operators
    assert few_of_each(cases, 0) == cases and len(few_of_each(cases, 2)) > len(chosen)


def test_surprises() -> None:
    assert surprise(GROUPS, Verdict(case("test_abs"), "", 0)) == ""
    assert surprise(GROUPS, Verdict(case("test_lacking_1"), "differs", 0)) == ""
    assert surprise(GROUPS, Verdict(case("test_random_1"), "differs", 0)) == ""
    assert surprise(GROUPS, Verdict(case("test_random_1"), "", 0)) == ""
    assert "UNEXPECTED FAILURE node/test_abs: differs" in surprise(GROUPS, Verdict(case("test_abs"), "differs", 0))
    assert "UNEXPECTED PASS" in surprise(GROUPS, Verdict(case("test_lacking_1"), "", 0))


def test_update_drops_what_passes_and_adds_what_fails(tmp_path: Path) -> None:
    run = {"node/test_lacking_1": "", "node/test_lacking_2": "differs", "node/test_random_1": ""}
    updated = manifest.update(GROUPS, {**run, "node/test_abs": "KeyError: 'x' (a.py:12)"})
    left = Group(REASON, ("node/test_lacking_2", "simple/test_b"))
    assert updated == (left, GROUPS[1], Group("KeyError: 'x'", ("node/test_abs",)))
    manifest.write(updated, tmp_path / "manifest.toml")
    assert set(manifest.read(tmp_path / "manifest.toml")) == set(updated)
    assert manifest.update(updated, {"node/test_abs": "again"}) == updated


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [("abs", True), ("Abs", True), ("node/test_*", True), ("test_a?s", True), ("simple", False), ("ab*", False)],
)
def test_patterns(pattern: str, fits: bool) -> None:
    assert matches(case("test_abs"), pattern) == fits


def test_a_broken_model_fails_alone() -> None:
    broken = Case("node", "test_broken", "Abs", b"\xff\xff\xff", (((A,), (A,)),), 1e-3, 1e-7)
    verdicts = list(run_cases([broken], "cpu", jobs=1, limit_s=60))
    assert len(verdicts) == 1 and verdicts[0].error
