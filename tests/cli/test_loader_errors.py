"""Whatever goes wrong while images are read, in this process or in loader processes, ends in one line."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

import cli.data
import diffrate
from tests.cli.test_errors import check
from tests.cli.test_finetune import PLAIN
from tests.cli.test_search import MODEL, words
from tests.conftest import Cli, write_image

STRANGE = (47, 47)  # pixels of the image that transforms choke on
# Loader processes run what is patched here only where they are forked.
FORKED = pytest.mark.skipif(multiprocessing.get_all_start_methods()[0] != "fork", reason="loader processes start anew")
# torch raises it wherever this process is just then: also within multiprocessing's own receiving, between a
# socket's opening and its closing.
DIES = pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")
WORKERS = pytest.mark.parametrize("workers", [0, pytest.param(2, marks=FORKED)])


@pytest.fixture(autouse=True)
def _loaders_end() -> Iterator[None]:
    """Garbage that still has loader processes waits seconds for them when it is collected."""
    yield
    for thing in gc.get_objects():
        if type(thing) is _MultiProcessingDataLoaderIter:
            thing._shutdown_workers()


class TwoWordsError(Exception):
    """One that is not made from its message alone."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


# What is raised, and what is said of it: its kind and the first line of its message.
ERRORS = {
    "many lines": (ValueError("first\nsecond\n\nthird"), "ValueError (first)"),
    "a key": (KeyError("colour"), "KeyError ('colour')"),
    "what torch says": (
        RuntimeError("size mismatch\nTraceback (most recent call last):"),
        "RuntimeError (size mismatch)",
    ),
    "no message": (ZeroDivisionError(), "ZeroDivisionError (ZeroDivisionError)"),
    "no memory": (MemoryError(), "MemoryError (MemoryError)"),
    "a file": (FileNotFoundError(2, "No such file", "profile.icc"), "FileNotFoundError ([Errno 2] No such file: "),
    "two words": (TwoWordsError("odd", "size"), "TwoWordsError (odd size)"),
    "the end": (StopIteration("over"), "StopIteration (over)"),
}


class Chokes:
    """A transform that does something else with one image."""

    def __init__(self, transform: Callable[[Image.Image], Any], act: Callable[[], object]) -> None:
        self.transform, self.act = transform, act

    def __call__(self, image: Image.Image) -> Any:
        if image.size == STRANGE:
            self.act()
        return self.transform(image)


def choke(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    for name in ("eval_transform", "train_transform"):
        original = getattr(cli.data, name)
        monkeypatch.setattr(cli.data, name, lambda *of, made=original: Chokes(made(*of), act))


def raises(error: Exception) -> Callable[[], object]:
    def act() -> None:
        raise error

    return act


def strange(folder: Path, split: str) -> Path:
    """One image of the split, now the one that transforms choke on."""
    path = folder / split / "dog" / "1.jpg"
    write_image(path, seed=1, size=STRANGE[0])
    return path


def command(mode: str, folder: Path, out: Path) -> list[object]:
    match mode:
        case "search":
            return [*words(folder, out), "--no-repeated-aug"]
        case "finetune":
            return [*PLAIN, "--data-path", folder, "--output_dir", out, "--epochs", 1]
        case _:
            return ["--eval", "--model", MODEL, "--checkpoint", "scratch", "--data-path", folder, "--batch-size", 4]


@WORKERS
@pytest.mark.parametrize("kind", ERRORS)
def test_any_error_names_its_image(
    kind: str, workers: int, cli: Cli, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, said = ERRORS[kind]
    choke(monkeypatch, raises(error))
    path = strange(image_folder, "val")
    result = cli(*command("eval", image_folder, tmp_path), "--num_workers", workers)
    check(result, f"main.py: error: image {path}: {said}", " while it was read")


@WORKERS
@pytest.mark.parametrize(
    ("mode", "split"), [("search", "train"), ("search", "val"), ("finetune", "train"), ("finetune", "val")]
)
def test_in_every_loop(
    mode: str,
    split: str,
    workers: int,
    cli: Cli,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choke(monkeypatch, raises(ValueError("first\nsecond")))
    path = strange(image_folder, split)
    result = cli(*command(mode, image_folder, tmp_path / "out"), "--num_workers", workers)
    check(result, f"main.py: error: image {path}: ValueError (first) while it was read")


@pytest.mark.parametrize("mode", ["--baseline", "--benchmark"])
@FORKED
def test_in_other_modes(
    mode: str, cli: Cli, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choke(monkeypatch, raises(KeyError("colour")))
    path = strange(image_folder, "val")
    kind = {"--baseline": ("both", "--target_flops", 0.025), "--benchmark": ("loading", "--rounds", 2)}[mode]
    flags = ("--model", MODEL, "--checkpoint", "scratch", "--data-path", image_folder, "--batch-size", 4)
    result = cli(mode, *kind, *flags, "--num_workers", 2)
    check(result, f"main.py: error: image {path}: KeyError ('colour') while it was read")


@FORKED
@DIES
@pytest.mark.parametrize("mode", ["eval", "search", "finetune"])
@pytest.mark.parametrize("end", ["exits", "is killed"])
def test_a_loader_process_that_dies(
    end: str, mode: str, cli: Cli, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    act = {"exits": lambda: os._exit(3), "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL)}[end]
    choke(monkeypatch, act)
    strange(image_folder, "val" if mode == "eval" else "train")
    result = cli(*command(mode, image_folder, tmp_path / "out"), "--num_workers", 2)
    check(result, "main.py: error: loading: DataLoader worker (pid")


@FORKED
@DIES
def test_a_loader_process_that_dies_while_the_model_runs(
    cli: Cli, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = diffrate.CompressedModel.forward

    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(1)
        return original(*args, **options)

    monkeypatch.setattr(diffrate.CompressedModel, "forward", slow)
    choke(monkeypatch, lambda: (time.sleep(0.3), os._exit(3)))
    strange(image_folder, "val")
    result = cli(*command("eval", image_folder, tmp_path), "--num_workers", 1)
    check(result, "main.py: error: loading: DataLoader worker (pid")


@WORKERS
@pytest.mark.parametrize("name", ["a\nb.jpg", "ä ?.jpg", "%s {0}.jpg"])
def test_images_of_odd_names(name: str, workers: int, cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "val" / "dog" / name).write_bytes(b"no picture")
    result = cli(*command("eval", image_folder, tmp_path), "--num_workers", workers)
    check(result, f"{name.splitlines()[-1]}: cannot be read")
