"""What every patched model can do, whatever its family."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, SupportsIndex

from torch import Tensor, nn

from diffrate.kept import KeptCounts
from diffrate.schedule import Schedule, check_schedule, make_schedule
from diffrate.tokens import TokenState


class CompressedModel(nn.Module):
    """A timm model whose blocks prune and merge tokens; a family fills in the abstract methods.

    Nothing in a forward pass is kept on the model: threads may share it.
    """

    compression: KeptCounts

    @property
    @abstractmethod
    def token_limits(self) -> tuple[int, ...]:
        """The most tokens each block of a schedule can have, class token included."""

    @property
    @abstractmethod
    def prunes(self) -> bool:
        """Whether schedules have pruning counts; CAFormer only merges."""

    @abstractmethod
    def flops_at(self, schedule: Schedule) -> int:
        """Multiply-accumulates of one image at `schedule`."""

    @abstractmethod
    def compress(self, images: Tensor, schedule: Schedule, trace: bool) -> TokenState:
        """The tokens that `images` `[B, 3, H, W]` leave after the last compressible block."""

    @abstractmethod
    def classify(self, state: TokenState) -> Tensor:
        """Logits `[B, K]` from what `compress` left."""

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
        check_schedule(schedule, self.token_limits, self.prunes, where)

    def get_kept_num(self) -> tuple[list[int] | None, list[int]]:
        """The kept counts of every block as they were set: prune (None for CAFormer) and merge."""
        schedule = self.compression.schedule
        return None if schedule.prune is None else list(schedule.prune), list(schedule.merge)

    def flops(self) -> int:
        """Multiply-accumulates of one image at the kept counts, as the paper counts them."""
        return self.flops_at(self.compression.schedule)

    def forward(self, images: Tensor, return_flop: bool = True) -> Any:
        """Logits `[B, K]` of images `[B, 3, H, W]`, and with `return_flop` the cost of one image.

        The cost is in multiply-accumulates, as the paper counts them.
        """
        schedule = self.compression.schedule
        logits = self.classify(self.compress(images, schedule, trace=False))
        return (logits, self.flops_at(schedule)) if return_flop else logits

    def forward_tokens(self, images: Tensor) -> TokenState:
        """The tokens left of `images` `[B, 3, H, W]`: features, sizes, and the origins they come from."""
        state = self.compress(images, self.compression.schedule, trace=True)
        return state._replace(size=state.sizes())

    def dense_schedule(self) -> Schedule:
        """The schedule that removes nothing."""
        limits = self.token_limits
        return Schedule(limits if self.prunes else None, limits)
