"""Who may import whom, which third parties live where, how long a file may be, what lies at the top level."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOP_LEVEL = {"pyproject.toml", "README.md", "gpu_engine", "cpu_fallback", "tests", "benchmarks"}
LINE_LIMIT = 400

# From the ground up. A module belongs to the layer that names it or its nearest package, and imports from its own
# layer and those below.
LAYERS = (
    ("gpu_engine.errors", "gpu_engine.ir.dtypes"),
    ("gpu_engine.ir",),
    ("gpu_engine.ir.ops",),
    (
        "gpu_engine.frontend",
        "gpu_engine.passes",
        "gpu_engine.plan",
        "gpu_engine.runtime.device",
        "gpu_engine.runtime.device_tensors",
        "gpu_engine.runtime.dlpack",
    ),
    ("gpu_engine.gpu", "cpu_fallback"),
    ("gpu_engine.options", "gpu_engine.runtime.scheduler"),
    ("gpu_engine.runtime",),
    ("gpu_engine",),
    ("gpu_engine.tools", "gpu_engine.compat"),
)
# What these may not import although it lies in their own layer or below.
FORBIDDEN = {
    "cpu_fallback": ("gpu_engine.frontend", "gpu_engine.passes", "gpu_engine.gpu"),
    "gpu_engine.gpu": ("gpu_engine.frontend", "gpu_engine.passes", "cpu_fallback"),
    "gpu_engine.passes": ("gpu_engine.frontend",),
    "gpu_engine.plan": ("gpu_engine.frontend", "gpu_engine.passes"),
    "gpu_engine.runtime.device": ("gpu_engine.frontend", "gpu_engine.passes"),
    "gpu_engine.options": ("gpu_engine.ir", "gpu_engine.frontend", "gpu_engine.passes", "gpu_engine.plan"),
    "gpu_engine.runtime.scheduler": ("gpu_engine.ir", "gpu_engine.frontend", "gpu_engine.passes", "gpu_engine.plan"),
}
THIRD_PARTIES = {
    "numpy": ("gpu_engine", "cpu_fallback"),
    "ml_dtypes": ("gpu_engine", "cpu_fallback"),
    "onnx": ("gpu_engine.frontend.reader", "gpu_engine.compat"),
    "google": ("gpu_engine.frontend.reader",),
    "llvmlite": ("cpu_fallback",),
    "threadpoolctl": ("cpu_fallback",),
    "triton": ("gpu_engine.gpu",),
    "cupy": ("gpu_engine.gpu.cuda", "gpu_engine.gpu.cuda_tensors"),
    "typer": ("gpu_engine.tools",),
    "rich": ("gpu_engine.tools",),
    "jinja2": ("gpu_engine.tools",),
    "tomlkit": ("gpu_engine.tools",),
}
# Where an import may happen inside a function, and why.
LATE = {
    "gpu_engine.runtime.late": "opens devices by name from a visible table",
    "gpu_engine.frontend.operators.image": "Pillow is optional and slow to import",
}


def modules() -> dict[str, Path]:
    """{dotted name: file} of both packages."""
    found = {}
    for package in ("gpu_engine", "cpu_fallback"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def layer(module: str) -> int:
    """The layer of the longest entry that the module lies in."""
    names = [(len(name), number) for number, row in enumerate(LAYERS) for name in row if within(module, name)]
    return max(names)[1]


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(module, line) for every import statement; a name imported from a package is the module if it is one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in MODULES else str(node.module)), node.lineno


@cache
def parsed(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def is_ours(name: str) -> bool:
    return name.split(".")[0] in ("gpu_engine", "cpu_fallback")


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    for name, line in imports(parsed(module)):
        if is_ours(name):
            assert layer(name) <= layer(module), f"{module}:{line} imports {name}, which lies above it"
            for package, refused in FORBIDDEN.items():
                if within(module, package):
                    assert not any(within(name, other) for other in refused), f"{module}:{line} imports {name}"


def test_imports_have_no_cycle() -> None:
    known = MODULES.keys()
    graph = {module: {name for name, _ in imports(parsed(module))} & known - {module} for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("module", MODULES)
def test_third_parties_stay_in_their_rooms(module: str) -> None:
    for name, line in imports(parsed(module)):
        top = name.split(".")[0]
        if top in sys.stdlib_module_names or is_ours(name):
            continue
        assert any(within(module, room) for room in THIRD_PARTIES.get(top, ())), f"{module}:{line} imports {name}"


def late_imports() -> list[str]:
    """Every import that happens inside a function, be it a statement or a call."""
    found = set()
    for module in MODULES:
        for node in ast.walk(parsed(module)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                found |= {f"{module}:{line}" for _, line in imports(node)}
                found |= {f"{module}:{call.lineno}" for call in ast.walk(node) if is_import_call(call)}
    return sorted(found)


def is_import_call(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("import_module", "__import__")


def test_late_imports_are_few_and_known() -> None:
    late = late_imports()
    assert [place.split(":")[0] for place in late] == sorted(LATE), late


def test_no_file_is_too_long() -> None:
    folders = ("gpu_engine", "cpu_fallback", "benchmarks")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name: count for name, count in lengths.items() if count > LINE_LIMIT} == {}


def test_names_say_what_is_inside() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "base", "manager", "misc"}
    parts = {part for module in MODULES for part in module.split(".")}
    assert not parts & vague
    classes = [node.name for module in MODULES for node in ast.walk(parsed(module)) if isinstance(node, ast.ClassDef)]
    assert not [name for name in classes if name.endswith(("Manager", "Handler", "Context", "Wrapper"))]


def test_the_top_level_is_fixed() -> None:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    tops = {line.split("/")[0] for line in listing.stdout.splitlines()}
    assert {top for top in tops if not top.startswith(".")} == TOP_LEVEL


def test_every_module_says_what_it_is() -> None:
    silent = [
        module for module in MODULES if MODULES[module].read_text().strip() and not ast.get_docstring(parsed(module))
    ]
    assert not silent
