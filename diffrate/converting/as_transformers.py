"""`diffrate.as_transformers`: a compressed model with the forward of a model of transformers."""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from typing import Any

from torch import Tensor, nn

from diffrate.blocks.block import UnsupportedModelError
from diffrate.blocks.tokens import TokenState
from diffrate.converting.convert import known_name
from diffrate.converting.transformers_vits import LAYOUTS, Layout, both_heads, distilled, images_of_patches
from diffrate.patch.base import require_patched
from diffrate.patch.features import restore
from diffrate.patch.parts import TextHead
from diffrate.patch.plain_vit import CompressedVit

# What a forward of transformers may be given and a compressed model has not: refused unless it is nothing.
REFUSED = ("bool_masked_pos", "head_mask", "attention_mask", "output_attentions")
HIDDEN = "output_hidden_states"
WHOLE = ("CLIPOutput", "SiglipOutput", "Siglip2Output")  # of models with a text tower beside


def as_transformers(compressed: nn.Module, like: nn.Module, *, grid: bool | None = True) -> Any:
    """A module with the forward, outputs, configuration and loss of `like`, a model of transformers, that computes with
    `compressed`, at its kept counts in training, too.

    It is an instance of the class of `like`, holds `compressed` (not a copy) and no weights of `like`: a pipeline, a
    `Trainer`, or a model whose tower it replaces take it. Of a model with two towers, such as `CLIPModel`, it is a copy
    with the vision tower exchanged. Keep it by `diffrate.save` of `compressed`: `from_pretrained` does not read it.

    grid: whether `last_hidden_state` is at the full grid `[B, N0, C]`, in which each position has the features of the
    token that stands for it; else of the tokens that are left, `[B, N, C]`, whose `origin` `[B, N0]` is an attribute of
    the outputs. `hidden_states`, on request, likewise. With None there are none of both, and the forward takes no
    longer than that of `compressed`. Classifiers have none.

    A tower without its last blocks (`convert(model, layer=-2)`) gives its hidden states, None for those of later
    blocks, and nothing else: what a language model reads.

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
    tower = getattr(config, "vision_config", config)
    blocks, depth, texts = len(compressed.blocks), tower.num_hidden_layers, isinstance(compressed.head, TextHead)
    accepts = f"as {type(like).__name__} has"
    if blocks < depth and not whole and layout.output.endswith("ModelOutputWithPooling"):
        accepted = (0,)
    elif blocks != depth:
        raise UnsupportedModelError(f"compressed: found {blocks} blocks; accepted: {depth}, {accepts}")
    if texts or head not in accepted or width != tower.hidden_size or twice != (layout.reader is distilled):
        how = " by two heads" if twice else " by a text head" if texts else ""
        found = f"{head} outputs of {width} channels{how}"
        by_two = " by two" if layout.reader is distilled else ""
        wanted = f"{' or '.join(map(str, accepted))} of {tower.hidden_size}{by_two}"
        raise UnsupportedModelError(f"compressed: found {found}; accepted: {wanted}, {accepts}")


def _shell(compressed: CompressedVit, like: Any, layout: Layout, grid: bool | None) -> Any:
    """An object of a class derived from that of `like`, with its attributes and, as its only module, `compressed`."""
    shell = _empty(type(like), layout, grid)
    fresh = vars(shell).keys()
    kept = {key: value for key, value in vars(like).items() if key not in fresh and key not in ("forward", "_hf_hook")}
    vars(shell).update(kept)
    shell.compressed = compressed
    shell.training = compressed.training
    return shell


def _empty(kind: Any, layout: Layout, grid: bool | None) -> Any:
    """An object of a class derived from `kind`, without attributes."""
    own = {"__module__": kind.__module__, "forward": _forward_like(kind, layout, grid), "made_of": (kind, layout, grid)}
    derived: Any = type(kind.__name__, (_Compressed, kind), own)
    shell = derived.__new__(derived)
    nn.Module.__init__(shell)
    return shell


class _Compressed:
    """What differs from a class of transformers, beside the forward."""

    compressed: CompressedVit
    made_of: tuple[Any, Layout, bool | None]

    def __reduce__(self) -> tuple[Any, ...]:  # the class is in no module that pickle would find it in
        return _empty, self.made_of, vars(self)

    def save_pretrained(self, *given: Any, **options: Any) -> Any:
        """As transformers does, which a `Trainer` needs, with a warning."""
        warnings.warn("from_pretrained does not read a compressed model: keep it by diffrate.save", stacklevel=2)
        return super().save_pretrained(*given, **options)  # type: ignore[misc]

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
            images = images_of_patches(model, images, options)
        for name in REFUSED:
            found = options.pop(name, None)
            if (found is not None and found is not False) or getattr(self.config, name, False):
                raise ValueError(f"{name}: found one; accepted: none, since tokens are compressed")
        asked = options.pop(HIDDEN, None)  # True, or the number of a layer
        hidden = getattr(self.config, HIDDEN, False) if asked is None else asked is not False
        if hidden and (grid is None or not layout.output.endswith(("WithPooling", "VisionModelOutput"))):
            raise ValueError(f"{HIDDEN}: found one; accepted: none, since nothing but pooled outputs is computed")
        origin: Tensor | None = None
        if layout.output == "ImageClassifierOutput":
            logits, labels = model.outputs_at(images, model.schedule), options.pop("labels", None)
            counted = {name: options[name] for name in ("num_items_in_batch",) if name in options}
            loss = None if labels is None else self.loss_function(labels, logits, self.config, **counted)
            found = {"loss": loss, "logits": logits}
        elif layout.output == "DeiTForImageClassificationWithTeacherOutput":
            found = both_heads(model, images)
        else:
            depth = getattr(self.config, "vision_config", self.config).num_hidden_layers
            found, origin = _features(model, images, layout, grid, hidden, depth)
            if grid is not None and getattr(self, "pooler", model) is None:
                found["pooler_output"] = None
        outputs = output(**found)
        if origin is not None:
            outputs.origin = origin
        as_tuple = return_dict is False or (return_dict is None and getattr(self.config, "return_dict", True) is False)
        return outputs.to_tuple() if as_tuple else outputs

    forward.__signature__ = signature  # type: ignore[reportFunctionMemberAccess]
    return forward


def _features(
    model: CompressedVit, images: Tensor, layout: Layout, grid: bool | None, hidden: bool, depth: int
) -> tuple[dict[str, Any], Tensor | None]:
    """Pooled output, the last hidden state as `grid` says, and with `hidden` those before, as of a model of `depth`
    blocks; and the origins of the tokens that are left, unless they are at the grid."""
    pooled = "image_embeds" if layout.output == "CLIPVisionModelOutput" else "pooler_output"
    if grid is None:
        return {pooled: model.outputs_at(images, model.schedule), "last_hidden_state": None}, None
    entry = model.enter(images, TokenState.remembered if grid else TokenState.traced)
    steps = model.steps(entry, model.schedule, whole=True)
    states = [entry.state, *model.run_each(steps, entry.state)] if hidden else [model.run(steps, entry.state)]
    left = [restore(state) if grid else state.x for state in states]
    last, later = left[-1], depth - len(steps)
    found: dict[str, Any] = {"hidden_states": (*left, *[None] * later)} if hidden else {}
    if not later:
        found |= {pooled: model.classify(states[-1]), "last_hidden_state": model.norm(last) if layout.normed else last}
    return found, None if grid else states[-1].origin
