"""What models of other libraries have and no argument of timm's stands for, as parts of a timm model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({"none": lambda x: x, "tanh": torch.tanh})


class FeatureHead(nn.Linear):
    """A last layer whose outputs are features of an image, not logits: a projection, or a pooler with its activation.

    activation: a name of `ACTIVATIONS`.
    """

    def __init__(self, inputs: int, outputs: int, activation: str = "none") -> None:
        super().__init__(inputs, outputs)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Features `[B, K]` of pooled tokens `[B, C]`."""
        return ACTIVATIONS[self.activation](super().forward(x))


class ClassAndMean(nn.Module):
    """The class token beside the mean of the patches, `[B, 2 C]` of normalised tokens `[B, N, C]`, as DINOv2's
    classifier sees them. It is a model's `attn_pool`.

    prefix: how many first tokens are no patches.
    """

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix

    def forward(self, x: Tensor) -> Tensor:
        """Pooled tokens of dense images."""
        return torch.cat([x[:, 0], x[:, self.prefix :].mean(1)], dim=-1)


def complete(
    model: Any, norm_eps: float | None = None, class_and_mean: bool = False, feature_head: str | None = None
) -> None:
    """Give a plain timm `model`, in place, the parts that its arguments cannot ask for.

    norm_eps: the epsilon of each layer norm. class_and_mean: pool by `ClassAndMean`. feature_head: an activation, of a
    `FeatureHead` for as many features as the model has classes.

    Raises:
        ValueError: an epsilon that is no number above 0, or an unknown activation.
    """
    if norm_eps is not None:
        if not isinstance(norm_eps, float) or not norm_eps > 0:
            raise ValueError(f"norm_eps: found {norm_eps!r}; accepted: a number above 0")
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = norm_eps
    width = model.num_features
    if class_and_mean:
        model.attn_pool, width = ClassAndMean(model.num_prefix_tokens), 2 * width
        model.head = nn.Linear(width, model.num_classes) if model.num_classes else nn.Identity()
    if feature_head is not None:
        if feature_head not in ACTIVATIONS:
            raise ValueError(f"feature_head: found {feature_head!r}; accepted: {', '.join(ACTIVATIONS)}")
        model.head = FeatureHead(width, model.num_classes, feature_head)
