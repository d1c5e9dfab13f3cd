"""What `pip install .` installs: the package diffrate alone, with the dependencies that it imports."""

from __future__ import annotations

import ast
import email
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import diffrate

PROJECT = Path(__file__).parent.parent.parent
# Imported where pictures are drawn, which the extra "drawing" is for.
DRAWING = {"PIL": "pillow"}
# And where graphs are exported and their files run, which the extra "export" is for.
EXPORT = {"onnx", "onnxscript", "onnxruntime", "openvino"}
CONVERTED = ("transformers", "open-clip")  # extras for libraries whose models are converted, which are never imported


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the project's modules: building leaves files beside them."""
    folder = tmp_path_factory.mktemp("wheel")
    unread = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "output", "figures", "digits*")
    shutil.copytree(PROJECT, folder / "project", ignore=unread)
    words = ["wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *words],
        check=True,
        cwd=folder / "project",
        capture_output=True,
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """A folder with what the wheel holds."""
    folder = wheel.with_name("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(folder: Path, where: Path, code: str) -> None:
    """Run Python in the empty folder `where`, with `folder` and the environment's packages to import from."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_wheel_holds_the_package_alone(wheel: Path) -> None:
    assert wheel.name == f"diffrate-{diffrate.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names} == {"diffrate", f"diffrate-{diffrate.__version__}.dist-info"}
    assert {"diffrate/py.typed", "diffrate/__init__.pyi"} <= names
    modules = {path.relative_to(PROJECT).as_posix() for path in (PROJECT / "diffrate").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules


def test_the_wheel_works_alone(installed: Path, tmp_path: Path) -> None:
    run(
        installed,
        tmp_path,
        f"""
import diffrate
assert diffrate.__file__.startswith({str(installed)!r})
assert diffrate.__version__ == {diffrate.__version__!r}
assert diffrate.patch.vit
assert diffrate.load
""",
    )


def test_importing_needs_neither_torch_nor_pillow(installed: Path, tmp_path: Path) -> None:
    run(
        installed,
        tmp_path,
        """
sys.modules["PIL"] = sys.modules["torch"] = sys.modules["timm"] = None
import diffrate
assert diffrate.Schedule(None, (1,))
assert diffrate.about
""",
    )


@pytest.fixture(scope="module")
def metadata(installed: Path) -> Message:
    """What the package says of itself."""
    return email.message_from_string(next(installed.glob("*.dist-info/METADATA")).read_text())


def test_what_the_package_says_of_itself(metadata: Message) -> None:
    assert metadata["Name"] == "diffrate"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert str(metadata.get_payload()).startswith("# DiffRate\n")


def third_party(folder: Path) -> set[str]:
    """The top-level modules that a folder's modules import, but for Python's and the folder's own."""
    names = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module or "")
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {folder.name}


def requirements(name: str) -> dict[str, Requirement]:
    """The lines of a requirements file, by package."""
    lines = (re.sub(r"#.*", "", line).strip() for line in (PROJECT / name).read_text().splitlines())
    parsed = [Requirement(line) for line in lines if line and not line.startswith("-r")]
    return {requirement.name: requirement for requirement in parsed}


def declared(metadata: Message, extra: str = "") -> dict[str, Requirement]:
    """The dependencies of the package, or those that `extra` adds, by package."""
    parsed = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    return {
        requirement.name: requirement
        for requirement in parsed
        if (requirement.marker is None) == (not extra)
        and (requirement.marker is None or requirement.marker.evaluate({"extra": extra}))
    }


def test_dependencies_are_what_is_imported(metadata: Message) -> None:
    assert declared(metadata).keys() == third_party(PROJECT / "diffrate") - DRAWING.keys() - EXPORT
    assert declared(metadata, "drawing").keys() == {*DRAWING.values(), "matplotlib"}
    assert declared(metadata, "export").keys() == EXPORT
    assert metadata.get_all("Provides-Extra") == ["drawing", "tensorboard", "export", "multilabel", *CONVERTED]


@pytest.mark.parametrize("extra", ["", "drawing", "tensorboard", "export", "multilabel", *CONVERTED])
def test_bounds_are_those_of_the_requirements(metadata: Message, extra: str) -> None:
    known = (
        requirements("requirements-export.txt")
        | requirements("requirements-dev.txt")
        | requirements("requirements.txt")
    )
    wanted = declared(metadata, extra)
    assert wanted
    assert {name: known[name].specifier for name in wanted} == {name: one.specifier for name, one in wanted.items()}
