"""What `benchmarks.gpu` measured, as verdicts on its targets, a table for the terminal, and the README's section."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from benchmarks.gpu_cells import COMPILED, EAGER, KERNELS, OURS, RATES, STREAMS, TIMELINE, Cell
from benchmarks.gpu_results import Results, Values

MARKS = ("<!-- gpu -->\n", "<!-- end of gpu -->\n")
EVERYWHERE, MEAN, MATRIX_SHARE, STREAM_GAIN, COPY_SHARE = 1.0, 1.5, 0.7, 1.5, 0.85
MEAN_PRECISION, MEAN_BATCHES = "fp16", range(1, 17)
LARGE_BATCH, SMALL_BATCHES = 256, (1, 4)
BOUND_BY_PRODUCTS = 0.5
"""A network whose floor is products for so large a share is bound by them."""
SHOWN_BATCHES = (1, 16, 256)
MET, MISSED, UNKNOWN = "met", "missed", "not measured"


@dataclass(frozen=True)
class Verdict:
    """A target, whether it is met, and the figures that say so; `not measured` where there are none."""

    target: str
    outcome: str
    figures: str


def ratios(found: Results, peer: str = COMPILED) -> dict[Cell, float]:
    """{our cell: how many times as fast as the peer's, on the device alone}."""
    pairs = [(cell, Cell(peer, cell.model, cell.precision, cell.batch)) for cell in found.values if cell.kind == OURS]
    return {
        cell: found.values[other]["device"]["median_ms"] / found.values[cell]["device"]["median_ms"]
        for cell, other in pairs
        if other in found.values
    }


def matrix_shares(found: Results) -> dict[Cell, float]:
    """{our cell: the share of the measured matrix rate} where products are what bounds the network."""
    ceilings = found.values.get(Cell(RATES), {})
    shares = {}
    for cell, values in found.values.items():
        if cell.kind == OURS and values["floor"]["matrix_share"] >= BOUND_BY_PRODUCTS and cell.precision in ceilings:
            seconds = values["device"]["median_ms"] / 1e3
            shares[cell] = values["floor"]["flops"] / seconds / ceilings[cell.precision]
    return shares


def stream_gains(found: Results) -> dict[Cell, float]:
    """{cell: rows a second of two streams with two slots over those of one slot}."""
    return {cell: values["2"] / values["one slot"] for cell, values in found.values.items() if cell.kind == STREAMS}


def copy_shares(found: Results) -> dict[str, float]:
    """{kernel and precision: the share of the copy rate}."""
    kernels: Values = found.values.get(Cell(KERNELS), {})
    named = {name: by for name, by in kernels.items() if isinstance(by, dict)}
    return {f"{name} {precision}": share for name, by in named.items() for precision, share in by.items()}


def verdicts(found: Results) -> list[Verdict]:
    """One for each target of the issue."""
    everywhere = ratios(found)
    chosen = [ratio for cell, ratio in everywhere.items()
              if cell.precision == MEAN_PRECISION and cell.batch in MEAN_BATCHES]  # fmt: skip
    large = {cell: share for cell, share in matrix_shares(found).items() if cell.batch == LARGE_BATCH}
    gains = {cell: gain for cell, gain in stream_gains(found).items() if cell.batch in SMALL_BATCHES}
    mean = geometric_mean(chosen) if chosen else None
    alone = sum(cell.kind == OURS and cell not in everywhere for cell in found.values)
    note = f", {alone} without a figure of torch.compile" if alone else ""
    return [
        _least(f"at least {EVERYWHERE:.1f} x torch.compile (max-autotune) everywhere", everywhere, EVERYWHERE, note),
        Verdict(
            f"{MEAN} x torch.compile in the geometric mean over batch 1 to 16 in {MEAN_PRECISION}",
            UNKNOWN if mean is None else MET if mean >= MEAN else MISSED,
            "" if mean is None else f"{mean:.2f} over {len(chosen)}",
        ),
        _least(f"{MATRIX_SHARE:.0%} of the matrix rate where products bound, batch {LARGE_BATCH}", large, MATRIX_SHARE),
        _least(f"2 streams of 2 slots {STREAM_GAIN} x one slot at batch 1 and 4", gains, STREAM_GAIN),
        _least(f"pointwise and norm kernels {COPY_SHARE:.0%} of the copy rate", copy_shares(found), COPY_SHARE),
    ]


def _least(target: str, figures: dict[Any, float], bound: float, note: str = "") -> Verdict:
    if not figures:
        return Verdict(target, UNKNOWN, "")
    worst = min(figures, key=lambda one: figures[one])
    below = sum(figure < bound for figure in figures.values())
    text = f"least {figures[worst]:.2f} ({str(worst).removeprefix('ours ')}), {below} of {len(figures)} below{note}"
    return Verdict(target, MISSED if below else MET, text)


def rows(found: Results) -> list[list[str]]:
    """A line for each of our cells: milliseconds on the device of ours and of both peers, how many times as fast, the
    99th percentile, the floor's share, and the latency with copies."""
    return [_row(found, cell) for cell in found.values if cell.kind == OURS]


ROW_TITLES = ("network", "precision", "batch", "ms", "p99", "rows/s", "compiled", "eager", "x compiled", "of floor",
              "with copies", "p99", "between kernels")  # fmt: skip


def _row(found: Results, cell: Cell) -> list[str]:
    ours = found.values[cell]
    device, host = ours["device"], ours["host"]
    peers = [_peer(found, cell, kind) for kind in (COMPILED, EAGER)]
    ratio = ratios(found).get(cell)
    line = found.values.get(Cell(TIMELINE, cell.model, cell.precision, cell.batch), {})
    return [
        cell.model, cell.precision, str(cell.batch), _ms(device["median_ms"]), _ms(device["p99_ms"]),
        f"{device['rows_per_s']:,.0f}", *peers, "-" if ratio is None else f"{ratio:.2f}",
        f"{ours['floor']['seconds'] * 1e3 / device['median_ms']:.0%}", _ms(host["median_ms"]), _ms(host["p99_ms"]),
        _ms(line["gaps_ms"]) if "gaps_ms" in line else "-",
    ]  # fmt: skip


def _peer(found: Results, cell: Cell, kind: str) -> str:
    other = found.values.get(Cell(kind, cell.model, cell.precision, cell.batch))
    return "-" if other is None else _ms(other["device"]["median_ms"])


def _ms(value: float) -> str:
    return f"{value:.3g}"


def markdown(found: Results, link: str) -> str:
    """The README's section; ValueError for a rehearsal, whose clock says nothing."""
    if found.rehearsal:
        raise ValueError("a rehearsal's figures do not go into a README")
    titles = ["x torch.compile", *(f"{precision} {batch}" for precision, batch in _columns(found))]
    models = dict.fromkeys(cell.model for cell in ratios(found))
    lines = [_line(titles), _line(["---", *["---:"] * (len(titles) - 1)])]
    lines += [_line([model, *(_ratio(found, model, *column) for column in _columns(found))]) for model in models]
    outcomes = [
        f"* {one.target}: **{one.outcome}**{f' ({one.figures})' if one.figures else ''}" for one in verdicts(found)
    ]
    return "\n".join([*(lines if models else ()), "", *outcomes, "", _machine(found, link), "", *_checked(found)])


def _columns(found: Results) -> list[tuple[str, int]]:
    known = {(cell.precision, cell.batch) for cell in ratios(found)}
    precisions = dict.fromkeys(cell.precision for cell in ratios(found))
    return [(precision, batch) for precision in precisions for batch in SHOWN_BATCHES if (precision, batch) in known]


def _ratio(found: Results, model: str, precision: str, batch: int) -> str:
    ratio = ratios(found).get(Cell(OURS, model, precision, batch))
    return "-" if ratio is None else f"{ratio:.2f}"


def _machine(found: Results, link: str) -> str:
    last = found.environments[-1]
    gpu, versions = last["gpu"], last["versions"]
    what = ", ".join(filter(None, [gpu.get("name", "an unknown GPU"), _driver(gpu), last["date"][:10]]))
    software = " and ".join(f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions)
    return f"{what}; {software}. Every measurement is a line of [{Path(link).name}]({link})."


def _driver(gpu: Values) -> str:
    return f"driver {gpu['driver_version']}" if "driver_version" in gpu else ""


def _checked(found: Results) -> list[str]:
    failed = [check.name for check in found.checks.values() if not check.passed]
    if failed:
        return [f"Checks that failed: {', '.join(failed)}.", ""]
    return [f"All {len(found.checks)} checks passed.", ""] if found.checks else ["Nothing was checked.", ""]


def _line(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"


def failures(found: Results) -> Sequence[str]:
    """Cells without values, with the reason."""
    return [f"{cell}: {reason}" for cell, reason in found.failures.items()]
