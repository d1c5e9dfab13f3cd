"""No mode flag: search the kept counts for each of `--target_flops` in turn."""

from __future__ import annotations

import copy

import torch
from torch import nn

import diffrate
from cli.data import check_same_classes, eval_loader, train_dataset, train_loader
from cli.entry import patched
from cli.model import check_targets
from cli.results import log_found, save_model, save_schedules
from cli.resume import check_search, resume_path, search_identity
from cli.schedules import start_schedule, targets_of
from cli.search_report import Reporter
from cli.settings import Settings
from cli.trained import Trained, trained_model
from datasets import ImageLoader
from engine import evaluate
from processes.runtime import Runtime
from training.checkpoint import LAST
from training.recipe import build_criterion, build_mixup
from utils import StopSignals, UsageError


def run(settings: Settings, runtime: Runtime) -> None:
    """Search, and leave schedules, checkpoints and plots in the output folder."""
    trained = trained_model(settings, runtime, drop_path_rate=settings.model.drop_path)
    check_targets(settings.model, trained.entry, trained.weights.head or len(trained.val.classes))
    train = train_dataset(settings, trained.entry, trained.weights.head, trained.weights.classes)
    check_same_classes(train, trained.val)
    loaders = train_loader(train, settings, runtime), eval_loader(trained.val, settings, runtime)
    batches, accumulate = len(loaders[0]), settings.search.accumulate
    if accumulate > batches:
        raise UsageError(f"--accum-steps {accumulate}: accepted: up to {batches}, the batches of an epoch")
    count = max(1, len(settings.model.targets))
    for index in range(count):
        # A huge model needs no second copy for the last.
        model = trained.model if index == count - 1 else copy.deepcopy(trained.model)
        _search_one(index, settings, trained, model, loaders, runtime)


def _search_one(
    index: int,
    settings: Settings,
    trained: Trained,
    plain: nn.Module,
    loaders: tuple[ImageLoader, ImageLoader],
    runtime: Runtime,
) -> None:
    """The search for one target, from its checkpoint if there is one, and what it leaves behind."""
    entry, search = trained.entry, settings.search
    model = patched(plain, settings.model).to(runtime.device)
    target = targets_of(settings.model, model)[index]
    # Several targets have a folder each for their checkpoints, and one file for their schedules.
    inner = runtime.inside(f"target_{target:g}") if len(settings.model.targets) > 1 else runtime
    assert inner.output_dir is not None, "flags make sure of a folder"
    train, val = loaders
    assert train.batch_size is not None
    identity = search_identity(settings, entry, target, train.batch_size)
    resume = resume_path(settings, inner)
    if resume is not None:
        check_search(resume, identity)
    start = start_schedule(settings.model, entry, model)
    accumulate = search.accumulate
    with StopSignals() as signals:
        found = diffrate.search(
            model,
            train,
            target_flops=target * 1e9,
            epochs=search.epochs,
            val=val,
            criterion=build_criterion(settings.mixing),
            mixup=build_mixup(settings.mixing, model.num_classes),
            flops_loss=search.flops_loss,
            flops_weight=search.flops_weight,
            warmup=search.warmup,
            learning_rate=search.learning_rate,
            least_learning_rate=search.least_learning_rate,
            accumulate=accumulate,
            start=None if start is None else start.schedule,
            precision=runtime.amp or torch.float32,
            seed=search.seed,
            callback=Reporter(model, target * 1e9, loaders, accumulate, inner, signals),
            checkpoint=inner.output_dir / LAST,
            resume=resume,
            save_every=inner.print_freq,
            notes={"flags": {**settings.run.flags, **identity}},
        )
    file = save_schedules(settings, entry, target, found.schedule, runtime)
    assert found.scores is not None, "there is a validation split"
    dense = model.dense_schedule()
    model.set_kept_num(dense.prune, dense.merge)
    scores = found.scores, evaluate(model, val, runtime)
    model.set_kept_num(found.schedule.prune, found.schedule.merge)
    save_model(settings, entry, model, trained.classes, runtime)
    log_found(settings, entry, target, model, found.schedule, scores, file, runtime)
