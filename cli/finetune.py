"""`--finetune`: train the weights at fixed rates, or dense, and score them after each epoch."""

from __future__ import annotations

import logging

import diffrate
import models
from cli.data import (
    check_same_classes,
    eval_dataset,
    eval_loader,
    input_size_of,
    train_dataset,
    train_loader,
    warn_of_turned,
)
from cli.model import Plan, Weights, checked_plan, chosen_entry, compressed, output_names, read_weights
from cli.recipe import with_augmentation, with_rate
from cli.results import save_model
from cli.resume import check_training, resume_path, training_flags
from cli.runtime import Runtime
from cli.settings import Settings
from cli.training import dense_copy
from engine import Training, finetune
from utils import UsageError

log = logging.getLogger(__name__)


def run(settings: Settings, runtime: Runtime) -> None:
    """Train, score, and leave checkpoints in the output folder, and with `--save` the model in a file."""
    entry = chosen_entry(settings.model)
    plan = checked_plan(settings, entry)
    weights = read_weights(settings.model, plan, runtime)
    # The data decide the classes: a head that does not fit starts fresh.
    train, val = (dataset(settings, entry, head=None, names=None) for dataset in (train_dataset, eval_dataset))
    check_same_classes(train, val)
    if len(train.classes) == 1:
        raise UsageError(f"--data-path {settings.data.path}: found one class; accepted: two or more, to tell apart")
    fewer = with_augmentation(settings, len(train))
    if fewer != settings:
        settings, train = fewer, train_dataset(fewer, entry, head=None, names=None)
    warn_of_turned(settings, runtime, train, val)
    classes = len(train.classes)
    loader = train_loader(train, settings, runtime)
    settings = with_rate(settings, len(train), loader.batch_size or 1, runtime)
    model = _model(settings, plan, weights, classes).to(runtime.device)
    teacher = None if settings.training.distill is None else dense_copy(model)
    flags = training_flags(settings, entry, model, len(loader), teacher)
    resume = resume_path(settings, runtime)
    if resume is not None:
        check_training(resume, flags)
    training = Training(
        settings=settings.training,
        mixing=settings.mixing,
        train=loader,
        val=eval_loader(val, settings, runtime),
        classes=classes,
        seed=settings.run.seed,
        compiled=settings.run.compile,
        runtime=runtime,
        teacher=teacher,
    )
    trained = finetune(model, training, flags, resume)
    save_model(settings, entry, trained, output_names(val, classes), runtime)


def _model(settings: Settings, plan: Plan, weights: Weights, classes: int) -> diffrate.CompressedModel:
    """The model to train, with a fresh head where the weights have none or the data have other classes.

    Raises:
        UsageError: a fresh head, where it is to be taught by the dense model.
    """
    size, drop_path = input_size_of(settings.model, plan.entry), settings.model.drop_path
    model = models.create(plan.entry, size, num_classes=classes, drop_path_rate=drop_path)
    notes: tuple[str, ...] = ("training from scratch",)
    if weights.state is not None:
        report = models.fit_state(model, weights.state, weights.name, fresh_head=True)
        notes = report.notes
        if settings.training.distill is not None and report.reinitialized:
            raise UsageError(f"--distill: {notes[0]}, and teach nothing; accepted: weights with the data's classes")
    for note in notes:
        log.info(note)
    return compressed(model, settings.model, plan, weights)
