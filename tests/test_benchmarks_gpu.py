"""`python -m benchmarks.gpu` without a GPU: its cells, its budget, what it resumes, its verdicts, and its refusals."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytest.importorskip("torch", reason="needs PyTorch, of the bench extra")

from benchmarks import gpu, gpu_commands, gpu_jobs, gpu_report, gpu_results
from benchmarks.gpu_cells import (
    COMPILED,
    EAGER,
    KERNELS,
    OURS,
    RATES,
    STREAMS,
    TIMELINE,
    Cell,
    Job,
    as_record,
    cells,
    check_cells,
    from_record,
    jobs,
)
from benchmarks.gpu_commands import Program
from benchmarks.gpu_jobs import Budget, run_jobs, run_lanes
from benchmarks.gpu_places import Activity, Effort, event_times, place
from benchmarks.gpu_report import MET, MISSED, UNKNOWN
from benchmarks.gpu_results import Check
from benchmarks.gpu_timeline import overlap_of, profile_of
from benchmarks.gpu_worker import Bench, measured

ALL = cells(("a", "b"), (1, 4, 16, 64, 256), ("fp16", "fp32"))


def test_cells_come_in_the_order_of_their_worth() -> None:
    assert ALL[:2] == [Cell(RATES), Cell(KERNELS)]
    assert len(ALL) == len(set(ALL)) == 2 + 2 * 2 * (3 * 5 + 2 + 2)
    first = [ALL.index(Cell(kind, "b", "fp16", 16)) for kind in (OURS, EAGER, COMPILED)]
    assert first == sorted(first) and first[-1] < ALL.index(Cell(OURS, "a", "fp16", 256))
    assert ALL.index(Cell(COMPILED, "b", "fp16", 4)) < ALL.index(Cell(OURS, "a", "fp32", 1))
    assert {cell.batch for cell in ALL if cell.kind == STREAMS} == {1, 4}
    assert {cell.batch for cell in ALL if cell.kind == TIMELINE} == {1, 16}


def test_neighbours_share_a_process() -> None:
    groups = jobs(ALL)
    assert [cell for job in groups for cell in job.cells] == ALL
    checks = jobs(check_cells(("a", "b"), ("fp16", "fp32")))
    assert [len(job.cells) for job in checks] == [1, 1, 2, 2]
    assert groups[2].cells == (Cell(OURS, "a", "fp16", 1), Cell(OURS, "a", "fp16", 16))


def worker(body: str) -> Callable[[Sequence[Cell]], list[str]]:
    """A process that does `body` for every cell: `cell` is the record, `say(values)` prints its line."""
    text = f"""
import json, os, sys, time
def say(values, key="values"):
    print({gpu_jobs.MARK!r} + json.dumps({{"cell": cell, key: values}}), flush=True)
for cell in json.loads(sys.argv[1]):
    {body}
"""
    return lambda some: [sys.executable, "-c", text, json.dumps(list(map(as_record, some)))]


def outcomes(body: str, some: Sequence[Cell], limit_s: float = 30.0, seconds: float = 60.0) -> list[Any]:
    budget = Budget(time.monotonic() + seconds, limit_s)
    return list(run_jobs(jobs(some), worker(body), budget, {}, io.StringIO()))


SOME = [Cell(OURS, "a", "fp16", batch) for batch in (1, 16, 64)]


def test_what_a_process_prints_besides_is_not_looked_at() -> None:
    found = outcomes("print('noise'); print('@', file=sys.stderr); say({'x': cell['batch']})", SOME)
    assert found == [(cell, {"x": cell.batch}) for cell in SOME]


def test_a_process_that_dies_takes_one_cell_with_it() -> None:
    body = "print('the reason', flush=True); os._exit(7) if cell['batch'] == 16 else say({'x': 1})"
    found = dict(outcomes(body, SOME))
    assert found[SOME[0]] == found[SOME[2]] == {"x": 1}
    assert found[SOME[1]] == "its process ended with 7: the reason"


def test_a_cell_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    child = f"import os; open({str(tmp_path / 'child')!r}, 'w').write(str(os.getpid())); import time; time.sleep(99)"
    body = f"__import__('subprocess').run([sys.executable, '-c', {child!r}]) if cell['batch'] == 16 else say({{}})"
    found = dict(outcomes(body, SOME, limit_s=2.0))
    assert found == {SOME[0]: {}, SOME[1]: "took more than 2 s", SOME[2]: {}}
    child_process = int((tmp_path / "child").read_text())
    ends_s = time.monotonic() + 10
    while os.path.exists(f"/proc/{child_process}") and time.monotonic() < ends_s:
        state = Path(f"/proc/{child_process}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":
            break
        time.sleep(0.05)
    else:
        assert not os.path.exists(f"/proc/{child_process}")


def test_the_cell_that_time_ends_in_is_left_for_the_next_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_jobs, "LEAST_S", 0.0)
    body = "say({}) if cell['batch'] == 1 else time.sleep(99)"
    started_s = time.monotonic()
    assert outcomes(body, SOME, seconds=2.0) == [(SOME[0], {})]
    assert time.monotonic() - started_s < 20


def test_nothing_is_begun_without_time() -> None:
    assert outcomes("say({})", SOME, seconds=gpu_jobs.LEAST_S / 2) == []


def test_results_survive_a_kill_and_later_lines_count(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "r.jsonl"
    gpu_results.add_environment(path, {"rehearsal": False, "gpu": {}})
    gpu_results.add_check(path, Check("one", False, 1.0, "why"))
    gpu_results.add_cell(path, SOME[0], "too slow")
    gpu_results.add_cell(path, SOME[1], {"x": 1})
    with path.open("a") as file:
        file.write('{"cell": {"kind"')
    gpu_results.add_check(path, Check("one", True, 2.0))
    gpu_results.add_cell(path, SOME[0], {"x": 2})
    found = gpu_results.read(path)
    assert found.values == {SOME[0]: {"x": 2}, SOME[1]: {"x": 1}} and not found.failures
    assert found.checks == {"one": Check("one", True, 2.0)} and not found.rehearsal
    assert from_record(as_record(SOME[2])) == SOME[2]


def timed(ms: float) -> dict[str, Any]:
    return {"median_ms": ms, "p99_ms": 2 * ms, "rows_per_s": 1e3 / ms, "runs": 9}


def ours(ms: float, matrix_share: float = 0.9, flops: int = 10**9) -> dict[str, Any]:
    floor = {"flops": flops, "nbytes": 10, "seconds": 0.5e-3, "matrix_share": matrix_share}
    return {"compile_s": 1.0, "floor": floor, "device": timed(ms), "host": timed(3 * ms), "distance": 0.0}


def result_file(path: Path, compiled_ms: float = 2.0, large_ms: float = 1.25, rehearsal: bool = False) -> Path:
    """One network at batch 1 and 256, where ours takes 1 ms at batch 1, and the matrix rate is 1e12."""
    gpu_results.add_environment(
        path,
        {
            "rehearsal": rehearsal,
            "gpu": {"name": "NVIDIA H200", "driver_version": "580"},
            "versions": {"torch": "2.11"},
            "date": "2026-01-02T03:04:05",
        },
    )
    gpu_results.add_check(path, Check("sizes", True, 1.0))
    gpu_results.add_cell(path, Cell(RATES), {"copy": 4e12, "fp16": 1e12})
    gpu_results.add_cell(path, Cell(KERNELS), {"softmax": {"fp16": 0.9}})
    for batch, ms in ((1, 1.0), (256, large_ms)):
        gpu_results.add_cell(path, Cell(OURS, "net", "fp16", batch), ours(ms))
        gpu_results.add_cell(path, Cell(COMPILED, "net", "fp16", batch), {"device": timed(compiled_ms)})
    gpu_results.add_cell(path, Cell(STREAMS, "net", "fp16", 1), {"one slot": 10.0, "1": 12.0, "2": 16.0, "4": 18.0})
    return path


def test_verdicts_of_targets_that_are_met(tmp_path: Path) -> None:
    found = gpu_report.verdicts(gpu_results.read(result_file(tmp_path / "r")))
    assert [one.outcome for one in found] == [MET] * 5
    assert found[1].figures == "2.00 over 1"
    assert "least 0.80 (net fp16 256), 0 of 1 below" in found[2].figures
    gpu_results.add_cell(tmp_path / "r", Cell(OURS, "net", "fp16", 4), ours(1.0))
    found = gpu_report.verdicts(gpu_results.read(tmp_path / "r"))
    assert found[0].figures.endswith("0 of 2 below, 1 without a figure of torch.compile")


def test_verdicts_of_targets_that_are_missed(tmp_path: Path) -> None:
    path = result_file(tmp_path / "r", compiled_ms=0.9, large_ms=2.0)
    gpu_results.add_cell(path, Cell(KERNELS), {"softmax": {"fp16": 0.9, "fp32": 0.5}})
    gpu_results.add_cell(path, Cell(STREAMS, "net", "fp16", 4), {"one slot": 10.0, "1": 12.0, "2": 14.0, "4": 18.0})
    found = gpu_report.verdicts(gpu_results.read(path))
    assert [one.outcome for one in found] == [MISSED] * 5
    assert "least 0.45 (net fp16 256), 2 of 2 below" in found[0].figures
    assert "(softmax fp32), 1 of 2 below" in found[4].figures


def test_what_was_not_measured_is_not_met(tmp_path: Path) -> None:
    path = tmp_path / "r"
    gpu_results.add_environment(path, {"rehearsal": False})
    assert {one.outcome for one in gpu_report.verdicts(gpu_results.read(path))} == {UNKNOWN}
    memory_bound = replace(gpu_results.read(path), values={Cell(RATES): {"fp16": 1e12},
                           Cell(OURS, "net", "fp16", 256): ours(1.0, matrix_share=0.2)})  # fmt: skip
    assert gpu_report.verdicts(memory_bound)[2].outcome == UNKNOWN


def test_the_readme_gets_a_table(tmp_path: Path) -> None:
    page, path = tmp_path / "README.md", result_file(tmp_path / "gpu-2026-01-02.jsonl")
    page.write_text(f"before\n{gpu_report.MARKS[0]}old\n{gpu_report.MARKS[1]}after\n")
    for _ in range(2):
        assert gpu.main(["--show", str(path), "--update", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| x torch.compile | fp16 1 | fp16 256 |" in text and "| net | 2.00 | 1.60 |" in text
    assert "NVIDIA H200, driver 580, 2026-01-02; torch 2.11." in text and "(gpu-2026-01-02.jsonl)" in text
    assert "**met** (2.00 over 1)" in text and "All 1 checks passed." in text


def test_a_rehearsal_never_reaches_a_readme(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"{gpu_report.MARKS[0]}old\n{gpu_report.MARKS[1]}")
    path = result_file(tmp_path / "r", rehearsal=True)
    with pytest.raises(ValueError, match="rehearsal"):
        gpu.main(["--show", str(path), "--update", str(page)])
    with pytest.raises(SystemExit):
        gpu.main(["--rehearse", "--update", str(page)])
    assert "old" in page.read_text()


def test_without_a_gpu_it_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "r"
    if not os.path.exists("/dev/nvidia0"):
        assert gpu.main(["--output", str(path), "--models", "unet"]) == 2
        said = capsys.readouterr().err
        assert said.startswith("nothing was checked or measured: ") and len(said.splitlines()[0]) > 50
        assert "20 of them through torch.compile" in said and "unet at batch 1, 4, 16, 64, 256" in said
        assert not path.exists()


def options(tmp_path: Path, *more: str) -> list[str]:
    return ["--rehearse", "--output", str(tmp_path / "r"), "--caches", str(tmp_path / "caches"), *more]


def test_a_check_that_fails_ends_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = (sys.executable, "-c")
    failing = [Program("good", (*python, "print(5)"), "5"), Program("bad", (*python, "print('x' * 3); exit(3)"))]
    monkeypatch.setattr(gpu, "programs", lambda rehearsal: failing)
    monkeypatch.setattr(gpu, "check_cells", lambda models, precisions: [])
    monkeypatch.setattr(gpu, "cells", lambda models, batches, precisions: [Cell(RATES)])
    assert gpu.main(options(tmp_path)) == 1
    found = gpu_results.read(tmp_path / "r")
    assert [check.passed for check in found.checks.values()] == [True, False] and not found.values
    assert found.checks["bad"].detail == "ended with 3: xxx" and found.rehearsal
    assert "FAILED bad" in capsys.readouterr().out
    assert gpu.main(options(tmp_path, "--measure-only", "--resume", str(tmp_path / "r"))) == 1
    assert not gpu_results.read(tmp_path / "r").values
    assert gpu.main(options(tmp_path, "--keep-going", "--measure-only", "--resume", str(tmp_path / "r"))) == 1
    assert list(gpu_results.read(tmp_path / "r").values) == [Cell(RATES)]


def test_a_check_needs_its_sign_and_its_time() -> None:
    silent = Program("quiet", (sys.executable, "-c", "pass"), "passed")
    assert not gpu_commands.checked(silent, 60).passed
    slow = gpu_commands.checked(Program("slow", (sys.executable, "-c", "import time; time.sleep(60)")), 0.5)
    assert not slow.passed and slow.detail == "took more than 0 s" and slow.seconds < 30


def test_the_marked_tests_are_found() -> None:
    assert any(path.endswith("test_gpu_device.py") for path in gpu_commands.marked_tests())


@pytest.mark.filterwarnings("ignore:num_streams exceeds num_cores")
def test_a_rehearsal_measures_and_is_resumed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On this thread: to start a process with PyTorch takes seconds."""

    def run_here(some: Sequence[Job], command: Callable[[Sequence[Cell]], list[str]], *rest: Any) -> Iterator[Any]:
        for job in some:
            request = json.loads(command(job.cells)[-1])
            bench = Bench(place(request["place"]), request["ceilings"], Path(request["skeletons"]))
            yield from ((cell, measured(bench, cell)) for cell in map(from_record, request["cells"]))

    monkeypatch.setattr(gpu, "run_jobs", run_here)
    narrow = ("--models", "tiny_text", "--precisions", "fp16", "--batches", "1", "--measure-only")
    assert gpu.main(options(tmp_path, *narrow)) == 0
    found = gpu_results.read(tmp_path / "r")
    wanted = cells(("tiny_text",), (1,), ("fp16",))
    assert set(found.values) == set(wanted) and not found.failures and found.rehearsal
    assert "says anything of a GPU" in capsys.readouterr().out
    values = found.values[Cell(OURS, "tiny_text", "fp16", 1)]
    assert values["launches"] == 3 and values["distance"] < 4e-3 and values["floor"]["flops"] == 2 * 5 * 8 * 16
    lines = (tmp_path / "r").read_text().splitlines()
    (tmp_path / "r").write_text("\n".join(line for line in lines if '"eager"' not in line))
    capsys.readouterr()
    assert gpu.main(options(tmp_path, *narrow, "--resume", str(tmp_path / "r"))) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("ours", "eager", "compiled"))]
    assert [line.split()[0] for line in said] == ["eager"]
    assert set(gpu_results.read(tmp_path / "r").values) == set(wanted)


def test_what_failed_before_is_tried_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, asked = result_file(tmp_path / "r", rehearsal=True), list[Cell]()

    def run_here(some: Sequence[Job], *rest: Any) -> Iterator[Any]:
        for cell in (cell for job in some for cell in job.cells):
            asked.append(cell)
            yield cell, "still too slow"

    wanted = [Cell(RATES), *SOME]
    gpu_results.add_cell(path, SOME[0], "too slow")
    gpu_results.add_cell(path, SOME[1], ours(1.0))
    monkeypatch.setattr(gpu, "run_jobs", run_here)
    monkeypatch.setattr(gpu, "cells", lambda models, batches, precisions: wanted)
    gpu.main(options(tmp_path, "--measure-only", "--resume", str(path)))
    assert asked == [SOME[2], SOME[0]]
    assert gpu_results.read(path).failures == dict.fromkeys((SOME[2], SOME[0]), "still too slow")


def test_rehearsals_and_measurements_do_not_mix(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--rehearse", "--resume", str(result_file(tmp_path / "r"))])


def test_every_precision_of_every_network_is_checked() -> None:
    found = check_cells(("a", "b"), ("fp32", "bf16"))
    assert len({str(cell) for cell in found}) == len(found) == 2 + 4


KERNEL_LINE = [Activity("k", 0.0, 1.0), Activity("k", 1.5, 2.5), Activity("k", 2.5, 4.0)]


def test_lanes_run_at_the_same_time() -> None:
    some = [Cell(OURS, model, "fp16", 1) for model in "abcd"]
    started_s = time.monotonic()
    body = "time.sleep(1.5) if cell['model'] != 'c' else os._exit(3); say({})"
    budget = Budget(time.monotonic() + 60, 30)
    found = dict(run_lanes(jobs(some), worker(body), budget, {}, io.StringIO(), 4))
    assert found == {cell: {} for cell in some} | {some[2]: "its process ended with 3: it said nothing"}
    assert time.monotonic() - started_s < 4.5 or len(os.sched_getaffinity(0)) < 2


TICK_S = 2.0**-9


class Ticks:
    """Events of a device on which every run takes `TICK_S`, and the first ten times as long."""

    now_s, started = 0.0, 0

    def __init__(self) -> None:
        self.at_s = -1.0

    def record(self) -> None:
        self.at_s = Ticks.now_s

    @staticmethod
    def run() -> None:
        Ticks.now_s += TICK_S if Ticks.started else 10 * TICK_S
        Ticks.started += 1


def test_warm_runs_do_not_count_and_time_says_how_many_do() -> None:
    finished: list[int] = []
    found = event_times(
        Ticks.run, Effort(50 * TICK_S, 10, 1000, 3), Ticks, lambda: finished.append(Ticks.started),
        lambda first, last: last.at_s - first.at_s,
    )  # fmt: skip
    assert found == [TICK_S] * 50 and Ticks.started == 3 + 1 + 50
    assert finished == [3, 4, 54]
    few = event_times(Ticks.run, Effort(0.001, 10, 1000, 0), Ticks, lambda: None, lambda a, b: b.at_s - a.at_s)
    assert len(few) == 10


def test_what_lies_between_kernels() -> None:
    found = profile_of([*KERNEL_LINE, Activity("Memcpy", 0.0, 9.0, True)], runs=1, whole_s=4.0)
    assert found == {"run_ms": 4e3, "kernels_ms": 3.5e3, "gaps_ms": 500.0, "kernels": 3.0, "pause_us": 0.5e6}
    assert profile_of([], runs=1, whole_s=4.0) == {"run_ms": 4e3}


def test_copies_beside_kernels() -> None:
    copies = [Activity("in", 0.5, 2.0, True), Activity("out", 1.0, 1.6, True), Activity("in", 5.0, 5.5, True)]
    found = overlap_of([*KERNEL_LINE, *copies])
    assert found["copies_ms"] == pytest.approx(2e3) and found["computed_ms"] == pytest.approx(3.5e3)
    assert found["copies_beside_kernels"] == pytest.approx((0.5 + 0.5) / 2.0)
    assert overlap_of(KERNEL_LINE) == {}
