"""Recipes: of a search, the paper's for its models, another for all that have none of their own; and of a training,
by where it starts, and by how many images there are."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from typing import Any

from cli.flags import parse_flags
from cli.runtime import Runtime
from cli.settings import DEFAULT_BATCH, FROM_SCRATCH, RecipeSettings, Settings
from diffrate.schedule import PUBLISHED
from diffrate.searching.settings import CALIBRATED, SearchSettings, flag_of
from engine import SCALED_BATCH, step_rate
from models.zoo import ModelEntry
from utils import UsageError

PAPER = RecipeSettings(
    loss=SearchSettings.loss, transform="train", budget=SearchSettings.budget, method=SearchSettings.method
)
# DeiT's recipe is for 1.28 million images. Up to so many, its augmentation and learning rate leave too few steps.
FEW = 50_000
MILD = {"aa": "none", "mixup": 0.0, "cutmix": 0.0, "reprob": 0.0, "repeated_aug": False, "drop_path": 0.0}
# Epochs, and the rate of a step whatever its images: from fresh weights, and from trained ones.
FEW_FROM_SCRATCH, FEW_FROM_WEIGHTS = {"epochs": 100, "lr": 1e-3}, {"lr": 5e-5}
MANY_FROM_SCRATCH, MANY_FROM_WEIGHTS = {"epochs": 300, "lr": 5e-4}, {"lr": 1e-5}  # DeiT's own, and the paper's
FALLING = ("cosine", "tanh", "poly")  # schedules that end at --min-lr
ENDS = 0.1  # of the rate, where that lies below the usual end
log = logging.getLogger(__name__)
OTHERS = RecipeSettings(loss="distill", transform="eval", budget="held", method=CALIBRATED)


def with_recipe(settings: Settings, entry: ModelEntry) -> Settings:
    """`settings` with what the flags leave open of a search as the model has it.

    Images as in evaluation come once each, and are neither augmented nor mixed.

    Raises:
        UsageError: images that are mixed in pairs, and batches of no pairs; an augmentation that no image would have.
    """
    # What is to meet a time has no recipe in the paper.
    timed = any(target.timed for target in settings.model.targets)
    asked, usual = settings.recipe, PAPER if entry.published and not timed else OTHERS
    recipe = replace(usual, **{name: value for name, value in vars(asked).items() if value is not None})
    if recipe.method == CALIBRATED and asked.loss == SearchSettings.loss:
        raise UsageError("--search_loss labels goes with --search gradient; hard counts are held to no labels")
    augmentation, mixing = settings.augmentation, settings.mixing
    if recipe.transform == "eval":
        _refuse_augmentation(settings)
        augmentation, mixing = replace(augmentation, repeated=False), replace(mixing, mixup=0.0, cutmix=0.0)
    if mixing.mixes and settings.data.batch_size % 2:
        raise UsageError(f"--batch-size {settings.data.batch_size}: accepted: an even number with --mixup or --cutmix")
    rule = settings.search.rule or (PUBLISHED if entry.published else None)
    search = replace(settings.search, loss=recipe.loss, budget=recipe.budget, method=recipe.method, rule=rule)
    return replace(settings, recipe=recipe, search=search, augmentation=augmentation, mixing=mixing)


def _refuse_augmentation(settings: Settings) -> None:
    """Refuse flags that say how images are augmented or mixed, where none are. Labels may be smoothed all the same."""
    usual = parse_flags(())  # the sample has defaults of its own
    for part, other in ((settings.augmentation, usual.augmentation), (settings.mixing, usual.mixing)):
        for item in fields(part):
            value, defaults = getattr(part, item.name), (item.default, getattr(other, item.name))
            if value and value not in defaults and item.name != "smoothing":
                raise UsageError(f"{flag_of(item)}: found --search_transform eval; accepted: --search_transform train")


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
