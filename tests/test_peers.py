"""What the comparison with other engines counts and writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from benchmarks import peer_report as report
from benchmarks.arithmetic import model_flops
from benchmarks.peer_report import CPU, THROUGHPUT, Row

ROW = Row("2026-01-02", "a processor", 2, "net", "x:1x3", CPU, "gpu_engine", "", 2.0, 1e-7, True, 50.0, 100.0)
ROWS = [
    ROW,
    replace(ROW, engine="ONNX Runtime", version="1.0", value=3.0, gflops=None, peak_gflops=None),
    replace(ROW, engine="OpenVINO", version="2.0", value=None, error=None, note="refused, for a reason"),
    replace(ROW, measure=THROUGHPUT, value=100.0),
    replace(ROW, measure=THROUGHPUT, engine="ONNX Runtime", version="1.0", value=200.0, agrees=False),
]


def model(*nodes: onnx.NodeProto, **shapes: list[int | str]) -> bytes:
    """The nodes over float inputs; the output is y."""
    inputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    output = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", inputs, [output])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return bytes(proto.SerializeToString())


def flops(proto: bytes, **shapes: tuple[int, ...]) -> int | None:
    return model_flops(proto, {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})


def test_a_product_counts_two_for_each_multiplication() -> None:
    node = helper.make_node("MatMul", ["a", "b"], ["y"])
    assert flops(model(node, a=["n", 5, 7], b=[7, 3]), a=(4, 5, 7), b=(7, 3)) == 2 * 4 * 5 * 7 * 3


def test_a_grouped_convolution_counts_its_own_channels() -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=2, strides=[2, 1])
    proto = model(node, x=["n", 4, "2*h", "w"], w=[6, 2, 3, 3])
    assert flops(proto, x=(1, 4, 8, 9), w=(6, 2, 3, 3)) == 2 * (6 * 3 * 7) * (2 * 3 * 3)


def test_a_transposed_convolution_counts_its_inputs() -> None:
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2])
    assert flops(model(node, x=[1, 4, 5, 6], w=[4, 3, 2, 2]), x=(1, 4, 5, 6), w=(4, 3, 2, 2)) == 2 * 120 * 12


def test_a_recurrence_counts_input_and_state() -> None:
    node = helper.make_node("LSTM", ["x", "w", "r"], ["", "y"], hidden_size=8)
    proto = model(node, x=["t", 2, 5], w=[1, 32, 5], r=[1, 32, 8])
    assert flops(proto, x=(3, 2, 5), w=(1, 32, 5), r=(1, 32, 8)) == 2 * 3 * 2 * 32 * (5 + 8)


def test_rows_come_back_from_the_file(tmp_path: Path) -> None:
    report.write_rows(tmp_path / "deep" / "peers.csv", ROWS)
    assert report.read_rows(tmp_path / "deep" / "peers.csv") == ROWS


def test_a_ratio_is_the_best_peer_over_ours() -> None:
    faster = replace(ROWS[1], engine="another", value=2.5)
    assert report.ratios([*ROWS, faster], CPU) == {"net": 1.25}
    assert report.ratios(ROWS, THROUGHPUT) == {"net": 0.5}
    assert report.ratios([ROW, ROWS[2]], CPU) == {}


def test_what_an_engine_cannot_do_is_said() -> None:
    assert report.remarks(ROWS) == [
        "OpenVINO does not run net.",
        "ONNX Runtime is outside the tolerance on net.",
    ]


def test_the_section_is_rewritten_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.MARKS[0]}previous\n{report.MARKS[1]}after\n")
    for _ in range(2):
        report.update_between_marks(page, report.markdown(ROWS, "chart.svg", "folder/peers.csv"))
    text = page.read_text()
    assert text.startswith("before\n<!-- peers -->\n![") and text.endswith("\n<!-- end of peers -->\nafter\n")
    assert "| CPU time on one thread | 1 | 1.50 | 1.50 (net) | 0 |" in text
    assert "a processor, 2 cores, 2026-01-02" in text and "previous" not in text


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("nothing")
    with pytest.raises(ValueError, match="peers"):
        report.update_between_marks(tmp_path / "page.md", "text")
