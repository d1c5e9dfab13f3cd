"""Shared fixtures: image folders of real files, and the command line run in this process."""

from __future__ import annotations

import gc
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

# Before torch is imported, and for the processes that tests start: tensors are tiny here, and threads
# that share a busy core would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import main

Cli = Callable[..., tuple[int, str, str]]
QUICK = (  # files of tests that `-m quick` runs, beside single tests that say so
    *("test_golden", "test_search", "test_structure", "test_schedule", "test_budget", "test_flops"),
    *("test_reductions", "test_masked_attention", "cli/test_flags", "cli/test_processes"),
)


DRAWN = (  # files of tests that look at the plots of runs
    *("test_bad_input", "test_benchmarks", "test_calibrated", "test_finetune", "test_plots", "test_search"),
    *("test_sensitivity", "test_speed_targets", "test_token_counts", "test_visualize"),
)
LONGEST = (  # files that take a process most of a minute: they begin first, so that none of them ends alone
    *("exporting/test_files", "exporting/test_sample", "library/test_convert", "cli/test_eval", "test_constructions"),
    *("cli/test_compiled", "cli/test_distributed", "test_docs", "cli/test_search", "cli/test_checkpoints"),
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    files = {Path(__file__).parent / f"{name}.py" for name in QUICK}
    for item in items:
        if item.path in files:
            item.add_marker(pytest.mark.quick)
    order = {Path(__file__).parent / f"{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_collection_finish() -> None:
    """What was imported and collected stays: nobody need look through it for garbage again, and seldom for other."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@contextmanager
def root_logger_kept() -> Iterator[None]:
    """The command line logs through the root logger: give it back as it was."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(autouse=True)
def _quiet_after() -> Iterator[None]:
    with root_logger_kept():
        yield


@pytest.fixture(autouse=True)
def _plots_where_they_are_looked_at(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes as long as many a run of the command line."""
    if request.path.parent.name == "cli" and request.path.stem not in DRAWN:
        monkeypatch.setattr("cli.plot.plot_run", lambda _: None)


@pytest.fixture(scope="session", autouse=True)
def painting() -> Iterator[Callable[[Path], None]]:
    """Plots of runs are made, and not painted: that takes longer than a short run. Gives what paints them."""
    from matplotlib.figure import Figure

    from cli import plot

    paint = plot.plot_run

    def made(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Figure, "savefig", lambda *_, **__: None)
            paint(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "plot_run", made)
        yield paint


@pytest.fixture
def painted(painting: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots of runs are painted."""
    monkeypatch.setattr("cli.plot.plot_run", painting)


@pytest.fixture(scope="session", autouse=True)
def memory() -> Iterator[Callable[..., float | None]]:
    """Benchmarks start no processes to measure memory in, which take seconds each. Gives what does."""
    from benchmarks import speed

    measure = speed.memory_mib
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "memory_mib", lambda *_, **__: 1.0)
        yield measure


def ran_once(*words: object) -> str:
    """Run `main.py` with these words, for a fixture that many tests look at: its standard output."""
    with root_logger_kept(), redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = main.main([str(word) for word in words])
    assert (code, err.getvalue()) == (0, "")
    return out.getvalue()


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run `main.py` with these words in this process: exit code, standard output, standard error."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main.main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def nothing_compiled() -> None:
    """As on the command line: where a model with other widths of heads was compiled, torch 2.6 takes no scale."""
    torch.compiler.reset()


def write_image(path: Path, seed: int, size: int = 40, brightest: int = 255) -> None:
    """Noise from `seed`; `brightest` makes classes that a model can tell apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, brightest, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """ImageFolder layout: classes `cat`, `dog`, `emu`, four JPEGs each in train/ and three in val/."""
    root = tmp_path / "data"
    for split, count in (("train", 4), ("val", 3)):
        for label, name in enumerate(("cat", "dog", "emu")):
            for index in range(count):
                write_image(root / split / name / f"{index}.jpg", seed=100 * label + index, brightest=60 + 90 * label)
    return root


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Eight images without labels."""
    for index in range(8):
        write_image(tmp_path / "photographs" / f"{index}.png", seed=index)
    return tmp_path / "photographs"


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def tensors_in(file: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint or a saved model holds, under the names in the file; averaged weights before others."""
    if file.suffix == ".safetensors":
        return load_file(file)
    content = torch.load(file, weights_only=True)
    return content.get("model_ema", content["model"])
