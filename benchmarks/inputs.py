"""Inputs as the real models' own clients make them: drawn text, preprocessed; file bytes; tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Array = NDArray[np.generic]
Feed = dict[str, Array]

SENTENCES = (
    "Hello ONNX 2026",
    "A Study of Inference Engines",
    "Throughput grows with the batch",
    "until memory bandwidth is met",
    "Table 1: latency of four models",
    "0.15 ms, 4 x 128, 95 GFLOP/s",
)
FILES = (
    b'import os\nprint("hi")\n' * 9,
    b'{"a":[1,2,3]}' * 9,
    b"<!DOCTYPE html><html><head><title>t</title></head><body><p>text</p></body></html>\n" * 12,
    b"name,value,unit\nlatency,0.15,ms\nthroughput,95,GFLOP/s\n" * 40,
    b'#include <stdio.h>\nint main(void) { printf("%d\\n", 42); return 0; }\n' * 3,
    bytes(range(256)) * 3,
)
FILE_LABELS = ("python", "json", "html", "csv", "c", "unknown")


def draw(height: int, width: int, first: int = 0) -> NDArray[np.uint8]:
    """Black sentences on white, [height, width, 3]; `first` says which sentence comes first."""
    size = max(10, min(40, height * 2 // 3))
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    for line in range(max(1, height // (size * 2))):
        sentence = SENTENCES[(first + line) % len(SENTENCES)]
        pen.text((width // 20, size // 6 + line * size * 2), sentence, fill="black", font=ImageFont.load_default(size))
    return np.asarray(image)


def text_line(text: str, height: int = 48, padding: int = 8) -> NDArray[np.uint8]:
    """One line of text, cropped as a detector would crop it: [height, its own width, 3]."""
    font = ImageFont.load_default(height * 2 // 3)
    width = int(font.getlength(text)) + 2 * padding
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).text((padding, height // 10), text, fill="black", font=font)
    return np.asarray(image)


def pages(rows: int, height: int, width: int) -> Array:
    """What a text detector is fed: images scaled to -1 .. 1, a transposed view [rows, 3, height, width]."""
    images = np.stack([draw(height, width, row) for row in range(rows)])
    return ((images / np.float32(255) - np.float32(0.5)) / np.float32(0.5)).transpose(0, 3, 1, 2)


def text_lines(rows: int, height: int, width: int) -> Array:
    """What a text recognizer is fed: lines scaled to -1 .. 1, padded right with 0, [rows, 3, height, width]."""
    batch = np.zeros((rows, 3, height, width), np.float32)
    for row in range(rows):
        line = text_line(SENTENCES[row % len(SENTENCES)], height)[:, :width]
        batch[row, :, :, : line.shape[1]] = ((line / np.float32(255) - 0.5) / 0.5).transpose(2, 0, 1)
    return batch


def photos(rows: int, height: int, width: int) -> Array:
    """What an ImageNet network is fed: mean and deviation removed per channel, a view [rows, 3, height, width]."""
    images = np.stack([draw(height, width, row) for row in range(rows)]) * np.float32(1 / 255)
    mean, deviation = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
    return ((images - mean) / deviation).transpose(0, 3, 1, 2)


def file_bytes(rows: int, size: int = 1024, padding: int = 256) -> Array:
    """What a file type detector is fed: the first and last bytes of stripped content, int32 [rows, 2 * size]."""
    batch = np.full((rows, 2 * size), padding, np.int32)
    for row in range(rows):
        content = np.frombuffer(FILES[row % len(FILES)].strip(), np.uint8)
        head, tail = content[:size], content[-size:]
        batch[row, : len(head)] = head
        batch[row, 2 * size - len(tail) :] = tail
    return batch


def tokens(rows: int, length: int, vocabulary: int = 30522) -> tuple[Array, Array]:
    """(ids, mask) as a WordPiece tokenizer pads them: [CLS] words [SEP] then 0, the first row full; int64."""
    generator = np.random.default_rng(rows * 1000 + length)
    ids = generator.integers(1000, vocabulary, (rows, length))
    mask = np.zeros((rows, length), np.int64)
    for row, used in enumerate(max(2, length - row * length // (rows + 1)) for row in range(rows)):
        ids[row, 0], ids[row, used - 1], mask[row, :used] = 101, 102, 1
    return ids * mask, mask
