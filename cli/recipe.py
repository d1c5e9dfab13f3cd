"""The recipe of a search: the paper's for its models, another for all that have none of their own."""

from __future__ import annotations

from dataclasses import replace

from cli.settings import RecipeSettings, Settings
from diffrate.searching.settings import SearchSettings
from models.zoo import ModelEntry
from utils import UsageError

PAPER = RecipeSettings(
    loss=SearchSettings.loss, transform="train", start="flat", budget=SearchSettings.budget, method="gradient"
)
OTHERS = RecipeSettings(loss="distill", transform="eval", start="flat", budget="held", method="calibrated")


def with_recipe(settings: Settings, entry: ModelEntry) -> Settings:
    """`settings` with what the flags leave open of a search as the model has it.

    Images as in evaluation come once each, and are not mixed.

    Raises:
        UsageError: images that are mixed in pairs, and batches of no pairs.
    """
    # What is to meet a time has no recipe in the paper.
    timed = any(target.timed for target in settings.model.targets)
    asked, usual = settings.recipe, PAPER if entry.published and not timed else OTHERS
    recipe = RecipeSettings(
        loss=asked.loss or usual.loss,
        transform=asked.transform or usual.transform,
        start=asked.start or usual.start,
        budget=asked.budget or usual.budget,
        method=asked.method or usual.method,
        minutes=asked.minutes,
    )
    if recipe.method == "calibrated" and asked.loss == SearchSettings.loss:
        raise UsageError("--search_loss labels goes with --search gradient or both; hard counts are held to no labels")
    assert recipe.loss is not None
    assert recipe.budget is not None
    augmentation, mixing = settings.augmentation, settings.mixing
    if recipe.transform == "eval":
        augmentation, mixing = replace(augmentation, repeated=False), replace(mixing, mixup=0.0, cutmix=0.0)
    if mixing.mixes and settings.data.batch_size % 2:
        raise UsageError(f"--batch-size {settings.data.batch_size}: accepted: an even number with --mixup or --cutmix")
    search = replace(settings.search, loss=recipe.loss, budget=recipe.budget)
    return replace(settings, recipe=recipe, search=search, augmentation=augmentation, mixing=mixing)
