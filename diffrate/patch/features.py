"""A compressed ViT as a backbone: features at the full grid, as timm's own model returns them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from timm.models._features import feature_take_indices
from torch import Tensor

from diffrate.patch.base import CompressedModel
from diffrate.patch.grid import as_map, restore

_Model = CompressedModel if TYPE_CHECKING else object


class Features(_Model):
    """Mixed in by the families: what dense heads call, at the present kept counts.

    Every position has the features of the token that stands for it; where it was pruned, what its token
    was when it went.
    """

    norm: Any
    num_prefix_tokens: int

    def forward_features(self, images: Tensor) -> Tensor:
        """Normalised features `[B, N0, C]` of images `[B, 3, H, W]`, prefix tokens first."""
        *_, last = self.run_blocks(self.enter(images).remembered())
        return self.norm(restore(last))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """What some blocks leave of images `x` `[B, 3, H, W]`, and `forward_features` of them, as in timm.

        `indices` are the blocks, or how many of the last; `norm` normalises; maps are `[B, C, rows, columns]`,
        or tokens `[B, N, C]` for the format "NLC", paired with the prefix tokens on request. Only the maps with
        `intermediates_only`, and then no block after the last of them runs with `stop_early`.

        Raises:
            ValueError: another format.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: found {output_fmt!r}; accepted: 'NCHW' or 'NLC'")
        taken, highest = feature_take_indices(len(self.compressible_blocks()), _as_list(indices))
        end = highest + 1 if stop_early else None
        states = self.run_blocks(self.enter(x).remembered(), end)
        found = [self._intermediate(restore(states[index]), norm, output_fmt) for index in taken]
        maps = found if return_prefix_tokens else [features for features, _ in found]
        return maps if intermediates_only else (self.norm(restore(states[-1])), maps)

    def _intermediate(self, x: Tensor, norm: bool, output_fmt: str) -> tuple[Tensor, Tensor]:
        """Patch features in the format, and those of the prefix tokens, of tokens `[B, N0, C]`."""
        x = self.norm(x) if norm else x
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        return (as_map(patches, self.token_grid).contiguous() if output_fmt == "NCHW" else patches), prefix


def _as_list(indices: int | Sequence[int] | None) -> int | list[int] | None:
    return list(indices) if isinstance(indices, Sequence) else indices
