"""timm models as structure alone, without storage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import nn

from diffrate.files import first_line
from diffrate.saving.about import SavedModelError


def plain_model(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    """timm's model on the meta device: no weights, no draws from a generator.

    `arguments` are JSON values; arrays reach timm as tuples, as its own defaults are.

    Raises:
        SavedModelError: this timm has no such architecture, or cannot build it with these arguments.
    """
    if not timm.is_model(architecture):
        raise SavedModelError(f"architecture: found {architecture!r}; accepted: a model of timm {timm.__version__}")
    given: dict[str, Any] = {name: tuple(it) if isinstance(it, list) else it for name, it in arguments.items()}
    try:
        with torch.device("meta"):
            return timm.create_model(architecture, pretrained=False, **given)
    except Exception as error:  # each constructor fails in its own way, and all mean: not with these
        raise SavedModelError(
            f"arguments: found {dict(arguments)}; accepted: what timm {timm.__version__} "
            f"builds {architecture} with ({first_line(error)})"
        ) from error
