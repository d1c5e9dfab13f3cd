"""Saved models on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import hf_hub_download

from diffrate.atomic import first_line
from diffrate.saving.about import SavedModelError

PREFIX = "hf-hub:"
DEFAULT_FILE = "model.safetensors"
REFERENCE = re.compile(PREFIX + r"(?P<repository>[^/@]+/[^/@]+)(/(?P<file>[^@]+))?(@(?P<revision>.+))?")


def fetch(reference: str) -> Path:
    """The file of `hf-hub:USER/NAME[/FILE][@REVISION]` on this machine, downloaded on first use.

    Raises:
        SavedModelError: the reference is of another form, or the file cannot be had.
    """
    parts = REFERENCE.fullmatch(reference)
    if parts is None:
        raise SavedModelError(f"found {reference!r}; accepted: {PREFIX}USER/NAME, with /FILE and @REVISION or without")
    file = parts["file"] or DEFAULT_FILE
    try:
        return Path(hf_hub_download(parts["repository"], file, revision=parts["revision"]))
    except Exception as error:  # no network, repository, file or permission: an error of its own each
        raise SavedModelError(f"{reference}: cannot download {file} ({first_line(error)})") from error
