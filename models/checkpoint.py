"""Read weights in every official layout into a timm model, dense or patched."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from timm.models import load_state_dict
from timm.models.metaformer import MetaFormer
from timm.models.metaformer import checkpoint_filter_fn as convert_metaformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as convert_vit
from torch import Tensor, nn

from models.download import fetch
from models.errors import CheckpointError

StateDict = dict[str, Tensor]

# The classifier's last layer in each layout: DeiT, MAE, timm ViT; timm CAFormer; original CAFormer.
CLASSIFIERS = ("head.weight", "head.fc.fc2.weight", "head.fc2.weight")
# What torch.load and safetensors raise on files that are cut short, damaged or something else.
UNREADABLE = (
    *(OSError, EOFError, RuntimeError, ValueError, KeyError, AttributeError, TypeError),
    *(SafetensorError, pickle.UnpicklingError),
)
SHOWN_KEYS = 3
# What a patched model adds to its state: absent from official files, skipped for dense models.
COMPRESSION_PREFIX = "compression."


@dataclass(frozen=True)
class LoadReport:
    """What loading changed besides copying: the names of fresh tensors, and a note for the log on each."""

    reinitialized: tuple[str, ...]
    notes: tuple[str, ...]


def load_weights(model: nn.Module, path_or_url: str | Path) -> LoadReport:
    """Copy the weights of a checkpoint into `model`, whatever layout the file has.

    Reads DeiT's and MAE's files (`{"model": ...}`), the original CAFormer layout
    (`downsample_layers.*`, `stages.*`), timm's files, safetensors, and what this project saves. A
    head with another number of classes keeps the model's fresh weights, and the report says so;
    position embeddings of another input size are interpolated.

    Raises:
        CheckpointError: the file is missing or unreadable, or does not fit the model.
    """
    return fit_state(model, read_state(path_or_url), str(path_or_url))


def fit_state(model: nn.Module, state: StateDict, name: str) -> LoadReport:
    """`load_weights` for tensors that `read_state` has read; `name` stands for them in messages.

    Raises:
        CheckpointError: the tensors do not fit the model.
    """
    found = _convert(state, model, name)
    expected = model.state_dict()
    optional = {key for key in expected if key.startswith(COMPRESSION_PREFIX)}
    if not optional:
        found = {key: value for key, value in found.items() if not key.startswith(COMPRESSION_PREFIX)}
    reinitialized = _drop_other_head(found, expected)
    _check_fit(name, found, expected, optional=optional | set(reinitialized))
    model.load_state_dict(found, strict=False)
    notes = []
    if reinitialized:
        notes.append(f"{name}: the head has another number of classes; {', '.join(reinitialized)} start fresh")
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
    path = _local(path_or_url, bar)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path}: no such file")
    try:
        state = load_state_dict(str(path), weights_only=True)
    except UNREADABLE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"checkpoint {path}: cannot be read, cut short or not a checkpoint ({reason}); "
            "accepted: a file of torch.save with plain tensors, or safetensors"
        ) from error
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"checkpoint {path}: found no tensors; accepted: a state dict, alone or under 'model'")
    return tensors


def _local(path_or_url: str | Path, bar: bool) -> Path:
    if str(path_or_url).startswith(("http://", "https://")):
        return fetch(str(path_or_url), bar)
    return Path(path_or_url).expanduser()


def _convert(state: StateDict, model: nn.Module, name: str) -> StateDict:
    """Bring `state` to timm's names and to the model's input size, with timm's own converters."""
    try:
        if isinstance(model, VisionTransformer):
            return convert_vit(state, model)
        if isinstance(model, MetaFormer):
            # The converter looks every key up in the model, ours it does not know.
            ours = {key: value for key, value in state.items() if key.startswith(COMPRESSION_PREFIX)}
            theirs = {key: value for key, value in state.items() if key not in ours}
            return {**convert_metaformer(theirs, model), **ours}
    except KeyError as error:
        raise CheckpointError(f"checkpoint {name} does not fit the model: unexpected {error.args[0]}") from error
    except (RuntimeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(f"checkpoint {name} does not fit the model: {str(error).splitlines()[0]}") from error
    raise CheckpointError(f"{type(model).__name__} is not handled; accepted: VisionTransformer, MetaFormer")


def _drop_other_head(found: StateDict, expected: Mapping[str, Tensor]) -> list[str]:
    """Remove the last layer from `found` when its class count differs; the names removed."""
    dropped = []
    for weight in CLASSIFIERS:
        if weight not in found or weight not in expected:
            continue
        ours, theirs = expected[weight].shape, found[weight].shape
        if ours[0] != theirs[0] and ours[1:] == theirs[1:]:
            names = [weight, weight.removesuffix("weight") + "bias"]
            dropped += [key for key in names if found.pop(key, None) is not None]
    return dropped


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
