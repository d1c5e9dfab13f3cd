"""From flags to the things a run works with: weights, the compressed model, and data loaders."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler

import diffrate
import models
from datasets import DataError, LabelledDataset, SeededSamples, build_dataset, data_root
from diffrate.budget import check_target
from diffrate.schedule import find_schedule
from flags import FROM_SCRATCH, OFFICIAL, PROJECT
from models.zoo import SAMPLE_MODEL
from processes import local_main_first, usable_cores
from progress import bar_fits
from recipe import build_augmentation
from samplers import eval_sampler, train_sampler
from transforms import eval_transform, train_transform
from utils import Runtime, UsageError

log = logging.getLogger(__name__)

PATCHES = {"deit": diffrate.patch.deit, "mae": diffrate.patch.mae}
PROJECT_RATES = PROJECT / "compression_rate.json"
TARGET_OF_SAMPLE = 0.0242  # GFLOPs: half of the sample model's


def input_size_of(args: Namespace, entry: models.ModelEntry) -> int:
    """Side of the input in pixels."""
    return args.input_size or entry.input_size


def check_inputs(args: Namespace, entry: models.ModelEntry) -> None:
    """Refuse what can be refused before any weights are downloaded or read.

    Raises:
        DataError, ScheduleError: the data folder or the schedule is not there.
    """
    data_root(args.data_set, args.data_path)
    chosen_schedule(args, entry)


def read_weights(args: Namespace, entry: models.ModelEntry, runtime: Runtime) -> tuple[models.StateDict | None, str]:
    """The tensors that `--checkpoint` names, None for none, and what to call them in messages.

    Raises:
        CheckpointError: they cannot be fetched or read.
    """
    if args.checkpoint == FROM_SCRATCH:
        return None, FROM_SCRATCH
    with local_main_first(runtime.processes):  # one download for all processes of a machine
        source = models.official_file(entry, runtime.bar) if args.checkpoint == OFFICIAL else args.checkpoint
        return models.read_state(source, runtime.bar), str(source)


def trained_model(
    args: Namespace, entry: models.ModelEntry, runtime: Runtime, **options: Any
) -> tuple[nn.Module, LabelledDataset]:
    """The plain model with the weights that the flags name, and the validation split it fits.

    Raises:
        CheckpointError, DataError, ScheduleError, UsageError: one of them is not there or does not fit.
    """
    check_inputs(args, entry)
    state, name = read_weights(args, entry, runtime)
    dataset = eval_dataset(args, entry, None if state is None else models.head_classes(state))
    return plain_model(args, entry, state, name, len(dataset.classes), **options), dataset


def plain_model(
    args: Namespace, entry: models.ModelEntry, state: models.StateDict | None, name: str, classes: int, **options: Any
) -> nn.Module:
    """The plain model with what `read_weights` gave; with as many classes as that has, fresh with `classes`.

    Raises:
        CheckpointError, UsageError: the weights, or the input's size, do not fit.
    """
    head = None if state is None else models.head_classes(state)
    model = dense_model(entry, input_size_of(args, entry), num_classes=head or classes, **options)
    if state is not None:
        models.fit_state(model, state, name)
    return model


def check_targets(args: Namespace, entry: models.ModelEntry, classes: int) -> None:
    """Refuse what no search of the model can meet, before anything is searched.

    Raises:
        BudgetError: gives the reachable range.
        UsageError: a granularity that leaves a single count to choose.
    """
    with torch.device("meta"):  # shapes are enough to cost it
        compressed = patch(dense_model(entry, input_size_of(args, entry), num_classes=classes), entry, args)
    fewest = min(len(rate) for rate in compressed.arch_parameters())
    if fewest < 2:
        limit = compressed.compression.patches(compressed.compression.space.searchable[0])
        raise UsageError(f"--granularity {args.granularity}: accepted: from 1 to {limit - 1}")
    for target in targets_of(args):
        check_target(target * 1e9, compressed.compression.space, compressed.flops_at)


def dense_model(entry: models.ModelEntry, input_size: int, **options: Any) -> nn.Module:
    """The plain timm model of a zoo entry for square images of `input_size`, with fresh weights.

    Raises:
        UsageError: the patches of a ViT do not tile the input.
    """
    if entry.family == "caformer":  # its convolutions take any size
        return models.create(entry, **options)
    model: Any = models.create(entry, img_size=input_size, **options)
    patch = model.patch_embed.patch_size[0]
    if input_size % patch:
        raise UsageError(f"--input-size {input_size}: accepted: a multiple of {patch}, the side of a patch")
    return model


def chosen_schedule(args: Namespace, entry: models.ModelEntry) -> tuple[diffrate.Schedule | None, str]:
    """The schedule that the flags name, None for none, and what to call it in messages.

    Raises:
        ScheduleError: no such schedule, or a malformed one.
    """
    if not args.load_compression_rate:
        return None, ""
    target = args.target_flops[0] if args.target_flops else None
    if target is None and entry.name == SAMPLE_MODEL and args.compression_rate_file is None:
        target = TARGET_OF_SAMPLE
    file = rate_file(args)
    return find_schedule(file, entry.schedule_key, target), f"{file}: {entry.schedule_key}: "


def rate_file(args: Namespace) -> Path:
    """Where schedules are read from."""
    return args.compression_rate_file or PROJECT_RATES


def targets_of(args: Namespace) -> list[float]:
    """The budgets to meet, in GFLOPs; the sample has one of its own."""
    return args.target_flops or [TARGET_OF_SAMPLE]


def compress(model: nn.Module, entry: models.ModelEntry, args: Namespace) -> diffrate.CompressedModel:
    """Patch `model` in place, at the schedule that the flags name, or keeping every token.

    Raises:
        ScheduleError: no such schedule, or one that does not fit.
    """
    schedule, where = chosen_schedule(args, entry)
    compressed = patch(model, entry, args)
    if schedule is None:
        schedule = compressed.dense_schedule()
    compressed.check(schedule, where)
    compressed.set_kept_num(schedule.prune, schedule.merge)
    return compressed


def patch(model: nn.Module, entry: models.ModelEntry, args: Namespace) -> diffrate.CompressedModel:
    """Patch `model` in place, ready to search.

    Raises:
        RateError: a granularity that leaves no choice.
    """
    steps = (args.granularity, args.granularity)
    if entry.family == "caformer":
        return diffrate.patch.caformer(model, *steps, input_size=input_size_of(args, entry))
    return PATCHES[entry.family](model, *steps)


def start_rates(compressed: diffrate.CompressedModel, entry: models.ModelEntry, args: Namespace) -> None:
    """Start the rates at the schedule of `--init_compression_rate`, if there is one.

    Raises:
        ScheduleError: no such schedule, or one that does not fit.
    """
    if args.init_compression_rate is None:
        return
    file = rate_file(args)
    schedule = find_schedule(file, entry.schedule_key, args.init_compression_rate)
    compressed.check(schedule, f"{file}: {entry.schedule_key}: ")
    compressed.compression.start_at(schedule)


def eval_dataset(args: Namespace, entry: models.ModelEntry, head: int | None) -> LabelledDataset:
    """The validation split, labelled for a model with `head` classes."""
    transform = eval_transform(input_size_of(args, entry), args.crop_pct or entry.crop_pct)
    return build_dataset(args.data_set, args.data_path, "val", transform, head, bar=bar_fits(args.quiet))


def train_dataset(args: Namespace, entry: models.ModelEntry) -> LabelledDataset:
    """The training split with the augmentation that the flags ask for.

    Raises:
        UsageError: an augmentation policy that timm does not know.
        DataError: as `build_dataset`.
    """
    try:
        transform = train_transform(input_size_of(args, entry), build_augmentation(args))
    except (AssertionError, KeyError, ValueError) as error:  # how timm refuses a policy
        raise UsageError(f"--aa {args.aa}: {error}; accepted: a policy of timm, or none") from error
    return build_dataset(args.data_set, args.data_path, "train", transform, bar=bar_fits(args.quiet))


def check_same_classes(train: LabelledDataset, val: LabelledDataset) -> None:
    """Refuse splits whose labels mean different things.

    Raises:
        DataError: names the first classes that only one split has.
    """
    differing = sorted(set(train.classes) ^ set(val.classes))
    if differing:
        raise DataError(
            f"train and val differ in classes, first {', '.join(differing[:3])}; accepted: the same in both"
        )


def eval_loader(dataset: LabelledDataset, args: Namespace, runtime: Runtime) -> DataLoader[Any]:
    """Every image once, over all processes."""
    sampler = eval_sampler(len(dataset), runtime.processes.rank, runtime.processes.world)
    return _loader(dataset, sampler, args, runtime, drop_last=False)


def train_loader(dataset: LabelledDataset, args: Namespace, runtime: Runtime) -> DataLoader[Any]:
    """Whole batches in an order that each epoch draws afresh.

    Raises:
        UsageError: fewer images than one batch over all processes.
    """
    processes = runtime.processes
    samples = SeededSamples(dataset)
    sampler = train_sampler(samples, processes.rank, processes.world, args.repeated_aug, args.seed)
    loader = _loader(samples, sampler, args, runtime, drop_last=True)
    if len(loader) == 0:
        raise DataError(f"--batch-size {args.batch_size}: accepted: up to {len(sampler)}, the images of a process")
    return loader


def _loader(dataset: Any, sampler: Sampler[Any], args: Namespace, runtime: Runtime, drop_last: bool) -> DataLoader[Any]:
    workers = args.num_workers
    if workers is None:
        workers = max(1, usable_cores() // runtime.processes.local_world)
    return DataLoader(
        dataset,
        sampler=sampler,
        batch_size=args.batch_size,
        drop_last=drop_last,
        num_workers=workers,  # they start with the first batch and live on across epochs
        persistent_workers=workers > 0,
        pin_memory=args.pin_mem and runtime.device.type == "cuda",
        generator=torch.Generator().manual_seed(args.seed + runtime.processes.rank),
    )
