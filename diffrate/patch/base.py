"""What every patched model can do, whatever its family."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffrate.blocks.block import fixed_block
from diffrate.blocks.forms import UnsupportedModelError, check_block, has_hooks, is_read
from diffrate.blocks.heads import NO_POSITIONS, Positions
from diffrate.blocks.masked_block import BlockPlan, plan_search, search_block
from diffrate.blocks.reduction import ReductionRule
from diffrate.blocks.tokens import TokenState, in_graph, replaced, size_dtype
from diffrate.flops import Count
from diffrate.patch.shapes import channels_of
from diffrate.patch.state import CompressionState
from diffrate.schedule import Kept, Schedule, check_schedule, make_schedule, running_counts

PlannedCost = Callable[[Sequence[BlockPlan]], Tensor]  # of one image, with gradients


class Entry(NamedTuple):
    """What enters the first compressible block: the tokens, and what the attention of each such block knows of
    positions."""

    state: TokenState
    positions: Sequence[Positions]

    def traced(self) -> Entry:
        """The same, with tokens that are traced."""
        return replaced(self, state=self.state.traced())

    def remembered(self) -> Entry:
        """The same, with tokens that are traced, and remembered where they are pruned."""
        return replaced(self, state=self.state.remembered())


class Step(NamedTuple):
    """A compressible block, what its attention knows of positions, what happens to the tokens in it, and how many
    first tokens are all that is read of what it leaves; None for all."""

    block: nn.Module
    positions: Positions
    kept: Kept
    read: int | None


class CompressedModel(nn.Module):
    """A timm model whose blocks prune and merge tokens; a family fills in the abstract methods.

    Before `set_kept_num`, a forward pass in training mode is a step of the search, and one in
    evaluation mode removes nothing until the rate logits have learned, then runs at the counts that
    they stand for. After it, both run at the fixed counts. Nothing in a forward pass is kept on the
    model: threads may share it.
    """

    rule: ReductionRule  # the family's, unless a baseline replaces it on its model
    compression: CompressionState
    num_classes: int  # outputs; 0 for a model without a head
    pretrained_cfg: Any  # timm's: what the model's inputs are like
    image_size: tuple[int, int]  # height and width of the images that the model takes
    return_flop: bool = True  # whether a forward pass gives the cost beside the logits, unless it is asked otherwise

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
    def embed(self, images: Tensor) -> tuple[Tensor, Sequence[Positions]]:
        """Tokens `[B, N0, C]` of images `[B, 3, H, W]` before the first compressible block, and what the attention of
        each such block knows of positions."""

    @abstractmethod
    def classify(self, state: TokenState) -> Tensor:
        """Logits `[B, K]` from what the last compressible block left; `[B, N0, K]` of models without a pooling."""

    def containers(self) -> Sequence[nn.Module]:
        """The modules that hold the blocks: they are never called."""
        return [self.get_submodule("blocks")]

    def attention_blocks(self) -> Sequence[nn.Module]:
        """The blocks that run by their parts, which the counts of a schedule belong to."""
        return self.compressible_blocks()

    def recomputes(self) -> bool:
        """Whether activations inside the compressible blocks are computed again for the backward pass
        (`set_grad_checkpointing`)."""
        return bool(getattr(self, "grad_checkpointing", False))

    def has_head(self) -> bool:
        """Whether there are logits to compare with labels: a pooling, and a classifier."""
        return has_classifier(self)

    def train_to_search(self) -> None:
        """Training mode for a search of rates alone: statistics of batch norms stay as they are, as weights do."""
        self.train()
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

    def no_positions(self) -> Sequence[Positions]:
        """That of models whose positions are in the features."""
        return [NO_POSITIONS] * len(self.compressible_blocks())

    def settle(self) -> None:
        """Compute once and for all what is the same for all images: in a copy that is exported."""

    @property
    def read(self) -> int | None:
        """How many first tokens are all that is read of what the last compressible block leaves; None for all."""
        return None

    def prepared(self, state: TokenState, schedule: Schedule | None) -> TokenState:
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
        """The kept counts of every block in evaluation mode, prune (None for CAFormer) and merge."""
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

    def forward(self, images: Tensor, return_flop: bool | None = None) -> Any:
        """Logits of images `[B, 3, H, W]`, as `classify` gives them, and with `return_flop` the cost of one image.

        By default as the model was patched.

        The cost is in multiply-accumulates: an integer at fixed counts, in search a scalar tensor
        that carries the gradient to the rates.
        """
        return_flop = self.return_flop if return_flop is None else return_flop
        if self.training and self.compression.schedule is None:
            logits, flops = self.search_step(images)
            return (logits, flops) if return_flop else logits
        schedule = self.compression.current()
        logits = self.outputs_at(images, schedule)
        return (logits, self.flops_at(schedule)) if return_flop else logits

    def outputs_at(self, images: Tensor, schedule: Schedule) -> Tensor:
        """What `classify` gives of images `[B, 3, H, W]` at `schedule`, whatever the model is set to."""
        entry = self.enter(images)
        state = self.prepared(entry.state, schedule)
        return self.classify(self._compress(replaced(entry, state=state), schedule, self.read))

    def search_step(self, images: Tensor, cost: PlannedCost | None = None) -> tuple[Tensor, Tensor]:
        """One step of the search: what `classify` gives, and the expected cost with gradients, in whatever mode.

        The cost is in multiply-accumulates, or what `cost` makes of the plans of all blocks.
        """
        entry = self.enter(images)
        state, spent = self._search(replaced(entry, state=self.prepared(masked(entry.state), None)), self.read, cost)
        return self.classify(state), spent

    def forward_tokens(self, images: Tensor) -> TokenState:
        """The tokens left of images `[B, 3, H, W]`: features, sizes, and the origins they come from."""
        state = self._compress(self.enter(images).traced(), self.compression.current(), None)
        return replaced(state, size=state.sizes())

    def forward_blocks(self, images: Tensor) -> list[TokenState]:
        """The tokens of images `[B, 3, H, W]` after each compressible block, with their origins.

        `classify` makes logits of the last.
        """
        return self.run_blocks(self.enter(images).traced())

    def enter(self, images: Tensor) -> Entry:
        """What enters the first compressible block, of images `[B, 3, H, W]`.

        Raises:
            TypeError: the images are no tensor.
            ValueError: they have no four dimensions, or make another grid of tokens than the model was patched for.
            UnsupportedModelError: parts of the model were replaced since it was patched.
        """
        if not in_graph():
            self.check_parts()
        self.check_grid(images)
        x, positions = self.embed(images)
        tokens, expected = x.shape[1], self.compression.space.limits[0]
        if tokens != expected:  # of stems that round a size otherwise than they say
            raise ValueError(f"images of {list(images.shape[-2:])} make {tokens} tokens; accepted: {expected}")
        state = TokenState(x)
        # Places are kept only where some attention looks something up by them.
        looked_up = any(table is not NO_POSITIONS for table in positions)
        return Entry(state.placed() if looked_up else state, positions)

    def check_parts(self) -> None:
        """Refuse what was changed since the model was patched, and would be passed over.

        Raises:
            UnsupportedModelError: names it.
        """
        blocks, expected = self.attention_blocks(), len(self.compression.space.limits)
        if len(blocks) != expected:
            raise UnsupportedModelError(f"blocks: found {len(blocks)}; accepted: {expected}, as when it was patched")
        for number, block in enumerate(blocks):
            if not is_read(block):
                check_block(block, f"blocks.{number}")
        if any(map(has_hooks, self.containers())):
            raise UnsupportedModelError("blocks: found hooks of their container; accepted: hooks of each block")

    def check_grid(self, images: Tensor) -> None:
        """Refuse images of another grid of tokens, as `enter` does."""
        if not isinstance(images, Tensor):
            raise TypeError(f"images: found {type(images).__name__}; accepted: a tensor [B, channels, H, W]")
        if images.ndim != 4:
            raise ValueError(f"images: found the shape {list(images.shape)}; accepted: [B, channels, H, W]")
        if not in_graph():
            channels = channels_of(self)
            if images.shape[1] != channels or not images.is_floating_point():
                found = f"{images.shape[1]} channels of {str(images.dtype).removeprefix('torch.')}"
                raise ValueError(f"images: found {found}; accepted: {channels} channels of floats")
        height, width = images.shape[-2:]
        found = self.grid_at((height, width))
        if found != self.token_grid:
            grids = f"make {list(found)} tokens; accepted: {list(self.token_grid)}"
            raise ValueError(f"images of {[height, width]} {grids}")

    def run_blocks(self, entry: Entry, end: int | None = None) -> list[TokenState]:
        """The tokens after each of the first `end` compressible blocks, or after all."""
        states = [entry.state]
        for block, positions, kept in self._blocks(entry, self.compression.current())[:end]:
            states.append(self._run(block, positions, states[-1], kept))
        return states[1:]

    def run_from(self, entry: Entry, schedule: Schedule, start: int, state: TokenState) -> list[TokenState]:
        """The tokens after each compressible block from number `start` on at `schedule`, where `state` enters that one.

        `classify` makes logits of the last, of which only what it reads is left. The blocks before are to have left
        what `schedule` says, of `prepared` tokens.
        """
        states = [state]
        for block, positions, kept, read in self.steps(entry, schedule)[start:]:
            states.append(self._run(block, positions, states[-1], kept, read))
        return states[1:]

    def steps(self, entry: Entry, schedule: Schedule) -> list[Step]:
        """What the compressible blocks do at `schedule` on the way to `classify`, in order."""
        blocks = self._blocks(entry, schedule)
        return [Step(*block, self.read if index == len(blocks) - 1 else None) for index, block in enumerate(blocks)]

    def _compress(self, entry: Entry, schedule: Schedule, read: int | None) -> TokenState:
        """The tokens after the last compressible block at fixed counts, or the first `read` alone."""
        state = entry.state
        *blocks, (last, where, final) = self._blocks(entry, schedule)
        for block, positions, kept in blocks:
            state = self._run(block, positions, state, kept)
        return self._run(last, where, state, final, read)

    def _run(
        self, block: nn.Module, positions: Positions, state: TokenState, kept: Kept, read: int | None = None
    ) -> TokenState:
        """`fixed_block` by the model's rule."""
        return self._recomputed(fixed_block, block, positions, self.rule, state, kept, read)

    def _recomputed(self, step: Callable[..., TokenState], *given: Any) -> TokenState:
        """`step(*given)`, whose activations are not kept for the backward pass where the model recomputes them."""
        if self.recomputes() and torch.is_grad_enabled():
            return checkpoint(step, *given, use_reentrant=False)
        return step(*given)

    def _blocks(self, entry: Entry, schedule: Schedule) -> list[tuple[nn.Module, Positions, Kept]]:
        """The compressible blocks, what they know of positions, and what happens to the tokens in each."""
        blocks = self.compressible_blocks()
        # CAFormer's schedules go on with counts for the blocks after the compressible ones.
        counts = running_counts(schedule, self.compression.space.limits[0])[: len(blocks)]
        return list(zip(blocks, entry.positions, counts, strict=True))

    def _search(self, entry: Entry, read: int | None, cost: PlannedCost | None) -> tuple[TokenState, Tensor]:
        """The masked tokens after the last block, or the first `read` alone, and the expected cost with gradients."""
        state, blocks = entry.state, self.compressible_blocks()
        plans = plan_search(self.compression.draw(), len(blocks), state.x.shape[1])
        for index, (block, positions, plan) in enumerate(zip(blocks, entry.positions, plans, strict=True)):
            last = index == len(blocks) - 1
            state = self._recomputed(search_block, block, positions, self.rule, state, plan, read if last else None)
        spent = self.cost(plan.cost for plan in plans) if cost is None else cost(plans)
        assert isinstance(spent, Tensor)
        return state, spent


def require_patched(model: object) -> None:
    """Refuse what was not patched.

    Raises:
        UnsupportedModelError: says so.
    """
    if not isinstance(model, CompressedModel):
        raise UnsupportedModelError(f"found {type(model).__name__}; accepted: a model after diffrate.patch.vit(model)")


def masked(state: TokenState) -> TokenState:
    """The same tokens as they enter a search: with a mask that says that all of them are there."""
    x = state.x
    return replaced(state, mask=torch.ones(x.shape[:2], dtype=size_dtype(x), device=x.device))


def has_classifier(model: nn.Module) -> bool:
    """Whether a model has one, patched or not; True where it does not say."""
    get_classifier: Any = getattr(model, "get_classifier", None)
    if get_classifier is None:
        return True
    found = get_classifier()
    heads = found if isinstance(found, tuple) else (found,)
    return not all(isinstance(head, nn.Identity) for head in heads)
