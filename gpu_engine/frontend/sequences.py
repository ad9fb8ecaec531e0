"""Sequences and optionals while a model is imported: their structure is known, so none of them reaches the Graph."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_engine.ir.graph import Value


@dataclass(frozen=True, eq=False)
class SequenceValue:
    """A sequence whose length the importer knows."""

    elements: tuple[Value, ...]


@dataclass(frozen=True, eq=False)
class AbsentValue:
    """An optional that holds nothing; one that holds something is what it holds."""


Emitted = Value | SequenceValue | AbsentValue
"""What a name can mean while nodes are emitted."""
