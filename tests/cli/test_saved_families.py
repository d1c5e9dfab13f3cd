"""Files of `diffrate.save` on the command line, of models whose buffers and arguments are of other kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import diffrate
import models
from cli.flags import parse_flags
from cli.model import chosen_entry
from tests.constructions import build, since, size_of
from tests.library.foreign_models import foreign


@pytest.mark.parametrize(
    "name",
    [
        *("rope_dinov3_biases", "rope_fewer_keys", "relative_table", "distilled"),
        pytest.param("naflex_rope", marks=since("1.0.31")),  # older timm does not keep what it is given
    ],
)
def test_a_saved_model_is_built_again_from_its_entry(name: str, tmp_path: Path) -> None:
    come_back(diffrate.patch.vit(build(name).float(), 1, 1, size_of(name)), size_of(name), tmp_path)


@pytest.mark.parametrize("name", ["torchvision", "dinov2", "vit_pooler", "dinov3"])
def test_a_saved_model_of_another_library_is_built_again(name: str, tmp_path: Path) -> None:
    come_back(diffrate.patch.vit(diffrate.convert(foreign(name)), 1, 1), (32, 32), tmp_path)


def come_back(model: Any, size: tuple[int, int], tmp_path: Path) -> None:
    """Save `model`, for images of `size`, build it again as the command line does, and compare."""
    file = tmp_path / "model.safetensors"
    model.pretrained_cfg = {**model.pretrained_cfg, "crop_mode": "squash"}
    schedule = model.dense_schedule()
    model.set_kept_num(schedule.prune, schedule.merge)
    diffrate.save(model, file)
    entry = chosen_entry(parse_flags(["--eval", "--checkpoint", str(file), "--data-path", str(tmp_path)]).model)
    assert (entry.input_size, entry.crop_mode) == (size, "squash")
    again = models.create(entry).eval()
    models.load_weights(again, file)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(again(images), model.eval()(images, return_flop=False), atol=1e-5, rtol=1e-4)
