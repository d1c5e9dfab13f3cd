"""Fetch weights: official files on first use, and any URL a user gives."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse

import timm
import torch
from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
from timm.models import get_pretrained_cfg
from torch import Tensor

from models.zoo import CheckpointError, ModelEntry, OfficialWeights, TimmWeights

# torch.hub checks a download against the first hex digits of its SHA-256 when the name carries them.
HASH_IN_NAME = re.compile(r"-([a-f0-9]{8,})\.")
CONNECT_SECONDS = 30
log = logging.getLogger("progress")  # --quiet silences it


def checkpoint_dir() -> Path:
    """Where downloads are kept and files fetched by hand are looked for (`TORCH_HOME` moves it)."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def official_file(entry: ModelEntry, bar: bool = True) -> Path:
    """The official weights of an entry of the zoo as a local file, downloaded on first use, with a progress bar
    or a log line.

    Raises:
        CheckpointError: no source could be reached; the message names each source tried and the
            place where the file may be put by hand.
    """
    if isinstance(entry.weights, Path):
        return entry.weights
    if not isinstance(entry.weights, OfficialWeights):
        raise CheckpointError(f"--model {entry.name}: has no pretrained weights; accepted: a file with --checkpoint")
    target = checkpoint_dir() / entry.weights.file
    if target.is_file():
        return target
    failures = []
    for source, download in _sources(entry.weights, target, bar):
        try:
            return download()
        except Exception as error:  # every source fails in its own way, and all mean: try the next
            failures.append(f"{source} ({first_line(error)})")
    raise CheckpointError(
        f"cannot download the weights of {entry.name}: tried {'; '.join(failures)}. "
        f"Put the file by hand at {target}, or name one with --checkpoint"
    )


def fetch(url: str, bar: bool = True) -> Path:
    """Download `url` into the checkpoint directory, once; the hash in its name is checked if there.

    Raises:
        CheckpointError: the URL cannot be reached or the hash differs.
    """
    target = checkpoint_dir() / Path(urlparse(url).path).name
    try:
        return target if target.is_file() else _download_url(url, target, bar)
    except Exception as error:
        raise CheckpointError(
            f"cannot download {url} ({first_line(error)}). Put the file by hand at {target}, "
            "or give its path instead of the URL"
        ) from error


def timm_state(weights: TimmWeights, bar: bool = True) -> dict[str, Tensor]:
    """The tensors of a pretrained model as timm builds it, downloaded on first use.

    Raises:
        CheckpointError: they cannot be had; the message names the source and what to do.
    """
    try:
        if weights.hub and weights.file:
            repository, _, revision = weights.hub.partition("@")
            try:  # with progress, what timm then finds in the cache
                _download_hub(repository, weights.file, revision or None, bar)
            except EntryNotFoundError as error:
                if isinstance(error, LocalEntryNotFoundError):  # no connection, which timm would try several times over
                    raise
                # Where the file has another name, timm looks for it.
        with _connection_timeout():
            model = timm.create_model(weights.name, pretrained=True)
    except Exception as error:  # every source fails in its own way
        place = "bring it into the Hugging Face cache (HF_HOME)" if weights.hub else "connect"
        raise CheckpointError(
            f"cannot load the weights of {weights.name}: tried {weights.source} ({first_line(error)}). "
            f"To go on, {place}, or name a file with --checkpoint"
        ) from error
    return model.state_dict()


def _sources(weights: OfficialWeights, target: Path, bar: bool) -> Iterator[tuple[str, Callable[[], Path]]]:
    url, hub_id = weights.url, None
    if weights.timm_config is not None:
        config = get_pretrained_cfg(weights.timm_config)
        assert config is not None, f"timm has no pretrained configuration {weights.timm_config}"
        url, hub_id = str(config.url or ""), config.hf_hub_id
    if url:
        yield url, lambda: _download_url(url, target, bar)
    if hub_id:
        yield f"huggingface.co/{hub_id}", lambda: _download_hub(hub_id, "model.safetensors", None, bar)


def _download_url(url: str, target: Path, bar: bool) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    found = HASH_IN_NAME.search(target.name)
    with _connection_timeout():
        # Writes to a temporary file first, and renames when the hash agrees.
        _tell(url, bar)
        torch.hub.download_url_to_file(url, str(target), hash_prefix=found and found.group(1), progress=bar)
    return target


def _download_hub(repository: str, file: str, revision: str | None, bar: bool) -> Path:
    """A file of a repository on the Hugging Face hub, from its cache where it is there already."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    _tell(f"huggingface.co/{repository}", bar)
    if not bar:
        disable_progress_bars()
    with quiet_hub():
        return Path(hf_hub_download(repository, file, revision=revision, etag_timeout=CONNECT_SECONDS))


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Without the hub's warnings on each retry: that all failed is told in one line."""
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

    before = get_verbosity()
    set_verbosity_error()
    try:
        yield
    finally:
        set_verbosity(before)


def _tell(source: str, bar: bool) -> None:
    if not bar:
        log.info("downloading %s", source)


@contextmanager
def _connection_timeout() -> Iterator[None]:
    """torch.hub takes no timeout, and without one a silent server hangs the command for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def first_line(error: Exception) -> str:
    """What an error says, on one line."""
    if isinstance(error, LocalEntryNotFoundError):
        return "no connection, and nothing in the cache"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
