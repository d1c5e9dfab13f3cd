"""DeiT's whole recipe over thousands of views of photographs: what augmentation asks for now and then, it gets."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps

import engine
from cli.data import View, _posterize, train_transform
from cli.settings import Augmentation
from diffrate.device import seed_everything
from tests.cli.test_eval import PROJECT
from tests.cli.test_finetune import FULL, records
from tests.conftest import Cli

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")
SIDES = (64, 80, 100)  # pixels of what is cut out of them
LEAST = 500  # pictures that pass through the loader in a run
FORKED = multiprocessing.get_all_start_methods()[0] == "fork"  # else loader processes do not see what is patched
RECIPE = Augmentation(0.3, "rand-m9-mstd0.5-inc1", "bicubic", 0.25, "pixel", 1, 0.5, None, True)


def cuttings(name: str, count: int) -> list[Image.Image]:
    """Squares of three sizes, spread over the photograph."""
    with Image.open(PROJECT / "figures" / f"{name}.jpg") as photograph:
        width, height = photograph.size
        cut = []
        for index in range(count):
            side = SIDES[index % len(SIDES)]
            left, top = 37 * index % (width - side), 53 * index % (height - side)
            cut.append(photograph.crop((left, top, left + side, top + side)))
        return cut


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class for each photograph: 100 cuttings to train on and 4 to score on, as JPEG."""
    root = tmp_path_factory.mktemp("photographs")
    for name in PHOTOGRAPHS:
        for split, first, last in (("train", 0, 100), ("val", 100, 104)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index, cutting in enumerate(cuttings(name, last)[first:]):
                cutting.save(folder / f"{index}.jpg")
    return root


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """The bits that posterizing was asked to keep so far, in loader processes as well."""
    file = tmp_path / "asked"
    original = ImageOps.posterize

    def posterize(image: Image.Image, bits: int) -> Image.Image:
        with file.open("a") as note:
            note.write(f"{bits}\n")
        return original(image, bits)

    monkeypatch.setattr(ImageOps, "posterize", posterize)
    return lambda: [int(bits) for bits in file.read_text().split()] if file.exists() else []


def test_posterizing_to_no_bits_is_black() -> None:
    """Also from Pillow 13 on, which refuses it."""
    cutting = cuttings("chelsea", 1)[0]
    assert _posterize(cutting, 0).getextrema() == ((0, 0),) * 3
    assert _posterize(cutting, 1).tobytes() == ImageOps.posterize(cutting, 1).tobytes()


def test_fifteen_hundred_views(asked: Callable[[], list[int]]) -> None:
    seed_everything(0)
    transform = train_transform(View(48, 0.875), RECIPE)
    for name in PHOTOGRAPHS:
        cut = cuttings(name, 100)
        views = torch.stack([transform(picture) for picture in cut for _ in range(5)])
        assert views.shape == (500, 3, 48, 48)
        assert views.isfinite().all()
        assert len(views.flatten(1).unique(dim=0)) > 450  # all but what became one colour
    assert asked().count(0) > 0


def test_a_search_with_the_default_recipe(
    asked: Callable[[], list[int]], photographs: Path, cli: Cli, tmp_path: Path
) -> None:
    """No flag of the recipe; the input is small for the test's sake."""
    model = ("--model", "vit_deit_tiny_patch16_224", "--checkpoint", "scratch", "--input-size", 48)
    run = ("--target_flops", "60%", "--epochs", 2, "--num_workers", 2, "--output_dir", tmp_path / "out")
    code, _, err = cli(*model, "--data-path", photographs, *run)
    assert (code, err) == (0, "")
    history = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)["history"]
    assert len(history) * 64 >= LEAST
    assert asked() or not FORKED


def test_a_training_with_the_whole_recipe(
    asked: Callable[[], list[int]], photographs: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    step = engine._train_step

    def spy(model: Any, recipe: Any, images: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(len(images))
        return step(model, recipe, images, *rest)

    monkeypatch.setattr(engine, "_train_step", spy)
    run = ("--epochs", 2, "--batch-size", 64, "--num_workers", 2, "--output_dir", tmp_path / "out")
    code, _, err = cli(*FULL, "--data-path", photographs, *run)
    assert (code, err) == (0, "")
    assert sum(seen) >= LEAST
    assert len(records(tmp_path / "out")) == 2
    assert asked().count(0) > 0 or not FORKED
