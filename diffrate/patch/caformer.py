"""CAFormer: merge in stage 3 only, without a class token, and restore the grid before stage 4."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import Any

from timm.models._features import feature_take_indices
from timm.models.metaformer import Attention, MetaFormer, MlpHead, SepConv
from torch import Tensor, nn

from diffrate.blocks.block import UnsupportedModelError, check_block, check_methods
from diffrate.blocks.heads import NO_POSITIONS, Positions
from diffrate.blocks.reduction import IntoMostSimilarKept, Mean, ReceivedAttention, ReductionRule
from diffrate.blocks.tokens import TokenState
from diffrate.flops import Count, StageShape, caformer_flops
from diffrate.patch.base import CompressedModel, Entry, compress, mlps_of
from diffrate.patch.features import as_map, restore
from diffrate.patch.shapes import Size, as_size
from diffrate.schedule import GRANULARITY, MERGE_FIELD, Kept, Schedule, ScheduleError, SearchSpace

MIXERS = (SepConv, SepConv, Attention, Attention)
# timm's port of the head normalises with 1e-6, the original with 1e-5: logits differ by 1e-6.
ORIGINAL_HEAD_EPS = 1e-5
# As published, the most important token is no destination.
RULE = ReductionRule(0, ReceivedAttention(0, masked_queries=True), IntoMostSimilarKept(1), Mean())


class CompressedCaformer(CompressedModel, MetaFormer):
    """A CAFormer whose third stage merges tokens. `grids` are the rows and columns of each stage for
    images of `image_size`, height and width."""

    image_size: Size
    grids: tuple[Size, ...]
    stages: Any  # typed by timm as plain modules
    head: Any

    def compressible_blocks(self) -> Sequence[nn.Module]:
        return self.stages[2].blocks

    def containers(self) -> Sequence[nn.Module]:
        return [self.stages, *(part for stage in self.stages[2:] for part in (stage, stage.blocks))]

    def attention_blocks(self) -> Sequence[nn.Module]:
        return [*self.stages[2].blocks, *self.stages[3].blocks]

    def recomputes(self) -> bool:
        return self.stages[2].grad_checkpointing  # timm sets that of all stages

    @property
    def token_grid(self) -> tuple[int, int]:
        return self.grids[2]

    def grid_at(self, size: Size) -> Size:
        return tuple(_grids(self, size))[2]

    def prepared(self, state: TokenState, schedule: Schedule | None) -> TokenState:
        """Origins, to restore the grid before stage 4, unless nothing is removed."""
        whole = schedule is not None and min(schedule.merge[: len(self.stages[2].blocks)]) == prod(self.grids[2])
        return state if whole else state.traced()

    def check(self, schedule: Schedule, where: str = "") -> Schedule:
        made = super().check(schedule, where)
        for block in range(len(self.stages[2].blocks), len(made.merge)):
            count, limit = made.merge[block], self.compression.space.limits[block]
            if count != limit:
                raise ScheduleError(
                    f"{where}{MERGE_FIELD}[{block}]: found {count}; accepted: {limit}, stage 4 is never compressed"
                )
        return made

    def cost(self, counts: Iterable[tuple[Count, Count]]) -> Count | int:
        kernel = self.stages[0].blocks[0].token_mixer.dwconv.kernel_size[0]
        shapes = [
            StageShape(prod(grid), into.out_channels, into.in_channels, into.kernel_size[0], len(stage.blocks))
            for grid, into, stage in zip(self.grids, _convolutions(self), self.stages, strict=True)
        ]
        return caformer_flops(shapes, self.num_classes, kernel, counts)

    def embed(self, images: Tensor) -> tuple[Tensor, Sequence[Positions]]:
        return self._tokens(2, self.stages[1](self.stages[0](self.stem(images)))), self.no_positions()

    def classify(self, state: TokenState) -> Tensor:
        return self.forward_head(self._fourth_stage(as_map(restore(state), self.grids[2])))

    def forward_features(self, x: Tensor) -> Tensor:
        """Features `[B, C, rows, columns]` of images `x` `[B, 3, H, W]`, as timm's: those of stage 4.

        Where a count of 1 has pruned, a position keeps what its token last was; logits have zeros there.
        """
        return self._maps(x)[-1]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """What some stages leave of images `x` `[B, 3, H, W]`, each `[B, C, rows, columns]`, and what the last stage
        leaves, as in timm: with `stop_early` the last one that was asked for. `norm` changes nothing here.

        Raises:
            ValueError: another format, or images of another grid.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: found {output_fmt!r}; accepted: 'NCHW'")
        taken, highest = feature_take_indices(len(self.stages), indices)
        maps = self._maps(x)[: highest + 1 if stop_early else None]
        found = [maps[index] for index in taken]
        return found if intermediates_only else (maps[-1], found)

    def _maps(self, x: Tensor) -> list[Tensor]:
        """What each stage leaves of images `[B, 3, H, W]`."""
        self.check_input(x)
        first = self.stages[0](self.stem(x))
        second = self.stages[1](first)
        state = TokenState(self._tokens(2, second)).remembered()
        third = as_map(restore(self.run_blocks(Entry(state, self.no_positions()))[-1]), self.grids[2])
        return [first, second, third, self._fourth_stage(third)]

    def _tokens(self, stage: int, x: Tensor) -> Tensor:
        """Tokens `[B, N, C]` that enter the blocks of a stage, of what the stage before left."""
        return self.stages[stage].downsample(x).flatten(2).transpose(1, 2)

    def _fourth_stage(self, x: Tensor) -> Tensor:
        """What stage 4 makes of what stage 3 left, `[B, C, rows, columns]`: it is never compressed."""
        x = self._tokens(3, x)
        whole = Kept(x.shape[1], x.shape[1], x.shape[1])
        steps = [(block, NO_POSITIONS, self.rule, whole, None) for block in self.stages[3].blocks]
        return as_map(self.run(steps, TokenState(x)).x, self.grids[3])


def caformer(
    model: Any,
    prune_granularity: int = GRANULARITY,
    merge_granularity: int = GRANULARITY,
    input_size: int | Size = 224,
    return_flop: bool = True,
) -> CompressedCaformer:
    """Patch a timm CAFormer for images of `input_size`, a side or height and width, in place.

    The search leaves the first and last block of stage 3 whole. CAFormer only merges: the pruning
    granularity is there because the three families are called alike. The head's norm gets the
    original's epsilon.

    Raises:
        UnsupportedModelError: `model` is not a MetaFormer of two convolution and two attention stages.
        RateError: a granularity below 1.
    """
    _check_caformer(model)
    size = as_size(input_size)
    grids = tuple(_grids(model, size))
    third, fourth = (len(stage.blocks) for stage in model.stages[2:])
    if third < 3:
        raise UnsupportedModelError(f"found {third} blocks in stage 3; accepted: three at least")
    if prod(grids[2]) < 2:
        raise UnsupportedModelError(f"input_size: found {input_size}; accepted: two tokens at least in stage 3")
    limits = (prod(grids[2]),) * third + (prod(grids[3]),) * fourth
    space = SearchSpace(limits, searchable=tuple(range(1, third - 1)), prunes=False, prefix=0)
    facts = {"rule": RULE, "image_size": size, "grids": grids, "return_flop": return_flop}
    compress(model, space, (prune_granularity, merge_granularity), **facts)
    model.__class__ = CompressedCaformer
    model.mlps = mlps_of(model)
    if not isinstance(model.head.fc, nn.Identity):
        model.head.fc.norm.eps = ORIGINAL_HEAD_EPS
    return model


def _check_caformer(model: Any) -> None:
    kind = type(model)
    if kind is not MetaFormer:
        raise UnsupportedModelError(f"found {kind.__name__}; accepted: a timm MetaFormer not yet patched")
    mixers = tuple(type(stage.blocks[0].token_mixer) for stage in model.stages)
    if mixers != MIXERS:
        found = ", ".join(mixer.__name__ for mixer in mixers)
        raise UnsupportedModelError(f"found stages of {found}; accepted: SepConv, SepConv, Attention, Attention")
    if not isinstance(model.head.fc, MlpHead | nn.Identity):
        raise UnsupportedModelError(f"head.fc: found {type(model.head.fc).__name__}; accepted: MlpHead, or none")
    check_methods(model, "model", CompressedCaformer.uncalled)
    for index in (2, 3):
        check_methods(model.stages[index], f"stages.{index}")
        for position, block in enumerate(model.stages[index].blocks):
            check_block(block, f"stages.{index}.blocks.{position}")


def _convolutions(model: Any) -> list[nn.Conv2d]:
    """The convolution into each stage."""
    return [model.stem.conv, *(stage.downsample.conv for stage in model.stages[1:])]


def _grids(model: nn.Module, size: Size) -> Iterator[Size]:
    """Yield the rows and columns of each stage for images of `size`."""
    for convolution in _convolutions(model):
        steps = zip(size, convolution.padding, convolution.kernel_size, convolution.stride, strict=True)
        rows, columns = ((side + 2 * int(padding) - kernel) // stride + 1 for side, padding, kernel, stride in steps)
        yield (size := (rows, columns))  # what enters the next
