"""How much each block can lose alone: the loss against the dense model's outputs, on images without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from diffrate.device import place_for
from diffrate.evaluation import require_batches
from diffrate.patch.base import CompressedModel, require_patched
from diffrate.schedule import Schedule, SearchSpace
from diffrate.searching.calibration import finite
from diffrate.searching.settings import SearchSettingError
from diffrate.searching.teacher import Teacher, means_over

SHARES = (0.75, 0.5, 0.35, 0.2, 0.1)  # of a block's tokens, kept


@dataclass(frozen=True)
class Sensitivity:
    """What one block costs that reduces tokens where no other does.

    kind: how it does, `prune` or `merge`. kept: what it leaves of its `tokens`, prefix included.
    loss: the mean over `images` images of how far the outputs are from the dense model's.
    agreement: the share of these images with the dense model's likeliest class; None where outputs are no classes.
    """

    block: int
    kind: str
    kept: int
    tokens: int
    loss: float
    agreement: float | None
    images: int

    @property
    def share(self) -> float:
        """Of the tokens, kept."""
        return self.kept / self.tokens

    def record(self) -> dict[str, Any]:
        """The same for a JSON line."""
        names = ("block", "kind", "kept", "tokens", "share", "loss", "agreement", "images")
        return {name: getattr(self, name) for name in names}


def sensitivity(
    model: CompressedModel,
    loader: Iterable[Any],
    *,
    shares: Sequence[float] = SHARES,
    multi_label: bool = False,
    device: torch.device | str | None = None,
    precision: torch.dtype | None = None,
    callback: Callable[[int], None] | None = None,
) -> tuple[Sensitivity, ...]:
    """Measure what a patched model's outputs lose where one block alone prunes, or merges, down to each of `shares`.

    Tokens are really dropped: all later blocks have as many as the block leaves. The loss is Kullback and Leibler's
    divergence from the dense outputs; of one output, the squared error relative to the variance of the dense one;
    without a head, one less the cosine of the pooled features. In the order of the blocks, falling shares in each.

    The model runs in evaluation mode, on `device` (its own by default) and under autocast to `precision` (none by
    default), and is then as before. Inside an initialised process group the images of all processes count.

    Args:
        loader: batches of images `[B, 3, H, W]`, as `evaluate` takes them; labels are not looked at.
        shares: of a block's tokens, kept; those that round to the same number of tokens count once.
        multi_label: the loss is that of `diffrate.search` with it.
        callback: told the block, after each block of each batch.

    Raises:
        UnsupportedModelError: the model is not patched.
        SearchSettingError: a share that keeps all, or nothing.
        NonFiniteLossError: a loss is no number.
        ValueError: there is no batch, or one of another form.
    """
    require_patched(model)
    require_batches(loader)
    candidates = _candidates(model.compression.space.every_block(), shares)
    place, teacher = place_for(model, device), Teacher(model, multi_label=multi_label)
    teacher.of_outputs = model.has_head()  # those without a pooling are compared as features are
    classes = teacher.of_outputs and not multi_label and model.num_classes != 1
    model.to(place.device)  # outside inference mode: the weights stay fit for training

    def sums_of(images: Tensor) -> tuple[Tensor, Tensor]:
        """Of the loss and of the agreement of each candidate, `[candidates, 2]`, and the dense outputs."""
        entry = model.enter(images)
        state = model.prepared(entry.state, next(iter(candidates.values())))  # followed where any block removes tokens
        entering = [state, *model.run_each(model.steps(entry, model.dense_schedule()), state)]
        taught, sums = model.classify(entering[-1]).float(), []
        for block, group in groupby(candidates, key=lambda candidate: candidate[0]):
            for candidate in group:
                left = model.run(model.steps(entry, candidates[candidate])[block:], entering[block])
                outputs = model.classify(left).float()
                loss = teacher.apart(outputs, taught).double().sum()
                sums.append(torch.stack([loss, (outputs.argmax(-1) == taught.argmax(-1)).double().sum()]))
            if callback is not None:
                callback(block)
        return torch.stack(sums), taught

    means, images = means_over(teacher, loader, place, precision, (len(candidates), 2), sums_of)
    return tuple(
        Sensitivity(*candidate, finite(loss), agreement if classes else None, images)
        for candidate, (loss, agreement) in zip(candidates, means, strict=True)
    )


def _candidates(space: SearchSpace, shares: Sequence[float]) -> dict[tuple[int, str, int, int], Schedule]:
    """The schedule of every reduction to try, by block, kind, tokens kept, and tokens, in the order of the blocks."""
    wrong = [share for share in shares if not 0 < share < 1]
    if wrong or not shares:
        raise SearchSettingError(f"shares: found {wrong[0] if wrong else 'none'}; accepted: above 0 and below 1")
    whole = [space.limits[block] for block, _ in space.choices]
    found = {}
    for index, ((block, kind), tokens) in enumerate(zip(space.choices, whole, strict=True)):
        counts = {max(space.least, round(share * tokens)) for share in shares}
        for kept in sorted(counts - {tokens}, reverse=True):
            found[block, kind, kept, tokens] = space.schedule([*whole[:index], kept, *whole[index + 1 :]])
    if not found:
        raise SearchSettingError(f"shares: found {max(shares)}, all of {space.tokens} tokens; accepted: a smaller one")
    return found
