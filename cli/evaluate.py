"""`--eval`, `--finetune`, `--baseline`, `--export` and `--list-models`: score a model as it is, trained, or at uniform
schedules; write it for another runtime; print the names of all models."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import diffrate
import models
from cli import data, results
from cli.flags import parse_flags
from cli.model import (
    Plan,
    Weights,
    chosen_entry,
    compressed,
    for_inference,
    meta_model,
    named_model,
    output_names,
    patched,
    planned,
    read_weights,
    trained_model,
)
from cli.runtime import AMP_DTYPES, Runtime
from cli.schedules import budgets_of, kept_as
from cli.settings import DEFAULT_BATCH, FROM_SCRATCH, OFFICIAL, Settings
from datasets import DataError, has_validation
from diffrate.budget import Budget, baseline_schedule
from diffrate.device import generators_kept, shapes_alone
from diffrate.files.export import LEAST_IMAGES
from diffrate.files.graph import Normalization
from diffrate.files.header import is_saved_model
from diffrate.latency.measure import confirmed
from diffrate.schedule import PUBLISHED, Schedule, fields_of
from engine import SCALED_BATCH, Training, dense_copy, evaluate, log_counts, read_training, step_rate
from utils import UsageError

COMPARED = 32  # images of --data-path that an exported file is compared on
# DeiT's recipe is for 1.28 million images. Up to so many, its augmentation and learning rate leave too few steps.
FEW = 50_000
MILD = {"aa": "none", "mixup": 0.0, "cutmix": 0.0, "reprob": 0.0, "repeated_aug": False, "drop_path": 0.0}
# Epochs, and the rate of a step whatever its images: from fresh weights, and from trained ones.
FEW_FROM_SCRATCH, FEW_FROM_WEIGHTS = {"epochs": 100, "lr": 1e-3}, {"lr": 5e-5}
MANY_FROM_SCRATCH, MANY_FROM_WEIGHTS = {"epochs": 300, "lr": 5e-4}, {"lr": 1e-5}  # DeiT's own, and the paper's
FALLING = ("cosine", "tanh", "poly")  # schedules that end at --min-lr
ENDS = 0.1  # of the rate, where that lies below the usual end
log = logging.getLogger(__name__)


def run(settings: Settings, runtime: Runtime) -> None:
    """Score, report, and with `--save` leave the model in a file."""
    plan, plain, weights, val = trained_model(settings, runtime)
    assert val is not None, "labels are needed"
    data.warn_of_turned(settings, runtime, val)
    model = compressed(plain, settings.model, plan, weights)
    results.use_searched(model, settings, plan.entry, runtime)
    classes = output_names(val, model.num_classes, weights)
    results.save_model(settings, plan.entry, model, classes, runtime)  # before its weights change precision
    running, inside = for_inference(model, settings.run.compile, settings.data.batch_size, runtime)
    loader = data.eval_loader(val, settings, runtime)
    scores = evaluate(running, loader, inside, multi_label=settings.model.multi_label)
    results.report("eval", plan.entry, model, scores, runtime)


def run_finetune(settings: Settings, runtime: Runtime) -> None:
    """Train, score, and leave checkpoints in the output folder, and with `--save` the model in a file."""
    entry = chosen_entry(settings.model)
    plan = planned(settings, entry)
    weights = read_weights(settings.model, plan, runtime)
    # The data decide the classes: a head that does not fit starts fresh.
    train, val = data.train_dataset(settings, entry), data.eval_dataset(settings, entry)
    data.check_same_classes(train, val)
    if len(train.classes) == 1:
        raise UsageError(f"--data-path {settings.data.path}: found one class; accepted: two or more, to tell apart")
    fewer = with_augmentation(settings, len(train))
    if fewer != settings:
        settings, train = fewer, data.train_dataset(fewer, entry)
    data.warn_of_turned(settings, runtime, train, val)
    loader = data.train_loader(train, settings, runtime)
    settings = with_rate(settings, len(train), loader.batch_size or 1, runtime)
    model = _finetuned(settings, plan, weights, len(train.classes)).to(runtime.device)
    teacher = None if settings.training.distill is None else dense_copy(model)
    flags = results.training_flags(settings, entry, model, len(loader), teacher)
    resume = results.resume_path(settings, runtime)
    if resume is not None:
        results.check_flags(resume, read_training(resume), flags)
    training = Training(model, teacher, loader, data.eval_loader(val, settings, runtime), settings, flags, runtime)
    if resume is not None:
        training.restore(resume)
    results.save_model(settings, entry, training.run(), output_names(val, len(train.classes)), runtime)


def _finetuned(settings: Settings, plan: Plan, weights: Weights, classes: int) -> diffrate.CompressedModel:
    """The model to train, with a fresh head where the weights have none or the data have other classes."""
    size, drop_path = data.input_size_of(settings.model, plan.entry), settings.model.drop_path
    entry, state = plan.entry, weights.state
    if entry.features:  # a classifier takes the place of what makes features of pooled tokens
        entry = replace(entry, own={**entry.own, "feature_head": None})
        state = None if state is None else {key: state[key] for key in state if not key.startswith("head.")}
    model = models.create(entry, size, num_classes=classes, drop_path_rate=drop_path)
    log.info("training from %s", weights.name)
    if state is not None:
        fitted = models.fit_state(model, state, weights.name, fresh_head=True)
        if settings.training.distill is not None and fitted.reinitialized:
            said = f"{fitted.notes[0]}, and teach nothing"
            raise UsageError(f"--distill: {said}; accepted: weights with the data's classes")
        for note in fitted.notes:
            log.info(note)
    return compressed(model, settings.model, plan, weights)


def with_augmentation(settings: Settings, images: int) -> Settings:
    """`settings` with what the flags leave open of a training on so many images, but for its learning rate."""
    usual = {name: value for name, value in _usual(settings, images).items() if name != "lr"}  # goes by the batches
    return parse_flags(settings.run.words, usual)


def with_rate(settings: Settings, images: int, batch_size: int, runtime: Runtime) -> Settings:
    """`settings` with all that the flags leave open of a training, at `batch_size` images a step on each process.

    Raises:
        UsageError: the learning rate lies below the end that was asked for.
    """
    usual, step, training = _usual(settings, images), batch_size * runtime.processes.world, settings.training
    if not training.unscaled:
        usual["lr"] *= SCALED_BATCH / step if images <= FEW else max(1.0, DEFAULT_BATCH / step)
    settings = parse_flags(settings.run.words, usual)
    training = settings.training
    rate, least = step_rate(training, step), training.least_learning_rate
    scaled = "" if training.unscaled else f" (--lr {training.learning_rate:.3g} for {SCALED_BATCH})"
    said = f"learning rate {rate:.3g} at {step} images a step{scaled}"
    if rate < least and training.schedule in FALLING:
        usual |= {"min_lr": ENDS * rate, "warmup_lr": ENDS * rate}
        settings = parse_flags(settings.run.words, usual)
        if settings.training.least_learning_rate == least:
            raise UsageError(f"--min-lr {least:g}: found a {said}; accepted: up to that, or another --lr")
        if runtime.processes.is_main:
            log.warning("%s lies below the usual --min-lr %g, and ends at %.3g", said, least, ENDS * rate)
    left = " ".join(_flag(name, value) for name, value in usual.items() if settings.run.flags[name] == value)
    log.info("%d images, %d epochs, %s; by default %s", images, training.epochs, said, left or "nothing")
    return settings


def _usual(settings: Settings, images: int) -> dict[str, Any]:
    """The defaults of a training on so many images."""
    scratch = settings.model.checkpoint == FROM_SCRATCH
    if images > FEW:
        return dict(MANY_FROM_SCRATCH if scratch else MANY_FROM_WEIGHTS)
    return MILD | (FEW_FROM_SCRATCH if scratch else FEW_FROM_WEIGHTS)


def _flag(name: str, value: Any) -> str:
    """A flag with its value, as it would be typed."""
    dashed = name.replace("_", "-")
    if value is False:
        return f"--no-{dashed}"
    return f"--{dashed} {value:.3g}" if isinstance(value, float) else f"--{dashed} {value}"


def run_baseline(settings: Settings, runtime: Runtime) -> None:
    """One schedule for each target, and one line of scores where the model has a head."""
    entry, checkpoint, kind = chosen_entry(settings.model), settings.model.checkpoint, settings.run.baseline
    assert kind is not None, "the mode that is asked for"
    loader = None
    if entry.headless and (checkpoint == OFFICIAL or is_saved_model(checkpoint)):
        if any(target.timed for target in settings.model.targets):
            raise UsageError(f"--baseline {kind} of a model without a head: accepted: --target_flops")
        model = meta_model(settings.model, entry)  # the schedules alone need neither weights nor images
    else:
        _, plain, _, val = trained_model(settings, runtime)
        assert val is not None, "labels are needed"
        data.warn_of_turned(settings, runtime, val)
        model = patched(plain, settings.model).to(runtime.device)
        loader = data.eval_loader(val, settings, runtime)
    space = model.compression.space.ruled(settings.search.rule or PUBLISHED)

    def uniform(budget: Budget, *_: Schedule) -> Schedule:
        return baseline_schedule(kind, space, budget)  # also of a corrected budget

    budgets, table = budgets_of(settings, model, runtime)
    for target, budget in budgets.items():
        schedule, speed = uniform(budget), None
        if table is not None and budget.timed:
            every = model.compression.space.every_block()
            with generators_kept():
                schedule, speed = confirmed(model, schedule, every, budget, table, uniform)
        if loader is None:
            log_counts(fields_of(schedule))
            log.info("* flops %.3f (no head to score with)", model.flops_at(schedule) / 1e9)
        else:
            model.schedule = schedule
            scores = evaluate(model, loader, runtime, multi_label=settings.model.multi_label)
            results.report(f"baseline {kind}", entry, model, scores, runtime)
        if speed is not None:
            log.info(speed.line())
        results.save_schedules(settings, entry, kept_as(target, model, schedule), schedule, runtime)


def run_export(settings: Settings, runtime: Runtime) -> None:
    """Write the file that `--export` names, and say how it compares with the model; main process only."""
    path, folder, entry = settings.run.export, settings.data.path, chosen_entry(settings.model)
    assert path is not None, "the mode that is asked for"
    model, names = named_model(settings, entry, runtime)
    if not runtime.processes.is_main:
        return
    images = None
    if folder is not None:
        split = "val" if has_validation(settings.data.data_set, folder) else None
        images = torch.stack([image for image, _ in data.some_images(settings, entry, COMPARED, split)])
        if len(images) < LEAST_IMAGES:
            raise DataError(f"--data-path {folder}: found {len(images)} images; accepted: {LEAST_IMAGES} or more")
        log.info("comparing on %d images of %s", len(images), folder)
        if settings.run.export_normalize:
            normalization = Normalization(entry.mean, entry.std)
            images = images * normalization.std + normalization.mean  # the file does what the transform has done
    made = diffrate.export(
        model,
        path,
        dtype=AMP_DTYPES.get(settings.run.export_dtype) or torch.float32,
        normalize=settings.run.export_normalize,
        opset=settings.run.export_opset,
        name=entry.name,
        classes=names or None,
        mean=entry.mean,
        std=entry.std,
        seed=settings.run.seed,
        images=images,
    )
    gflops, agreement = made.metadata.gflops, made.agreement
    log.info("exported %s: %.3f GFLOPs, %.1f MiB", path, gflops, made.size / 2**20)
    log.info(agreement.line())
    figures = {name: getattr(agreement, name) for name in ("difference", "top1", "images", "ties", "tied")}
    runtime.record({"mode": "export", "model": entry.name, "file": str(path), "gflops": gflops, **figures})


def run_list_models(settings: Settings, runtime: Runtime) -> None:
    """Print the names that match, a line each, as soon as each is known."""
    pattern = settings.run.pattern
    assert pattern is not None, "the mode that is asked for"
    if not runtime.processes.is_main:
        return
    found = False
    try:
        for name in models.supported_names(pattern, diffrate.patch.families(), _is_supported):
            print(name, flush=True)  # for pipes: not the log, which has the time before each line
            found = True
    except BrokenPipeError:  # as of `head`: nobody reads on, and Python would complain when it closes the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if not found:
        raise UsageError(
            f"--list-models {pattern}: no model that can be compressed; accepted: a pattern such as 'vit_*'"
        )


def _is_supported(model: nn.Module) -> bool:
    try:
        with shapes_alone():
            diffrate.patch.vit(model)
    except diffrate.UnsupportedModelError:
        return False
    return True
