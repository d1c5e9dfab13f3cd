"""From settings to what is read: pictures as input tensors, by the published evaluation transform and DeiT's training
recipe; data sets of them, and loaders in their order."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from random import Random
from threading import Thread
from typing import Any

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.auto_augment import AugmentOp, posterize
from torch.utils.data import Subset
from torchvision import transforms

from cli.runtime import Runtime
from cli.settings import Augmentation, ModelSettings, Settings, size_words
from datasets import (
    DataError,
    ImageLoader,
    LabelledDataset,
    Samples,
    SeededSamples,
    Transform,
    build_dataset,
    build_images,
    turned_images,
)
from models.zoo import ModelEntry
from samplers import SeededOrder
from utils import UsageError

log = logging.getLogger(__name__)
WORKERS_A_CORE = 8  # at most: more wait for each other, and take memory
SMALL = 32  # DeiT's recipe crops inputs up to this many pixels after padding, not after resizing
SMALL_PADDING = 4
LONGEST_SHAPE = 16  # rows to columns of an input, or columns to rows; of pictures beyond twice that the middle is read
LARGEST_SIDE = 16384  # pixels of a resized picture's short side: 800 MB


@dataclass(frozen=True)
class View:
    """How a picture becomes a model's input of `input_size`, a side or rows and columns.

    crop_mode, as in timm: `center` resizes the picture until it covers the input at `crop_pct` and cuts
    its centre out, `squash` resizes both sides to the input's at `crop_pct`, and `border` resizes it until
    it fits and pads it.
    """

    input_size: int | tuple[int, int]
    crop_pct: float
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"
    crop_mode: str = "center"

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the input."""
        return (self.input_size, self.input_size) if isinstance(self.input_size, int) else self.input_size


def eval_transform(view: View, hflip: float = 0.0) -> transforms.Compose:
    """timm's for evaluation: resize, crop the centre, normalise; after mirroring at probability `hflip`.

    Raises:
        UsageError: a crop share with which pictures would not fit in memory.
    """
    longest = max(view.size)
    if longest / view.crop_pct > LARGEST_SIDE:
        least = longest / LARGEST_SIDE
        raise UsageError(f"--crop-pct {view.crop_pct:g}: accepted: {least:.3g} to 1 at {longest} pixels")
    crop = {"crop_pct": view.crop_pct, "crop_mode": view.crop_mode}
    flips = [transforms.RandomHorizontalFlip(hflip)] if hflip else []
    flips += [_cut_long] if view.crop_mode == "center" and longest <= LONGEST_SHAPE * min(view.size) else []
    return transforms.Compose([*flips, *_timm_steps(view, is_training=False, interpolation=view.interpolation, **crop)])


def _timm_steps(view: View, **options: Any) -> list[Any]:
    composed: Any = create_transform(view.size, mean=view.mean, std=view.std, **options)
    return list(composed.transforms)


def _cut_long(image: Image.Image) -> Image.Image:
    """The middle of a picture that is far longer than wide: resized as a whole, it would not fit in memory."""
    width, height = image.size
    most = 2 * LONGEST_SHAPE * min(width, height)
    left, top = max(0, (width - most) // 2), max(0, (height - most) // 2)
    return image if max(width, height) <= most else image.crop((left, top, width - left, height - top))


def crop_view(photograph: Image.Image, view: View, size: int | tuple[int, int]) -> Image.Image:
    """The part of `photograph` that `eval_transform` makes the input of, at `size`: a side, or rows and columns."""
    for step in eval_transform(replace(view, input_size=size, interpolation="bicubic")).transforms[:-2]:
        photograph = step(photograph)  # resized and cropped, and not made a tensor of
    return photograph


def train_transform(view: View, augmentation: Augmentation) -> transforms.Compose:
    """DeiT's training transform through timm's factory, with random affine moves when asked for.

    Raises:
        UsageError: an augmentation policy that timm does not know.
    """
    try:
        steps = _timm_steps(
            view,
            is_training=True,
            hflip=augmentation.hflip,
            color_jitter=augmentation.color_jitter,
            auto_augment=augmentation.auto_augment,
            interpolation=augmentation.interpolation,
            re_prob=augmentation.erase_probability,
            re_mode=augmentation.erase_mode,
            re_count=augmentation.erase_count,
        )
    except (AssertionError, KeyError, ValueError) as error:  # how timm refuses a policy
        raise UsageError(f"--aa {augmentation.auto_augment}: {error}; accepted: a policy of timm, or none") from error
    for operation in _operations(steps):
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize
    if max(view.size) <= SMALL:
        steps[0] = transforms.RandomCrop(view.size, padding=SMALL_PADDING)
    if augmentation.affine is not None:
        degrees, shift, rescale = augmentation.affine
        moves, scales = (shift, shift), (1 - rescale, 1 + rescale)
        bilinear = transforms.InterpolationMode.BILINEAR
        steps.insert(0, transforms.RandomAffine(degrees, moves, scales, interpolation=bilinear))
    return transforms.Compose(steps)


def _operations(steps: list[Any]) -> Iterator[AugmentOp]:
    """Those that the policies among `steps` draw from."""
    for step in steps:
        yield from getattr(step, "ops", ())  # RandAugment, AugMix
        yield from chain(*getattr(step, "policy", ()))  # AutoAugment


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's, which at the strongest asks for no bits: black from Pillow before 13, which refuses it."""
    try:
        return posterize(image, bits, **options)
    except ValueError:
        if bits >= 1:
            raise
        return Image.new(image.mode, image.size)


def input_size_of(settings: ModelSettings, entry: ModelEntry) -> tuple[int, int]:
    """Rows and columns of the input in pixels."""
    return settings.input_size or entry.input_size


def view_of(settings: Settings, entry: ModelEntry) -> View:
    """How a picture becomes the model's input."""
    size, crop_pct = input_size_of(settings.model, entry), settings.data.crop_pct or entry.crop_pct
    return View(size, crop_pct, entry.mean, entry.std, entry.interpolation, entry.crop_mode)


def eval_dataset(
    settings: Settings, entry: ModelEntry, head: int | None = None, names: Sequence[str] | None = None
) -> LabelledDataset:
    """The validation split, labelled for a model with `head` classes, called `names` where that is known."""
    return _images("val", settings, eval_transform(view_of(settings, entry)), head, names)


def train_dataset(settings: Settings, entry: ModelEntry) -> LabelledDataset:
    """The training split with the augmentation that the flags ask for."""
    return _images("train", settings, train_transform(view_of(settings, entry), settings.augmentation))


def some_images(settings: Settings, entry: ModelEntry, most: int, split: str | None = None) -> Any:
    """Up to `most` images of a split, or of those to search on, spread evenly, as an evaluation sees them."""
    return _spread(_images(split, settings, eval_transform(view_of(settings, entry))), most)


def search_dataset(
    settings: Settings, entry: ModelEntry, head: int | None, names: Sequence[str] | None, augmented: bool
) -> LabelledDataset:
    """The images to search on, labelled as `eval_dataset` where the recipe asks for labels, else anyhow.

    `augmented` as the recipe says, or else as in evaluation.
    """
    view = view_of(settings, entry)
    if augmented and settings.recipe.transform == "train":
        transform = train_transform(view, settings.augmentation)
    else:
        transform = eval_transform(view, settings.augmentation.hflip if augmented else 0.0)
    return _images("train" if settings.search.labelled else None, settings, transform, head, names)


def _images(
    split: str | None,
    settings: Settings,
    transform: Transform,
    head: int | None = None,
    names: Sequence[str] | None = None,
) -> LabelledDataset:
    """A split of the data set; without one, the images to search on, whatever their labels."""
    data = settings.data
    if split is None:
        return build_images(data.data_set, data.path, transform, data.exif)
    return build_dataset(data.data_set, data.path, split, transform, head, names, upright=data.exif)


def check_same_classes(train: LabelledDataset, val: LabelledDataset) -> None:
    """Refuse splits whose labels mean different things.

    Raises:
        DataError: names the first classes that only one split has.
    """
    differing = ", ".join(sorted(set(train.classes) ^ set(val.classes))[:3])
    if differing:
        raise DataError(f"train and val differ in classes, first {differing}; accepted: the same in both")


def warn_of_turned(settings: Settings, runtime: Runtime, *datasets: LabelledDataset | None) -> None:
    """Warn once, on the main process, of images with an orientation that is not applied."""
    if settings.data.exif or not runtime.processes.is_main:
        return
    for turned, images in (turned_images(dataset) for dataset in datasets if dataset is not None):
        if turned:
            said = "%d of the first %d images carry an EXIF orientation, which is not looked at; --exif applies it"
            log.warning(said, turned, images)
            return


def eval_loader(dataset: LabelledDataset, settings: Settings, runtime: Runtime) -> ImageLoader:
    """Every image once, over all processes."""
    order = range(runtime.processes.rank, len(dataset), runtime.processes.world)
    samples = Samples(dataset, settings.data.skip_unreadable)
    return _loader(samples, order, settings.data.batch_size, settings, runtime, drop_last=False)


def part_loader(dataset: LabelledDataset, most: int, settings: Settings, runtime: Runtime) -> ImageLoader:
    """Up to `most` images from all over `dataset`, each once, over all processes; in random order where a search may
    not have the time for all of them."""
    part = _spread(dataset, most)
    if settings.search.minutes is not None:
        Random(settings.run.seed).shuffle(part.indices)
    return eval_loader(part, settings, runtime)


def _spread(dataset: Any, most: int) -> Any:
    """Up to `most` images at even steps: files are in the order of their classes."""
    count = min(most, len(dataset))
    return Subset(dataset, [number * len(dataset) // count for number in range(count)])


def train_loader(dataset: LabelledDataset, settings: Settings, runtime: Runtime) -> ImageLoader:
    """Whole batches in an order that each epoch draws afresh.

    Raises:
        DataError: fewer images than one batch over all processes.
    """
    processes = runtime.processes
    samples = SeededSamples(dataset, settings.data.skip_unreadable)
    sampler = SeededOrder(samples, processes.rank, processes.world, settings.augmentation.repeated, settings.run.seed)
    batch_size, images = settings.data.batch_size, len(sampler)
    if not settings.data.batch_sizes and 2 <= images < batch_size:
        batch_size = images // 2 * 2  # mixup wants pairs
        log.info("batches of %d images: there are %d", batch_size, images)
    if batch_size > images:
        raise DataError(f"--batch-size {batch_size}: accepted: up to {images}, the images of a process")
    return _loader(samples, sampler, batch_size, settings, runtime, drop_last=True)


def _loader(
    dataset: Samples, sampler: Iterable[Any], batch_size: int, settings: Settings, runtime: Runtime, drop_last: bool
) -> ImageLoader:
    """A loader on processes of its own, by default one per core of this process's share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most, workers = WORKERS_A_CORE * cores, settings.data.workers
    if workers is None:
        workers = max(1, cores // runtime.processes.local_world)
    elif workers > most:
        raise UsageError(f"--num_workers {workers}: accepted: 0 to {most} on {cores} cores")
    # Asked for more memory than there is, the system may end the process without a word.
    size, together = settings.model.input_size, min(batch_size, len(dataset))
    if size is not None and hasattr(os, "sysconf"):
        fitting = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (3 * 4 * size[0] * size[1])
        if together > fitting:
            raise UsageError(f"--batch-size {together}: accepted: below {fitting} at --input-size {size_words(size)}")
    return ImageLoader(
        dataset,
        runtime.unreadable,
        sampler=sampler,
        batch_size=batch_size,
        drop_last=drop_last,
        num_workers=workers,  # they start with the first batch and live on across epochs
        persistent_workers=workers > 0,
        pin_memory=settings.data.pin_memory and runtime.device.type == "cuda",
        generator=torch.Generator().manual_seed(settings.run.seed + runtime.processes.rank),
        worker_init_fn=_leave_signals,
    )


def _leave_signals(worker: int) -> None:
    """Leave signals to the whole group of processes to the main process, which saves before it stops."""

    def end_with_parent() -> None:
        """A process that ends asks its loader processes to stop, and waits for them: that one request counts."""
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=end_with_parent, daemon=True).start()
