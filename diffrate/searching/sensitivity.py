"""How much each block can lose alone: the loss against the dense model's outputs, on images without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffrate.device import all_sum, autocast, placement_of
from diffrate.evaluation import images_of, modes_kept, require_batches
from diffrate.patch.base import CompressedModel, require_patched
from diffrate.schedule import Schedule, SearchSpace
from diffrate.searching.calibration import finite
from diffrate.searching.settings import SearchSettingError
from diffrate.searching.teacher import Teacher, angle, spread_of

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


class _Candidate(NamedTuple):
    """One reduction in one block."""

    block: int
    kind: str
    kept: int
    tokens: int
    schedule: Schedule


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
    """Measure what the outputs of a patched `model` lose where one block alone prunes, or merges, down to each of
    `shares`.

    Tokens are really dropped: all later blocks have as many as the block leaves. The loss is Kullback and Leibler's
    divergence from the dense outputs; of one output, the squared error relative to the variance of the dense one;
    without a head, one less the cosine of the pooled features. In the order of the blocks, falling shares in each.

    The model runs in evaluation mode, on `device` (by default where it is) and under autocast to `precision` (by
    default in its weights' own); its training mode and its schedule are restored afterwards. Inside an initialised
    process group the images of all processes count.

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
    candidates = _candidates(model.compression.space, shares)
    placed = placement_of(model, device)
    sums = torch.zeros(len(candidates), 2, dtype=torch.float64, device=placed.device)  # of losses, of agreements
    images = torch.zeros((), dtype=torch.float64, device=placed.device)
    teacher, moments = Teacher(model, multi_label=multi_label), sums.new_zeros(3)
    model.to(placed.device)  # outside inference mode: the weights stay fit for training
    with torch.inference_mode(), modes_kept(model):
        model.eval()
        for batch in loader:
            seen = images_of(batch, placed)
            with autocast(placed.device, precision):
                found, dense = _batch_sums(teacher, seen, candidates, callback)
            sums += found
            moments += dense if model.has_head() else 0
            images += len(seen)
    total = float(all_sum(images))
    if total == 0:
        raise ValueError("loader: found no batch; accepted: batches of images")
    spread = spread_of(moments)
    classes = model.has_head() and not multi_label and not moments.any()  # those of one output
    rows = []
    for candidate, (loss, agreement) in zip(candidates, (all_sum(sums) / total).tolist(), strict=True):
        rows.append(Sensitivity(*candidate[:4], finite(loss / spread), agreement if classes else None, int(total)))
    return tuple(rows)


def _candidates(space: SearchSpace, shares: Sequence[float]) -> list[_Candidate]:
    """Every reduction to try, in the order of the blocks."""
    wrong = [share for share in shares if not 0 < share < 1]
    if wrong or not shares:
        raise SearchSettingError(f"shares: found {wrong[0] if wrong else 'none'}; accepted: above 0 and below 1")
    whole = [space.limits[block] for block, _ in space.choices]
    found = []
    for index, ((block, kind), tokens) in enumerate(zip(space.choices, whole, strict=True)):
        counts = {max(space.least, round(share * tokens)) for share in shares}
        for kept in sorted(counts - {tokens}, reverse=True):
            schedule = space.schedule([*whole[:index], kept, *whole[index + 1 :]])
            found.append(_Candidate(block, kind, kept, tokens, schedule))
    if not found:
        raise SearchSettingError(f"shares: found {max(shares)}, all of {space.tokens} tokens; accepted: a smaller one")
    return found


def _batch_sums(
    teacher: Teacher, images: Tensor, candidates: Sequence[_Candidate], callback: Callable[[int], None] | None
) -> tuple[Tensor, Tensor]:
    """Sums over a batch of the loss and of the agreement of each candidate, `[candidates, 2]`; and the moments of the
    dense outputs."""
    model = teacher.model
    measure = teacher.apart if model.has_head() else angle
    entry = model.enter(images)
    state = model.prepared(entry.state, candidates[0].schedule)  # followed where anything is removed, in any block
    entering = [state, *model.run_each(model.steps(entry, model.dense_schedule()), state)]
    taught = model.classify(entering[-1]).float()
    sums = []
    for block, group in groupby(candidates, key=lambda candidate: candidate.block):
        for candidate in group:
            left = model.run(model.steps(entry, candidate.schedule)[block:], entering[block])
            outputs = model.classify(left).float()
            agreeing = outputs.argmax(-1) == taught.argmax(-1)
            sums.append(torch.stack([measure(outputs, taught).double().sum(), agreeing.double().sum()]))
        if callback is not None:
            callback(block)
    return torch.stack(sums), teacher.moments(taught)
