"""Whatever goes wrong while images are read, in this process or in loader processes, ends in one line."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

import cli.data
import diffrate
from cli.data import View, eval_transform
from datasets import ImageLoader, Samples, SeededSamples, build_dataset
from tests.cli.test_errors import check
from tests.cli.test_finetune import PLAIN
from tests.cli.test_search import MODEL, words
from tests.conftest import Cli, write_image
from tests.forked import two_mains

STRANGE = (47, 47)  # pixels of the image that transforms choke on
# Loader processes run what is patched here only where they are forked.
FORKED = pytest.mark.skipif(multiprocessing.get_all_start_methods()[0] != "fork", reason="loader processes start anew")
# torch raises it wherever this process is just then: also within multiprocessing's own receiving, between a
# socket's opening and its closing.
DIES = pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")


def cases(*rows: tuple[Any, ...]) -> list[Any]:
    """Rows of cases whose last value is a number of loader processes."""
    return [pytest.param(*row, marks=[FORKED] * (row[-1] > 0)) for row in rows]


@pytest.fixture(autouse=True)
def _loaders_end() -> Iterator[None]:
    """Garbage that still has loader processes waits seconds for them when it is collected."""
    made: list[weakref.ref[Any]] = []
    start = _MultiProcessingDataLoaderIter.__init__

    def noted(self: Any, *args: Any) -> None:
        made.append(weakref.ref(self))
        start(self, *args)

    _MultiProcessingDataLoaderIter.__init__ = noted  # type: ignore[method-assign]
    yield
    _MultiProcessingDataLoaderIter.__init__ = start  # type: ignore[method-assign]
    for reference in made:
        if (iterator := reference()) is not None and hasattr(iterator, "_workers"):
            iterator._shutdown_workers()


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
            return [*words(folder, out), "--no-repeated-aug", "--epochs", 1]
        case "finetune":
            return [*PLAIN, "--data-path", folder, "--output_dir", out, "--epochs", 1]
        case _:
            return ["--eval", "--model", MODEL, "--checkpoint", "scratch", "--data-path", folder, "--batch-size", 4]


@pytest.mark.parametrize(
    ("kind", "workers"), cases(*((kind, 2) for kind in ERRORS), ("no memory", 0), ("two words", 0), ("the end", 0))
)
def test_any_error_names_its_image(
    kind: str, workers: int, cli: Cli, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, said = ERRORS[kind]
    choke(monkeypatch, raises(error))
    path = strange(image_folder, "val")
    result = cli(*command("eval", image_folder, tmp_path), "--num_workers", workers)
    check(result, f"main.py: error: image {path}: {said}", " while it was read")


@pytest.mark.parametrize(
    ("mode", "split", "workers"),
    cases(("search", "train", 2), ("search", "val", 0), ("finetune", "train", 0), ("finetune", "val", 2)),
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
@pytest.mark.parametrize(("end", "mode"), [("exits", "eval"), ("is killed", "search"), ("exits", "finetune")])
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


@pytest.mark.parametrize(("name", "workers"), cases(("a\nb.jpg", 2), ("ä ?.jpg", 0), ("%s {0}.jpg", 2)))
def test_images_of_odd_names(name: str, workers: int, cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "val" / "dog" / name).write_bytes(b"no picture")
    result = cli(*command("eval", image_folder, tmp_path), "--num_workers", workers)
    check(result, f"{name.splitlines()[-1]}: cannot be read")


def damage(folder: Path, split: str) -> list[Path]:
    """Two files of the split that cannot be read."""
    bad = [folder / split / "dog" / f"{index}.jpg" for index in (0, 1)]
    for path in bad:
        path.write_bytes(b"no picture")
    return bad


def left_out(out: str) -> list[str]:
    return [line.split("left out ")[1] for line in out.splitlines() if "left out " in line]


@pytest.mark.parametrize(("size", "workers"), cases((1, 2), (4, 0)))
def test_evaluation_goes_on_without_what_cannot_be_read(
    size: int, workers: int, cli: Cli, image_folder: Path, tmp_path: Path
) -> None:
    """Also where all of a batch is."""
    bad = damage(image_folder, "val")
    words = ["--batch-size", size, "--num_workers", workers, "--skip-unreadable", "--output_dir", tmp_path / "out"]
    code, out, err = cli(*command("eval", image_folder, tmp_path), *words)
    assert (code, err) == (0, "")
    assert left_out(out) == [f"2 images that cannot be read: {bad[0]}, {bad[1]}"]
    assert json.loads((tmp_path / "out" / "log.txt").read_text())["images"] == 7


@pytest.mark.parametrize(("mode", "workers"), cases(("search", 2), ("finetune", 0)))
def test_training_takes_the_next_image(
    mode: str, workers: int, cli: Cli, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = damage(image_folder, "train")
    result = cli(*command(mode, image_folder, tmp_path / "ends"), "--num_workers", workers)
    check(result, "cannot be read")
    sizes, original = [], ImageLoader.batches_from

    def noted(loader: Any, epoch: int, batch: int) -> Iterator[Any]:
        for images, labels in original(loader, epoch, batch):
            sizes.append((len(images) == loader.batch_size, len(labels) == loader.batch_size))
            yield images, labels

    monkeypatch.setattr(ImageLoader, "batches_from", noted)
    words = ["--num_workers", workers, "--skip-unreadable"]
    code, out, err = cli(*command(mode, image_folder, tmp_path / "out"), *words)
    assert (code, err) == (0, "")
    assert sizes
    assert set(sizes) == {(True, True)}
    assert [sorted(line.split(": ")[1].split(", ")) for line in left_out(out)] == [[str(path) for path in bad]]


def test_the_next_image_is_the_one_after(image_folder: Path) -> None:
    damage(image_folder, "train")
    dataset = build_dataset("IMNET", image_folder, "train", eval_transform(View(8, 1.0)))
    samples = SeededSamples(dataset, skip=True)
    (found, _), files = samples[4, 0]
    assert files == [str(image_folder / "train" / "dog" / f"{index}.jpg") for index in (0, 1)]
    (after, _), files = samples[6, 0]
    assert files == []
    assert torch.equal(found, after)


def test_images_that_vanish_are_left_out(image_folder: Path) -> None:
    samples = Samples(build_dataset("IMNET", image_folder, "val", eval_transform(View(8, 1.0))), skip=True)
    (image_folder / "val" / "emu" / "2.jpg").unlink()
    unreadable: dict[str, None] = {}
    batches = list(ImageLoader(samples, unreadable, batch_size=4))
    assert [len(images) for images, _ in batches] == [4, 4]
    assert list(unreadable) == [str(image_folder / "val" / "emu" / "2.jpg")]


@pytest.mark.parametrize("mode", ["eval", "search", "finetune", "--sensitivity"])
def test_where_nothing_can_be_read(mode: str, cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    for path in image_folder.rglob("*.jpg"):
        path.write_bytes(b"no picture")
    words = command(mode, image_folder, tmp_path / "out")
    result = cli(*(["--sensitivity", *words[1:]] if mode == "--sensitivity" else words), "--skip-unreadable")
    check(result, "accepted: ")
    if mode in ("eval", "--sensitivity"):
        (said,) = left_out(result[1])
        assert said.endswith("and 2 more") == (mode != "eval")


@pytest.mark.parametrize("mode", ["eval", "search"])
def test_two_processes_leave_out_what_cannot_be_read(mode: str, image_folder: Path, tmp_path: Path) -> None:
    bad = damage(image_folder, "val" if mode == "eval" else "train")
    words = command(mode, image_folder, tmp_path)
    ended = two_mains(tmp_path, *words, "--skip-unreadable", "--output_dir", tmp_path / "out")
    assert [(done.code, done.err) for done in ended] == [(0, ""), (0, "")]
    told = " ".join(line for done in ended for line in left_out(done.out))
    assert all(str(path) in told for path in bad)


@pytest.mark.parametrize(("mode", "split"), [("eval", "val"), ("search", "train"), ("finetune", "val")])
def test_turned_images_are_told_of_once(mode: str, split: str, cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (50, 40)).save(image_folder / split / "dog" / "1.jpg", exif=exif)
    Image.new("RGB", (50, 40)).save(image_folder / split / "dog" / "2.jpg", exif=b"Exif\0\0nonsense")
    words = [*command(mode, image_folder, tmp_path / "out"), "--num_workers", 0]
    code, out, err = cli(*words)
    assert (code, err) == (0, "")
    assert out.count("EXIF") == 1
    assert f"1 of the first {9 if split == 'val' else 12} images carry an EXIF orientation" in out
    again = [tmp_path / "again" if word == tmp_path / "out" else word for word in words]
    code, out, err = cli(*again, "--exif")
    assert (code, err, out.count("EXIF")) == (0, "", 0)


def test_a_training_goes_on_with_its_images_as_they_lay(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    words = [*command("finetune", image_folder, tmp_path / "out"), "--num_workers", 0]
    assert cli(*words)[0] == 0
    check(cli(*words, "--resume", "auto", "--exif"), "was made with --exif False; accepted: True")
    assert cli(*words, "--resume", "auto", "--skip-unreadable")[0] == 0
