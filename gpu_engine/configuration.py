"""Configuration files: the options of compile(), as TOML that a person may edit."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu_engine.options import suggestion

Configuration = str | os.PathLike[str] | Mapping[str, Any]


def read_configuration(source: Configuration) -> dict[str, Any]:
    """The options in a TOML file, or in a mapping; ValueError with the file's name if it is not TOML."""
    if isinstance(source, Mapping):
        return dict(source)
    try:
        return tomllib.loads(Path(source).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{os.fspath(source)} is no TOML: {error}") from error


def completed(
    given: Mapping[str, Any], defaults: Mapping[str, Any], configuration: Configuration | None
) -> dict[str, Any]:
    """The options of a call: what the call left at its default comes from the configuration if that has it.

    ValueError for a name that is not among `defaults`.
    """
    stored = {} if configuration is None else read_configuration(configuration)
    for name in stored:
        if name not in defaults:
            raise ValueError(f"the configuration has an unknown option {name!r}{suggestion(name, defaults)}")
        if isinstance(stored[name], dict | list):
            raise ValueError(f"option {name!r} of the configuration must be one value, given {stored[name]!r}")
    return {name: stored.get(name, value) if value == defaults[name] else value for name, value in given.items()}
