"""Regions, sampling, rearranging and signals against onnxruntime, NumPy and each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gpu_engine.errors import InvalidModel
from tests.reference import run_graph
from tests.test_operators_nn import agree, numbers, opened
from tests.test_operators_tensor import graph_of, model_of, run

Array = NDArray[Any]


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize("coordinates", [None, "half_pixel", "output_half_pixel"])
def test_roi_align(mode: str, samples: int, coordinates: str | None) -> None:
    rois = np.array([[0, 0, 4, 5], [-2, 1, 9, 3.5], [3, 3, 3.2, 3.1], [20, 20, 30, 30]], np.float32)
    inputs = {"x": numbers(2, 3, 6, 7), "rois": rois, "rows": np.array([0, 1, 1, 0])}
    moved = {"coordinate_transformation_mode": coordinates} if coordinates else {}
    shape = {"output_height": 2, "output_width": 3, "sampling_ratio": samples, "spatial_scale": 0.5}
    agree("RoiAlign", inputs, opset=16 if coordinates else 10, mode=mode, **shape, **moved)


def test_max_roi_pool() -> None:
    rois = np.array([[0, 0, 0, 4, 5], [1, 2, 1, 9, 3], [1, 6, 6, 6, 6]], np.float32)
    agree("MaxRoiPool", {"x": numbers(2, 3, 6, 7), "rois": rois}, pooled_shape=[2, 3], spatial_scale=0.5)


@pytest.mark.parametrize("centred", [0, 1])
def test_non_max_suppression(centred: int) -> None:
    random = np.random.default_rng(3)
    boxes, scores = random.random((2, 20, 4)), random.integers(0, 5, (2, 3, 20))
    inputs = {
        "boxes": boxes.astype(np.float32),
        "scores": scores.astype(np.float32),
        "most": np.array([4]),
        "overlap": np.array([0.3], np.float32),
        "least": np.array([1.0], np.float32),
    }
    agree("NonMaxSuppression", inputs, opset=11, center_point_box=centred)
    agree("NonMaxSuppression", {**inputs, "least": None}, opset=11, center_point_box=centred)
    assert run("NonMaxSuppression", {"boxes": inputs["boxes"], "scores": inputs["scores"]}).shape == (0, 3)


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("corners", [0, 1])
def test_grid_sample(mode: str, padding: str, corners: int) -> None:
    grid = (np.random.default_rng(1).random((2, 5, 6, 2)) * 4 - 2).astype(np.float32)
    inputs = {"x": numbers(2, 3, 4, 7), "grid": grid}
    agree("GridSample", inputs, opset=16, mode=mode, padding_mode=padding, align_corners=corners)


@pytest.mark.parametrize("corners", [0, 1])
@pytest.mark.parametrize("spatial", [(4, 5), (2, 3, 4)])
def test_the_identity_as_an_affine_grid_samples_the_image_itself(corners: int, spatial: tuple[int, ...]) -> None:
    x, rank = numbers(2, 3, *spatial), len(spatial)
    theta = np.broadcast_to(np.eye(rank, rank + 1, dtype=np.float32), (2, rank, rank + 1)).copy()
    size = {"size": np.array(x.shape)}
    grid = run("AffineGrid", {"theta": theta, **size}, 20, known=("size",), align_corners=corners)
    assert grid.shape == (2, *spatial, rank)
    np.testing.assert_array_equal(grid, run("AffineGrid", {"theta": theta, **size}, 20, align_corners=corners))
    sampled = run("GridSample", {"x": x, "grid": grid}, 20, align_corners=corners)
    np.testing.assert_allclose(sampled, x, atol=1e-5)


@pytest.mark.parametrize("group", [1, 2])
def test_a_deformable_convolution_that_does_not_deform(group: int) -> None:
    x, w, bias = numbers(2, 4, 6, 7), numbers(4, 4 // group, 3, 2, seed=1), numbers(4, seed=2)
    attributes = {"pads": [1, 0, 1, 1], "strides": [2, 1], "dilations": [1, 2], "group": group}
    expected = run("Conv", {"x": x, "w": w, "b": bias}, **attributes)
    offset = np.zeros((2, 2 * 2 * 6, *expected.shape[2:]), np.float32)
    mask = np.full((2, 2 * 6, *expected.shape[2:]), 0.5, np.float32)
    for form in ("known", "symbolic"):
        inputs = {"x": x, "w": w, "o": offset, "b": bias}
        found = run("DeformConv", inputs, 19, form=form, known=("w",), offset_group=2, **attributes)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    halved = run("DeformConv", {"x": x, "w": w, "o": offset, "b": None, "m": mask}, 19, offset_group=2, **attributes)
    np.testing.assert_allclose(halved, (expected - bias[:, None, None]) / 2, rtol=1e-4, atol=1e-5)


def test_offsets_move_the_samples() -> None:
    x, w = numbers(1, 1, 5, 6), np.ones((1, 1, 1, 1), np.float32)
    offset = np.zeros((1, 2, 5, 6), np.float32)
    offset[:, 0], offset[:, 1] = 1, -2
    moved = run("DeformConv", {"x": x, "w": w, "o": offset}, 19)
    expected = np.zeros_like(x)
    expected[:, :, :-1, 2:] = x[:, :, 1:, :-2]
    np.testing.assert_allclose(moved, expected, atol=1e-6)


@pytest.mark.parametrize("known", [(), ("image", "block")])
def test_col2im_sums_what_the_windows_hold(known: tuple[str, ...]) -> None:
    image, block = (6, 7), (2, 3)
    columns = np.ones((2, 3 * 6, 5 * 5), np.float32)
    inputs = {"x": columns, "image": np.array(image), "block": np.array(block)}
    found = run("Col2Im", inputs, 18, known=known)
    counts = np.zeros(image)
    for i in range(5):
        for j in range(5):
            counts[i : i + 2, j : j + 3] += 1
    np.testing.assert_array_equal(found, np.broadcast_to(counts, (2, 3, *image)))


def test_depth_and_space_are_inverse() -> None:
    x = numbers(2, 12, 4, 6)
    for mode in ("DCR", "CRD"):
        agree("DepthToSpace", {"x": x}, opset=13, mode=mode, blocksize=2)
        y = run("DepthToSpace", {"x": x}, 28, form="symbolic", mode=mode, blocksize=2)
        np.testing.assert_array_equal(run("SpaceToDepth", {"x": y}, 28, mode=mode, blocksize=2), x)


@pytest.mark.parametrize("form", ["static", "symbolic", "known"])
def test_center_crop_pad(form: str) -> None:
    x = numbers(5, 6, 3)
    inputs = {"x": x, "shape": np.array([3, 9])}
    found = run("CenterCropPad", inputs, 18, form=form, known=("shape",), axes=[0, -2])
    np.testing.assert_array_equal(found, np.pad(x[1:4], ((0, 0), (1, 2), (0, 0))))


def test_no_axis_has_fewer_than_no_elements() -> None:
    """ONNX Runtime wraps round."""
    inputs = {"x": numbers(1, 1), "shape": np.array([2, -(2**63)])}
    with pytest.raises(InvalidModel, match="-9223372036854775808"):
        run("CenterCropPad", inputs, 18, form="known", known=("shape",))
    with pytest.raises(ValueError, match="axis 1 cannot have -9223372036854775808 elements"):
        run("CenterCropPad", inputs, 18, form="symbolic")


def test_center_crop_pad_serves_any_extent() -> None:
    inputs = {"x": numbers(5, 6), "shape": np.array([4, 4])}
    graph = graph_of(opened(model_of("CenterCropPad", inputs, {}, 18, 1, ("shape",)), ["h", "w"]))
    assert graph.outputs[0].shape == (4, 4)
    for x in (numbers(5, 6), numbers(2, 9), numbers(4, 1)):
        rows, columns = (range((n - 4) // 2, (n - 4) // 2 + 4) if n > 4 else range(n) for n in x.shape)
        before = [(4 - min(n, 4)) // 2 for n in x.shape]
        expected = np.zeros((4, 4), np.float32)
        kept = x[np.ix_(rows, columns)]
        expected[before[0] : before[0] + kept.shape[0], before[1] : before[1] + kept.shape[1]] = kept
        np.testing.assert_array_equal(run_graph(graph, {"x": x})["y0"], expected)


def complex_of(x: Array) -> Array:
    return x[..., 0] + 1j * x[..., 1]  # type: ignore[no-any-return]


@pytest.mark.parametrize("known", [(), ("n", "axis")])
@pytest.mark.parametrize("length", [None, 4, 9])
def test_dft(known: tuple[str, ...], length: int | None) -> None:
    x = numbers(2, 6, 3, 2)
    operands = {"n": None if length is None else np.array(length), "axis": np.array(1)}
    y = run("DFT", {"x": x, **operands}, 20, known=known)
    np.testing.assert_allclose(complex_of(y), np.fft.fft(complex_of(x), n=length, axis=1), atol=1e-4)
    back = run("DFT", {"x": y, "n": None, "axis": operands["axis"]}, 20, known=known, inverse=1)
    np.testing.assert_allclose(
        back, np.pad(x, [(0, 0), (0, max(0, (length or 6) - 6)), (0, 0), (0, 0)])[:, :length], atol=1e-5
    )
    real = {"x": x[..., :1], **operands}
    half = run("DFT", real, 20, known=known, onesided=1)
    np.testing.assert_allclose(complex_of(half), np.fft.rfft(x[..., 0], n=length, axis=1), atol=1e-4)
    whole = run("DFT", {"x": half, **operands}, 20, known=known, onesided=1, inverse=1)
    np.testing.assert_allclose(whole[..., 0], np.fft.irfft(complex_of(half), n=length, axis=1), atol=1e-4)


@pytest.mark.parametrize("known", [(), ("step", "window", "length")])
@pytest.mark.parametrize("onesided", [0, 1])
def test_stft(known: tuple[str, ...], onesided: int) -> None:
    signal, window = numbers(2, 50, 1), np.hanning(16).astype(np.float32)
    inputs = {"x": signal, "step": np.array(5), "window": window, "length": np.array(16)}
    found = run("STFT", inputs, 17, known=known, onesided=onesided)
    frames = np.stack([signal[:, i : i + 16, 0] * window for i in range(0, 35, 5)], axis=1)
    expected = (np.fft.rfft if onesided else np.fft.fft)(frames, axis=-1)
    np.testing.assert_allclose(complex_of(found), expected, atol=1e-4)


@pytest.mark.parametrize("known", [(), tuple("abcde")])
def test_mel_weights(known: tuple[str, ...]) -> None:
    edges = {"d": np.array(0, np.float32), "e": np.array(4000, np.float32)}
    inputs = {"a": np.array(8), "b": np.array(64), "c": np.array(8000), **edges}
    agree("MelWeightMatrix", inputs, opset=17, known=known)
