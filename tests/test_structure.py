"""Rules of the source tree: imports run one way, and the project speaks for itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
ROOT_MODULES = {path.stem for path in PROJECT.glob("*.py")}
FORBIDDEN = {
    "diffrate": {"models", "sample"} | ROOT_MODULES,
    "models": {"diffrate", "sample"} | ROOT_MODULES,
    "sample": {"diffrate", "models"} | ROOT_MODULES,
    ".": {"main"},
}
CASES = [
    (room, path) for room in FORBIDDEN for path in sorted((PROJECT / room).glob("*.py" if room == "." else "**/*.py"))
]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize(("room", "path"), CASES, ids=[str(path.relative_to(PROJECT)) for _, path in CASES])
def test_imports_run_one_way(room: str, path: Path) -> None:
    assert imported(path) & FORBIDDEN[room] == set()


def test_schedules_need_no_torch() -> None:
    assert not imported(PROJECT / "diffrate" / "schedule.py") & {"torch", "timm", "numpy"}


@pytest.mark.parametrize(
    "path", sorted(PROJECT.glob("diffrate/**/*.py")) + sorted(PROJECT.glob("models/*.py")), ids=str
)
def test_public_functions_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node) or node not in tree.body, f"{path}: {node.name}"
