"""Pretrained weights through timm's own loader."""

from __future__ import annotations

import timm
from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

from models.download import connection_timeout, download_hub, first_line
from models.errors import CheckpointError
from models.layouts import StateDict
from models.zoo import TimmWeights


def timm_state(weights: TimmWeights, bar: bool = True) -> StateDict:
    """The tensors of a pretrained model as timm builds it, downloaded on first use.

    Raises:
        CheckpointError: they cannot be had; the message names the source and what to do.
    """
    try:
        if weights.hub and weights.file:
            _fetch(weights.hub, weights.file, bar)
        with connection_timeout():
            model = timm.create_model(weights.name, pretrained=True)
    except Exception as error:  # every source fails in its own way
        place = "bring it into the Hugging Face cache (HF_HOME)" if weights.hub else "connect"
        raise CheckpointError(
            f"cannot load the weights of {weights.name}: tried {weights.source} ({first_line(error)}). "
            f"To go on, {place}, or name a file with --checkpoint"
        ) from error
    return model.state_dict()


def _fetch(hub: str, file: str, bar: bool) -> None:
    """Download with progress what timm then finds in the cache; where the file has another name, timm looks for it."""
    repository, _, revision = hub.partition("@")
    try:
        download_hub(repository, file, revision or None, bar)
    except LocalEntryNotFoundError:  # no connection, which timm would try several times over
        raise
    except EntryNotFoundError:
        return
