"""compile(): from a model to an engine."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from gpu_engine.configuration import Configuration, completed
from gpu_engine.errors import DependsOnValues, DeviceError, GpuEngineError, OutOfMemory, UnsupportedModel
from gpu_engine.frontend.importer import caller_inputs, import_model, is_open, refuse_unsupported
from gpu_engine.frontend.reader import ModelSource, SpecificationFunctions, read
from gpu_engine.gpu.binary import BinarySource
from gpu_engine.gpu.bundle import Bundle, is_bundle, read_bundle
from gpu_engine.gpu.options import GpuOptions
from gpu_engine.gpu.several import SeveralDevices
from gpu_engine.ir.graph import Graph
from gpu_engine.ir.structure import Structure
from gpu_engine.options import (
    BatchPolicy,
    DeviceChoice,
    OutputPlace,
    Partial,
    PerformanceMode,
    Scheduler,
    TimeoutAction,
    one_batch,
    parse_device,
    validated,
)
from gpu_engine.passes.batchability import prove
from gpu_engine.passes.grouping import Ungroupable, grouped
from gpu_engine.passes.pipeline import optimize
from gpu_engine.plan.plan import Batching
from gpu_engine.runtime.device import Device
from gpu_engine.runtime.engine import Engine
from gpu_engine.runtime.late import DEVICE_COUNTS, DEVICES, KERNEL_COMPILER, load
from gpu_engine.runtime.sizing import by_node, is_shared
from gpu_engine.settings import precision_of, refuse_ineffective, with_properties
from gpu_engine.structured import OpenInput, StructuredEngine

_LOGGER = logging.getLogger(__name__)


def compile(
    model: ModelSource,
    *,
    config: Configuration | None = None,
    device: str = "auto",
    fallback: str | None = None,
    streams: int | str | None = None,
    requests: int | None = None,
    batch: int | None = None,
    hint: str | PerformanceMode | None = None,
    threads: int | None = None,
    scheduler: str | Scheduler | None = None,
    batch_timeout_ms: float = 0.0,
    max_queue_size: int = 0,
    priority_levels: int = 0,
    default_timeout: float = 0.0,
    timeout_action: str | TimeoutAction = TimeoutAction.REJECT,
    allow_override: bool = False,
    auto_batching: bool | None = None,
    memory_fraction: float = 0.9,
    memory_limit: int | None = None,
    batch_policy: str | BatchPolicy = BatchPolicy.formula,
    partial: str | Partial = Partial.together,
    deterministic: bool = False,
    outputs: str | OutputPlace = OutputPlace.host,
    warmup: bool | None = None,
    precision: str | None = None,
    properties: Mapping[str, Any] | None = None,
) -> Engine | StructuredEngine:
    """An engine for a model: a path, bytes, a ModelProto, or the path of a bundle that `gpu-engine build` wrote.

    A model whose inputs are sequences, optionals or tensors of unknown rank, or decide by value what there is to
    compile, gets a StructuredEngine.

    config            a TOML file (or a mapping) of these options, as `gpu-engine tune` writes it: it says those that
                      the call leaves at their defaults
    device            "auto" (cuda if it is usable, else cpu), "cpu", "cuda", "cuda:1"; "cuda:all" and "cuda:0,2" are
                      several GPUs of one architecture behind one queue; "GPU(8)" also fixes the batch
    fallback          "cpu": run there if the device asked for is not usable, instead of raising DeviceError

    precision         how a GPU multiplies float32: "fp32" (the default, exact), "tf32", "fp16" or "bf16", with sums in
                      float32; a bundle has its own. The CPU is always exact
    properties        options by OpenVINO's names, {"NUM_STREAMS": 2}; ValueError for one that is unknown, that would
                      have no effect, or that contradicts an option

    warmup            compare rows singly and together and time batches, while compiling or, for open extents and where
                      a row takes long, as requests come; None: unless the device is "interpret", whose time says
                      nothing

    The other options are those of `options.Options`. Raises ModelError, DeviceError, TypeError or ValueError for an
    option.
    """
    if config is not None:
        called = {name: value for name, value in locals().items() if name not in ("model", "config")}
        return compile(model, **completed(called, compile_defaults(), config))
    choice = parse_device(device)
    properties = properties or {}
    given = validated(
        streams=streams,
        requests=requests,
        batch=one_batch(choice, batch),
        hint=hint,
        threads=threads,
        scheduler=scheduler,
        batch_timeout_ms=batch_timeout_ms,
        max_queue_size=max_queue_size,
        priority_levels=priority_levels,
        default_timeout=default_timeout,
        timeout_action=timeout_action,
        allow_override=allow_override,
        auto_batching=True if choice.batched and auto_batching is None else auto_batching,
        memory_fraction=memory_fraction,
        memory_limit=memory_limit,
        batch_policy=batch_policy,
        partial=partial,
        deterministic=deterministic,
        outputs=outputs,
        warmup=choice.kind != "interpret" if warmup is None else warmup,
    )
    bundle = read_bundle(model) if is_bundle(model) else None
    options = with_properties(given, properties)
    wanted = _precision(precision_of(precision, properties), bundle)
    opened, reason = open_device(choice, fallback, wanted, bundle, options.deterministic, by_node(options))
    refuse_ineffective(properties, opened)
    parsed = read(model if bundle is None else bundle.model())

    def build(structures: Mapping[str, Structure] | None = None) -> Engine:
        with typed_errors():
            imported = import_model(parsed, SpecificationFunctions(), structures)
            mine = bundle is None
            graph, batching = _batched(imported, mine and is_shared(options), mine and options.batch is not None)
            return Engine(opened.lower(graph, batching), opened, options, reason, parsed.graph.name)

    inputs = caller_inputs(parsed)
    open_inputs = [OpenInput(info.name, info.dtype, bool(info.wrappers), info.key) for info in inputs]
    if any(map(is_open, inputs)):
        refuse_unsupported(parsed, SpecificationFunctions())
        return StructuredEngine(open_inputs, build)
    try:
        return build()
    except DependsOnValues as error:
        _LOGGER.warning("the model is compiled for every value of its small integer inputs: %s", error)
        return StructuredEngine(open_inputs, build, by_value=True)


def compile_defaults() -> dict[str, Any]:
    """{name: default} of the options that a call of compile(), or a configuration, may give."""
    parameters = inspect.signature(compile).parameters
    return {name: each.default for name, each in parameters.items() if name not in ("model", "config")}


def _batched(imported: Graph, share: bool, shares_outputs: bool) -> tuple[Graph, Batching]:
    """The optimized graph and its batching, for `shares_outputs` see `prove`; to `share` executions, with requests kept
    apart where rows are not.

    A bundle has kernels for the graph as it is, so that its requests share none.
    """
    graph = optimize(imported)
    batching = prove(graph, shares_outputs)
    if not batching.refused or not share or imported.output_structures:
        return graph, batching
    try:
        groups, apart = grouped(imported)
        return optimize(groups), apart
    except Ungroupable as error:
        return graph, replace(batching, refused=f"{batching.refused}; and {error}")


@contextmanager
def typed_errors() -> Iterator[None]:
    """What Python says about models too large to compile, in our terms."""
    try:
        yield
    except GpuEngineError:
        raise
    except MemoryError as error:
        raise OutOfMemory(f"no memory is left to compile the model: {error}") from error
    except RecursionError as error:
        raise UnsupportedModel("the model nests too deeply") from error
    except OverflowError as error:
        raise UnsupportedModel(f"a number of the model does not fit 64 bits: {error}") from error


def _precision(asked: str | None, bundle: Bundle | None) -> str:
    if asked is not None:
        GpuOptions(asked)
    if bundle is None:
        return asked or "fp32"
    if asked not in (None, bundle.precision):
        raise DeviceError(f"{bundle.path} is built for precision {bundle.precision!r}, not {asked!r}")
    return bundle.precision


def open_device(
    choice: DeviceChoice,
    fallback: str | None = None,
    precision: str = "fp32",
    bundle: Bundle | None = None,
    deterministic: bool = False,
    nodes_apart: bool = False,
) -> tuple[Device, str]:
    """The device and why it is this one; DeviceError with the reason if it is not usable and no fallback is allowed."""
    if fallback not in (None, "cpu"):
        raise ValueError(f"fallback must be 'cpu' or None, given {fallback!r}")
    kind = "cuda" if choice.kind == "auto" else choice.kind
    try:
        device = _open_all(replace(choice, kind=kind), precision, bundle, deterministic, nodes_apart)
    except DeviceError as error:
        if kind == "cpu" or (choice.kind != "auto" and fallback is None):
            raise
        device = _open("cpu", 0, precision, bundle, deterministic, nodes_apart)
        reason = f"{device.reason}; {error}"
        _LOGGER.log(
            logging.INFO if choice.kind == "auto" else logging.WARNING, "running on %s: %s", device.name, reason
        )
        return device, reason
    _LOGGER.info("running on %s: %s", device.name, device.reason)
    return device, device.reason


def _open_all(
    choice: DeviceChoice, precision: str, bundle: Bundle | None, deterministic: bool, nodes_apart: bool
) -> Device:
    """One device, or several as one."""

    def one(index: int) -> Device:
        return _open(choice.kind, index, precision, bundle, deterministic, nodes_apart)

    first = one(choice.index)
    others = range(1, load(DEVICE_COUNTS[choice.kind])()) if choice.every else choice.others
    return SeveralDevices([first, *map(one, others)]) if others else first


def _open(
    kind: str, index: int, precision: str, bundle: Bundle | None, deterministic: bool, nodes_apart: bool
) -> Device:
    try:
        make: Any = load(DEVICES[kind])
    except ImportError as error:
        raise DeviceError(f"{kind} is not usable: {error}; `gpu-engine doctor` says what to install") from error
    if kind == "cuda":
        device: Device = make(index, precision, _binaries(bundle), built=bundle is not None)
    elif kind == "interpret":
        device = make(index, options=GpuOptions(precision))
    else:
        device = make(index, deterministic, nodes_apart)
    return device


def _binaries(bundle: Bundle | None) -> BinarySource | None:
    """Where kernels come compiled from: the bundle, else Triton, else nowhere."""
    if bundle is not None:
        return bundle.binary
    try:
        source: BinarySource = load(KERNEL_COMPILER)
    except ImportError:
        return None
    return source
