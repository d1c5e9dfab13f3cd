"""Rules of the source tree: imports run one way, torch waits, and the project speaks for itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
# From the door down: a room imports itself and rooms further down. A file that more rooms may import than the rest of
# its folder is a room.
ROOMS = (
    *("main", "cli", "benchmarks", "engine", "datasets", "samplers", "cli.runtime", "cli.settings"),
    *("utils", "models", "sample", "diffrate", "diffrate.device", "diffrate.hub", "diffrate.atomic"),
)
# The same inside the library.
LIBRARY = (
    *("converting", "files", "searching", "latency", "timing", "pictures", "evaluation", "patch", "blocks", "device"),
    *("budget", "flops", "schedule", "hub", "atomic"),
)
BESIDE = {"models": {"diffrate"}}  # but for its rooms `diffrate.device`, `diffrate.hub` and `diffrate.atomic`
ASKED_FOR = {"main", "engine", "datasets", "samplers", "utils"}
FAST = (
    "cli.flags",
    "cli.settings",
    "diffrate.searching.settings",
    "diffrate.files.header",
)


def room_of(path: Path, base: Path) -> str:
    """The folder of `base` that a file is in, or the file itself."""
    return path.relative_to(base).parts[0].removesuffix(".py")


def room_with(module: str) -> str:
    """The room that a module, or a name in it, belongs to."""
    parts = module.split(".")
    within = ".".join(parts[:2])
    return within if within in ROOMS else parts[0]


def sources(base: Path) -> list[Path]:
    """The files of the project below `base`, without tests."""
    return [
        path
        for path in sorted(base.glob("**/*.py"))
        if not {"tests", "build"} & set(path.relative_to(PROJECT).parts)
        and not any(p.startswith(".") for p in path.parts)
    ]


def imported(path: Path) -> set[str]:
    """The modules that a file imports, by their full names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


@pytest.mark.parametrize("path", sources(PROJECT), ids=lambda path: str(path.relative_to(PROJECT)))
def test_imports_run_one_way(path: Path) -> None:
    room = room_with(".".join(path.relative_to(PROJECT).with_suffix("").parts))
    assert room in ROOMS, f"{room}: a new room needs its place here and its line in CONTRIBUTING.md"
    above = set(ROOMS[: ROOMS.index(room)]) | BESIDE.get(room, set())
    assert {room_with(name) for name in imported(path)} & above == set()


@pytest.mark.parametrize(
    "path", sources(PROJECT / "diffrate"), ids=lambda path: str(path.relative_to(PROJECT / "diffrate"))
)
def test_imports_in_the_library_run_one_way(path: Path) -> None:
    room = room_of(path, PROJECT / "diffrate")
    if room == "__init__":
        return
    above = set(LIBRARY[: LIBRARY.index(room)])
    inside = {name.split(".")[1] for name in imported(path) if name.startswith("diffrate.")}
    assert inside & above == set()


def test_no_modules_import_each_other() -> None:
    modules = {".".join(path.relative_to(PROJECT).with_suffix("").parts): path for path in sources(PROJECT)}
    graph = {name: imported(path) & modules.keys() - {name} for name, path in modules.items()}
    TopologicalSorter(graph).prepare()  # which raises CycleError


def test_the_root_holds_what_was_asked_for() -> None:
    assert {path.stem for path in PROJECT.glob("*.py")} == ASKED_FOR
    folders = {path.relative_to(PROJECT).parts[0] for path in sources(PROJECT)} - {f"{name}.py" for name in ASKED_FOR}
    assert folders == {"diffrate", "models", "cli", "benchmarks", "sample"}


def test_it_is_no_larger_than_contributing_says() -> None:
    said = re.search(r"(\d+) Python files and ([\d,]+) lines", (PROJECT / "CONTRIBUTING.md").read_text())
    assert said is not None
    texts = [path.read_text() for path in sources(PROJECT)]
    assert len(texts) <= int(said[1])
    assert sum(len(text.splitlines()) for text in texts) <= int(said[2].replace(",", ""))
    assert max(len(text.splitlines()) for text in texts) <= 700


def test_rooms_say_what_belongs_in_them() -> None:
    for path in PROJECT.glob("*/__init__.py"):
        if path.parent.name != "tests":
            assert ast.get_docstring(ast.parse(path.read_text())), path
            assert f"`{path.parent.name}/`" in (PROJECT / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize("module", ["main", *FAST, "diffrate.budget", "diffrate"])
def test_flags_and_budgets_need_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'timm', 'torchvision', 'matplotlib'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=False).returncode == 0


@pytest.mark.parametrize(
    "path",
    [path for room in ("diffrate", "models", "training", "benchmarks") for path in sources(PROJECT / room)],
    ids=lambda path: str(path.relative_to(PROJECT)),
)
def test_public_functions_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node) or node not in tree.body, f"{path}: {node.name}"
