"""What every patched model can do, whatever its family."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, SupportsIndex

import torch
from torch import Tensor, nn

from diffrate.blocks.block import BlockNames, ReductionRules, fixed_block
from diffrate.blocks.tokens import TokenState, size_dtype
from diffrate.budgets.flops import Count
from diffrate.budgets.schedule import Kept, Schedule, check_schedule, make_schedule, running_counts
from diffrate.patch.state import CompressionState
from diffrate.rates.masked_block import plan_search, search_block


class CompressedModel(nn.Module):
    """A timm model whose blocks prune and merge tokens; a family fills in the abstract methods.

    Before `set_kept_num`, a forward pass in training mode is a step of the search, and one in
    evaluation mode runs at the counts that the rate logits stand for. After it, both run at the
    fixed counts. Nothing in a forward pass is kept on the model: threads may share it.
    """

    names: ClassVar[BlockNames]
    rules: ReductionRules  # the family's, unless a baseline replaces them on its model
    reads_class_token_alone: ClassVar[bool] = False  # of what the last compressible block leaves
    compression: CompressionState
    pretrained_cfg: Any  # timm's: what the model's inputs are like
    image_size: tuple[int, int]  # height and width of the images that the model takes

    @abstractmethod
    def compressible_blocks(self) -> Sequence[nn.Module]:
        """The blocks that may reduce tokens, which the first counts of a schedule belong to."""

    @property
    @abstractmethod
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of the patches that the input tokens of the compressible blocks stand for."""

    @abstractmethod
    def cost(self, counts: Iterable[tuple[Count, Count]]) -> Count | int:
        """Multiply-accumulates of one image with these tokens entering and leaving each such block."""

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Tokens `[B, N0, C]` of images `[B, 3, H, W]` before the first compressible block."""

    @abstractmethod
    def classify(self, state: TokenState) -> Tensor:
        """Logits `[B, K]` from what the last compressible block left."""

    def needs_origins(self, schedule: Schedule | None) -> bool:
        """Whether `classify` reads origins, at a fixed schedule or in search."""
        return False

    def set_kept_num(self, prune: Sequence[SupportsIndex] | None, merge: Sequence[SupportsIndex]) -> None:
        """Fix the kept counts of every block, class token included; `prune` is None for CAFormer.

        Raises:
            ScheduleError: a count is no integer, below 1 or above the block's tokens, or their
                number is not that of the blocks.
        """
        schedule = make_schedule(prune, merge)
        self.check(schedule)
        self.compression.schedule = schedule

    def check(self, schedule: Schedule, where: str = "") -> None:
        """Refuse a schedule that this model cannot run; `where` it comes from starts the message.

        Raises:
            ScheduleError: as `set_kept_num`.
        """
        space = self.compression.space
        check_schedule(schedule, space.limits, space.prunes, where)

    def get_kept_num(self) -> tuple[list[int] | None, list[int]]:
        """The kept counts of every block, prune (None for CAFormer) and merge: as they were set, or
        before that as the rate logits have them."""
        schedule = self.compression.current()
        return None if schedule.prune is None else list(schedule.prune), list(schedule.merge)

    def arch_parameters(self) -> list[nn.Parameter]:
        """The rate logits: block order, prune before merge."""
        return self.compression.logits()

    def dense_schedule(self) -> Schedule:
        """The schedule that removes nothing."""
        return self.compression.space.dense()

    def flops_at(self, schedule: Schedule) -> int:
        """Multiply-accumulates of one image at `schedule`, as the paper counts them."""
        blocks = len(self.compressible_blocks())
        counts = running_counts(schedule, self.compression.space.limits[0])[:blocks]
        return self.cost((kept.entering, kept.merged) for kept in counts)

    def flops(self) -> int:
        """`flops_at` the present kept counts."""
        return self.flops_at(self.compression.current())

    def forward(self, images: Tensor, return_flop: bool = True) -> Any:
        """Logits `[B, K]` of images `[B, 3, H, W]`, and with `return_flop` the cost of one image.

        The cost is in multiply-accumulates: an integer at fixed counts, in search a scalar tensor
        that carries the gradient to the rates.
        """
        if self.training and self.compression.schedule is None:
            logits, flops = self._search(images)
            return (logits, flops) if return_flop else logits
        schedule = self.compression.current()
        state = self._compress(images, schedule, self.needs_origins(schedule), self.reads_class_token_alone)
        logits = self.classify(state)
        return (logits, self.flops_at(schedule)) if return_flop else logits

    def forward_tokens(self, images: Tensor) -> TokenState:
        """The tokens left of `images` `[B, 3, H, W]`: features, sizes, and the origins they come from."""
        state = self._compress(images, self.compression.current(), trace=True, class_only=False)
        return state._replace(size=state.sizes())

    def forward_blocks(self, images: Tensor) -> list[TokenState]:
        """The tokens of `images` `[B, 3, H, W]` after each compressible block, with their origins.

        `classify` makes logits of the last.
        """
        states = [TokenState(self.embed(images)).traced()]
        for block, kept in self._blocks(self.compression.current(), states[0]):
            states.append(fixed_block(block, self.names, self.rules, states[-1], kept))
        return states[1:]

    def _compress(self, images: Tensor, schedule: Schedule, trace: bool, class_only: bool) -> TokenState:
        """The tokens after the last compressible block at fixed counts, or the class token alone."""
        state = TokenState(self.embed(images))
        if trace:
            state = state.traced()
        *blocks, (last, final) = self._blocks(schedule, state)
        for block, kept in blocks:
            state = fixed_block(block, self.names, self.rules, state, kept)
        return fixed_block(last, self.names, self.rules, state, final, class_only)

    def _blocks(self, schedule: Schedule, state: TokenState) -> list[tuple[nn.Module, Kept]]:
        """The compressible blocks, and what happens to the tokens in `state` in each."""
        blocks = self.compressible_blocks()
        # CAFormer's schedules go on with counts for the blocks after the compressible ones.
        return list(zip(blocks, running_counts(schedule, state.x.shape[1])[: len(blocks)], strict=True))

    def _search(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the search: logits, and the expected cost with gradients."""
        x = self.embed(images)
        blocks = self.compressible_blocks()
        plans = plan_search(self.compression.draw(), len(blocks), x.shape[1])
        state = TokenState(x, mask=torch.ones(x.shape[:2], dtype=size_dtype(x), device=x.device))
        if self.needs_origins(None):
            state = state.traced()
        for index, (block, plan) in enumerate(zip(blocks, plans, strict=True)):
            class_only = self.reads_class_token_alone and index == len(blocks) - 1
            state = search_block(block, self.names, self.rules, state, plan, class_only)
        flops = self.cost(plan.cost for plan in plans)
        assert isinstance(flops, Tensor)
        return self.classify(state), flops
