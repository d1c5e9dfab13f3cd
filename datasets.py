"""What is read: the data sets and their labels, with errors that name the file at fault."""

from __future__ import annotations

import logging
import lzma
import os
import tarfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from PIL import ExifTags, Image, ImageOps
from timm.data import ImageNetInfo
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from diffrate.atomic import first_line, parse_json, refuse_pipe
from diffrate.device import generators_kept, seed_everything
from diffrate.pictures import VisualizationError, in_rgb
from sample import ARCHIVE, unpack_sample
from samplers import SeededOrder

IMAGENET_CLASSES = 1000
IN_FOLDERS = ("IMNET", "SAMPLE")  # the data sets that lie in folders of images
SHOWN_NAMES = 10
LOOKED_AT = 100  # images of a data set, for what cameras say of their orientation
TURNED = range(2, 9)  # EXIF orientations that are not upright

Labelled = tuple[list[tuple[str, int]], list[str]]  # files with their labels, and the names of the classes
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
    upright: bool = False,
) -> LabelledDataset:
    """The `train` or `val` split of the data set `name`; only that split is opened.

    `head` is the number of classes of a model that was trained before, and `names` are its outputs'
    where they are known; labels are then its outputs. Without it the data decide how many there are.
    SAMPLE without a `root` is the archive that ships, unpacked on first use. `upright` turns pictures as EXIF says,
    which published accuracies do not.

    Raises:
        DataError: the data are missing, in another layout, or do not fit `head`.
    """
    folder = _folder(name, root)
    if name in IN_FOLDERS:
        return ImageFiles(*_class_folders(folder / split, head, names), transform, upright)
    dataset: LabelledDataset
    if name.startswith("CIFAR"):
        kind = CIFAR10 if name == "CIFAR10" else CIFAR100
        try:
            dataset = kind(folder, train=split == "train", transform=transform)
        except RuntimeError as error:
            raise DataError(f"--data-path {folder}: no folder {kind.base_folder}/, or damaged") from error
    else:
        dataset = ImageFiles(*_inaturalist(folder, split, 2018 if name == "INAT" else 2019), transform, upright)
    if head is not None and head != len(dataset.classes):
        raise DataError(f"--data-set {name} has {len(dataset.classes)} classes, the checkpoint's head {head}")
    return dataset


def build_images(name: str, root: str | Path | None, transform: Transform, upright: bool = False) -> LabelledDataset:
    """The images of the data set `name` to search on, whatever their labels.

    Of a folder, every image file below its `train/`, or below itself where it has no splits.

    Raises:
        DataError: as `build_dataset`, or there is no image.
    """
    if name not in IN_FOLDERS:
        return build_dataset(name, root, "train", transform, upright=upright)
    folder = _folder(name, root)
    train = folder / "train"
    if not train.is_dir() and (folder / "val").is_dir():
        raise DataError(f"--data-path {folder}: val/ and no folder train/; accepted: both, or images without splits")
    top = train if train.is_dir() else folder
    found = (Path(below, name) for below, _, names in os.walk(top, followlinks=True) for name in names)
    files = sorted(path for path in found if _is_image(str(top), str(path)))
    if not files:
        raise DataError(f"--data-path {top}: no image files; accepted: {', '.join(IMG_EXTENSIONS)}, at any depth")
    return ImageFiles([(str(path), 0) for path in files], (), transform, upright)


def has_validation(name: str, root: str | Path | None) -> bool:
    """Whether the data set `name` has a validation split where it lies."""
    given = data_root(name, root)
    return name not in IN_FOLDERS or given is None or (given / "val").is_dir()


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


def load_image(path: str | Path, upright: bool = True) -> Image.Image:
    """The picture in `path`, in RGB with 8 bits, on white where it is transparent; `upright` turns it as EXIF says.

    Raises:
        DataError: the file is damaged or no picture, or its values have no known range.
    """
    try:
        with _opened(path) as image:
            image.load()
            picture, orientation = in_rgb(image, f"image {path}"), _orientation(image)
    except MemoryError:
        raise
    except VisualizationError as error:
        raise DataError(str(error)) from error
    except Exception as error:  # Pillow's readers let through what damaged files make them stumble over
        raise DataError(f"image {path}: cannot be read ({first_line(error)}); accepted: a whole image file") from error
    if not upright or orientation not in TURNED:
        return picture
    picture.info.clear()  # the rest of the EXIF may be damaged
    picture.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(picture)


def turned_images(dataset: LabelledDataset) -> tuple[int, int]:
    """How many of the first images of `dataset` lie on a side or are mirrored by their EXIF, and of how many."""
    looked_at, turned = min(LOOKED_AT, len(dataset)), 0
    for index in range(looked_at):
        with suppress(Exception), _opened(_name(dataset, index)) as image:  # errors show when it is read
            turned += image.format != "TIFF" and _orientation(image) in TURNED  # Pillow turns TIFFs itself
    return turned, looked_at


class ImageFiles(Dataset[tuple[Any, int]]):
    """Images in files, each with its label."""

    def __init__(
        self, samples: Sequence[tuple[str, int]], classes: Sequence[str], transform: Transform, upright: bool
    ) -> None:
        self.samples, self.classes, self.transform, self.upright = samples, classes, transform, upright

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return self.transform(load_image(path, self.upright)), label


class Samples(Dataset[Any]):
    """A data set whose every error names the image at fault, in one line; with a sample, the files left out for it.

    With `skip`, an image that cannot be read is no error: None is the sample.
    """

    def __init__(self, dataset: LabelledDataset, skip: bool = False) -> None:
        self.dataset, self.skip = dataset, skip

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> tuple[Any, list[str]]:
        try:
            return self.dataset[index], []
        except DataError:
            if not self.skip:
                raise
            return None, [_name(self.dataset, index)]
        except Exception as error:  # a transform's, of whatever kind
            kind = type(error).__name__
            said = f"{kind} ({(str(error) or kind).splitlines()[0]})"
            raise DataError(f"image {_name(self.dataset, index)}: {said} while it was read") from error


class SeededSamples(Samples):
    """The same with augmentation that is drawn from a seed that comes with each index.

    With `skip`, the next image that can be read takes the place of one that cannot: batches keep their size.
    """

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, list[str]]:
        index, seed = key
        left_out: list[str] = []
        with generators_kept():
            seed_everything(seed)
            for step in range(len(self)):
                sample, files = super().__getitem__((index + step) % len(self))
                left_out += files
                if sample is not None:
                    return sample, left_out
        raise DataError(f"image {left_out[0]}: cannot be read, nor any other; accepted: one that can")


class ImageLoader(DataLoader[Any]):
    """Batches, from any position of a training order on; errors of loader processes in one line.

    `unreadable` takes down the files that samples with `skip` leave out; batches without any image are passed over.
    """

    def __init__(self, dataset: Samples, unreadable: dict[str, None] | None = None, **options: Any) -> None:
        super().__init__(dataset, collate_fn=_readable, **options)
        self.unreadable = {} if unreadable is None else unreadable

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            for batch, files in super().__iter__():
                self.unreadable.update(dict.fromkeys(files))
                if batch is not None:
                    yield batch
        except (RuntimeError, OSError, TypeError, ValueError, MemoryError) as error:
            line = (str(error).strip() or type(error).__name__).splitlines()[-1]
            if "Traceback" in str(error):  # of a loader process, message last
                line = line.split(f"{DataError.__name__}: ", 1)[-1]
            raise DataError(line if isinstance(error, DataError) else f"loading: {line}") from error

    def batches_from(self, epoch: int, batch: int) -> Iterator[Any]:
        """The batches of `epoch` from number `batch` on, without reading those before."""
        order = self.sampler
        assert isinstance(order, SeededOrder), "a loader for training"
        order.set_epoch(epoch, start=batch * (self.batch_size or 1))
        return iter(self)


def label_outputs(classes: Sequence[str], head: int, folder: str, names: Sequence[str] | None = None) -> dict[str, int]:
    """Which output of a head with `head` classes stands for each class folder.

    Where the outputs have `names`: by name. As many folders as outputs: in order. Folders named by
    ImageNet's ids under an ImageNet head: by id, so that a part of ImageNet scores as it should.
    Other folders under an ImageNet head count in order, as the published code does, with a warning.

    Raises:
        DataError: a folder has no output of its name, or the counts differ under any other head.
    """
    if names is not None:
        unknown = [name for name in classes if name not in names]
        if unknown:
            raise DataError(f"--data-path {folder}: class {unknown[0]}; accepted: the checkpoint's, {listed(names)}")
        return {name: list(names).index(name) for name in classes}
    in_order = {name: index for index, name in enumerate(classes)}
    if head == len(classes):
        return in_order
    if head == IMAGENET_CLASSES and len(classes) < head:
        ids = {name: index for index, name in enumerate(ImageNetInfo().label_names())}
        if all(name in ids for name in classes):
            return {name: ids[name] for name in classes}
        said = "%s: its %d folders are not ImageNet ids; they count as outputs 0 to %d"
        log.warning(said, folder, len(classes), len(classes) - 1)
        return in_order
    raise DataError(f"--data-path {folder} has {len(classes)} classes, the checkpoint's head {head}")


def _inaturalist(root: Path, split: str, year: int) -> Labelled:
    """One split of iNaturalist as the competition ships it, by its index beside the images, such as `val2018.json`;
    labels are the category ids in order."""
    index = root / f"{split}{year}.json"
    try:
        refuse_pipe(index)
        content = parse_json(index.read_text(encoding="utf-8"))
        categories = sorted(content["categories"], key=lambda category: category["id"])
        label = {category["id"]: position for position, category in enumerate(categories)}
        labels = {note["image_id"]: label[note["category_id"]] for note in content["annotations"]}
        for image in content["images"]:
            if ".." in Path(image["file_name"]).parts or Path(image["file_name"]).is_absolute():
                raise ValueError(f"{image['file_name']}: outside of its folder")
        samples = [(str(root / image["file_name"]), labels[image["id"]]) for image in content["images"]]
        return samples, [str(category["name"]) for category in categories]
    except FileNotFoundError as error:
        raise DataError(f"--data-path {root}: no file {index.name}; accepted: iNaturalist {year}'s layout") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index}: not an iNaturalist index ({error!r})".replace("\n", " ")) from error


def _class_folders(root: Path, head: int | None, names: Sequence[str] | None) -> Labelled:
    """One split in ImageFolder's layout, `<class>/<image>`; labels are a model's outputs."""
    if not root.is_dir():
        accepted = "train/ and val/ of class folders"
        raise DataError(f"--data-path {root.parent}: no folder {root.name}/; accepted: {accepted}")
    try:
        classes = [name for name in find_classes(root)[0] if not name.startswith(".")]
        if not classes:
            raise FileNotFoundError(f"Couldn't find any class folder in {root}.")
        in_order = {name: index for index, name in enumerate(classes)}
        labels = in_order if head is None else label_outputs(classes, head, str(root), names)
        return make_dataset(root, labels, is_valid_file=partial(_is_image, str(root))), classes
    except FileNotFoundError as error:  # torchvision's word for no class folders, or an empty one
        reason = str(error).rstrip(".")
        raise DataError(f"--data-path {root}: {reason}; accepted: images in every class folder") from error


def listed(names: Sequence[str]) -> str:
    """The first of `names`, and how many more there are."""
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more


def _is_image(root: str, path: str) -> bool:
    """Whether `path` below `root` is called like an image, and neither it nor a folder on the way is hidden."""
    return path.lower().endswith(IMG_EXTENSIONS) and f"{os.sep}." not in path[len(root) :]


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """The file as Pillow opens it, without a word about damaged EXIF: the picture is whole."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*orrupt EXIF")
        refuse_pipe(path)
        with Image.open(path) as image:
            # Else Pillow maps files into memory, and TIFFs at the size after turning: they come out garbled.
            image.filename = ""  # type: ignore[attr-defined]
            yield image


def _orientation(image: Image.Image) -> Any:
    """What the EXIF says, None where it is damaged."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # of whatever kind
        return None


def _readable(samples: Sequence[tuple[Any, list[str]]]) -> tuple[Any, list[str]]:
    """A batch of the samples that there are, None of none, and the files that are left out."""
    there = [sample for sample, _ in samples if sample is not None]
    return default_collate(there) if there else None, [file for _, files in samples for file in files]


def _folder(name: str, root: str | Path | None) -> Path:
    """`data_root`, or the sample's folder."""
    folder = data_root(name, root)
    try:
        return unpack_sample(ARCHIVE) if folder is None else folder
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError) as error:
        raise DataError(f"sample {ARCHIVE}: cannot be unpacked beside itself ({first_line(error)})") from error


def _name(dataset: Any, index: Any) -> str:
    """What to call an image: its file, where the data set has files, else its number."""
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, dataset.indices[index]
    samples = getattr(dataset, "samples", None)
    return str(index) if samples is None else str(samples[index][0])
