"""Fetch weights: official files on first use, and any URL a user gives."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from urllib.parse import urlparse

import huggingface_hub
import timm
import torch
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from torch import Tensor

from diffrate.atomic import answers, first_line, hub_or_cache
from models.zoo import HUB_SITE, CheckpointError, ModelEntry, OfficialWeights

# torch.hub checks a download against the first hex digits of its SHA-256 when the name carries them.
HASH_IN_NAME = re.compile(r"-([a-f0-9]{8,})\.")
CONNECT_SECONDS = 30
log = logging.getLogger("progress")  # --quiet silences it


def official_file(entry: ModelEntry, bar: bool = True) -> Path:
    """The official weights of an entry of the zoo as a local file, downloaded on first use.

    Raises:
        CheckpointError: there are none, or no source can be reached; the message names each source, and the path where
            the file may be put by hand.
    """
    if isinstance(entry.weights, Path):
        return entry.weights
    if not isinstance(entry.weights, OfficialWeights):
        raise CheckpointError(f"--model {entry.name}: has no pretrained weights; accepted: a file with --checkpoint")
    file, sources = entry.weights
    return _first_of(sources, file, bar, f"the weights of {entry.name}: tried ", "name one with --checkpoint")


def fetch(url: str, bar: bool = True) -> Path:
    """Download `url` into the checkpoint directory, once; the hash in its name is checked if there.

    Raises:
        CheckpointError: the URL cannot be reached or the hash differs.
    """
    try:
        name = Path(urlparse(url).path).name
        if name in ("", ".."):
            raise ValueError("found no file")
    except ValueError as error:
        raise CheckpointError(f"checkpoint {url}: {error}; accepted: a URL that ends in a file's name") from error
    return _first_of([url], name, bar, "", "give its path instead of the URL")


def timm_state(name: str, source: str, bar: bool = True) -> dict[str, Tensor]:
    """The tensors of a pretrained model as timm builds it, downloaded from `source` on first use.

    Raises:
        CheckpointError: they cannot be had; the message names the source and what to do.
    """
    try:
        if "://" in source:
            _check_answer(source, _checkpoints() / Path(urlparse(source).path).name)
        with downloading(source, bar), hub_or_cache() if source.startswith(HUB_SITE) else nullcontext():
            return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:
        remedy = "bring it into the Hugging Face cache (HF_HOME)" if source.startswith(HUB_SITE) else "connect"
        raise CheckpointError(
            f"cannot load the weights of {name}: tried {source} ({first_line(error)}). "
            f"To go on, {remedy}, or name a file with --checkpoint"
        ) from error


@contextmanager
def downloading(source: str, bar: bool = True) -> Iterator[None]:
    """Show a bar for downloads inside, or without `bar` log one line. A silent server times out."""
    if not bar:
        log.info("downloading %s", source)
        disable_progress_bars()
    timeout, verbosity = socket.getdefaulttimeout(), hub_logging.get_verbosity()
    socket.setdefaulttimeout(CONNECT_SECONDS)  # torch.hub has no argument for it
    hub_logging.set_verbosity_error()  # else the hub warns on each retry
    try:
        yield
    finally:
        socket.setdefaulttimeout(timeout)
        hub_logging.set_verbosity(verbosity)


def _first_of(sources: Sequence[str], file: str, bar: bool, what: str, instead: str) -> Path:
    """`file` in the checkpoint directory, which `TORCH_HOME` moves, from the first source that can be reached."""
    target, failures = _checkpoints() / file, []
    for source in sources:
        try:
            return _downloaded(source, target, bar)
        except Exception as error:  # every source fails in its own way, and all mean: try the next
            failures.append(f"{source} ({first_line(error)})")
    tried = "; ".join(failures)
    raise CheckpointError(f"cannot download {what}{tried}. Put the file by hand at {target}, or {instead}")


def _checkpoints() -> Path:
    """Where torch keeps what it downloads."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def _check_answer(source: str, target: Path) -> None:
    """Raise an OSError where `target` is not there yet and the server of the URL `source` is silent."""
    if not target.is_file() and not answers(source):
        raise OSError(f"no answer from {urlparse(source).netloc}")


def _downloaded(source: str, target: Path, bar: bool) -> Path:
    """`target`, downloaded if it is missing, or a repository's file in the hub's own cache."""
    if target.is_file():
        return target
    with downloading(source, bar):
        if source.startswith(HUB_SITE):
            with hub_or_cache():
                return Path(huggingface_hub.hf_hub_download(source.removeprefix(HUB_SITE), "model.safetensors"))
        _check_answer(source, target)
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = HASH_IN_NAME.search(target.name)
        # Writes to a temporary file first, and renames when the hash agrees.
        torch.hub.download_url_to_file(source, str(target), hash_prefix=digest and digest[1], progress=bar)
    return target
