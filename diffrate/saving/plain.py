"""timm models as structure alone, without storage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import nn

from diffrate.files import first_line
from diffrate.saving.about import SavedModelError


def plain_model(architecture: str, arguments: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> nn.Module:
    """timm's model on the meta device: no weights, no draws from a generator.

    `config` goes over the entries of its `pretrained_cfg`.

    Raises:
        SavedModelError: this timm has no such architecture, or cannot build it with these arguments.
    """
    if not timm.is_model(architecture):
        raise SavedModelError(f"architecture: found {architecture!r}; accepted: a model of timm {timm.__version__}")
    try:
        with torch.device("meta"):
            return timm.create_model(
                architecture, pretrained=False, pretrained_cfg_overlay=dict(config or {}), **arguments
            )
    except Exception as error:  # each constructor fails in its own way, and all mean: not with these
        raise SavedModelError(
            f"arguments: found {dict(arguments)}; accepted: what timm {timm.__version__} "
            f"builds {architecture} with ({first_line(error)})"
        ) from error
