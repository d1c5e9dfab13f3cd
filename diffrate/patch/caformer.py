"""CAFormer: merge in stage 3 only, without a class token, and restore the grid before stage 4."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.metaformer import Attention, MetaFormer, MlpHead, SepConv
from torch import Tensor, nn

from diffrate.block import BlockNames, ReductionRules, UnsupportedModelError, check_block, fixed_block
from diffrate.flops import StageShape, caformer_flops
from diffrate.kept import KeptCounts
from diffrate.patch.base import CompressedModel
from diffrate.schedule import MERGE_FIELD, Kept, Schedule, ScheduleError, running_counts
from diffrate.tokens import TokenState

NAMES = BlockNames(
    attention="token_mixer",
    branch1=("drop_path1", "layer_scale1"),
    branch2=("drop_path2", "layer_scale2"),
    skip1=("res_scale1",),
    skip2=("res_scale2",),
)
RULES = ReductionRules(class_token=False, weigh_by_similarity=False)
MIXERS = (SepConv, SepConv, Attention, Attention)
# timm's port of the head normalises with 1e-6, the original with 1e-5: logits differ by 1e-6.
ORIGINAL_HEAD_EPS = 1e-5

Grid = tuple[int, int]


class CompressedCaformer(CompressedModel, MetaFormer):
    """A CAFormer whose third stage merges tokens. `grids` are the rows and columns of each stage."""

    grids: tuple[Grid, ...]
    stages: Any  # typed by timm as plain modules
    head: Any

    @property
    def token_limits(self) -> tuple[int, ...]:
        return tuple(_area(self.grids[stage]) for stage in (2, 3) for _ in self.stages[stage].blocks)

    @property
    def prunes(self) -> bool:
        return False

    def check(self, schedule: Schedule, where: str = "") -> None:
        super().check(schedule, where)
        third = len(self.stages[2].blocks)
        for block, (count, limit) in enumerate(zip(schedule.merge, self.token_limits, strict=True)):
            if block >= third and count != limit:
                raise ScheduleError(
                    f"{where}{MERGE_FIELD}[{block}]: found {count}; accepted: {limit}, stage 4 is never compressed"
                )

    def flops_at(self, schedule: Schedule) -> int:
        counts = [(kept.entering, kept.merged) for kept in self._third_stage_counts(schedule)]
        shapes = _stage_shapes(self)
        return caformer_flops(
            shapes, self.num_classes, self.stages[0].blocks[0].token_mixer.dwconv.kernel_size[0], counts
        )

    def compress(self, images: Tensor, schedule: Schedule, trace: bool) -> TokenState:
        x = self.stages[1](self.stages[0](self.stem(images)))
        third = self.stages[2]
        x = third.downsample(x)
        if tuple(x.shape[-2:]) != self.grids[2]:
            raise ValueError(
                f"images {list(images.shape[-2:])} make {list(x.shape[-2:])} tokens; accepted: {list(self.grids[2])}"
            )
        state = TokenState(x.flatten(2).transpose(1, 2))
        counts = self._third_stage_counts(schedule)
        if trace or counts[-1].merged < counts[0].entering:
            state = state.traced()
        for block, kept in zip(third.blocks, counts, strict=True):
            state = fixed_block(block, NAMES, RULES, state, kept)
        return state

    def classify(self, state: TokenState) -> Tensor:
        fourth = self.stages[3]
        x = fourth.downsample(_as_grid(restore(state), self.grids[2]))
        state = TokenState(x.flatten(2).transpose(1, 2))
        tokens = state.x.shape[1]
        for block in fourth.blocks:
            state = fixed_block(block, NAMES, RULES, state, Kept(tokens, tokens, tokens))
        return self.forward_head(_as_grid(state.x, self.grids[3]))

    def _third_stage_counts(self, schedule: Schedule) -> list[Kept]:
        third = Schedule(None, schedule.merge[: len(self.stages[2].blocks)])
        return running_counts(third, _area(self.grids[2]))


def restore(state: TokenState) -> Tensor:
    """Features for every input position `[B, N0, C]`: those of the token that stands for it.

    A position without one, which only a count of 1 leaves (`merge_tokens`), gets zeros.
    """
    if state.origin is None:
        return state.x
    index = state.origin.clamp(min=0).unsqueeze(-1).expand(-1, -1, state.x.shape[-1])
    return torch.where((state.origin >= 0).unsqueeze(-1), state.x.gather(1, index), 0)


def caformer(model: nn.Module, input_size: int = 224) -> CompressedCaformer:
    """Patch a timm CAFormer for square images of `input_size`, in place; it keeps every token
    until `set_kept_num`. The head's norm gets the original's epsilon.

    Raises:
        UnsupportedModelError: `model` is not a MetaFormer of two convolution and two attention stages.
    """
    _check_caformer(model)
    model.__class__ = CompressedCaformer
    assert isinstance(model, CompressedCaformer)
    model.head.fc.norm.eps = ORIGINAL_HEAD_EPS
    model.grids = _grids(model, (input_size, input_size))
    model.add_module("compression", KeptCounts(model.dense_schedule()))
    return model


def _check_caformer(model: nn.Module) -> None:
    if type(model) is not MetaFormer:
        raise UnsupportedModelError(f"found {type(model).__name__}; accepted: a timm MetaFormer not yet patched")
    stages: Any = model.stages
    mixers = tuple(type(stage.blocks[0].token_mixer) for stage in stages)
    if mixers != MIXERS or not isinstance(model.head.fc, MlpHead):
        found = ", ".join(mixer.__name__ for mixer in mixers)
        raise UnsupportedModelError(f"found stages of {found}; accepted: SepConv, SepConv, Attention, Attention")
    for index in (2, 3):
        for position, block in enumerate(stages[index].blocks):
            check_block(block, NAMES, f"stages.{index}.blocks.{position}")


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


def _as_grid(x: Tensor, grid: Grid) -> Tensor:
    """`[B, N, C]` as `[B, C, rows, columns]`."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid)
