"""The dense model as the teacher of the compressed one, without labels; and how much each block can lose alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffrate.blocks.block import UnsupportedModelError
from diffrate.device import Group, Placement, all_sum, autocast, place_for, placement_of
from diffrate.evaluation import evaluating, require_batches, split_batch
from diffrate.patch.base import CompressedModel, PlannedCost, has_classifier, require_patched
from diffrate.patch.plain_vit import CompressedVit
from diffrate.schedule import Schedule, SearchSpace
from diffrate.searching.checkpoint import NonFiniteLossError
from diffrate.searching.settings import SearchSettingError

LEAST_SPREAD = 1e-9  # of outputs, as a share of their mean square: one image alone has none


def divergence(outputs: Tensor, taught: Tensor) -> Tensor:
    """Kullback and Leibler's divergence of logits `[B, K]` from the dense model's, `[B]`; of those of all positions
    `[B, N0, K]`, its mean over positions. In the measures below, too."""
    dense = taught.float().log_softmax(-1)
    return _an_image((dense.exp() * (dense - outputs.float().log_softmax(-1))).sum(-1).clamp(min=0))


def sigmoid_divergence(outputs: Tensor, taught: Tensor) -> Tensor:
    """The same of outputs that each stand for a label of their own: binary cross-entropy against the dense model's
    sigmoids, less their own entropy, a mean over labels, `[B]`."""
    dense, found = taught.float(), outputs.float()
    with_label = dense.sigmoid() * (F.logsigmoid(dense) - F.logsigmoid(found))
    without = (-dense).sigmoid() * (F.logsigmoid(-dense) - F.logsigmoid(-found))
    return _an_image((with_label + without).mean(-1).clamp(min=0))


def angle(outputs: Tensor, taught: Tensor) -> Tensor:
    """One less the cosine between features `[B, C]`, or those of all positions, and the dense model's, `[B]`."""
    return _an_image(1 - F.cosine_similarity(outputs.float(), taught.float(), dim=-1))


def _an_image(apart: Tensor) -> Tensor:
    return apart if apart.ndim == 1 else apart.mean(1)


def spread_of(moments: Tensor, group: Group) -> float:
    """The variance of numbers from their `Teacher.moments`, those of all processes, never 0; 1 where there are none."""
    count, total, squares = all_sum(moments, group).tolist()
    if count == 0:
        return 1.0
    return max(squares / count - (total / count) ** 2, LEAST_SPREAD * squares / count, 1e-12)


def finite(loss: float) -> float:
    """`loss` as it is; NonFiniteLossError where it is no number."""
    if not math.isfinite(loss):
        raise NonFiniteLossError(
            f"the loss is {loss} on the calibration images; accepted: images, weights and a precision that give numbers"
        )
    return loss


class Teacher:
    """The dense model, to compare it compressed with: by its outputs (`distill`), or by its patches' features
    (`tokens`).

    multi_label: outputs are sigmoids' and not a softmax's. A head with one output is compared by squared errors, which
    count relative to the variance of the dense outputs. of_outputs: whether outputs are compared, not features.
    group: of the processes that `searching` takes this variance over.
    UnsupportedModelError where the model's family has no features of every patch.
    """

    def __init__(
        self, model: CompressedModel, loss: str = "distill", multi_label: bool = False, group: Group = None
    ) -> None:
        self.group = group
        self.model, self.multi_label, self.of_outputs = model, multi_label, loss != "tokens" and has_classifier(model)
        if loss != "tokens":
            self.at, self.step = model.outputs_at, model.search_step
        elif isinstance(model, CompressedVit):
            self.at, self.step = model.features_at, model.search_features
        else:
            found = f"'tokens' for {type(model).__name__}, which has no features of every patch"
            raise UnsupportedModelError(f"loss: found {found}; accepted: 'distill'")

    def taught(self, images: Tensor) -> Tensor:
        """The dense model's outputs or features of images; without gradients."""
        with torch.no_grad():
            return self.at(images, self.model.dense_schedule())

    def apart(self, outputs: Tensor, taught: Tensor) -> Tensor:
        """How far outputs are from what was `taught`, per image, `[B]`; squared errors not yet relative."""
        if self.relative(taught):
            return _an_image((outputs.float() - taught.float()).square().mean(-1))
        measure = sigmoid_divergence if self.multi_label else divergence
        return (measure if self.of_outputs else angle)(outputs, taught)

    def relative(self, taught: Tensor) -> bool:
        """Whether `apart` is to be divided by the variance of what was taught."""
        return self.of_outputs and not self.multi_label and taught.shape[-1] == 1

    def moments(self, taught: Tensor) -> Tensor:
        """Number, sum, and sum of squares of what was taught, `[3]`, for `spread_of`; zeros where it is not asked."""
        values = taught.detach().double()
        if not self.relative(taught):
            return values.new_zeros(3)
        return torch.stack([values.new_tensor(values.numel()), values.sum(), values.square().sum()])

    def searching(self, images: Tensor, cost: PlannedCost | None = None) -> tuple[Tensor, Tensor]:
        """The mean of `apart` in a step of the search, with gradients, and the expected cost."""
        outputs, spent = self.step(images, cost)
        taught = self.taught(images)
        apart = self.apart(outputs, taught).mean()
        return apart / spread_of(self.moments(taught), self.group) if self.relative(taught) else apart, spent


def means_over(
    teacher: Teacher,
    loader: Iterable[Any],
    place: Placement,
    precision: torch.dtype | None,
    shape: tuple[int, int],
    sums_of: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> tuple[list[list[float]], int]:
    """Means over the images of all processes, rows of the given shape that begin with a loss, and their number.

    sums_of: from images to sums of these figures, and to the dense model's outputs. ValueError where there is no batch.
    """
    require_batches(loader)
    sums = torch.zeros(shape, dtype=torch.float64, device=place.device)
    moments, count = sums.new_zeros(3), sums.new_zeros(())
    with evaluating(teacher.model):
        for batch in loader:
            images = place.take(split_batch(batch)[0])
            with torch.inference_mode(), autocast(place.device, precision):
                found, taught = sums_of(images)
                moments += teacher.moments(taught)
            sums += found
            count += len(images)
    total = int(all_sum(count, place.group))
    if total == 0:
        raise ValueError("loader: found no batch; accepted: batches of images")
    means = all_sum(sums, place.group) / total
    means[:, 0] /= spread_of(moments, place.group)
    return means.tolist(), total


def losses_at(
    model: CompressedModel,
    schedules: Sequence[Schedule],
    loader: Iterable[Any],
    precision: torch.dtype | None = None,
    multi_label: bool = False,
) -> list[float]:
    """How far the outputs of `model` at each of the `schedules` are from the dense ones, a mean over all images.

    The batches are as `split_batch` takes them; labels are not used. ValueError where there is no batch.
    """
    teacher = Teacher(model, multi_label=multi_label)

    def sums_of(images: Tensor) -> tuple[Tensor, Tensor]:
        taught = teacher.taught(images)
        rows = [teacher.apart(teacher.at(images, schedule), taught).sum() for schedule in schedules]
        return torch.stack(rows)[:, None], taught

    rows, _ = means_over(teacher, loader, placement_of(model), precision, (len(schedules), 1), sums_of)
    return [loss for (loss,) in rows]


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
        return asdict(self) | {"share": self.share}


def sensitivity(
    model: CompressedModel,
    loader: Iterable[Any],
    *,
    shares: Sequence[float] = SHARES,
    multi_label: bool = False,
    device: torch.device | str | None = None,
    precision: torch.dtype | None = None,
    callback: Callable[[int], None] | None = None,
    group: Group = None,
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
        group: the processes whose images count, as `evaluate` takes it.

    Raises:
        UnsupportedModelError: the model is not patched.
        SearchSettingError: a share that keeps all, or nothing.
        NonFiniteLossError: a loss is no number.
        TypeError: `group` is no process group.
        ValueError: there is no batch, or one of another form; or this process is not in `group`.
    """
    require_patched(model)
    candidates = _candidates(model.compression.space.every_block(), shares)
    place, teacher = place_for(model, device, group), Teacher(model, multi_label=multi_label)
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
    rows = zip(candidates, means, strict=True)
    return tuple(Sensitivity(*one, finite(loss), same if classes else None, images) for one, (loss, same) in rows)


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
