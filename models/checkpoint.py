"""Read weights in every layout that timm knows into a timm model, dense or patched."""

from __future__ import annotations

import copy
import logging
import pickle
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor, nn
from torch.serialization import safe_globals

from models.download import fetch, first_line
from models.errors import CheckpointError
from models.layouts import COMPRESSION_PREFIX, SHOWN_KEYS, StateDict, convert, resampled
from models.numpy_files import is_numpy_file, read_numpy

# The last layers of the classifiers in each layout: ViTs, with a distilled one's second; timm CAFormer;
# original CAFormer. The first that is there says how many classes there are.
CLASSIFIERS = ("head.weight", "head_dist.weight", "head.fc.fc2.weight", "head.fc2.weight")
# What torch.load and safetensors raise on files that are cut short, damaged or something else.
UNREADABLE = (
    *(OSError, EOFError, RuntimeError, ValueError, KeyError, AttributeError, TypeError),
    *(SafetensorError, pickle.UnpicklingError),
)
# Words that tensors stand under, in timm's order, the averaged ones first; then those of BEiT v2 and I-JEPA.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module", "encoder")
# Parts that files have and a model may be built without: timm leaves them out, too.
POOLING = "attn_pool."
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """What loading did besides copying: the names of fresh tensors, and a note for the log on each thing."""

    reinitialized: tuple[str, ...]
    notes: tuple[str, ...]


def load_weights(model: nn.Module, path_or_url: str | Path) -> LoadReport:
    """Copy the weights of a checkpoint into `model`, whatever layout the file has.

    Reads what timm's converter of the model's family reads (`models/layouts.py`): official files of
    DeiT and DeiT III, MAE, CAFormer, BEiT, EVA, CLIP, DINOv2 and others, timm's own, safetensors, the NumPy
    archives (`.npz`) of Google's ViTs, and what this project saves. A head with another number of
    classes keeps the model's fresh weights, and position embeddings and tables of relative positions of another size
    are interpolated; the report and the log say so, and under which word of the file the weights were found.

    Raises:
        CheckpointError: the file is missing or unreadable, or does not fit the model, or is for patches of another
            size.
    """
    path, name = local_file(path_or_url), str(path_or_url)
    found, notes = read_numpy(path, copy.deepcopy(model)) if is_numpy_file(path) else read_noted(path, name)
    state = convert(found, model, name)
    report = _fit(model, state, name)
    report = LoadReport(report.reinitialized, (*report.notes, *notes, *resampled(found, state, name)))
    for note in report.notes:
        log.info(note)
    return report


def fit_state(model: nn.Module, state: StateDict, name: str, fresh_head: bool = False) -> LoadReport:
    """`load_weights` for tensors that `read_state` has read; `name` stands for them in messages.

    With `fresh_head`, tensors without any head leave the model's as it is.

    Raises:
        CheckpointError: the tensors do not fit the model.
    """
    return _fit(model, convert(state, model, name), name, fresh_head)


def _fit(model: nn.Module, found: StateDict, name: str, fresh_head: bool = False) -> LoadReport:
    """`fit_state` for tensors under timm's names."""
    expected = model.state_dict()
    optional = {key for key in expected if key.startswith(COMPRESSION_PREFIX)}
    if not optional:
        found = {key: value for key, value in found.items() if not key.startswith(COMPRESSION_PREFIX)}
    # What this project saves has buffers that timm computes by itself, at this size of images.
    computed = {key for key, _ in model.named_buffers()} - expected.keys()
    found = {key: value for key, value in found.items() if key not in computed}
    notes = []
    if not any(key.startswith(POOLING) for key in expected) and any(key.startswith(POOLING) for key in found):
        found = {key: value for key, value in found.items() if not key.startswith(POOLING)}
        notes.append(f"{name}: the pooling {POOLING}* is left out, which the model has not")
    reinitialized, why = _drop_other_head(found, expected), "the head has another number of classes"
    if fresh_head and head_classes(found) is None and not reinitialized:
        reinitialized, why = _names_of_head(expected, expected), "there is no head"
    _check_fit(name, found, expected, optional=optional | set(reinitialized))
    model.load_state_dict(found, strict=False)
    notes += [f"{name}: {why}; {', '.join(reinitialized)} start fresh"] if reinitialized else []
    return LoadReport(tuple(reinitialized), tuple(notes))


def check_finite(state: StateDict, name: str) -> None:
    """Refuse weights that give no numbers.

    Raises:
        CheckpointError: names the first tensor with a NaN or an infinity.
    """
    for key, value in state.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise CheckpointError(f"checkpoint {name}: {key} holds NaN or infinite values; accepted: finite weights")


def head_classes(state: StateDict) -> int | None:
    """The number of classes of a checkpoint's head, None when it has no head."""
    return next((state[key].shape[0] for key in CLASSIFIERS if key in state), None)


def read_state(path_or_url: str | Path, bar: bool = True) -> StateDict:
    """The tensors of a checkpoint file or URL under their own names, unwrapped.

    Averaged weights (`model_ema`) go before the plain ones when a file has both, as in timm. A
    download shows a bar, or without `bar` a log line.

    Raises:
        CheckpointError: the file is missing, cut short, or holds no tensors by name.
    """
    return read_noted(local_file(path_or_url, bar), str(path_or_url))[0]


def read_noted(path: Path, name: str) -> tuple[StateDict, list[str]]:
    """`read_state` of a file on this machine, called `name`, with a note on where in the file the tensors were.

    Raises:
        CheckpointError: as `read_state`.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path}: no such file")
    try:
        with safe_globals([Namespace]):  # official files hold their flags
            content: Any = (
                load_file(path)
                if path.suffix == ".safetensors"
                else torch.load(path, map_location="cpu", weights_only=True)
            )
    except UNREADABLE as error:
        reason = first_line(error)
        raise CheckpointError(
            f"checkpoint {path}: cannot be read, cut short or not a checkpoint ({reason}); "
            "accepted: a file of torch.save with plain tensors, safetensors, or for Google's ViTs .npz"
        ) from error
    notes = []
    while isinstance(content, dict) and (words := [word for word in WRAPPERS if isinstance(content.get(word), dict)]):
        others = f", not {', '.join(map(repr, words[1:]))}" if len(words) > 1 else ""
        notes.append(f"{name}: weights read from {words[0]!r}{others}")
        content = content[words[0]]
    found = content if isinstance(content, dict) else {}
    tensors = clean_state_dict({key: value for key, value in found.items() if isinstance(value, Tensor)})
    if tensors:
        return _without_prefix(tensors), notes
    raise CheckpointError(f"checkpoint {path}: found no tensors; accepted: a state dict, alone or under 'model'")


def _without_prefix(state: StateDict) -> StateDict:
    """`state` without the words that all its names begin with, such as `model.` or `backbone.`: a training framework
    or another module held the model. A model of its own has parts of several names."""
    while len(state) > 1:
        words = {key.partition(".")[0] for key in state}
        if len(words) > 1 or not all("." in key for key in state):
            break
        state = {key.partition(".")[2]: value for key, value in state.items()}
    return state


def local_file(path_or_url: str | Path, bar: bool = True) -> Path:
    """A file on this machine: downloaded once where it is a URL.

    Raises:
        CheckpointError: the URL cannot be reached.
    """
    if str(path_or_url).startswith(("http://", "https://")):
        return fetch(str(path_or_url), bar)
    return Path(path_or_url).expanduser()


def _drop_other_head(found: StateDict, expected: Mapping[str, Tensor]) -> list[str]:
    """Remove the last layers from `found` whose class count differs; the names removed."""
    dropped = []
    for weight in CLASSIFIERS:
        if weight not in found or weight not in expected:
            continue
        ours, theirs = expected[weight].shape, found[weight].shape
        if ours[0] != theirs[0] and ours[1:] == theirs[1:]:
            dropped += [key for key in _names_of_head([weight], found) if found.pop(key, None) is not None]
    return dropped


def _names_of_head(weights: Iterable[str], state: Mapping[str, Tensor]) -> list[str]:
    """The weights and biases in `state` of those of `weights` that are a classifier's last layer."""
    pairs = [(weight, weight.removesuffix("weight") + "bias") for weight in weights if weight in CLASSIFIERS]
    return [name for pair in pairs for name in pair if name in state]


def _check_fit(name: str, found: StateDict, expected: Mapping[str, Tensor], optional: set[str]) -> None:
    wrong = [
        f"{key} expected {list(expected[key].shape)} found {list(value.shape)}"
        for key, value in found.items()
        if key in expected and key not in optional and value.shape != expected[key].shape
    ]
    wrong += [
        f"{key} expected {list(value.shape)} found nothing"
        for key, value in expected.items()
        if key not in found and key not in optional
    ]
    wrong += [
        f"{key} expected nothing found {list(value.shape)}" for key, value in found.items() if key not in expected
    ]
    if wrong:
        more = f" and {len(wrong) - SHOWN_KEYS} more" if len(wrong) > SHOWN_KEYS else ""
        raise CheckpointError(f"checkpoint {name} does not fit the model: {'; '.join(wrong[:SHOWN_KEYS])}{more}")
