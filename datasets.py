"""What is read: the data sets and their labels, with errors that name the file at fault."""

from __future__ import annotations

import json
import logging
import lzma
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

from sample.unpack import ARCHIVE as SAMPLE_ARCHIVE
from sample.unpack import unpack_sample
from utils import seed_everything

DATA_SETS = ("IMNET", "CIFAR10", "CIFAR", "INAT", "INAT19", "SAMPLE")
IMAGENET_CLASSES = 1000
# What Pillow raises on files that are cut short, damaged or no images.
BAD_IMAGE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)

Transform = Callable[[Image.Image], Tensor]
log = logging.getLogger(__name__)


class DataError(ValueError):
    """Data that is missing, laid out in another way, damaged, or that does not fit the model."""


class LabelledDataset(Protocol):
    """A data set of (image, label) pairs that knows its classes."""

    classes: Sequence[str]

    def __getitem__(self, index: int) -> Any: ...
    def __len__(self) -> int: ...


def build_dataset(
    name: str,
    root: str | Path | None,
    split: str,
    transform: Transform,
    head: int | None = None,
    sample: Path = SAMPLE_ARCHIVE,
    bar: bool = False,
) -> LabelledDataset:
    """The `train` or `val` split of the data set `name`; only that split is opened.

    `head` is the number of classes of a model that was trained before; labels are then its
    outputs. Without it the data decide how many classes there are. SAMPLE without a `root` is the
    archive `sample`, unpacked on first use, with a progress `bar` if wanted.

    Raises:
        DataError: the data are missing, in another layout, or do not fit `head`.
    """
    root = data_root(name, root)
    if name == "CIFAR10":
        dataset: LabelledDataset = _cifar(CIFAR10, root, split, transform)
    elif name == "CIFAR":
        dataset = _cifar(CIFAR100, root, split, transform)
    elif name in ("INAT", "INAT19"):
        dataset = INaturalist(Path(str(root)), split, 2018 if name == "INAT" else 2019, transform)
    else:
        folder = _unpacked(sample, bar) if root is None else Path(root)
        return ClassFolder(folder / split, transform, head)
    if head is not None and head != len(dataset.classes):
        raise DataError(f"--data-set {name} has {len(dataset.classes)} classes, the checkpoint's head {head}")
    return dataset


def data_root(name: str, root: str | Path | None) -> Path | None:
    """The folder of the data set `name`; None for SAMPLE from its archive.

    Raises:
        DataError: no folder where one is needed.
    """
    if root is None:
        if name == "SAMPLE":
            return None
        raise DataError(f"--data-set {name} needs --data-path")
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise DataError(f"--data-path {root}: no such folder")
    return folder


def load_image(path: str | Path) -> Image.Image:
    """The picture in `path`, in RGB.

    Raises:
        DataError: the file is damaged or no picture.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except BAD_IMAGE as error:
        raise DataError(f"image {path}: cannot be read ({_reason(error)}); accepted: a whole image file") from error


class ClassFolder(ImageFolder):
    """One split in ImageFolder layout, `<class>/<image>`, with labels that are a model's outputs."""

    def __init__(self, root: Path, transform: Transform, head: int | None) -> None:
        if not root.is_dir():
            raise DataError(
                f"--data-path {root.parent}: no folder {root.name}/; accepted: train/ and val/ of class folders"
            )
        self.head = head
        try:
            super().__init__(str(root), transform=transform, loader=load_image)
        except FileNotFoundError as error:  # torchvision's word for no class folders, or an empty one
            reason = str(error).split(" Supported", 1)[0].rstrip(".")
            raise DataError(f"--data-path {root}: {reason}; accepted: images in every class folder") from error

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        classes, order = super().find_classes(directory)
        return classes, order if self.head is None else label_outputs(classes, self.head, directory)


class SeededSamples(Dataset[tuple[Any, int]]):
    """A data set whose augmentation is drawn from a seed that comes with each index."""

    def __init__(self, dataset: LabelledDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, int]:
        index, seed = key
        with seeded(seed):
            return self.dataset[index]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` inside the block, whichever generator, and go on as before after it."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  (what timm draws from)
    try:
        with torch.random.fork_rng(devices=[]):
            seed_everything(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def label_outputs(classes: Sequence[str], head: int, folder: str) -> dict[str, int]:
    """Which output of a head with `head` classes stands for each class folder.

    As many folders as outputs: in order. Folders named by ImageNet's ids under an ImageNet head:
    by id, so that a part of ImageNet scores as it should. Other folders under an ImageNet head
    count in order, as the published code does, with a warning.

    Raises:
        DataError: the counts differ under any other head.
    """
    in_order = {name: index for index, name in enumerate(classes)}
    if head == len(classes):
        return in_order
    if head == IMAGENET_CLASSES and len(classes) < head:
        ids = {name: index for index, name in enumerate(ImageNetInfo().label_names())}
        if all(name in ids for name in classes):
            return {name: ids[name] for name in classes}
        log.warning(
            "%s: its %d folders are not ImageNet ids; they count as outputs 0 to %d",
            folder,
            len(classes),
            len(classes) - 1,
        )
        return in_order
    raise DataError(f"--data-path {folder} has {len(classes)} classes, the checkpoint's head {head}")


class INaturalist(Dataset[tuple[Any, int]]):
    """iNaturalist 2018 or 2019 as the competition ships it: `val2018.json` beside its images.

    Labels are the category ids in order; only the index of the split asked for is read.
    """

    def __init__(self, root: Path, split: str, year: int, transform: Transform) -> None:
        index = root / f"{split}{year}.json"
        try:
            content = json.loads(index.read_text())
            categories = sorted(content["categories"], key=lambda category: category["id"])
            label = {category["id"]: position for position, category in enumerate(categories)}
            labels = {note["image_id"]: label[note["category_id"]] for note in content["annotations"]}
            self.samples = [(root / image["file_name"], labels[image["id"]]) for image in content["images"]]
        except FileNotFoundError as error:
            raise DataError(
                f"--data-path {root}: no file {index.name}; accepted: iNaturalist {year}'s layout"
            ) from error
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{index}: not an iNaturalist index ({error!r})".replace("\n", " ")) from error
        self.classes = [str(category["name"]) for category in categories]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return self.transform(load_image(path)), label


def _unpacked(archive: Path, bar: bool) -> Path:
    try:
        return unpack_sample(archive, bar)
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError) as error:
        raise DataError(f"sample {archive}: cannot be unpacked beside itself ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _cifar(kind: type[CIFAR10], root: str | Path | None, split: str, transform: Transform) -> CIFAR10:
    try:
        return kind(str(root), train=split == "train", transform=transform, download=False)
    except RuntimeError as error:
        raise DataError(f"--data-path {root}: no folder {kind.base_folder}/, or damaged") from error
