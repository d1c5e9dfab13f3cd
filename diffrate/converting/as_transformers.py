"""`diffrate.as_transformers`: a compressed model with the forward of a model of transformers."""

from __future__ import annotations

import copy
import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from diffrate.blocks.block import UnsupportedModelError
from diffrate.blocks.tokens import TokenState
from diffrate.converting.convert import known_name
from diffrate.converting.transformers_vits import LAYOUTS, Layout, distilled
from diffrate.patch.base import require_patched
from diffrate.patch.features import restore
from diffrate.patch.parts import TextHead
from diffrate.patch.plain_vit import CompressedVit

# What a forward of transformers may be given and a compressed model has not: refused unless it is nothing.
REFUSED = ("bool_masked_pos", "head_mask", "attention_mask", "output_hidden_states", "output_attentions")
WHOLE = ("CLIPOutput", "SiglipOutput", "Siglip2Output")  # of models with a text tower beside


def as_transformers(compressed: nn.Module, like: nn.Module, *, grid: bool | None = True) -> Any:
    """A module with the forward, outputs, configuration and loss of `like`, a model of transformers, that computes with
    `compressed`, at its kept counts in training, too.

    It is an instance of the class of `like`, holds `compressed` (not a copy) and no weights of `like`: a pipeline, a
    `Trainer`, or a model whose tower it replaces take it. Of a model with two towers, such as `CLIPModel`, it is a copy
    with the vision tower exchanged. Keep it by `diffrate.save` of `compressed`: `from_pretrained` does not read it.

    grid: whether `last_hidden_state` is at the full grid `[B, N0, C]`, in which each position has the features of the
    token that stands for it; else of the tokens that are left, `[B, N, C]`. With None it is None, and the forward takes
    no longer than that of `compressed`. Classifiers have none of it.

    Raises:
        UnsupportedModelError: `compressed` is not patched, the class of `like` is not known, or the two have outputs of
            other sizes.
    """
    require_patched(compressed)
    name = known_name(like, LAYOUTS)
    if name is None or LAYOUTS[name].output == "ViTMAEModelOutput" or not isinstance(compressed, CompressedVit):
        known = sorted(key.rpartition(".")[2] for key in LAYOUTS)
        raise UnsupportedModelError(f"like: found {type(like).__name__}; accepted: {', '.join(known)}")
    layout, whole = LAYOUTS[name], LAYOUTS[name].output in WHOLE
    _check_outputs(compressed, like, layout, whole)
    if not whole:
        return _shell(compressed, like, layout, grid)
    copied: Any = copy.copy(like)  # whose other parts are those of `like`
    copied._modules = dict(like._modules)
    copied.vision_model = _shell(
        compressed, copied.vision_model, layout._replace(output="BaseModelOutputWithPooling"), grid
    )
    if compressed.num_classes:  # its head is the projection
        copied.visual_projection = nn.Identity()
    return copied


def _check_outputs(compressed: CompressedVit, like: Any, layout: Layout, whole: bool) -> None:
    """Refuse a model with other outputs than `like` has, which may be a `whole` one."""
    config, projection = like.config, getattr(like, "visual_projection", None)
    head, width, twice = compressed.num_classes, compressed.num_features, hasattr(compressed, "head_dist")
    if layout.output == "ImageClassifierOutput" or layout.reader is distilled:
        accepted = (config.num_labels,)
    elif projection is not None:
        accepted = (projection.out_features, 0) if whole else (projection.out_features,)
    else:  # of those with a pooler, features
        pooler = getattr(getattr(like, "pooler", None), "dense", None)
        accepted = (0 if pooler is None else pooler.out_features,)
    hidden = getattr(config, "vision_config", config).hidden_size
    texts = isinstance(compressed.head, TextHead)
    if texts or head not in accepted or width != hidden or twice != (layout.reader is distilled):
        how = " by two heads" if twice else " by a text head" if texts else ""
        found = f"{head} outputs of {width} channels{how}"
        wanted = f"{' or '.join(map(str, accepted))} of {hidden}{' by two' if layout.reader is distilled else ''}"
        raise UnsupportedModelError(f"compressed: found {found}; accepted: {wanted}, as {type(like).__name__} has")


def _shell(compressed: CompressedVit, like: Any, layout: Layout, grid: bool | None) -> Any:
    """An object of a class derived from that of `like`, with its attributes and, as its only module, `compressed`."""
    kind = type(like)
    forward = _forward_like(kind, layout, grid)
    derived: Any = type(kind.__name__, (_Compressed, kind), {"__module__": kind.__module__, "forward": forward})
    shell = derived.__new__(derived)
    nn.Module.__init__(shell)
    fresh = vars(shell).keys()
    kept = {key: value for key, value in vars(like).items() if key not in fresh and key not in ("forward", "_hf_hook")}
    vars(shell).update(kept)
    shell.compressed = compressed
    shell.training = compressed.training
    return shell


class _Compressed:
    """What differs from a class of transformers, beside the forward."""

    compressed: CompressedVit

    def get_input_embeddings(self) -> nn.Module:
        """The module that makes patches of images."""
        return self.compressed.stem

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """Compute activations again for the backward pass."""
        self.compressed.set_grad_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations for the backward pass."""
        self.compressed.set_grad_checkpointing(False)


def _forward_like(kind: Any, layout: Layout, grid: bool | None) -> Any:
    """The forward of a class: the signature of `kind`'s own, and its outputs, of a compressed model."""
    signature = inspect.signature(kind.forward)
    names = list(signature.parameters)[2:]  # after self and pixel_values
    output = getattr(sys.modules[kind.__module__], layout.output)

    def forward(self: Any, pixel_values: Tensor, *given: Any, return_dict: bool | None = None, **options: Any) -> Any:
        options |= dict(zip(names, given, strict=False))
        model: CompressedVit = self.compressed
        images = pixel_values.to(next(model.parameters()).dtype)
        if images.ndim == 3:
            images = _images(model, images, options)
        for name in REFUSED:
            found = options.pop(name, None)
            if (found is not None and found is not False) or getattr(self.config, name, False):
                raise ValueError(f"{name}: found one; accepted: none, since tokens are compressed")
        if layout.output == "ImageClassifierOutput":
            logits, labels = model.outputs_at(images, model.schedule), options.pop("labels", None)
            counted = {name: options[name] for name in ("num_items_in_batch",) if name in options}
            loss = None if labels is None else self.loss_function(labels, logits, self.config, **counted)
            found = {"loss": loss, "logits": logits}
        elif layout.output == "DeiTForImageClassificationWithTeacherOutput":
            found = _both_heads(model, images)
        else:
            found = _features(model, images, layout, grid)
            if grid is not None and getattr(self, "pooler", model) is None:
                found["pooler_output"] = None
        outputs = output(**found)
        as_tuple = return_dict is False or (return_dict is None and getattr(self.config, "return_dict", True) is False)
        return outputs.to_tuple() if as_tuple else outputs

    forward.__signature__ = signature  # type: ignore[reportFunctionMemberAccess]
    return forward


def _both_heads(model: Any, images: Tensor) -> dict[str, Tensor]:
    entry, schedule = model.enter(images), model.schedule
    x = model.norm(model.run(model.steps(entry, schedule), entry.state).x)
    first, second = model.head(x[:, 0]), model.head_dist(x[:, 1])
    return {"logits": (first + second) / 2, "cls_logits": first, "distillation_logits": second}


def _features(model: CompressedVit, images: Tensor, layout: Layout, grid: bool | None) -> dict[str, Any]:
    """Pooled output, and the last hidden state as `grid` says."""
    pooled = "image_embeds" if layout.output == "CLIPVisionModelOutput" else "pooler_output"
    if grid is None:
        return {pooled: model.outputs_at(images, model.schedule), "last_hidden_state": None}
    entry = model.enter(images, TokenState.remembered if grid else None)
    state = model.run(model.steps(entry, model.schedule, whole=True), entry.state)
    last = restore(state) if grid else state.x
    return {pooled: model.classify(state), "last_hidden_state": model.norm(last) if layout.normed else last}


def _images(model: Any, patches: Tensor, options: dict[str, Any]) -> Tensor:
    """Images `[B, C, H, W]` of the patches `[B, N, P * P * C]` that SigLIP 2 takes; all there, and of one grid.

    Raises:
        ValueError: patches of another grid, or some that are masked.
    """
    rows, columns = model.token_grid
    shapes, mask = options.get("spatial_shapes"), options.get("pixel_attention_mask")
    mask = options.pop("attention_mask", None) if mask is None else mask  # as the tower of transformers 4 calls it
    if shapes is not None and (torch.as_tensor(shapes) != torch.tensor([rows, columns], device=shapes.device)).any():
        raise ValueError(f"spatial_shapes: found {shapes.tolist()}; accepted: {[rows, columns]} for all images")
    if patches.shape[1] != rows * columns or (mask is not None and not mask.all()):
        raise ValueError(f"pixel_values: found {patches.shape[1]} patches; accepted: {rows * columns}, none masked")
    height, width = model.stem.patch_size
    split = patches.unflatten(2, (height, width, -1)).unflatten(1, (rows, columns))
    return split.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
