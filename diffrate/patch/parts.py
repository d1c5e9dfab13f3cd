"""What models of other libraries have and no argument of timm's stands for, as parts of a timm model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffrate.blocks.block import UnsupportedModelError

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


class TextHead(nn.Linear):
    """A classifier by texts, as CLIP and SigLIP have it: scaled cosines of features and embeddings, the rows of its
    weight, which are of length 1 until they are trained.

    features: what makes them of pooled tokens, a `FeatureHead` or nothing. sigmoid: whether there is a bias, as of
    logits that a sigmoid makes probabilities of.
    """

    logit_bias: nn.Parameter | None

    def __init__(self, features: nn.Module, width: int, classes: int, sigmoid: bool = False) -> None:
        super().__init__(width, classes, bias=False)
        self.features = features
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.register_parameter("logit_bias", nn.Parameter(torch.zeros(())) if sigmoid else None)

    @classmethod
    def over(cls, features: Any, model: Any, classes: int, width: int, sigmoid: bool) -> TextHead:
        """The head that sees the `features` of `model`, of `width` channels; an UnsupportedModelError where it has
        none such."""
        if not isinstance(features, FeatureHead | nn.Identity) or hasattr(model, "head_dist"):
            found = f"a {type(features).__name__} that gives logits"
        elif not model.global_pool:
            found = "features of every position"
        else:
            channels = getattr(features, "out_features", model.num_features)
            if channels == width:
                return cls(features, width, classes, sigmoid)
            found = f"features of {channels} channels"
        raise UnsupportedModelError(f"found {found}; accepted: of an image, of {width} channels as the embeddings")

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, K]` of pooled tokens `[B, C]`."""
        logits = super().forward(F.normalize(self.features(x), dim=-1)) * self.logit_scale.exp()
        return logits if self.logit_bias is None else logits + self.logit_bias


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
    model: Any,
    norm_eps: float | None = None,
    class_and_mean: bool = False,
    feature_head: str | None = None,
    text_width: int | None = None,
    text_sigmoid: bool | None = False,
) -> None:
    """Give a plain timm `model`, in place, the parts that its arguments cannot ask for.

    norm_eps: the epsilon of each layer norm. class_and_mean: pool by `ClassAndMean`. feature_head: an activation, of a
    `FeatureHead` for as many features as the model has classes. text_width, text_sigmoid: a `TextHead` for the classes,
    over so many of these features.

    Raises:
        ValueError: an epsilon that is no number above 0, or an unknown activation.
        UnsupportedModelError: the model has no features of so many channels.
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
        plain = type(model.head) in (nn.Linear, nn.Identity)
        model.head = FeatureHead(width, text_width or model.num_classes, feature_head) if plain else model.head
    if text_width is not None:
        features = nn.Identity() if feature_head is None and type(model.head) is nn.Linear else model.head
        model.head = TextHead.over(features, model, model.num_classes, text_width, bool(text_sigmoid))
