"""From settings to what is read: data sets with their transforms, and loaders in their order."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterable, Sequence
from random import Random
from threading import Thread
from typing import Any

import torch
from torch.utils.data import Subset

from cli.runtime import Runtime
from cli.settings import ModelSettings, Settings, size_words
from cli.transforms import View, eval_transform, train_transform
from datasets import (
    DataError,
    ImageLoader,
    LabelledDataset,
    Samples,
    SeededSamples,
    Transform,
    build_dataset,
    build_images,
    has_validation,
    turned_images,
)
from models.zoo import ModelEntry
from samplers import SeededOrder
from utils import UsageError

log = logging.getLogger(__name__)
WORKERS_A_CORE = 8  # at most: more wait for each other, and take memory


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


def calibration_dataset(settings: Settings, entry: ModelEntry, most: int) -> Any:
    """Up to `most` images to search on, with or without labels, spread evenly, as an evaluation sees them."""
    return _spread(_images(None, settings, eval_transform(view_of(settings, entry))), most)


def pictures(settings: Settings, entry: ModelEntry, most: int) -> torch.Tensor:
    """Up to `most` images of the validation split, or of a folder without splits, spread evenly, `[N, C, H, W]`."""
    split = "val" if has_validation(settings.data.data_set, settings.data.path) else None
    dataset = _spread(_images(split, settings, eval_transform(view_of(settings, entry))), most)
    return torch.stack([image for image, _ in dataset])


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
