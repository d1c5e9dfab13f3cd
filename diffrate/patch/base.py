"""What every patched model can do, whatever its family."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from diffrate.blocks.block import fixed_block
from diffrate.blocks.positions import NO_POSITIONS, Positions
from diffrate.blocks.rules import ReductionRules
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

    rules: ReductionRules  # the family's, unless a baseline replaces them on its model
    compression: CompressionState
    num_classes: int  # outputs; 0 for a model without a head
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
    def grid_at(self, size: tuple[int, int]) -> tuple[int, int]:
        """The `token_grid` of images of `size`, height and width."""

    @abstractmethod
    def cost(self, counts: Iterable[tuple[Count, Count]]) -> Count | int:
        """Multiply-accumulates of one image with these tokens entering and leaving each such block."""

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Tokens `[B, N0, C]` of images `[B, 3, H, W]` before the first compressible block."""

    @abstractmethod
    def classify(self, state: TokenState) -> Tensor:
        """Logits `[B, K]` from what the last compressible block left."""

    def train_to_search(self) -> None:
        """Training mode for a search: weights are frozen, and so are the statistics of batch norms."""
        self.train()
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

    def positions(self) -> Sequence[Positions]:
        """What the attention of each compressible block knows of positions."""
        return [NO_POSITIONS] * len(self.compressible_blocks())

    @property
    def looks_up_places(self) -> bool:
        """Whether `positions` are any, so that tokens have to keep their places."""
        return False

    @property
    def read(self) -> int | None:
        """How many first tokens are all that is read of what the last compressible block leaves; None for all."""
        return None

    def followed(self, state: TokenState, schedule: Schedule | None) -> TokenState:
        """`state` before the first block, with what `classify` asks to be followed: nothing, by default.

        At a fixed schedule, or in search for None.
        """
        return state

    def set_kept_num(self, prune: Sequence[SupportsIndex] | None, merge: Sequence[SupportsIndex]) -> None:
        """Fix the kept counts of every block, class and register tokens included; `prune` is None for CAFormer.

        Raises:
            ScheduleError: a count is no integer, below the fewest tokens that the model can keep or above
                the block's tokens, or their number is not that of the blocks.
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
        check_schedule(schedule, space.limits, space.prunes, where, space.least)

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
        state = self.followed(self.enter(images), schedule)
        logits = self.classify(self._compress(state, schedule, self.read))
        return (logits, self.flops_at(schedule)) if return_flop else logits

    def forward_tokens(self, images: Tensor) -> TokenState:
        """The tokens left of `images` `[B, 3, H, W]`: features, sizes, and the origins they come from."""
        state = self._compress(self.enter(images).traced(), self.compression.current(), None)
        return state._replace(size=state.sizes())

    def forward_blocks(self, images: Tensor) -> list[TokenState]:
        """The tokens of `images` `[B, 3, H, W]` after each compressible block, with their origins.

        `classify` makes logits of the last.
        """
        return self.run_blocks(self.enter(images).traced())

    def enter(self, images: Tensor) -> TokenState:
        """The tokens of `images` `[B, 3, H, W]` before the first compressible block.

        Raises:
            ValueError: the images make another grid of tokens than the model was patched for.
        """
        height, width = images.shape[-2:]
        found = self.grid_at((height, width))
        if found != self.token_grid:
            raise ValueError(
                f"images of {[height, width]} make {list(found)} tokens; accepted: {list(self.token_grid)}"
            )
        state = TokenState(self.embed(images))
        return state.placed() if self.looks_up_places else state

    def run_blocks(self, state: TokenState, end: int | None = None) -> list[TokenState]:
        """The tokens after each of the first `end` compressible blocks (all for None), from those that `enter` made."""
        states = [state]
        for block, positions, kept in self._blocks(self.compression.current(), state)[:end]:
            states.append(fixed_block(block, positions, self.rules, states[-1], kept))
        return states[1:]

    def _compress(self, state: TokenState, schedule: Schedule, read: int | None) -> TokenState:
        """The tokens after the last compressible block at fixed counts, or the first `read` alone."""
        *blocks, (last, where, final) = self._blocks(schedule, state)
        for block, positions, kept in blocks:
            state = fixed_block(block, positions, self.rules, state, kept)
        return fixed_block(last, where, self.rules, state, final, read)

    def _blocks(self, schedule: Schedule, state: TokenState) -> list[tuple[nn.Module, Positions, Kept]]:
        """The compressible blocks, what they know of positions, and what happens to the tokens in each."""
        blocks = self.compressible_blocks()
        # CAFormer's schedules go on with counts for the blocks after the compressible ones.
        counts = running_counts(schedule, state.x.shape[1])[: len(blocks)]
        return list(zip(blocks, self.positions(), counts, strict=True))

    def _search(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the search: logits, and the expected cost with gradients."""
        state, blocks = self.enter(images), self.compressible_blocks()
        x = state.x
        plans = plan_search(self.compression.draw(), len(blocks), x.shape[1])
        mask = torch.ones(x.shape[:2], dtype=size_dtype(x), device=x.device)
        state = self.followed(state._replace(mask=mask), None)
        for index, (block, positions, plan) in enumerate(zip(blocks, self.positions(), plans, strict=True)):
            read = self.read if index == len(blocks) - 1 else None
            state = search_block(block, positions, self.rules, state, plan, read)
        flops = self.cost(plan.cost for plan in plans)
        assert isinstance(flops, Tensor)
        return self.classify(state), flops
