"""What is read: the data sets and their labels, with errors that name the file at fault."""

from __future__ import annotations

import json
import logging
import lzma
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from diffrate.seeds import generators_kept, seed_everything
from sample.unpack import ARCHIVE as SAMPLE_ARCHIVE
from sample.unpack import unpack_sample
from samplers import SeededOrder

IMAGENET_CLASSES = 1000
SHOWN_CLASSES = 10
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
    names: Sequence[str] | None = None,
    sample: Path = SAMPLE_ARCHIVE,
    bar: bool = False,
) -> LabelledDataset:
    """The `train` or `val` split of the data set `name`; only that split is opened.

    `head` is the number of classes of a model that was trained before, and `names` are its outputs'
    where they are known; labels are then its outputs. Without it the data decide how many there are.
    SAMPLE without a `root` is the archive `sample`, unpacked on first use, with a progress `bar` if wanted.

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
        return ClassFolder(folder / split, transform, head, names)
    if head is not None and head != len(dataset.classes):
        raise DataError(f"--data-set {name} has {len(dataset.classes)} classes, the checkpoint's head {head}")
    return dataset


def build_images(name: str, root: str | Path | None, transform: Transform, bar: bool = False) -> LabelledDataset:
    """The images of the data set `name` to search on, whatever their labels.

    Of a folder, every image file below its `train/`, or below itself where it has no splits.

    Raises:
        DataError: as `build_dataset`, or there is no image.
    """
    if not in_folders(name):
        return build_dataset(name, root, "train", transform)
    given = data_root(name, root)
    folder = _unpacked(SAMPLE_ARCHIVE, bar) if given is None else given
    train = folder / "train"
    if not train.is_dir() and (folder / "val").is_dir():
        raise DataError(f"--data-path {folder}: val/ and no folder train/; accepted: both, or images without splits")
    return ImageFiles(train if train.is_dir() else folder, transform)


def has_validation(name: str, root: str | Path | None) -> bool:
    """Whether the data set `name` has a validation split where it lies."""
    given = data_root(name, root)
    return not in_folders(name) or given is None or (given / "val").is_dir()


def in_folders(name: str) -> bool:
    """Whether the data set `name` lies in folders of images."""
    return name in ("IMNET", "SAMPLE")


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

    def __init__(self, root: Path, transform: Transform, head: int | None, names: Sequence[str] | None = None) -> None:
        if not root.is_dir():
            raise DataError(
                f"--data-path {root.parent}: no folder {root.name}/; accepted: train/ and val/ of class folders"
            )
        self.head, self.names = head, names
        try:
            super().__init__(str(root), transform=transform, loader=load_image)
        except FileNotFoundError as error:  # torchvision's word for no class folders, or an empty one
            reason = str(error).split(" Supported", 1)[0].rstrip(".")
            raise DataError(f"--data-path {root}: {reason}; accepted: images in every class folder") from error

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        classes, order = super().find_classes(directory)
        return classes, order if self.head is None else label_outputs(classes, self.head, directory, self.names)


class ImageFiles(Dataset[tuple[Any, int]]):
    """Every image file below a folder, in the order of their paths, without labels: each has label 0."""

    classes: Sequence[str] = ()

    def __init__(self, root: Path, transform: Transform) -> None:
        walked = os.walk(root, followlinks=True)
        found = (Path(folder) / name for folder, _, names in walked for name in names)
        files = sorted(path for path in found if path.suffix.lower() in IMG_EXTENSIONS)
        if not files:
            raise DataError(f"--data-path {root}: no image files; accepted: {', '.join(IMG_EXTENSIONS)}, at any depth")
        self.samples, self.transform = [(str(path), 0) for path in files], transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return self.transform(load_image(path)), label


class Samples(Dataset[tuple[Any, int]]):
    """A data set whose every error names the image at fault, in one line."""

    def __init__(self, dataset: LabelledDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> tuple[Any, int]:
        try:
            return self.dataset[index]
        except DataError:
            raise
        except Exception as error:  # a transform's, of whatever kind
            kind = type(error).__name__
            raise DataError(
                f"image {_name(self.dataset, index)}: {kind} ({_reason(error)}) while it was read"
            ) from error


class SeededSamples(Samples):
    """The same with augmentation that is drawn from a seed that comes with each index."""

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, int]:
        index, seed = key
        with generators_kept():
            seed_everything(seed)
            return super().__getitem__(index)


class ImageLoader(DataLoader[Any]):
    """Batches, from any position of a training order on; errors of loader processes in one line."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except DataError as error:
            raise DataError(_last_line(error)) from error
        except (RuntimeError, OSError, TypeError, ValueError, MemoryError) as error:
            raise DataError(f"loading: {_last_line(error)}") from error

    def batches_from(self, epoch: int, batch: int) -> Iterator[Any]:
        """The batches of `epoch` from number `batch` on, without reading those before."""
        order = self.sampler
        assert isinstance(order, SeededOrder), "a loader for training"
        order.set_epoch(epoch, start=batch * (self.batch_size or 1))
        return iter(self)


def label_outputs(classes: Sequence[str], head: int, folder: str, names: Sequence[str] | None = None) -> dict[str, int]:
    """Which output of a head with `head` classes stands for each class folder.

    Where the outputs have `names`: by name. As many folders as outputs: in order. Folders named by
    ImageNet's ids under an ImageNet head:
    by id, so that a part of ImageNet scores as it should. Other folders under an ImageNet head
    count in order, as the published code does, with a warning.

    Raises:
        DataError: a folder has no output of its name, or the counts differ under any other head.
    """
    if names is not None:
        unknown = [name for name in classes if name not in names]
        if unknown:
            raise DataError(f"--data-path {folder}: class {unknown[0]}; accepted: the checkpoint's, {_listed(names)}")
        return {name: list(names).index(name) for name in classes}
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


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN_CLASSES]) + (
        f" and {len(names) - SHOWN_CLASSES} more" if len(names) > SHOWN_CLASSES else ""
    )


def _name(dataset: Any, index: Any) -> str:
    """What to call an image: its file, where the data set has files, else its number."""
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, dataset.indices[index]
    samples = getattr(dataset, "samples", None)
    return str(index) if samples is None else str(samples[index][0])


def _last_line(error: Exception) -> str:
    """The message alone: a loader process wraps it in its traceback, message last."""
    last = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return last.split(f"{DataError.__name__}: ", 1)[-1] if "Traceback" in str(error) else last


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _cifar(kind: type[CIFAR10], root: str | Path | None, split: str, transform: Transform) -> CIFAR10:
    try:
        return kind(str(root), train=split == "train", transform=transform, download=False)
    except RuntimeError as error:
        raise DataError(f"--data-path {root}: no folder {kind.base_folder}/, or damaged") from error
