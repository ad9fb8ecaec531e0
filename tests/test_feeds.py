"""Inputs for measurements: shapes as users of other tools write them, and random data."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from gpu_engine.errors import InputError
from gpu_engine.ir.dims import symbol
from gpu_engine.plan.plan import Port
from gpu_engine.tools.feeds import parse_shapes, random_feed


@pytest.mark.parametrize("text", ["x:1x3x48x320", "x=1,3,48,320", "x[1,3,48,320]", "x:1, 3, 48, 320", "1x3x48x320"])
def test_shapes_are_read_as_other_tools_write_them(text: str) -> None:
    assert parse_shapes([text], ["x"]) == {"x": (1, 3, 48, 320)}


def test_names_may_hold_colons_and_scalars_have_no_extents() -> None:
    assert parse_shapes(["a:0:2x2", "s:"], ["a:0", "s"]) == {"a:0": (2, 2), "s": ()}


@pytest.mark.parametrize(("text", "message"), [("y:1x2", "names none"), ("1x2", "names none"), ("x:1xN", "is written")])
def test_other_shapes_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_shapes([text], ["x", "z"])


def port(dtype: object, *shape: object) -> Port:
    return Port("x", np.dtype(dtype), shape)  # type: ignore[arg-type]


def test_a_batch_is_one_row_and_the_seed_decides() -> None:
    ports = [port(np.float32, symbol("N"), 3)]
    first, again, other = (random_feed(ports, {}, "N", seed)["x"] for seed in (1, 1, 2))
    assert first.shape == (1, 3) and first.dtype == np.float32
    assert (first == again).all() and (first != other).any()


def test_integers_are_safe_indices_and_bytes_are_full() -> None:
    wide = random_feed([port(np.int64, 1000)], {}, None, 0)["x"]
    narrow = random_feed([port(np.uint8, 4000)], {}, None, 0)["x"]
    assert set(wide) == {0, 1} and (narrow.min(), narrow.max()) == (0, 255)
    assert set(random_feed([port(np.bool_, 100)], {}, None, 0)["x"]) == {False, True}
    assert random_feed([port(np.int64), port(np.bool_, 1)], {}, None, 0)["x"].all(), "a count, or a condition"
    for dtype in (ml_dtypes.bfloat16, np.float16, ml_dtypes.int4, np.int8):
        assert random_feed([port(dtype, 5)], {}, None, 0)["x"].dtype == dtype


def test_open_extents_need_a_shape() -> None:
    ports = [port(np.float32, symbol("N"), 3, symbol("W"))]
    with pytest.raises(InputError, match="--shape x:1x3x\\?"):
        random_feed(ports, {}, "N", 0)
    assert random_feed(ports, {"x": (2, 3, 7)}, "N", 0)["x"].shape == (2, 3, 7)
    with pytest.raises(InputError, match="another rank"):
        random_feed(ports, {"x": (2, 3)}, "N", 0)


def test_strings_cannot_be_random() -> None:
    with pytest.raises(InputError, match="cannot be random"):
        random_feed([port(object, 1)], {}, None, 0)
