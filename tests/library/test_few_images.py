"""The search at hard counts with a hundred images and no labels, with a head and without: held to fresh images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import diffrate
import models
import sample
from cli.data import View, eval_transform
from datasets import build_dataset, build_images
from diffrate.budget import Budget, meets_budget, uniform_schedules
from diffrate.searching.teacher import losses_at

WEIGHTS = Path(sample.__file__).with_name(f"{sample.MODEL}.pth")


def images(split: str, count: int) -> list[torch.Tensor]:
    """Batches of digits at even steps through a split, `[50, 3, 28, 28]`."""
    entry = models.entry_of(sample.MODEL)
    view = View(entry.input_size, entry.crop_pct, entry.mean, entry.std, entry.interpolation, entry.crop_mode)
    transform = eval_transform(view)
    digits = (
        build_images("SAMPLE", None, transform) if split == "train" else build_dataset("SAMPLE", None, split, transform)
    )
    step = len(digits) // count
    return list(torch.stack([digits[place * step][0] for place in range(count)]).split(50))


@pytest.mark.parametrize("head", [True, False], ids=["head", "no head"])
def test_a_hundred_images_beat_every_uniform_schedule(head: bool) -> None:
    model = models.create(models.entry_of(sample.MODEL), models.entry_of(sample.MODEL).input_size)
    models.fit_state(model, torch.load(WEIGHTS, weights_only=True)["model"], WEIGHTS.name)
    if not head:
        model.reset_classifier(0)
    patched = diffrate.patch.vit(model)
    target = 0.5 * patched.flops_at(patched.dense_schedule())
    found = diffrate.search(patched, images("train", 100), target_flops=target, method="calibrated", work=300)
    assert meets_budget(found.flops, target)
    uniform = list(uniform_schedules(patched.compression.space, Budget(patched.flops_at, target)).values())
    losses = losses_at(patched, [found.schedule, *uniform], images("val", 200))
    assert losses[0] < min(losses[1:])
