"""What tests of saved models share: models that remove tokens, and whether a loaded one is the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor

from diffrate.files.header import SavedModelError
from diffrate.patch.base import CompressedModel
from diffrate.patch.shapes import input_size

needs_arguments = pytest.mark.skipif(
    not hasattr(timm.create_model("test_vit"), "_model_args"), reason="needs a timm that keeps what it was given"
)


def scheduled(model: CompressedModel) -> CompressedModel:
    """`model` with some tokens fewer in every block that may lose some."""
    space = model.compression.space
    counts = {"prune": list(space.limits), "merge": list(space.limits)}
    for block in space.searchable:
        counts["prune"][block] = max(space.least, space.limits[block] - 5 * block)
        counts["merge"][block] = max(space.least, space.limits[block] - 5 * block - 3)
    model.set_kept_num(counts["prune"] if space.prunes else None, counts["merge"])
    return model


@torch.no_grad()
def logits(model: CompressedModel) -> Tensor:
    """Of two images that are always the same."""
    said = input_size(model)
    images = torch.randn(2, *said, generator=torch.Generator().manual_seed(1))
    return model(images.to(next(model.parameters()).dtype), return_flop=False)


def assert_same(loaded: CompressedModel, model: CompressedModel) -> None:
    """Everything a caller can see of the two is equal, to the last bit."""
    assert type(loaded) is type(model)
    assert not loaded.training
    assert loaded.get_kept_num() == model.get_kept_num()
    assert loaded.compression.granularity == model.compression.granularity
    assert loaded.compression.space == model.compression.space
    assert loaded.image_size == model.image_size
    assert loaded.flops() == model.flops()
    ours, theirs = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert parameter.dtype == ours[name].dtype, name
        assert torch.equal(parameter, ours[name].cpu()), name
    assert torch.equal(logits(loaded), logits(model.eval()))


def refusal(act: Callable[[], object]) -> str:
    """The one line with which `act` is refused."""
    with pytest.raises(SavedModelError) as caught:
        act()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message
