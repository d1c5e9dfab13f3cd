"""CAFormer: merge in stage 3 only, without a class token, and restore the grid before stage 4."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from timm.models.metaformer import Attention, MetaFormer, MlpHead, SepConv
from torch import Tensor, nn

from diffrate.blocks.forms import UnsupportedModelError, check_block, check_methods
from diffrate.blocks.heads import NO_POSITIONS, Positions
from diffrate.blocks.reduction import IntoMostSimilarKept, PlainMean, ReceivedAttention, ReductionRule
from diffrate.blocks.tokens import TokenState
from diffrate.flops import Count, StageShape, caformer_flops
from diffrate.patch.base import CompressedModel, Entry
from diffrate.patch.features import as_map, restore, taken_of
from diffrate.patch.shapes import as_size
from diffrate.patch.state import CompressionState
from diffrate.schedule import GRANULARITY, MERGE_FIELD, Kept, Schedule, ScheduleError, SearchSpace

MIXERS = (SepConv, SepConv, Attention, Attention)
# timm's port of the head normalises with 1e-6, the original with 1e-5: logits differ by 1e-6.
ORIGINAL_HEAD_EPS = 1e-5

Grid = tuple[int, int]


# As published, the most important token is no destination.
RULE = ReductionRule(0, ReceivedAttention(masked_queries=True), IntoMostSimilarKept(1), PlainMean(cosine_sizes=False))


class CompressedCaformer(CompressedModel, MetaFormer):
    """A CAFormer whose third stage merges tokens. `grids` are the rows and columns of each stage for
    images of `image_size`, height and width."""

    image_size: Grid
    grids: tuple[Grid, ...]
    stages: Any  # typed by timm as plain modules
    head: Any

    def compressible_blocks(self) -> Sequence[nn.Module]:
        return self.stages[2].blocks

    def containers(self) -> Sequence[nn.Module]:
        return [part for stage in self.stages[2:] for part in (stage, stage.blocks)]

    def attention_blocks(self) -> Sequence[nn.Module]:
        return [*self.stages[2].blocks, *self.stages[3].blocks]

    def recomputes(self) -> bool:
        return self.stages[2].grad_checkpointing  # timm sets that of all stages

    @property
    def token_grid(self) -> tuple[int, int]:
        return self.grids[2]

    def grid_at(self, size: Grid) -> Grid:
        return _grids(self, size)[2]

    def prepared(self, state: TokenState, schedule: Schedule | None) -> TokenState:
        """Origins, to restore the grid before stage 4, unless nothing is removed."""
        whole = schedule is not None and min(schedule.merge[: len(self.stages[2].blocks)]) == _area(self.grids[2])
        return state if whole else state.traced()

    def check(self, schedule: Schedule, where: str = "") -> None:
        super().check(schedule, where)
        third = len(self.stages[2].blocks)
        for block, (count, limit) in enumerate(zip(schedule.merge, self.compression.space.limits, strict=True)):
            if block >= third and count != limit:
                raise ScheduleError(
                    f"{where}{MERGE_FIELD}[{block}]: found {count}; accepted: {limit}, stage 4 is never compressed"
                )

    def cost(self, counts: Iterable[tuple[Count, Count]]) -> Count | int:
        kernel = self.stages[0].blocks[0].token_mixer.dwconv.kernel_size[0]
        return caformer_flops(_stage_shapes(self), self.num_classes, kernel, counts)

    def embed(self, images: Tensor) -> tuple[Tensor, Sequence[Positions]]:
        return self._third_tokens(self.stages[1](self.stages[0](self.stem(images)))), self.no_positions()

    def classify(self, state: TokenState) -> Tensor:
        return self.forward_head(self._fourth_stage(self._third_map(state)))

    def forward_features(self, x: Tensor) -> Tensor:
        """Features `[B, C, rows, columns]` of images `x` `[B, 3, H, W]`, as timm's: those of stage 4.

        Where a count of 1 has pruned, a position keeps what its token last was; logits have zeros there.
        """
        return self._fourth_stage(self._third_map(self.run_blocks(self.enter(x).remembered())[-1]))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
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
        taken, highest = taken_of(len(self.stages), indices)
        maps = self._maps(x)[: highest + 1 if stop_early else None]
        found = [maps[index] for index in taken]
        return found if intermediates_only else (maps[-1], found)

    def _maps(self, x: Tensor) -> list[Tensor]:
        """What each stage leaves of images `[B, 3, H, W]`."""
        self.check_grid(x)
        maps = [self.stages[0](self.stem(x))]
        maps.append(self.stages[1](maps[0]))
        state = TokenState(self._third_tokens(maps[1])).remembered()
        maps.append(self._third_map(self.run_blocks(Entry(state, self.no_positions()))[-1]))
        return [*maps, self._fourth_stage(maps[2])]

    def _third_tokens(self, x: Tensor) -> Tensor:
        """Tokens `[B, N, C]` that enter the blocks of stage 3, of what stage 2 left."""
        return self.stages[2].downsample(x).flatten(2).transpose(1, 2)

    def _third_map(self, state: TokenState) -> Tensor:
        """What stage 3 leaves, at its grid."""
        return as_map(restore(state), self.grids[2])

    def _fourth_stage(self, x: Tensor) -> Tensor:
        """What stage 4 makes of what stage 3 left, `[B, C, rows, columns]`: it is never compressed."""
        fourth = self.stages[3]
        state = TokenState(fourth.downsample(x).flatten(2).transpose(1, 2))
        tokens = state.x.shape[1]
        for block in fourth.blocks:
            state = self._run(block, NO_POSITIONS, state, Kept(tokens, tokens, tokens))
        return as_map(state.x, self.grids[3])


def caformer(
    model: nn.Module,
    prune_granularity: int = GRANULARITY,
    merge_granularity: int = GRANULARITY,
    input_size: int | Grid = 224,
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
    image_size = as_size(input_size)
    grids = _grids(model, image_size)
    stages: Any = model.stages
    depths = [len(stage.blocks) for stage in stages]
    space = SearchSpace(
        limits=(_area(grids[2]),) * depths[2] + (_area(grids[3]),) * depths[3],
        searchable=tuple(range(1, depths[2] - 1)),
        prunes=False,
        prefix=0,
    )
    if not space.searchable:
        raise UnsupportedModelError(f"found {depths[2]} blocks in stage 3; accepted: three at least")
    if _area(grids[2]) < 2:
        raise UnsupportedModelError(f"input_size: found {input_size}; accepted: two tokens at least in stage 3")
    compression = CompressionState(space, prune_granularity, merge_granularity).to(next(model.parameters()).device)
    model.__class__ = CompressedCaformer
    assert isinstance(model, CompressedCaformer)
    classifier: Any = model.head.fc
    if isinstance(classifier, MlpHead):
        norm: Any = classifier.norm
        norm.eps = ORIGINAL_HEAD_EPS
    model.rule = RULE
    model.image_size, model.grids, model.return_flop = image_size, grids, return_flop
    model.add_module("compression", compression)
    return model


def _check_caformer(model: nn.Module) -> None:
    if type(model) is not MetaFormer:
        raise UnsupportedModelError(f"found {type(model).__name__}; accepted: a timm MetaFormer not yet patched")
    stages: Any = model.stages
    mixers = tuple(type(stage.blocks[0].token_mixer) for stage in stages)
    if mixers != MIXERS:
        found = ", ".join(mixer.__name__ for mixer in mixers)
        raise UnsupportedModelError(f"found stages of {found}; accepted: SepConv, SepConv, Attention, Attention")
    head: Any = model.head
    if not isinstance(head.fc, MlpHead | nn.Identity):
        raise UnsupportedModelError(f"head.fc: found {type(head.fc).__name__}; accepted: MlpHead, or none")
    check_methods(model, "model")
    for index in (2, 3):
        check_methods(stages[index], f"stages.{index}")
        for position, block in enumerate(stages[index].blocks):
            check_block(block, f"stages.{index}.blocks.{position}")


def _stage_shapes(model: CompressedCaformer) -> tuple[StageShape, StageShape, StageShape, StageShape]:
    first, second, third, fourth = (
        StageShape(
            tokens=_area(grid),
            width=convolution.out_channels,
            inputs=convolution.in_channels,
            kernel=convolution.kernel_size[0],
            depth=len(stage.blocks),
        )
        for grid, convolution, stage in zip(model.grids, _convolutions(model), model.stages, strict=True)
    )
    return first, second, third, fourth


def _convolutions(model: Any) -> list[nn.Conv2d]:
    """The convolution into each stage."""
    return [model.stem.conv, *(stage.downsample.conv for stage in list(model.stages)[1:])]


def _grids(model: nn.Module, size: Grid) -> tuple[Grid, ...]:
    """Rows and columns of each stage for images of `size`."""
    grids = []
    for convolution in _convolutions(model):
        rows, columns = (
            (side + 2 * int(convolution.padding[axis]) - convolution.kernel_size[axis]) // convolution.stride[axis] + 1
            for axis, side in enumerate(size)
        )
        size = (rows, columns)
        grids.append(size)
    return tuple(grids)


def _area(grid: Grid) -> int:
    return grid[0] * grid[1]
