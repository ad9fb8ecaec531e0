"""Measuring tiles without a GPU: problems of one product, an injected clock, the table, the choice that reads it."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from benchmarks import gpu_tiles
from benchmarks.gpu_measure import fastest, prepared
from benchmarks.gpu_problems import Problem, choices, plan_with, problem_of
from gpu_engine.errors import DeviceError
from gpu_engine.gpu import tuned_tiles
from gpu_engine.gpu.options import GpuOptions
from gpu_engine.gpu.tiles import GEMM_TILES, Choice, Extents, GemmTile, choose
from gpu_engine.gpu.tuned_tiles import Record, Table, bucket, read_table, write_table
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dtypes import FLOAT32
from gpu_engine.ir.graph import Node, Op, TensorType, Value
from gpu_engine.ir.ops import MatMul
from gpu_engine.ir.ops.channels_last import LastConv
from tests import fake_cupy
from tests.recording_cuda import Gpu
from tests.test_gpu_cuda import replace_modules

ROWS = dims.symbol("rows")


def product_node() -> Node:
    """[rows, 40] times known [40, 24], and an epilogue that measuring leaves out."""
    weights = np.random.default_rng(1).standard_normal((40, 24), np.float32)
    bias = Value(TensorType(FLOAT32, (24,)))
    op = MatMul(epilogue=expr.arg(0, FLOAT32) + expr.arg(1, FLOAT32))
    return node(op, Value(TensorType(FLOAT32, (ROWS, 40))), Value(TensorType(FLOAT32, (40, 24)), weights), bias)


def conv_node() -> Node:
    """3x3 over [rows, 8, 8, 16] with known weights [32, 16, 3, 3]."""
    weights = np.ones((32, 16, 3, 3), np.float32)
    op = LastConv((1, 1), (1, 1), (1, 1), (1, 1), 1, None, False)
    return node(op, Value(TensorType(FLOAT32, (ROWS, 8, 8, 16))), Value(TensorType(FLOAT32, weights.shape), weights))


def node(op: Op, *values: Value) -> Node:
    return Node(op, values, tuple(Value(kind) for kind in op.infer(*(value.type for value in values))), "the node")


def problem(rows: int = 20, made: Callable[[], Node] = product_node, precision: str = "fp32") -> Problem:
    found = problem_of(made(), {"rows": rows}, GpuOptions(precision))
    assert found is not None
    return found


def test_problems_know_what_their_tile_is_chosen_by() -> None:
    assert problem().extents == Extents(1, 20, 24, 40, 4) and problem().family == "ieee"
    assert problem(precision="tf32").family == "tf32"
    conv = problem(made=conv_node)
    assert (conv.kind, conv.extents) == ("conv", Extents(1, 20 * 64, 32, 144, 4))
    assert problem_of(product_node(), {}, GpuOptions()) is None


def test_every_candidate_is_a_choice() -> None:
    found = choices(problem(made=conv_node))
    assert {choice.tile for choice in found} == set(GEMM_TILES["ieee"])
    assert {choice.splits for choice in found} == {1, 2, 4}


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Any:
    replace_modules(monkeypatch, Gpu())
    from gpu_engine.gpu.cuda import CudaDriver

    yield CudaDriver(0, 90, fake_cupy.binary_source)
    sys.modules.pop("gpu_engine.gpu.cuda", None)


@pytest.mark.parametrize("splits", [1, 2])
def test_what_is_timed_computes_the_product(driver: Any, splits: int) -> None:
    tile = GemmTile(16, 32, 16, 4, 2)
    plan = plan_with(problem(), Choice(1, None, tile, splits))
    assert len(plan.steps) == 1
    ready = prepared(plan, driver, np.random.default_rng(0))
    ready.run(driver)
    memories = ready.held[len(plan.steps) :]
    a, b = (driver.array(memories[i], 0, plan.buffers[i].shape, FLOAT32) for i in (plan.inputs[0], constant(plan)))
    (out,) = plan.outputs
    found = driver.array(memories[out], 0, plan.buffers[out].shape, FLOAT32)
    np.testing.assert_allclose(np.asarray(found), np.asarray(a) @ np.asarray(b), rtol=1e-4, atol=1e-4)


def constant(plan: Any) -> int:
    return next(i for i, buffer in enumerate(plan.buffers) if buffer.constant is not None)


def test_the_fastest_is_found_by_medians(driver: Any) -> None:
    """A clock that says three times for each candidate: one of them once very fast, another always."""
    wanted = choices(problem())[2]
    times = iter(
        [t for choice in choices(problem()) for t in ((3e-6,) * 3 if choice == wanted else (1e-9, 5e-6, 5e-6))]
    )
    record = fastest(problem(), Still(driver), lambda run: next(times), lambda *_: True, runs=3)
    assert record is not None
    assert GemmTile(*record.tile) == wanted.tile and record.splits == wanted.splits and record.median_s == 3e-6
    assert record.bucket == bucket((1, 20, 24, 40)) == (0, 5, 5, 6)


class Still:
    """A driver that loads and launches no kernel."""

    def __init__(self, driver: Any) -> None:
        self.allocate, self.array, self.upload = driver.allocate, driver.array, driver.upload

    def load(self, kernel: Any) -> Any:
        return kernel

    def pack(self, loaded: Any, words: Any, grid: Any) -> Any:
        return words

    def launch(self, *arguments: Any) -> None:
        """Nothing happens."""


def test_tiles_that_do_not_fit_and_kernels_that_do_not_load_are_left_out(driver: Any) -> None:
    class Refusing(Still):
        def load(self, kernel: Any) -> Any:
            raise DeviceError("too many registers")

    told: list[str] = []
    assert fastest(problem(), Still(driver), lambda run: 1.0, lambda *_: False) is None
    assert fastest(problem(), Refusing(driver), lambda run: 1.0, lambda *_: True, tell=told.append) is None
    assert told and all("too many registers" in line for line in told)


def records() -> tuple[Record, ...]:
    """The last candidate of "ieee", in two parts for few rows."""
    tile = GEMM_TILES["ieee"][-1]
    fields = tile.block_m, tile.block_n, tile.block_k, tile.num_warps, tile.num_stages, tile.group_m
    return (
        Record("ieee", "gemm", 4, bucket((1, 8, 768, 3072)), fields, 2, 1e-5),
        Record("ieee", "gemm", 4, bucket((1, 2048, 768, 3072)), fields, 1, 2e-5),
    )


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a table for sm_90."""
    monkeypatch.setattr(tuned_tiles, "FOLDER", tmp_path)
    write_table(Table("NVIDIA H200", 90, "2026-11-29", "3.6.0", records()), tmp_path)
    return tmp_path


def test_what_was_written_is_read(tuned: Path) -> None:
    found = read_table(tuned / "sm_90.json")
    assert found == Table("NVIDIA H200", 90, "2026-11-29", "3.6.0", records())
    (tuned / "sm_80.json").write_text("[]")
    with pytest.raises(ValueError, match="is no table"):
        read_table(tuned / "sm_80.json")


def test_a_measured_tile_goes_before_the_estimate(tuned: Path) -> None:
    tile = GEMM_TILES["ieee"][-1]
    assert choose("ieee", Extents(1, 6, 700, 3000, 4), 90) == (Choice(1, None, tile, 2),)
    ranges = choose("ieee", Extents(1, ROWS, 768, 3072, 4), 90)
    assert ranges[0] == Choice(1, 17, tile, 2) and any(choice == Choice(1025, 4097, tile, 1) for choice in ranges)
    assert all(a.end == b.least for a, b in itertools.pairwise(ranges))


@pytest.mark.parametrize(
    ("family", "extents", "arch", "kind"),
    [("ieee", Extents(1, 6, 768, 3072, 4), 80, "gemm"), ("ieee", Extents(1, 6, 768, 3072, 4), 100, "gemm"),
     ("ieee", Extents(1, 6, 768, 3072, 4), 90, "conv"), ("ieee", Extents(1, 6, 64, 3072, 4), 90, "gemm"),
     ("tf32", Extents(1, 6, 768, 3072, 4), 90, "gemm")],
)  # fmt: skip
def test_a_table_counts_for_its_own_gpu_family_and_extents(
    family: str, extents: Extents, arch: int, kind: str, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    measured = choose(family, extents, arch, kind=kind)
    monkeypatch.setattr(tuned_tiles, "FOLDER", tuned / "none")
    assert measured == choose(family, extents, arch, kind=kind)


def test_parts_need_steps(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = GEMM_TILES["ieee"][-1].block_k * 3
    record = replace(records()[0], bucket=bucket((1, 8, 768, few)))
    write_table(Table("NVIDIA H200", 90, "2026-11-29", "3.6.0", (record,)), tuned / "few")
    monkeypatch.setattr(tuned_tiles, "FOLDER", tuned / "few")
    assert choose("ieee", Extents(1, 8, 768, few, 4), 90)[0].splits == 1


def test_a_tile_that_is_no_candidate_any_more_is_not_taken(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_engine.gpu.tiles.GEMM_TILES", GEMM_TILES | {"ieee": GEMM_TILES["ieee"][:-1]})
    assert choose("ieee", Extents(1, 6, 768, 3072, 4), 90)[0].tile != GEMM_TILES["ieee"][-1]


def test_without_a_gpu_measuring_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    replace_modules(monkeypatch, Gpu(devices=0))
    monkeypatch.delitem(sys.modules, "benchmarks.gpu_clock", raising=False)
    assert gpu_tiles.main(["--measure"]) == 1
    assert "no GPU can be used: no NVIDIA driver is installed" in capsys.readouterr().err
    sys.modules.pop("gpu_engine.gpu.cuda", None)
    sys.modules.pop("benchmarks.gpu_clock", None)


def test_without_cupy_measuring_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.delitem(sys.modules, "gpu_engine.gpu.cuda", raising=False)
    monkeypatch.delitem(sys.modules, "benchmarks.gpu_clock", raising=False)
    assert gpu_tiles.main(["--measure"]) == 1
    assert "a GPU is reached through CuPy" in capsys.readouterr().err
