"""Sound as the real models' own clients feed it: synthetic speech, cut into chunks or turned into log-mel features."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from benchmarks.inputs import Array, Feed

RATE = 16000
WINDOW, HOP = 400, 160


def speech(rows: int, samples: int, rate: int = RATE) -> NDArray[np.float32]:
    """Voices of different pitch, four syllables a second with pauses between, and faint noise: [rows, samples]."""
    time_s = np.arange(samples) / rate
    noise = np.random.default_rng(samples).standard_normal((rows, samples)) * 0.003
    voices = []
    for row in range(rows):
        pitch = (110 + 45 * row) * (1 + 0.08 * np.sin(2 * np.pi * 1.3 * time_s + row))
        phase = 2 * np.pi * np.cumsum(pitch) / rate
        harmonics = [np.sin(k * phase) / (1 + abs(k * (110 + 45 * row) - 600) / 300) for k in range(1, 16)]
        syllables = np.clip(np.sin(2 * np.pi * 4 * time_s + row), 0, None) * (
            np.sin(2 * np.pi * 0.7 * time_s + row) > -0.6
        )
        voices.append(0.08 * syllables * np.sum(harmonics, axis=0))
    return (np.stack(voices) + noise).astype(np.float32)


def vad_chunk(rows: int, samples: int, rate: int, call: int = 0) -> Feed:
    """A voice detector's call, the chunk with the end of the one before: 576 samples at 16 kHz, 288 at 8 kHz."""
    context = samples // 9
    step = samples - context
    sound = np.pad(speech(rows, rate * 2, rate), ((0, 0), (context, 0)))
    first = (call * step) % (rate * 2 - samples)
    return {
        "input": sound[:, first : first + samples],
        "state": np.zeros((2, rows, 128), np.float32),
        "sr": np.array(rate, np.int64),
    }


def vad_sequence(chunks: int, call: int = 0) -> Feed:
    """Chunks in a row, one call for all of them: input [chunks, 576], h and c [1, 1, 128]."""
    sound = np.pad(speech(1, RATE * 4)[0], (64, 0))
    windows = sliding_window_view(sound, 576)[::512]
    first = (call * chunks) % (len(windows) - chunks)
    state = np.zeros((1, 1, 128), np.float32)
    return {"input": windows[first : first + chunks], "h": state, "c": state}


def old_vad_chunk(rows: int, samples: int, rate: int, call: int = 0) -> Feed:
    """The chunk of a call of the third version: no context, two states of 64."""
    sound = speech(rows, rate * 2, rate)
    first = (call * samples) % (rate * 2 - samples)
    state = np.zeros((2, rows, 64), np.float32)
    return {"input": sound[:, first : first + samples], "sr": np.array(rate, np.int64), "h": state, "c": state}


def samples_16_bit(rows: int, samples: int) -> Array:
    """Sound as float32 that holds 16-bit integers: [rows, samples]."""
    return np.round(speech(rows, samples) * 32767).astype(np.float32)


def turns(rows: int, frames: int = 800) -> Array:
    """What a turn detector is fed: 3 s of sound at the end of 8 s, brought to deviation 1, log-mel [rows, 80, 800]."""
    sound = np.pad(speech(rows, 3 * RATE), ((0, 0), (frames * HOP - 3 * RATE, 0)))
    sound = (sound - sound.mean(-1, keepdims=True)) / np.sqrt(sound.var(-1, keepdims=True) + 1e-7)
    return log_mel(sound, 80)[:, :, :frames]


def log_mel(sound: NDArray[np.float32], bands: int) -> Array:
    """Whisper's features: log10 of the mel spectrum, no more than 8 below its peak, [rows, bands, frames]."""
    padded = np.pad(sound.astype(np.float64), ((0, 0), (WINDOW // 2, WINDOW // 2)), mode="reflect")
    frames = sliding_window_view(padded, WINDOW, axis=-1)[:, ::HOP]
    power = np.abs(np.fft.rfft(frames * np.hanning(WINDOW + 1)[:-1])) ** 2
    logarithm = np.log10(np.maximum(power @ _mel_filters(bands), 1e-10))
    logarithm = np.maximum(logarithm, logarithm.max((1, 2), keepdims=True) - 8)
    return ((logarithm + 4) / 4).astype(np.float32).swapaxes(1, 2)


@cache
def _mel_filters(bands: int) -> NDArray[np.float64]:
    """Slaney's triangles, each of area 1: [WINDOW // 2 + 1, bands]."""
    step = np.log(6.4) / 27
    mels = np.linspace(0, 15 + np.log(RATE / 2 / 1000) / step, bands + 2)
    corners = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp(step * (mels - 15)))
    bins = np.linspace(0, RATE / 2, WINDOW // 2 + 1)[:, None]
    rising = (bins - corners[:-2]) / np.diff(corners)[:-1]
    falling = (corners[2:] - bins) / np.diff(corners)[1:]
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (corners[2:] - corners[:-2])
