"""The forms in which callers may give inputs, and what is refused before anything runs."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gpu_engine.errors import InputError
from gpu_engine.plan.plan import Port
from gpu_engine.runtime.arrays import Ports, as_array

F32, I64, U8 = np.dtype(np.float32), np.dtype(np.int64), np.dtype(np.uint8)
STRING, BOOL, BF16 = np.dtype(object), np.dtype(bool), np.dtype(ml_dtypes.bfloat16)


def ports(inputs: int = 1, outputs: int = 1, dtype: Any = F32) -> Ports:
    return Ports(
        [Port(name, dtype, (2,)) for name in ("images", "mask", "scale")[:inputs]],
        [Port(name, dtype, (2,)) for name in ("boxes", "scores")[:outputs]],
    )


A, B = np.zeros(2, F32), np.ones(2, F32)


def test_an_array_gives_an_array() -> None:
    arrays, wrap = ports().arrange(A)
    assert arrays[0] is A and wrap([B]) is B


def test_an_array_gives_a_list_of_several_outputs() -> None:
    _, wrap = ports(outputs=2).arrange(A)
    assert wrap([A, B]) == [A, B]


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_gives_a_list(kind: Any) -> None:
    arrays, wrap = ports(2).arrange(kind([A, B]))
    assert arrays[0] is A and arrays[1] is B and wrap([B]) == [B]


def test_a_dict_gives_a_dict() -> None:
    arrays, wrap = ports(2, 2).arrange({"mask": B, "images": A})
    assert arrays[0] is A and arrays[1] is B
    assert wrap([A, B]) == {"boxes": A, "scores": B}


@pytest.mark.parametrize(
    ("count", "inputs", "message"),
    [
        (1, {"image": A}, "no input 'image'; did you mean 'images'"),
        (2, {"images": A}, "missing input 'mask'"),
        (3, {"images": A}, "missing inputs 'mask', 'scale'"),
        (1, {"images": A, "extra": B}, "no input 'extra'"),
        (2, [A], r"takes 2 inputs \(images: float32\[2\]; mask: float32\[2\]\), given a list of 1"),
        (1, [A, B], "takes 1 input .* given a list of 2"),
        (2, A, "give a list or a dict, not a ndarray"),
        (1, None, "input 'images' is a NoneType"),
        (1, "text", "input 'images' is a str"),
        (1, {A.tobytes(): A}, "no input b"),
        (2, {"images": A, "mask": object()}, "input 'mask' is a object"),
    ],
)
def test_refused_forms(count: int, inputs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ports(count).arrange(inputs)


def test_dtypes_are_never_cast() -> None:
    with pytest.raises(
        InputError, match=r"input 'images' is float64, but the model takes float32: .*astype\('float32'\)"
    ):
        ports().check_dtypes([A.astype(np.float64)])
    with pytest.raises(InputError, match="float32"):
        ports().check_dtypes([A.astype(">f4")])
    ports().check_dtypes([A])


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        ([1, 2], F32, [1, 2]),
        ([[1.5], [2]], F32, [[1.5], [2]]),
        (3, I64, 3),
        (3.5, F32, 3.5),
        (True, BOOL, True),
        ([True, False], U8, [1, 0]),
        ([0, 255], U8, [0, 255]),
        ([], I64, []),
        (np.float64(2.5), F32, 2.5),
        ((1, 2), BF16, [1, 2]),
        ([1 + 2j], np.dtype(np.complex64), [1 + 2j]),
        (float("nan"), F32, float("nan")),
    ],
)
def test_lists_and_scalars_are_converted(value: Any, dtype: Any, expected: Any) -> None:
    array = as_array(value, Port("x", dtype, ()))
    assert array.dtype == dtype and array.shape == np.shape(expected)
    np.testing.assert_array_equal(array.astype(np.complex64), np.asarray(expected, np.complex64))


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        ([1.5], I64, "values of float64 do not convert to int64"),
        ([256], U8, "do not convert to uint8"),
        ([-1], U8, "do not convert to uint8"),
        ([1], BOOL, "do not convert to bool"),
        (1j, F32, "do not convert to float32"),
        ([[1, 2], [3]], F32, "uneven lengths"),
        (["a"], F32, "do not convert"),
        ([None], F32, "do not convert"),
        (b"12", F32, "is a bytes"),
        ({1, 2}, F32, "is a set"),
    ],
)
def test_lists_that_do_not_fit(value: Any, dtype: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_array(value, Port("x", dtype, ()))


def test_strings() -> None:
    port = Port("text", STRING, ("N",))  # type: ignore[arg-type]
    for value in (["a", "bc"], np.array(["a", "bc"]), np.array(["a", "bc"], object)):
        array = as_array(value, port)
        assert array.dtype == STRING and list(array) == ["a", "bc"]
    assert as_array([], port).dtype == STRING
    for bad in ([1], np.array([1.0]), np.array(["a", 3], object), b"a"):
        with pytest.raises(InputError, match="must hold strings"):
            as_array(bad, port)
    arrays, _ = Ports([port], []).arrange(np.array(["x"]))
    assert arrays[0].dtype == STRING


class Exporter:
    """An array of another library."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


class OldExporter:
    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.arange(2, dtype=F32)


class BrokenExporter(OldExporter):
    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("requires grad")

    def __dlpack_device__(self) -> Any:
        return (1, 0)


class Broken:
    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise ValueError("lives on another device")


def test_arrays_of_other_libraries() -> None:
    port = Port("x", F32, (2,))
    shared = as_array(Exporter(A), port)
    assert np.shares_memory(shared, A)
    assert list(as_array(OldExporter(), port)) == list(as_array(BrokenExporter(), port)) == [0, 1]
    with pytest.raises(InputError, match="lives on another device"):
        as_array(Broken(), port)
