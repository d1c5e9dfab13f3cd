"""Which names there are of models that can be compressed: found out by building them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from fnmatch import fnmatchcase

import timm
from timm.models import get_arch_name, list_pretrained, model_entrypoint
from torch import nn

from models.shapes import shapes_alone
from models.zoo import ZOO

# Blocks that a model is built with: a first, a last, and one between them.
DEPTH = 3
ALL = "*"


def supported_names(
    pattern: str, kinds: Collection[type[nn.Module]], accepts: Callable[[nn.Module], bool]
) -> Iterator[str]:
    """The names that match `pattern`, a shell's, of models that are of one of timm's `kinds` and that `accepts` takes.

    The zoo's come first. Then timm's, each with its pretrained tags, or alone where it has none.
    """
    yield from (name for name in ZOO if fnmatchcase(name, pattern))
    tags: dict[str, list[str]] = {}
    for name in timm.list_models(pattern, include_tags=True):  # a pattern without a tag is for all tags, as in timm
        tags.setdefault(get_arch_name(name), []).append(name)
    pretrained = set(list_pretrained())
    for architecture, names in tags.items():
        if _may_be(architecture, kinds) and _is_accepted(architecture, accepts):
            yield from [name for name in names if name in pretrained] or [architecture]


def _may_be(architecture: str, kinds: Collection[type[nn.Module]]) -> bool:
    """Whether the file that builds an architecture has one of `kinds`: most of timm's have none, and the zoo's
    own names, which have come already, are built elsewhere."""
    module = sys.modules[model_entrypoint(architecture).__module__]
    return any(getattr(module, kind.__name__, None) is kind for kind in kinds)


def _is_accepted(architecture: str, accepts: Callable[[nn.Module], bool]) -> bool:
    """Whether a model without storage is accepted: with few blocks, or whole where that is no model."""
    with shapes_alone():
        for depth in (DEPTH, None):
            # Families of stages have no depth, and some models fix how many blocks are of a kind.
            with suppress(Exception):
                if accepts(timm.create_model(architecture, depth=depth)):
                    return True
    return False
