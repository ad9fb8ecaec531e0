"""Timed devices, observers, the profile's table and its trace."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from cpu_fallback.device import CpuDevice
from cpu_fallback.team import can_have_teams
from gpu_engine.errors import EngineClosed
from gpu_engine.gpu.interpret import InterpretDevice
from gpu_engine.ir.dims import Dim, substitute, symbol
from gpu_engine.ir.ops import Attention, Conv, ConvTranspose, Map, MatMul
from gpu_engine.options import validated
from gpu_engine.passes.batchability import prove
from gpu_engine.runtime.device import Device, StepTimes
from gpu_engine.runtime.engine import Engine
from gpu_engine.runtime.observation import Execution, Moments, ObservedPart
from gpu_engine.tools.cli import app
from gpu_engine.tools.demo import FOLDER
from gpu_engine.tools.feeds import random_feed
from gpu_engine.tools.stages import Stages, nodes_of_steps, read_named, shapes_at, short, stages_of
from gpu_engine.tools.trace import QUEUE, trace_events
from gpu_engine.tools.work import flop_by_source, flop_of_steps, node_flop
from tests.cpu_teams import X
from tests.recording_device import F32, MakeEngine, RecordingDevice, double, poisoned, rows, until
from tests.reference import graph_of
from tests.test_control import model_of

Event = dict[str, Any]
DIGITS = FOLDER / "digits.onnx"
LOOP = """
g (int64 n, float[N, 3] a) => (float[N, 3] y) {
  go = Constant <value = bool {1}> ()
  y = Loop (n, go, a) <body = step (
    int64 i, bool before, float[N, 3] p
  ) => (bool r, float[N, 3] s) {
    r = Identity (before)
    q = Tanh (p)
    s = Add (q, a)
  }>
}"""


def test_profile_command_and_its_trace(tmp_path: Path) -> None:
    arguments = ["profile", str(DIGITS), "--device", "cpu", "--streams", "2", "--batch", "4", "--in-flight", "24"]
    file = tmp_path / "trace.json"
    result = CliRunner().invoke(app, [*arguments, "--seconds", "0.4", "--json", "--trace", str(file)])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["executions"] > 1 and facts["streams"] == 2 and facts["batch"] == 4
    assert sum(row["share"] for row in facts["steps"]) == pytest.approx(1)
    assert facts["steps"][0]["nodes"] == ["Conv '/layer0/Conv'", "Relu '/layer1/Relu'"]
    rates = [row["gflop_per_s"] for row in facts["steps"]]
    assert [rate is not None for rate in rates] == [True, True, False, True, False, False, True, False]
    assert all(row["gb_per_s"] > 0 and row["runs"] == 1 for row in facts["steps"])
    trace = json.loads(file.read_text())
    check_trace(trace["traceEvents"])
    names = {event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"}
    assert names == {"waiting requests", "stream 0", "stream 1"}
    steps = [event for event in trace["traceEvents"] if event.get("cat") == "step"]
    batches = [event for event in trace["traceEvents"] if event.get("cat") == "batch"]
    assert len(steps) == len(batches) * len(facts["steps"])


def test_the_profile_prints_a_table(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((2, 1, 8, 8), F32))
    arguments = ["profile", str(DIGITS), "--device", "cpu", "--seconds", "0.05", "--top", "2", "--batch", "2"]
    result = CliRunner().invoke(app, [*arguments, "-i", str(tmp_path / "images.npy")])
    assert result.exit_code == 0, result.output
    assert "Conv '/layer" in result.stdout and "executions of 2.0 rows" in result.stdout
    assert CliRunner().invoke(app, [*arguments, "--extent", "height=3"]).exception is not None


def test_inputs_that_were_made_up_say_so(tmp_path: Path) -> None:
    text = "g (int64[N, M] x) => (float[N, M, 1] y) <float[1, 1] w = {1}> { y = Gather (w, x) }"
    onnx.save(model_of(text), tmp_path / "model.onnx")
    result = CliRunner().invoke(app, ["profile", str(tmp_path / "model.onnx"), "--device", "cpu", "--extent", "M=3"])
    assert re.search(r"outside \[-1, 0\].*made up \(N=1, M=3\).*--input", str(result.exception))


def check_trace(events: Sequence[Event]) -> None:
    """The rules of the format that Perfetto relies on."""
    json.dumps(events, allow_nan=False)
    named: set[tuple[str, int, int]] = set()
    stacks: dict[tuple[int, int], list[Event]] = defaultdict(list)
    flows: dict[int, list[Event]] = defaultdict(list)
    last = 0.0
    for event in events:
        assert {"name", "ph", "ts", "pid", "tid"} <= event.keys() and event["ph"] in "XMsf" and event["ts"] >= last
        last = event["ts"]
        thread = (event["pid"], event["tid"])
        stack = stacks[thread]
        while stack and stack[-1]["ts"] + stack[-1]["dur"] <= event["ts"] + 1e-6 and event["ph"] == "X":
            stack.pop()
        if event["ph"] == "M":
            named.add((event["name"], *thread))
            assert event["args"]
        elif event["ph"] == "X":
            assert event["dur"] >= 0 and ("thread_name", *thread) in named
            assert ("process_name", event["pid"], 0) in named
            ends = event["ts"] + event["dur"]
            assert not stack or ends <= stack[-1]["ts"] + stack[-1]["dur"] + 1e-6, "slices overlap without nesting"
            stack.append(event)
        else:
            flows[event["id"]].append(event)
            around = stack[0]
            assert around["ts"] <= event["ts"] <= around["ts"] + around["dur"], "a flow event outside of a slice"
            assert event["ph"] == "s" or event["bp"] == "e"
    for number, pair in flows.items():
        assert [event["ph"] for event in pair] == ["s", "f"], number
        assert pair[0]["pid"] == QUEUE != pair[1]["pid"]


def test_traces_of_made_up_executions() -> None:
    def part(number: int, arrival_s: float, start: int = 0, stop: int = 1) -> ObservedPart:
        return ObservedPart(number, arrival_s, start, stop)

    def execution(slot: int, at: float, *parts: ObservedPart) -> Execution:
        times = StepTimes(np.array([0.5]), np.array([1]), np.array([0]), np.array([at + 1.2, at + 1.7]))
        rows = sum(each.stop - each.start for each in parts)
        return Execution(0, slot, parts, rows, (rows,), Moments(at, at + 1, at + 2, at + 3), times)

    executions = [
        execution(1, 12.0, part(9, 10.0, 3, 6), part(5, 11.5)),
        execution(0, 11.0, part(7, 9.5), part(9, 10.0, 0, 3)),
    ]
    events = trace_events(executions, [("Conv 'c'", "Gemm")])
    check_trace(events)
    slices = {(event["cat"], event["name"]): event for event in events if event["ph"] == "X"}
    assert slices["queue", "request 1"]["ts"] == 0.5e6 and slices["queue", "request 1"]["dur"] == 1e6
    assert slices["batch", "4 rows"]["args"]["requests"] == [1, 2] and slices["batch", "4 rows"]["tid"] == 1
    assert slices["batch", "4 rows"]["args"]["rows"] == ["1: 3 to 6", "2: 0 to 1"]
    waiting = {event["tid"] for event in events if event.get("cat") == "queue"}
    assert waiting == {0, 1} and sum(event["ph"] == "f" for event in events) == 3
    assert trace_events([], []) == []


def observed(
    stages: Stages, device: Device, inputs: Any, count: int = 1, **options: Any
) -> tuple[Any, list[Execution]]:
    """What `count` runs give, and what an observer is told of them."""
    seen: list[Execution] = []
    with Engine(stages.plan, device, validated(**options)) as engine:
        engine.observe(seen.append)
        results = [engine.run(inputs) for _ in range(count)][-1]
    return results, seen


def check_times(times: StepTimes | None, execution: Execution, steps: int) -> StepTimes:
    """The spans follow each other inside the compute of their execution, and add up to the totals."""
    assert times is not None and len(times.seconds) == len(times.runs) == steps
    assert len(times.bounds_s) == len(times.step) + 1
    assert (np.diff(times.bounds_s) >= 0).all()
    assert execution.moments.staged_s <= times.bounds_s[0] and times.bounds_s[-1] <= execution.moments.computed_s
    assert (np.bincount(times.step, minlength=steps) == times.runs).all()
    totals = np.bincount(times.step, np.diff(times.bounds_s), steps)
    np.testing.assert_allclose(times.seconds, totals, atol=1e-6)
    return times


def test_a_timed_cpu_gives_the_same_results_and_tells_every_step() -> None:
    device = CpuDevice()
    stages = stages_of(read_named(DIGITS), device.lower)
    inputs = random_feed(stages.plan.input_ports, shapes_at(stages.plan, {"batch": 3}), None, 0)
    plain, untold = observed(stages, device, inputs)
    timed, told = observed(stages, device.timed(), inputs, 2)
    np.testing.assert_array_equal(plain["probabilities"], timed["probabilities"])
    assert list(timed) == ["probabilities"] and untold[0].steps is None
    for execution in told:
        assert check_times(execution.steps, execution, len(stages.plan.steps)).runs.tolist() == [1] * len(
            stages.plan.steps
        )


def test_loops_count_their_runs_and_jumps_land_where_they_should() -> None:
    device = CpuDevice()
    stages = stages_of(read_named(model_of(LOOP)), device.lower)
    for trips in (0, 1, 7):
        inputs = {"n": np.int64(trips), "a": np.ones((2, 3), F32)}
        plain, _ = observed(stages, device, inputs)
        timed, told = observed(stages, device.timed(), inputs, 2)
        np.testing.assert_array_equal(plain["y"], timed["y"])
        times = check_times(told[-1].steps, told[-1], len(stages.plan.steps))
        assert max(times.runs) == max(trips, 1)
        assert times.runs[[step.source.startswith("Tanh") for step in stages.plan.steps]].sum() in (0, trips)


def test_long_loops_keep_totals_of_what_they_do_not_keep_whole() -> None:
    device = CpuDevice()
    stages = stages_of(read_named(model_of(LOOP)), device.lower)
    _, told = observed(stages, device.timed(), {"n": np.int64(5000), "a": np.ones((1, 3), F32)})
    times = told[0].steps
    assert times is not None and times.runs.max() == 5000
    assert len(times.step) < times.runs.sum() and len(times.bounds_s) == len(times.step) + 1
    compute_s = told[0].moments.computed_s - told[0].moments.staged_s
    assert times.bounds_s[-1] - times.bounds_s[0] < times.seconds.sum() < compute_s


@pytest.mark.skipif(not can_have_teams(), reason="streams have one thread on this system")
def test_teams_are_timed_step_by_step() -> None:
    n = symbol("N")
    graph = graph_of(
        {"x": (n, 64)}, lambda b, x: b.emit(Map(X * 2), b.emit(MatMul(), x, b.constant(np.eye(64, dtype=F32))))
    )
    device = CpuDevice()
    stages = Stages(read_named(DIGITS), graph, graph, device.lower(graph, prove(graph)))
    x = np.random.default_rng(0).standard_normal((4096, 64), F32)
    results, told = observed(stages, device.timed(), {"x": x}, 3, threads=2)
    np.testing.assert_allclose(next(iter(results.values())), 2 * x, rtol=1e-5)
    assert check_times(told[-1].steps, told[-1], len(stages.plan.steps)).seconds.min() > 0


def test_segments_that_running_binds_share_one_journal() -> None:
    text = """g (float[N] x) => (int64[1, k] y) {
      r = Relu (x)  z = NonZero (r)  one = Constant <value = int64 {1}> ()  y = Add (z, one) }"""
    device = CpuDevice()
    stages = stages_of(read_named(model_of(text)), device.lower)
    assert len(stages.plan.program.segments) == 2
    results, told = observed(stages, device.timed(), {"x": np.array([0, 2, -1, 3], F32)}, 2)
    np.testing.assert_array_equal(results["y"], [[2, 4]])
    assert check_times(told[-1].steps, told[-1], len(stages.plan.steps)).runs.min() == 1


def test_the_interpreter_is_timed_too() -> None:
    device = InterpretDevice()
    stages = stages_of(
        read_named(model_of("g (float[N, 4] x) => (float[N, 4] y) { t = Tanh (x)  y = Softmax (t) }")), device.lower
    )
    results, told = observed(stages, device.timed(), {"x": np.ones((2, 4), F32)})
    np.testing.assert_allclose(results["y"], np.full((2, 4), 0.25), rtol=1e-6)
    assert check_times(told[0].steps, told[0], len(stages.plan.steps)).runs.tolist() == [1] * len(stages.plan.steps)


def test_observers_hear_of_parts_of_all_kinds(make_engine: MakeEngine, recorder: RecordingDevice) -> None:
    engine, seen = make_engine(recorder, streams=1, batch=4), []
    engine.observe(seen.append)
    engine.run(rows(1))
    recorder.hold()
    first = engine.submit(rows(2))
    until(lambda: engine.statistics().waiting == 0)
    others = [engine.submit(rows(*range(count))) for count in (1, 6, 2)]
    recorder.release()
    for future in (first, *others):
        future.result(30)
    engine.observe(None)
    engine.run(rows(1))
    assert seen[0].rows == 1 and sum(execution.rows for execution in seen) == 11
    parts: dict[int, list[ObservedPart]] = defaultdict(list)
    for execution in seen:
        moments = execution.moments
        assert moments.taken_s <= moments.staged_s <= moments.computed_s <= moments.copied_s
        assert (execution.stream, execution.extents) == (0, (execution.rows,))
        for part in execution.parts:
            parts[part.number].append(part)
    spans = sorted(sorted((part.start, part.stop) for part in found) for found in parts.values())
    assert Counter(found[-1][1] for found in spans) == {1: 3, 2: 1, 6: 1}
    assert all(a[1] == b[0] for found in spans for a, b in pairwise(found))
    assert {execution.slot for execution in seen} <= {0, 1}
    engine.close()
    engine.observe(None)
    with pytest.raises(EngineClosed):
        engine.observe(seen.append)


def test_only_successes_are_observed(make_engine: MakeEngine) -> None:
    device, seen = RecordingDevice(poisoned(double)), []
    engine = make_engine(device, streams=1, batch=4)
    engine.observe(seen.append)
    device.hold()
    first = engine.submit(rows(0))
    until(lambda: engine.statistics().waiting == 0)
    futures = [engine.submit(rows(value)) for value in (1, float("nan"), 2)]
    device.release()
    assert first.result(30) is not None and [future.exception(30) is None for future in futures] == [True, False, True]
    assert sum(execution.rows for execution in seen) == 3


def test_arithmetic_is_counted_as_the_textbook_does() -> None:
    n = symbol("N")

    def flop(op: Any, *shapes: tuple[Dim, ...]) -> Any:
        graph = graph_of({f"x{i}": shape for i, shape in enumerate(shapes)}, lambda b, *values: b.emit(op, *values))
        count = node_flop(graph.nodes[-1])
        return None if count is None else substitute(count, {"N": 3})

    assert flop(MatMul(), (n, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert flop(MatMul(transpose_a=True), (2, 5, n), (5, 7)) == 2 * 2 * 3 * 5 * 7
    one = (1, 1)
    conv = Conv(one, (0, 0), (0, 0), one, 2)
    assert flop(conv, (n, 4, 9, 9), (6, 2, 3, 3)) == 2 * 3 * 6 * 7 * 7 * 2 * 9
    assert flop(Attention(1.0), (n, 8, 4), (n, 6, 4), (n, 6, 5)) == 2 * 3 * 8 * 6 * (4 + 5)
    assert flop(ConvTranspose(one, (0, 0), (0, 0), one, (0, 0)), (n, 4, 5, 5), (4, 6, 3, 3)) == 2 * 3 * 4 * 25 * 6 * 9
    assert flop(Map(X * 2), (n, 4)) is None


def test_nodes_that_steps_do_not_name_went_where_their_results_did() -> None:
    text = """g (float[N, 4] x) => (float[N, 4] y, float[M] z) {
      a = Mul (x, x)  b = Add (a, x)  c = Softmax (b)  d = Neg (c)  y = Abs (d)
      flat = Constant <value = int64[1] {-1}> ()  z = Reshape (b, flat) }"""
    stages = stages_of(read_named(model_of(text)), CpuDevice().lower)
    members, nowhere = nodes_of_steps(stages.imported, {step.source for step in stages.plan.steps})
    found = {short(source).split()[0]: [short(name).split()[0] for name in names] for source, names in members.items()}
    assert found["Add"] == ["Mul", "Add"] and found["Abs"][-2:] == ["Neg", "Abs"]
    assert [short(source).split()[0] for source in nowhere] == ["Reshape"]
    assert not flop_by_source(stages.optimized, members)


def test_what_is_computed_with_another_node_counts_too() -> None:
    """A 1x1 convolution has no step where it is computed with the depthwise one behind it."""
    weights = [numpy_helper.from_array(np.ones(shape, F32), name)
               for name, shape in (("w", (96, 16, 1, 1)), ("taps", (96, 1, 3, 3)))]  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]), helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "taps"], ["y"], group=96, pads=[1, 1, 1, 1]),
    ]  # fmt: skip
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", depth, 112, 112])
             for name, depth in (("x", 16), ("y", 96))]  # fmt: skip
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    stages = stages_of(read_named(model), CpuDevice().lower)
    plan = stages.plan
    members, _ = nodes_of_steps(stages.imported, {step.source for step in plan.steps})
    found = flop_of_steps(plan, flop_by_source(stages.optimized, members), [1.0] * len(plan.steps), {"N": 2})
    assert sum(filter(None, found)) == 2 * 2 * 112 * 112 * 96 * (16 + 9)


def test_a_configuration_says_what_is_profiled(tmp_path: Path) -> None:
    (tmp_path / "model.toml").write_text('device = "cpu"\nbatch = 3\n')
    arguments = ["profile", str(DIGITS), "--config", str(tmp_path / "model.toml"), "--seconds", "0.02", "--json"]
    found = [json.loads(CliRunner().invoke(app, [*arguments, *more]).stdout) for more in ([], ["--batch", "2"])]
    assert [(facts["batch"], facts["streams"]) for facts in found] == [(3, 1), (2, 1)]
    assert all("cpu" in facts["device"].lower() for facts in found)
