"""What fuzzing starts from: small real models of every family, with inputs for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from gpu_engine.tools.demo import FOLDER
from tests.conformance_cases import collect

MAX_NBYTES = 100_000


@dataclass(frozen=True)
class Seed:
    """A serialized model and its inputs by position; a model with `external` keeps tensors in files."""

    name: str
    model: bytes
    inputs: tuple[Any, ...] = ()
    external: bool = False


@lru_cache(maxsize=1)
def families() -> tuple[tuple[Seed, ...], ...]:
    """Groups of seeds that get an equal share of the cases."""
    node, rest = [], []
    for case in collect(("node", "simple", "pytorch-operator", "pytorch-converted")):
        if len(case.model) <= MAX_NBYTES:
            inputs = case.data_sets[0][0] if case.data_sets else ()
            (node if case.suite == "node" else rest).append(Seed(case.label, case.model, inputs))
    control = [Seed(f"control/{i}", onnx.parser.parse_model(text).SerializeToString()) for i, text in enumerate(TEXTS)]
    digits = Seed("digits", (FOLDER / "digits.onnx").read_bytes(), (np.zeros((1, 1, 8, 8), np.float32),))
    return tuple(node), tuple(rest), (digits, _external(), *control)


def seed(generator: np.random.Generator) -> Seed:
    chosen: Sequence[Seed] = families()[generator.integers(len(families()))]
    return chosen[generator.integers(len(chosen))]


def _external() -> Seed:
    """y = x @ w with w [4, 4] in the file `w.bin`, which `fuzz_folder.prepare` makes."""
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in "xy"]
    w = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "w.bin"), ("offset", "64"), ("length", "64")):
        w.external_data.add(key=key, value=value)
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ports[:1], ports[1:], [w])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return Seed("external", model.SerializeToString(), (np.ones((2, 4), np.float32),), external=True)


HEAD = '<ir_version: 10, opset_import: ["" : 21, "local" : 1]>\n'
TEXTS = tuple(
    HEAD + text
    for text in (
        """
        branch (bool c, float[N, 2] x) => (float[M, 2] y) {
          y = If (c) <then_branch = yes () => (float[N, 2] a) { a = Add (x, x) },
                      else_branch = no () => (float[K, 2] b) { b = Concat <axis = 0> (x, x) }>
        }""",
        """
        counted (int64 n, float[2] x) => (float[2] last, float[T, 2] all) <bool going = {1}> {
          last, all = Loop (n, going, x) <body = step (int64 i, bool before, float[2] state)
            => (bool after, float[2] next, float[2] seen) {
              after = Identity (before)
              f = Cast <to = 1> (i)
              next = Add (state, f)
              seen = Mul (next, x)
          }>
        }""",
        """
        until (float[1] limit, float[1] x) => (float[1] last) <int64 n = {50}, bool going = {1}> {
          last = Loop (n, going, x) <body = step (int64 i, bool before, float[1] state)
            => (bool after, float[1] next) {
              next = Add (state, x)
              more = Less (next, limit)
              after = Squeeze (more)
          }>
        }""",
        """
        grows (int64 n, float[A, 2] x) => (float[B, 2] y) <bool going = {1}> {
          y = Loop (n, going, x) <body = step (int64 i, bool before, float[A, 2] state)
            => (bool after, float[C, 2] next) {
              after = Identity (before)
              next = Concat <axis = 0> (state, x)
          }>
        }""",
        """
        scanned (float[2] start, float[T, 2] x) => (float[2] last, float[T, 2] all) {
          last, all = Scan <num_scan_inputs = 1, body = step (float[2] state, float[2] part)
            => (float[2] next, float[2] seen) {
              next = Add (state, part)
              seen = Identity (next)
          }> (start, x)
        }""",
        """
        nested (int64 n, bool c, float[2] x) => (float[2] y) <bool going = {1}> {
          y = Loop (n, going, x) <body = outer (int64 i, bool before, float[2] state)
            => (bool after, float[2] next) {
              after = Identity (before)
              next = If (c) <then_branch = yes () => (float[2] a) {
                  a = Loop (n, before, state) <body = inner (int64 j, bool was, float[2] deep)
                    => (bool still, float[2] deeper) {
                      still = Identity (was)
                      deeper = Add (deep, x)
                  }>
                }, else_branch = no () => (float[2] b) { b = Neg (state) }>
          }>
        }""",
        """
        sequences (float[4, 2] x, int64 at) => (float[2] y, int64 count) <int64 two = {2}> {
          parts = SplitToSequence <axis = 0, keepdims = 0> (x)
          shorter = SequenceErase (parts, two)
          longer = SequenceInsert (shorter, first)
          first = SequenceAt (parts, at)
          count = SequenceLength (longer)
          joined = ConcatFromSequence <axis = 0, new_axis = 1> (longer)
          y = ReduceSum <keepdims = 0> (joined, axis)
          axis = Constant <value = int64[1] {0}> ()
        }""",
        """
        mapped (seq(float[2]) x) => (seq(float[2]) y) {
          y = SequenceMap (x) <body = each (float[2] part) => (float[2] result) { result = Relu (part) }>
        }""",
        """
        unrolled (float[2] x) => (float[6] y) <int64 n = {3}, bool going = {1}> {
          empty = SequenceEmpty ()
          all = Loop (n, going, empty) <body = step (int64 i, bool before, seq(float[2]) state)
            => (bool after, seq(float[2]) next) {
              after = Identity (before)
              next = SequenceInsert (state, x)
          }>
          y = ConcatFromSequence <axis = 0> (all)
        }""",
        """
        called (float[N] x) => (float[N] y) {
          a = local.twice (x)
          y = local.shifted <by = 2.0> (a)
        }
        <domain: "local", opset_import: ["" : 21]> twice (a) => (b) { b = Add (a, a) }
        <domain: "local", opset_import: ["" : 21, "local" : 1]> shifted <by> (a) => (b) {
          amount = Constant <value_float : float = @by> ()
          c = Add (a, amount)
          b = local.twice (c)
        }""",
        """
        open (float[N, M] x, int64[2] shape) => (int64[R, Q] places, float[P] kept, float[A, B] wide) {
          places = NonZero (x)
          flags = Cast <to = 9> (x)
          kept = Compress (x, only)
          only = Reshape (flags, flat)
          flat = Constant <value = int64[1] {-1}> ()
          wide = Expand (one, shape)
          one = Constant <value = float[1, 1] {1.0}> ()
        }""",
        """
        sizes (float[N, C, H, W] x) => (float[A, B, D, E] y, int64[4] s) {
          s = Shape (x)
          half = Div (s, two)
          two = Constant <value = int64[4] {1, 1, 2, 2}> ()
          more = Mul (half, two)
          zero = Constant <value = int64[4] {0, 0, 0, 0}> ()
          cut = Slice (x, zero, more)
          y = AveragePool <kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1> (cut)
        }""",
        """
        quantized (float[N, 4] x) => (float[N, 3] y)
        <float s = {0.1}, uint8 z = {3}, int8[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, float[3] t = {1, 2, 3}>
        {
          q = QuantizeLinear (x, s, z)
          d = DequantizeLinear (q, s, z)
          v = DequantizeLinear <axis = 1> (w, t)
          y = MatMul (d, v)
        }""",
        """
        texts (string[N] x) => (string[M] y, string[N] z) <string[1] w = {"b"}> {
          y = StringNormalizer <case_change_action = "UPPER", stopwords = ["A"]> (x)
          z = StringConcat (x, w)
        }""",
        """
        layers (float[N, 8] x) => (float[N, 8] y) <float[8] b = {1, 1, 1, 1, 1, 1, 1, 1}> {
          h = Gemm (x, v, b)
          v = EyeLike (w2)
          w2 = ConstantOfShape (side)
          side = Constant <value = int64[2] {8, 8}> ()
          n = LayerNormalization (h, b, b)
          y = Softmax (n)
        }""",
    )
)
