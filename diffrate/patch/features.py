"""A compressed ViT as a backbone: features at the full grid, as timm's own model returns them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor

from diffrate.blocks.tokens import TokenState, replaced, standing
from diffrate.patch.base import CompressedModel, PlannedCost, masked
from diffrate.schedule import Schedule


def restore(state: TokenState) -> Tensor:
    """Features for every input position `[B, N0, C]`: those of the token that stands for it.

    Where none does, the position was pruned: it gets what it last was, or zeros where nobody asked to
    remember. In search tokens are still in place: a masked one gives way to the one that stands for it
    by the share that its mask says, and so passes on how much its own features were worth.
    """
    if state.origin is None:
        return state.x
    found = standing(state.x, state.origin)
    if state.last is not None:
        found = torch.where(state.origin[:, :, None] >= 0, found, state.last)
    if state.mask is None:
        return found
    return torch.lerp(found, state.x, state.mask.to(state.x.dtype).unsqueeze(-1))


def as_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """`[B, N, C]` as `[B, C, rows, columns]`."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid)


_Model = CompressedModel if TYPE_CHECKING else object


class Features(_Model):
    """Mixed in by the families: what dense heads call, at the present kept counts.

    Every position has the features of the token that stands for it; where it was pruned, what its token
    was when it went.
    """

    norm: Any
    num_prefix_tokens: int

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Normalised features `[B, N0, C]` of images `x` `[B, 3, H, W]`, prefix tokens first.

        Raises:
            ValueError: a mask is asked for, or the images make another grid of tokens.
        """
        _refuse_masks(attn_mask, is_causal)
        return self.norm(restore(self._remembering(x)[-1]))

    def features_at(self, images: Tensor, schedule: Schedule) -> Tensor:
        """Normalised features `[B, N0, C]` of the patches alone at `schedule`, whatever the model is set to."""
        return self._patches(self._compress(self.enter(images).remembered(), schedule, None))

    def search_features(self, images: Tensor, cost: PlannedCost | None = None) -> tuple[Tensor, Tensor]:
        """The same in a step of the search, with the expected cost as in `search_step`; both carry gradients."""
        entry = self.enter(images)
        state, spent = self._search(replaced(entry, state=masked(entry.state).remembered()), None, cost)
        return self._patches(state), spent

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """What some blocks leave of images `x` `[B, 3, H, W]`, and normalised features of the last, as in timm.

        `indices` are the blocks, or how many of the last; `norm` normalises; maps are `[B, C, rows, columns]`,
        or tokens `[B, N, C]` for the format "NLC", paired with the prefix tokens on request where there are any.
        Only the maps with `intermediates_only`; no block after the last that was asked for runs with
        `stop_early`; under timm's names with `output_dict`.

        Raises:
            ValueError: another format, a mask, or images of another grid of tokens.
        """
        _refuse_masks(attn_mask, is_causal)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: found {output_fmt!r}; accepted: 'NCHW' or 'NLC'")
        taken, highest = taken_of(len(self.compressible_blocks()), indices)
        states = self._remembering(x, highest + 1 if stop_early else None)
        pairs = [self._intermediate(restore(states[index]), norm, output_fmt) for index in taken]
        last = None if intermediates_only else self.norm(restore(states[-1]))
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            return _as_dict(last, pairs, with_prefix)
        maps = pairs if with_prefix else [features for features, _ in pairs]
        return maps if last is None else (last, maps)

    def _patches(self, state: TokenState) -> Tensor:
        return self.norm(restore(state))[:, self.num_prefix_tokens :]

    def _remembering(self, x: Tensor, end: int | None = None) -> list[TokenState]:
        """The tokens of images after each of the first `end` blocks, and what pruned ones last were."""
        return self.run_blocks(self.enter(x).remembered(), end)

    def _intermediate(self, x: Tensor, norm: bool, output_fmt: str) -> tuple[Tensor, Tensor]:
        """Patch features in the format, and those of the prefix tokens, of tokens `[B, N0, C]`."""
        x = self.norm(x) if norm else x
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        return (as_map(patches, self.token_grid).contiguous() if output_fmt == "NCHW" else patches), prefix


def taken_of(count: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """Which of `count` parts `indices` mean, as timm reads them, and the highest of them."""
    return feature_take_indices(count, list(indices) if isinstance(indices, Sequence) else indices)


def _as_dict(last: Tensor | None, pairs: Sequence[tuple[Tensor, Tensor]], with_prefix: bool) -> dict[str, Any]:
    """Features under timm's names."""
    found: dict[str, Any] = {"image_intermediates": [features for features, _ in pairs]}
    if with_prefix:
        found["image_intermediates_prefix"] = [prefix for _, prefix in pairs]
    return found if last is None else found | {"image_features": last}


def _refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError("attn_mask, is_causal: found a mask; accepted: none, tokens are compressed for whole images")
