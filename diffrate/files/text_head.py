"""`diffrate.text_head`: zero-shot classes of CLIP and SigLIP, from a file of their texts' embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffrate.atomic import first_line, parse_json, refuse_pipe
from diffrate.files.header import SavedModelError
from diffrate.patch.parts import FeatureHead, TextHead

TENSORS = ("embeddings", "logit_scale", "logit_bias")
STEEPEST = 10.0  # of the scale's logarithm: CLIP stops at 4.6
EVEN = 1e-3  # how far a normalised row may be from 1


class Texts(NamedTuple):
    """Embeddings `[K, D]` of the texts of K classes, each of length 1; the logarithm of the cosines' scale, and what is
    added to the logits, None of a softmax's; the names of the classes; what was adapted, in lines."""

    embeddings: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None
    classes: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors of a head, as in a model's state."""
        state = {"head.weight": self.embeddings, "head.logit_scale": self.logit_scale}
        return state if self.logit_bias is None else state | {"head.logit_bias": self.logit_bias}


def read_texts(path: str | Path) -> Texts:
    """The content of a safetensors file: `embeddings` `[K, D]`, `logit_scale` as the model has it, a natural logarithm,
    and for SigLIP `logit_bias`; and in its metadata `classes`, a JSON array of K names.

    Raises:
        SavedModelError: the file cannot be read, or a tensor or the names are missing or cannot be what they are for.
    """
    try:
        refuse_pipe(path)
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise SavedModelError(f"{path}: cannot be read ({first_line(error)}); accepted: safetensors") from error
    if tensors.keys() | {"logit_bias"} != {*TENSORS}:
        accepted = "embeddings, logit_scale, and for SigLIP logit_bias"
        raise SavedModelError(f"{path}: found {', '.join(sorted(tensors))}; accepted: {accepted}")
    rows = tensors["embeddings"].float()
    shape = list(rows.shape)
    if rows.ndim != 2 or shape[0] < 2 or not tensors["embeddings"].is_floating_point():
        found = f"{tensors['embeddings'].dtype} {shape}"
        raise SavedModelError(f"{path}: found embeddings {found}; accepted: floats [classes, channels], two or more")
    lengths = rows.norm(dim=1)
    wrong = (~(lengths.isfinite() & (lengths > 0))).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise SavedModelError(f"{path}: found embeddings[{row}] of length {lengths[row]:g}; accepted: a number above 0")
    scale, bias = (_number(tensors[name], name, path) if name in tensors else None for name in TENSORS[1:])
    assert scale is not None, "it is there"
    low, high = float(lengths.min()), float(lengths.max())
    notes = () if max(1 - low, high - 1) < EVEN else (f"{path}: embeddings of length {low:.4g} to {high:.4g}, made 1",)
    return Texts(rows / lengths[:, None], scale, bias, _names(metadata.get("classes"), len(rows), path), notes)


def _names(text: str | None, rows: int, path: str | Path) -> tuple[str, ...]:
    try:
        names = parse_json(text or "null")
    except ValueError:
        names = text
    found = repr(names)
    if isinstance(names, list):
        names = tuple(map(str, names))
        twice = [name for name in names if names.count(name) > 1]
        if len(names) == rows and not twice:
            return names
        found = f"{twice[0]!r} twice" if twice else f"{len(names)} names"
    accepted = f"a JSON array of {rows} different names, one per row of embeddings, in the metadata"
    raise SavedModelError(f"{path}: found classes {found}; accepted: {accepted}")


def _number(tensor: Tensor, name: str, path: str | Path) -> Tensor:
    limited = name == "logit_scale"
    if tensor.numel() != 1 or not tensor.isfinite().all() or (limited and tensor.abs().item() > STEEPEST):
        accepted = f"one number, a natural logarithm up to {STEEPEST:g}" if limited else "one number"
        raise SavedModelError(f"{path}: found {name} {tensor.flatten()[:3].tolist()}; accepted: {accepted}")
    return tensor.float().reshape(())


def text_head(model: Any, path: str | Path) -> tuple[str, ...]:
    """Give a ViT of timm with image features, patched or not, in place, the classes of the file at `path`: its logits
    become `scale * cosine(features, embeddings) + bias`, as CLIP and SigLIP have them. Returns the classes' names.

    The file has `embeddings` `[classes, channels]`, `logit_scale` and for SigLIP `logit_bias`, as parameters of their
    models, and in its metadata `classes`, a JSON array of names. What the head gives now, or pooled tokens where it
    gives nothing, are the features; an earlier text head gives way.

    Raises:
        SavedModelError: the file cannot be read, or does not hold these.
        UnsupportedModelError: the model has no features of as many channels, but logits, or none of one vector.
    """
    texts = read_texts(path)
    head, width = getattr(model, "head", None), texts.embeddings.shape[1]
    features = head.features if isinstance(head, TextHead) else head
    if type(features) is nn.Linear and features.out_features == width:  # as timm has CLIP's projection
        made = FeatureHead(features.in_features, width).to(features.weight)
        made.load_state_dict({"bias": torch.zeros_like(made.bias)} | features.state_dict())
        features = made
    made = TextHead.over(features, model, len(texts.classes), width, texts.logit_bias is not None)
    made.load_state_dict({name.removeprefix("head."): tensor for name, tensor in texts.state.items()}, strict=False)
    model.head, model.num_classes = made.to(next(model.parameters())).train(model.training), len(texts.classes)
    return texts.classes
