"""Nodes of opsets before 7, rewritten and run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gpu_engine.errors import InvalidModel
from gpu_engine.frontend.legacy import upgrade
from gpu_engine.frontend.model import ModelNode
from tests.test_operators_nn import numbers
from tests.test_operators_tensor import run

Array = NDArray[Any]


@pytest.mark.parametrize("form", ["static", "symbolic"])
@pytest.mark.parametrize(("axis", "shape"), [(1, (3,)), (1, (3, 4)), (-3, (3, 4)), (0, (2,)), (2, (4, 5))])
def test_broadcast_from_an_axis(form: str, axis: int, shape: tuple[int, ...]) -> None:
    a, b = numbers(2, 3, 4, 5), numbers(*shape, seed=1)
    start = axis % 4
    expected = a * b.reshape(*shape, *(1,) * (4 - start - len(shape)))
    np.testing.assert_array_equal(run("Mul", {"a": a, "b": b}, 6, form=form, axis=axis, broadcast=1), expected)


def test_broadcast_without_an_axis_is_numpys() -> None:
    a, b = numbers(2, 3, 4), numbers(4, seed=1)
    np.testing.assert_array_equal(run("Add", {"a": a, "b": b}, 6, broadcast=1), a + b)
    np.testing.assert_array_equal(run("Sub", {"a": a, "b": a}, 1, consumed_inputs=[0, 0]), a - a)


def test_a_slope_belongs_to_the_channels() -> None:
    x, slope = numbers(2, 3, 4, 5), np.array([0.1, 0.2, 0.3], np.float32)
    expected = np.where(x < 0, x * slope[:, None, None], x)
    np.testing.assert_array_equal(run("PRelu", {"x": x, "s": slope}, 6), expected)
    np.testing.assert_array_equal(run("PRelu", {"x": x, "s": slope[:1]}, 6), np.where(x < 0, x * slope[0], x))


def test_attributes_that_became_inputs_or_numbers() -> None:
    x = numbers(1, 1, 2, 3)
    np.testing.assert_array_equal(run("Reshape", {"x": x}, 1, shape=[3, -1]), x.reshape(3, 2))
    np.testing.assert_array_equal(run("Cast", {"x": x * 9}, 5, to="INT32"), (x * 9).astype(np.int32))
    assert run("Cast", {"x": x}, 5, to="DOUBLE").dtype == np.float64
    np.testing.assert_array_equal(run("Pad", {"x": x}, 1, paddings=[0, 0, 1, 0, 0, 0, 0, 2]).shape, (1, 1, 3, 5))
    np.testing.assert_array_equal(
        run("Upsample", {"x": x}, 1, height_scale=2.0, width_scale=3.0), x.repeat(2, axis=2).repeat(3, axis=3)
    )


def test_inference_whatever_is_test_says() -> None:
    x = numbers(2, 3, 4)
    np.testing.assert_array_equal(run("Dropout", {"x": x}, 6, is_test=0, ratio=0.9), x)
    statistics = {name: abs(numbers(3, seed=i)) for i, name in enumerate("sbmv")}
    old = run("BatchNormalization", {"x": x, **statistics}, 6, is_test=1)
    np.testing.assert_array_equal(old, run("BatchNormalization", {"x": x, **statistics}, 9))


def test_old_defaults() -> None:
    x = numbers(2, 3)
    np.testing.assert_array_equal(run("Concat", {"a": x, "b": x}, 3), np.concatenate([x, x], axis=1))
    newest, oldest = run("Selu", {"x": x}, 6), run("Selu", {"x": x}, 5)
    assert newest[x > 0].tolist() != oldest[x > 0].tolist()
    np.testing.assert_allclose(oldest[x > 0], x[x > 0] * np.float32(1.0507), rtol=1e-6)


def test_too_many_axes_are_refused() -> None:
    node = ModelNode("Add", "", ("a", "b"), ("y",), {"axis": 2, "broadcast": 1})
    with pytest.raises(InvalidModel, match="too many axes"):
        upgrade(node, 6, (3, 2))
    with pytest.raises(InvalidModel, match="COLOUR"):
        upgrade(ModelNode("Cast", "", ("a",), ("y",), {"to": "COLOUR"}), 5, (1,))
