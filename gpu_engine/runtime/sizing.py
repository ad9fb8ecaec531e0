"""How many streams, slots and rows an engine uses: arithmetic on options and a device's limits."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

from gpu_engine.options import NUMA, BatchPolicy, Options, PerformanceMode, Scheduler

SLOTS_PER_STREAM = 2
HEURISTIC_BATCH = 32


@dataclass(frozen=True)
class BatchPlan:
    """How many rows share an execution and why.

    `limiting_factor` is what bound the number: "requests" (the formula), "user" (batch= or the latency hint),
    "device", "memory", or "graph" (batching is not proven; `reason` then names the node that lost the batch).
    `refused_inputs` do not carry the batch: requests share an execution only if theirs are identical.
    """

    batch: int
    reason: str
    limiting_factor: str
    refused_inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """What an engine opens: `slots` per stream that execute or are in flight, `shared` if requests are batched.

    `optimal_requests` in flight keep every slot busy and the next batches gathered. Streams are spread over `devices`.
    """

    streams: int
    slots: int
    batch: BatchPlan
    shared: bool
    optimal_requests: int
    devices: int = 1

    @property
    def slots_per_device(self) -> int:
        """The most slots on one device."""
        return -(-self.streams // self.devices) * self.slots


@dataclass(frozen=True)
class Limits:
    """What bounds the choice: the device's `streams` and `batch` (None: nothing), how many `devices` share requests,
    each with streams of its own, whether launches are asynchronous, whether requests of many rows must be cut even
    where none are joined, how many streams "auto" and "numa" mean, and why the graph refuses batching ("" if it does
    not)."""

    auto_streams: int
    numa_nodes: int = 1
    streams: int | None = None
    batch: int | None = None
    devices: int = 1
    asynchronous: bool = False
    splits: bool = False
    refused: str = ""
    refused_inputs: tuple[str, ...] = ()


def choose(options: Options, limits: Limits) -> Sizes:
    """The sizes of an engine; warns where more streams are asked for than the device has cores."""
    latency = is_latency(options)
    streams = choose_streams(options, limits)
    if options.scheduler is not Scheduler.single_stream:
        streams *= limits.devices
    in_flight = 1 if latency else SLOTS_PER_STREAM
    plan = choose_batch(options, limits, streams)
    return Sizes(
        streams=streams,
        slots=in_flight if limits.asynchronous else 1,
        batch=plan,
        shared=(is_shared(options) or limits.splits) and not limits.refused,
        optimal_requests=optimal_requests(plan.batch, streams, in_flight),
        devices=limits.devices,
    )


def threads_of(options: Options, streams: int) -> int | None:
    """Cores for each of the streams, as was said for one or for all of them; None: the device's choice."""
    return options.threads or (options.all_threads and max(1, options.all_threads // streams))


def is_latency(options: Options) -> bool:
    """The hint, or LATENCY unless an option speaks of several requests at a time."""
    if options.hint is not None:
        return options.hint is PerformanceMode.LATENCY
    spoken = (options.streams, options.requests, options.batch, options.auto_batching)
    return not any(spoken) and options.scheduler in (None, Scheduler.single_stream)


def is_shared(options: Options) -> bool:
    """Whether requests may share executions where the graph lets them: as was said, else unless the hint is LATENCY."""
    if options.auto_batching is None:
        return not is_latency(options) or options.batch is not None
    return options.auto_batching


def choose_streams(options: Options, limits: Limits) -> int:
    """Streams to open on each device: an explicit count, else `auto_streams` for a throughput hint or "auto", else 1. A
    single stream is one on all devices together."""
    if options.scheduler is Scheduler.single_stream:
        return 1
    streams, cores = options.streams, usable_cores(options, limits)
    if streams is None:
        several = options.scheduler is not None or options.hint not in (None, PerformanceMode.LATENCY)
        return auto_streams(options, limits) if several else 1
    if streams < 0:
        return limits.numa_nodes if streams == NUMA else auto_streams(options, limits)
    if cores is not None and streams > cores:
        warnings.warn(f"num_streams exceeds num_cores - capping to {cores}", RuntimeWarning, stacklevel=2)
        return cores
    return streams


def by_node(options: Options) -> bool:
    """Whether each stream is to keep to the cores of one NUMA node."""
    return options.scheduler is Scheduler.elastic or options.streams == NUMA


def usable_cores(options: Options, limits: Limits) -> int | None:
    """The cores that the streams may have, each at least one; None where streams do not compute on cores."""
    return limits.streams and min(limits.streams, options.all_threads or limits.streams)


def auto_streams(options: Options, limits: Limits) -> int:
    """What "auto" means: the device's own number, or as many as there are cores for where their threads are given."""
    cores = usable_cores(options, limits)
    if cores is None or not (options.threads or options.all_threads):
        return limits.auto_streams
    return max(1, cores // (options.threads or 1))


def choose_batch(options: Options, limits: Limits, streams: int) -> BatchPlan:
    """Explicit batch, else the formula, else the device's heuristic; then the limits of graph and device."""
    batch, factor, reason = _wanted_batch(options, streams)
    if limits.refused and batch > 1:
        batch, factor, reason = 1, "graph", limits.refused
    elif limits.refused:
        reason = f"{reason}; the graph is not batchable either: {limits.refused}"
    elif options.batch is None and limits.batch is not None and batch > limits.batch:
        batch, factor = limits.batch, "device"
        reason = f"{reason}, limited to {limits.batch} by the device; batch= overrides"
    return BatchPlan(batch, reason, factor, limits.refused_inputs)


def _wanted_batch(options: Options, streams: int) -> tuple[int, str, str]:
    if options.batch is not None:
        return options.batch, "user", f"batch={options.batch} was given"
    if options.auto_batching is False or (is_latency(options) and not options.auto_batching):
        return 1, "user", "every request runs as it is (latency hint, or batching switched off)"
    if options.batch_policy is BatchPolicy.openvino:
        batch = openvino_batch(HEURISTIC_BATCH, options.requests)
        return (
            batch,
            "requests",
            f"as OpenVINO, of {options.requests or 'unknown'} requests",
        )
    if options.requests:
        batch = formula(options.requests, streams)
        return batch, "requests", f"{options.requests} requests // ({streams} streams * {SLOTS_PER_STREAM}) = {batch}"
    return HEURISTIC_BATCH, "device", "the number of requests is not known: the device's own choice"


def formula(requests: int, streams: int) -> int:
    """Rows per execution that keep `requests` requests on all slots: two in flight for each stream."""
    return max(1, requests // (streams * SLOTS_PER_STREAM))


def openvino_batch(optimal: int, requests: int | None) -> int:
    """What OpenVINO's BATCH device chooses: as many as there are requests, and 1 unless more than 2 come of it.

    https://github.com/openvinotoolkit/openvino/blob/master/src/plugins/auto_batch/src/plugin.cpp
    """
    batch = min(optimal, requests) if requests else optimal
    return batch if batch > 2 else 1


def openvino_cap(batch: int, total: int, footprint: int) -> int:
    """OpenVINO's own limit for `total` bytes, `footprint` at a batch of 1: a power of two where it bounds the batch."""
    if footprint <= 0:
        return batch
    fits = (total - footprint) // footprint
    return min(batch, 1 << (fits.bit_length() - 1)) if fits > 0 else 1


def optimal_requests(batch: int, streams: int, in_flight: int = SLOTS_PER_STREAM) -> int:
    """How many requests of one row fill `in_flight` batches on each stream."""
    return batch * streams * in_flight


def memory_cap(free: float, weights: int, row: int, slots: int) -> int | None:
    """The most rows whose activations fit `free` bytes beside the weights, in all slots; at least 1; None: no cap."""
    if row <= 0:
        return None
    return max(1, int(free - weights) // (row * slots))


def capped(plan: BatchPlan, cap: int | None, bound: str = "free memory") -> BatchPlan:
    """The plan within a memory cap, which `bound` sets."""
    if cap is None or cap >= plan.batch:
        return plan
    return BatchPlan(cap, f"{plan.reason}, limited to {cap} by {bound}", "memory", plan.refused_inputs)


def resized(sizes: Sizes, plan: BatchPlan) -> Sizes:
    """The sizes with another batch."""
    in_flight = sizes.optimal_requests // sizes.batch.batch
    return replace(sizes, batch=plan, optimal_requests=plan.batch * in_flight)
