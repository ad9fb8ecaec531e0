"""Arrays from and to .npy and .npz files, for the command line."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from gpu_engine.errors import InputError

Array = NDArray[Any]
Arrays = Array | list[Array] | dict[str, Array]
FILE_WIDTH = 160


def read_inputs(specs: Sequence[str]) -> Arrays:
    """The inputs that `[NAME=]FILE` specs name: one array, a list of several unnamed ones, or a dict.

    A .npz file without a name gives its own names. ValueError if named and unnamed specs are mixed.
    """
    named: dict[str, Array] = {}
    unnamed: list[Array] = []
    for spec in specs:
        name, found, file = spec.rpartition("=") if not Path(spec).exists() else ("", "", spec)
        content = np.load(file, allow_pickle=False)
        if isinstance(content, np.ndarray):
            if found:
                named[name] = content
            else:
                unnamed.append(content)
        elif found:
            raise ValueError(f"{spec}: an .npz file brings its own names")
        else:
            named.update({key: content[key] for key in content.files})
    if named and unnamed:
        raise ValueError("give every input a name (NAME=FILE), or none")
    return named or (unnamed[0] if len(unnamed) == 1 else unnamed)


def named_inputs(specs: Sequence[str], names: Sequence[str]) -> dict[str, Array]:
    """As `read_inputs`, by name: unnamed files are in the order of `names`. InputError if their number differs."""
    found = read_inputs(specs)
    if isinstance(found, dict):
        return found
    arrays = found if isinstance(found, list) else [found]
    if len(arrays) != len(names):
        raise InputError(f"the model takes {', '.join(names)}, given {len(arrays)} files")
    return dict(zip(names, arrays, strict=True))


def named_outputs(outputs: Any) -> dict[str, Any]:
    """What `Engine.run` returned, by name; "0", "1", ... where it came without names."""
    if isinstance(outputs, Mapping):
        return dict(outputs)
    if isinstance(outputs, list | tuple):
        return {str(number): value for number, value in enumerate(outputs)}
    return {"0": outputs}


def describe_value(value: Any) -> str:
    """One line: dtype, shape, range; the elements themselves if there are at most eight."""
    if not isinstance(value, np.ndarray | np.generic):
        return repr(value)
    kind = f"{value.dtype}{list(value.shape)}"
    if value.size <= 8:
        return f"{kind} {value.tolist()}"
    if value.dtype.kind not in "fiub":
        return kind
    return f"{kind} from {value.min():.6g} to {value.max():.6g}, mean {value.mean():.6g}"


def console() -> Console:
    """The standard output; wide where it is no terminal, so that tables in files are not cut."""
    return Console(width=None if sys.stdout.isatty() else FILE_WIDTH)


def write_outputs(outputs: Mapping[str, Any], path: Path) -> None:
    """An .npz file of the outputs that are arrays; ValueError for the others."""
    others = [name for name, value in outputs.items() if not isinstance(value, np.ndarray | np.generic)]
    if others:
        raise ValueError(f"only arrays can be written to {path}; {', '.join(others)} are none")
    with path.open("wb") as file:
        np.savez(file, **dict(outputs))
