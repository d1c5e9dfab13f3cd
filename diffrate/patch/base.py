"""What every patched model can do, whatever its family."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, SupportsIndex, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffrate.blocks.block import UnsupportedModelError, check_block, check_methods, fixed_block, has_hooks, is_read
from diffrate.blocks.heads import NO_POSITIONS, Positions
from diffrate.blocks.masked import BlockPlan, plan_search, search_block
from diffrate.blocks.rates import CompressionState
from diffrate.blocks.reduction import ReductionRule
from diffrate.blocks.rules import NAMED
from diffrate.blocks.tokens import TokenState, in_graph, replaced
from diffrate.flops import Count
from diffrate.patch.parts import FeatureHead
from diffrate.patch.shapes import channels_of, weights
from diffrate.schedule import Kept, Schedule, ScheduleError, SearchSpace, check_schedule, make_schedule, running_counts

Patched = TypeVar("Patched", bound="CompressedModel")
PlannedCost = Callable[[Sequence[BlockPlan]], Tensor]  # of one image, with gradients


class Entry(NamedTuple):
    """What enters the first compressible block: the tokens, and what the attention of each such block knows of
    positions."""

    state: TokenState
    positions: Sequence[Positions]


# A compressible block, what its attention knows of positions, how it lets tokens go, what happens to the tokens in it,
# and how many first tokens are all that is read of what it leaves; None for all.
Step = tuple[nn.Module, Positions, ReductionRule, Kept, int | None]


class CompressedModel(nn.Module):
    """A timm model whose blocks prune and merge tokens; a family fills in the abstract methods.

    Before `set_kept_num`, a forward pass in training mode is a step of the search, and one in
    evaluation mode removes nothing until the rate logits have learned, then runs at the counts that
    they stand for. After it, both run at the fixed counts. Nothing in a forward pass is kept on the
    model: threads may share it.
    """

    rule: ReductionRule  # the paper's for the family
    compression: CompressionState
    num_classes: int  # outputs; 0 for a model without a head
    pretrained_cfg: Any  # timm's: what the model's inputs are like
    mlps: tuple[nn.Module, ...]  # of the attention blocks, as they were when the cost was counted
    image_size: tuple[int, int]  # height and width of the images that the model takes
    uncalled: tuple[str, ...] = ("forward_features",)  # methods that timm's `forward` goes through, and ours does not
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

    def requires_grad_(self: Patched, requires_grad: bool = True) -> Patched:
        """torch's. Rates learn only while they say the counts, as `CompressionState.schedule` says."""
        super().requires_grad_(requires_grad)
        if self.compression.schedule is not None:
            self.compression.requires_grad_(False)
        return self

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
        """`state` before the first block, at a schedule or in search for None, with what `classify` asks to be
        followed: nothing, by default."""
        return state

    @property
    def schedule(self) -> Schedule:
        """The kept counts of every block in evaluation mode, class and register tokens included.

        Set it to fix the counts.

        Raises:
            ScheduleError: on setting, it is no schedule, or a count is no integer, below the fewest tokens that the
                model can keep or above the block's tokens, or their number is not that of the blocks.
        """
        return self.compression.current()

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        self.compression.schedule = self.check(schedule)

    def set_kept_num(self, prune: Sequence[SupportsIndex] | None, merge: Sequence[SupportsIndex]) -> None:
        """Set the `schedule` to these counts, with the paper's rule; `prune` is None for CAFormer.

        Raises:
            ScheduleError: as on setting `schedule`.
        """
        self.schedule = make_schedule(prune, merge)

    def check(self, schedule: Schedule, where: str = "") -> Schedule:
        """The schedule in tuples, with a rule for each block where it has any. One that this model cannot run ends in a
        ScheduleError that starts with `where` it comes from."""
        if not isinstance(schedule, Schedule):
            raise ScheduleError(f"{where or 'schedule: '}found {type(schedule).__name__}; accepted: a Schedule")
        space, made = self.compression.space, make_schedule(schedule.prune, schedule.merge, schedule.rules, where)
        check_schedule(replace(made, tokens=schedule.tokens), space.limits, space.prunes, where, space.least)
        return made

    def get_kept_num(self) -> tuple[list[int] | None, list[int]]:
        """The counts of `schedule`, prune (None for CAFormer) and merge."""
        schedule = self.schedule
        return None if schedule.prune is None else list(schedule.prune), list(schedule.merge)

    def arch_parameters(self) -> list[nn.Parameter]:
        """The rate logits: block order, prune before merge."""
        return self.compression.logits()

    def dense_schedule(self) -> Schedule:
        """The schedule that removes nothing."""
        return self.compression.space.dense()

    def flops_at(self, schedule: Schedule) -> int:
        """Multiply-accumulates of one image at `schedule`, as the paper counts them."""
        return self.cost((kept.entering, kept.merged) for kept in self.counts_at(schedule))

    def counts_at(self, schedule: Schedule) -> list[Kept]:
        """What happens to the tokens in each compressible block at `schedule`."""
        if not isinstance(schedule, Schedule):
            raise ScheduleError(f"schedule: found {type(schedule).__name__}; accepted: a Schedule")
        space = self.compression.space
        check_schedule(schedule, space.limits, space.prunes, "schedule: ", space.least)
        # CAFormer's schedules go on with counts for the blocks after the compressible ones.
        return running_counts(schedule, space.limits[0])[: len(self.compressible_blocks())]

    def flops(self) -> int:
        """`flops_at` the present kept counts."""
        return self.flops_at(self.schedule)

    def forward(self, images: Tensor, return_flop: bool | None = None) -> Any:
        """Logits of images `[B, 3, H, W]`, as `classify` gives them, and with `return_flop` the cost of one image.

        The cost is in multiply-accumulates: an integer at fixed counts, in search a scalar tensor
        that carries the gradient to the rates.
        """
        return_flop = self.return_flop if return_flop is None else return_flop
        if self.training and self.compression.schedule is None:
            logits, flops = self.search_step(images)
            return (logits, flops) if return_flop else logits
        schedule = self.schedule
        logits = self.outputs_at(images, schedule)
        return (logits, self.flops_at(schedule)) if return_flop else logits

    def outputs_at(self, images: Tensor, schedule: Schedule) -> Tensor:
        """What `classify` gives of images `[B, 3, H, W]` at `schedule`, whatever the model is set to."""
        entry = self.enter(images)
        return self.classify(self.run(self.steps(entry, schedule), self.prepared(entry.state, schedule)))

    def search_step(self, images: Tensor, cost: PlannedCost | None = None) -> tuple[Tensor, Tensor]:
        """One step of the search: what `classify` gives, and the expected cost with gradients, in whatever mode.

        The cost is in multiply-accumulates, or what `cost` makes of the plans of all blocks.
        """
        entry = self.enter(images)
        state = self.prepared(entry.state.masked(), None)
        state, spent = self._search(state, entry.positions, self.read, cost)
        return self.classify(state), spent

    def forward_tokens(self, images: Tensor) -> TokenState:
        """The tokens left of images `[B, 3, H, W]`: features, sizes, and the origins they come from."""
        entry = self.enter(images, TokenState.traced)
        state = self.run(self.steps(entry, self.schedule, whole=True), entry.state)
        return replaced(state, size=state.sizes())

    def forward_blocks(self, images: Tensor) -> list[TokenState]:
        """The tokens of images `[B, 3, H, W]` after each compressible block, with their origins. `classify` makes
        logits of the last."""
        return self.run_blocks(self.enter(images, TokenState.traced))

    def enter(self, images: Tensor, follow: Callable[[TokenState], TokenState] | None = None) -> Entry:
        """What enters the first compressible block, of images `[B, 3, H, W]`, with tokens traced as `follow` says.
        Raises as `check_input`."""
        self.check_input(images)
        x, positions = self.embed(images)
        tokens, expected = x.shape[1], self.compression.space.limits[0]
        if tokens != expected:  # of stems that round a size otherwise than they say
            raise ValueError(f"images of {list(images.shape[-2:])} make {tokens} tokens; accepted: {expected}")
        state = TokenState(x) if follow is None else follow(TokenState(x))
        # Input positions are kept only where some attention looks something up by them.
        looked_up = any(table is not NO_POSITIONS for table in positions)
        return Entry(state.placed() if looked_up else state, positions)

    def check_input(self, images: Tensor) -> None:
        """Refuse images that the model does not take, and parts that were changed since it was patched and would be
        passed over. A compiled graph checks the parts once, when it is made; an exported one checks the shape alone.

        Raises:
            TypeError: the images are no tensor.
            ValueError: they have no four dimensions, or make another grid of tokens than the model was patched for.
            UnsupportedModelError: parts of the model were replaced.
        """
        if not isinstance(images, Tensor):
            raise TypeError(f"images: found {type(images).__name__}; accepted: a tensor [B, channels, H, W]")
        if images.ndim != 4:
            raise ValueError(f"images: found the shape {list(images.shape)}; accepted: [B, channels, H, W]")
        _, found, height, width = images.shape
        if torch.compiler.is_dynamo_compiling() or not in_graph():
            self.check_parts()
        if not in_graph():
            channels = channels_of(self)
            if found != channels or not images.is_floating_point():
                dtype = str(images.dtype).removeprefix("torch.")
                raise ValueError(f"images: found {found} channels of {dtype}; accepted: {channels} channels of floats")
        grid, expected = self.grid_at((height, width)), self.token_grid
        if grid != expected:
            made = f"{[height, width]} make {list(grid)} tokens"
            raise ValueError(f"images of {made}; accepted: {list(expected)}")

    @torch.compiler.assume_constant_result
    def check_parts(self) -> bool:
        """Refuse parts that were changed since the model was patched, with an UnsupportedModelError; else True."""
        blocks, expected = self.attention_blocks(), len(self.compression.space.limits)
        if len(blocks) != expected:
            accepted = f"{expected}, as when it was patched"
            raise UnsupportedModelError(f"blocks: found {len(blocks)}; accepted: {accepted}")
        for number, block in enumerate(blocks):
            if not is_read(block):
                check_block(block, f"blocks.{number}")
            _check_mlp(block, self.mlps[number], f"blocks.{number}.mlp")
        self.check_around()
        return True

    def check_around(self) -> None:
        """Refuse what stands around the blocks and would be passed over, with an UnsupportedModelError."""
        check_methods(self, "model", self.uncalled, alone=True)
        for container in self.containers():
            check_methods(container, "blocks", ("forward",), alone=True)
            if has_hooks(container):
                raise UnsupportedModelError("blocks: found hooks of their container; accepted: hooks of each block")

    def run_blocks(self, entry: Entry, end: int | None = None) -> list[TokenState]:
        """All tokens after each of the first `end` compressible blocks, or after each."""
        return self.run_each(self.steps(entry, self.schedule, whole=True)[:end], entry.state)

    def steps(self, entry: Entry, schedule: Schedule, whole: bool = False) -> list[Step]:
        """What the compressible blocks do at `schedule`, in order: on the way to `classify`, or leaving all tokens
        with `whole`."""
        blocks = self.compressible_blocks()
        reads = [*[None] * (len(blocks) - 1), None if whole else self.read]
        rules, counts = self.rules_at(schedule.rules), self.counts_at(schedule)
        return list(zip(blocks, entry.positions, rules, counts, reads, strict=True))

    def rules_at(self, names: Sequence[str] | None) -> list[ReductionRule]:
        """How each compressible block lets tokens go, by the `names` of a schedule."""
        blocks = len(self.compressible_blocks())
        if names is None:
            return [self.rule] * blocks
        return [NAMED[name](self.rule, block / blocks) for block, name in enumerate(names[:blocks])]

    def run(self, steps: Iterable[Step], state: TokenState) -> TokenState:
        """The tokens after the last of the `steps`, where `state` enters the first."""
        for block, positions, rule, kept, read in steps:
            state = self._recomputed(fixed_block, block, positions, rule, state, kept, read)
        return state

    def run_each(self, steps: Iterable[Step], state: TokenState) -> list[TokenState]:
        """The tokens after each of the `steps`, where `state` enters the first."""
        states = [state]
        for step in steps:
            states.append(self.run([step], states[-1]))
        return states[1:]

    def _recomputed(self, step: Callable[..., TokenState], *given: Any) -> TokenState:
        """`step(*given)`, whose activations are not kept for the backward pass where the model recomputes them."""
        if torch.is_grad_enabled() and self.recomputes():
            return checkpoint(step, *given, use_reentrant=False)
        return step(*given)

    def _search(
        self, state: TokenState, positions: Sequence[Positions], read: int | None, cost: PlannedCost | None
    ) -> tuple[TokenState, Tensor]:
        """The masked tokens after the last block, or the first `read` alone, and the expected cost with gradients."""
        blocks = self.compressible_blocks()
        plans = plan_search(self.compression.draw(), len(blocks), state.x.shape[1])
        rules = self.rules_at(self.compression.space.rules)
        for block, known, rule, plan in zip(blocks, positions, rules, plans, strict=True):
            own = read if plan is plans[-1] else None
            state = self._recomputed(search_block, block, known, rule, state, plan, own)
        spent = self.cost(plan.cost for plan in plans) if cost is None else cost(plans)
        assert isinstance(spent, Tensor)
        return state, spent


def mlps_of(model: CompressedModel) -> tuple[nn.Module, ...]:
    """The MLPs whose cost is that of the model."""
    blocks: Sequence[Any] = model.attention_blocks()
    return tuple(block.mlp for block in blocks)


def _check_mlp(block: Any, counted: nn.Module, where: str) -> None:
    """Refuse a block whose MLP costs something else than the one that was there when its cost was counted."""
    if block.mlp is not counted and weights(block.mlp) != weights(counted):
        accepted = f"{weights(counted)}, as when it was patched"
        raise UnsupportedModelError(f"{where}: found {weights(block.mlp)} weights of layers; accepted: {accepted}")


def compress(model: Any, space: SearchSpace, granularity: tuple[int, int], **facts: Any) -> None:
    """Give `model`, whose class is a compressed one already, what compression adds: its state, and `facts`."""
    state = CompressionState(space, *granularity).to(next(model.parameters()).device)
    model.add_module("compression", state)
    for name, value in facts.items():
        setattr(model, name, value)


def require_patched(model: object) -> None:
    """Refuse what was not patched, with an UnsupportedModelError."""
    if not isinstance(model, CompressedModel):
        raise UnsupportedModelError(f"found {type(model).__name__}; accepted: a model after diffrate.patch.vit(model)")


def has_classifier(model: nn.Module) -> bool:
    """Whether a model has one, patched or not; True where it does not say. A projection of features is none."""
    get_classifier: Any = getattr(model, "get_classifier", None)
    if get_classifier is None:
        return True
    found = get_classifier()
    heads = found if isinstance(found, tuple) else (found,)
    return not all(isinstance(head, nn.Identity | FeatureHead) for head in heads)
