"""Names of models: the zoo's and all others of timm, what each stands for, and the models built from them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext, suppress
from fnmatch import fnmatchcase
from typing import Any

import timm
from timm.data.config import resolve_data_config
from timm.layers.helpers import to_2tuple
from timm.models import get_arch_pretrained_cfgs, resolve_pretrained_cfg, split_model_name_tag
from timm.models._hub import load_model_config_from_path
from torch import nn

from diffrate.atomic import first_line
from diffrate.device import shapes_alone
from diffrate.hub import SOURCES, hub_or_cache
from models.weights import downloading, load_weights, official_file
from models.zoo import HUB_SITE, INPUTS, ZOO, InputSizeError, ModelEntry, Size, UnknownModelError, find

DEPTH = 3  # blocks of a model that is tried: a first, a last, and one between them


def create(entry: ModelEntry, input_size: int | Size | None = None, **options: Any) -> nn.Module:
    """The dense timm model of an entry with fresh weights, for images of `input_size`: a side, or rows and columns.

    `options` override the entry's. The model's `pretrained_cfg` says what its inputs are like.

    Raises:
        InputSizeError: the patches of a ViT do not tile the input, or it is smaller than a convolution.
    """
    # The class count is given always: timm's default for ViT-H has no head.
    options = {"num_classes": entry.num_classes, **entry.options, **options}
    given = options.pop("img_size", entry.input_size)
    size: Any = to_2tuple(input_size or given)  # rows and columns
    model: Any = timm.create_model(
        entry.architecture,
        pretrained=False,
        pretrained_cfg=None if entry.config is None else dict(entry.config),
        pretrained_cfg_overlay={name: getattr(entry, name) for name in INPUTS} | {"input_size": (3, *size)},
        **options,
    )
    if entry.complete is not None:
        entry.complete(model, **entry.own)
        model._model_args = {**getattr(model, "_model_args", options), **entry.own}  # so that it can be saved
    # timm hands the size to models whose configuration says that it is fixed. Of the others, some are built for
    # one all the same, and the convolutions of CAFormer and NaFlexViT take any.
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if built is not None and tuple(built) != size and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=size)
    _check_size(model, size, entry.input_size)
    return model


def _check_size(model: Any, size: Size, own: Size) -> None:
    """Refuse a size that loses pixels, unless it is the model's `own`: some published ones do."""
    flag = f"--input-size {size[0]}" if size[0] == size[1] else f"--input-size {size[0]} {size[1]}"
    conv = getattr(getattr(model, "stem", None), "conv", None)
    if isinstance(conv, nn.Conv2d) and min(size) < (least := conv.kernel_size[0] - 2 * int(conv.padding[0])):
        raise InputSizeError(f"{flag}: accepted: from {least}, what the first convolution takes")
    # A convolutional stem before the patches leaves one pixel of each.
    embedding = getattr(model, "patch_embed", None) or getattr(model, "embeds", None)
    rows, columns = map(int, to_2tuple(getattr(embedding, "patch_size", 1)))
    if size != own and (size[0] % rows or size[1] % columns):
        square, oblong = f"a multiple of {rows}, the side", f"multiples of {rows} and {columns}, the sides"
        raise InputSizeError(f"{flag}: accepted: {square if rows == columns else oblong} of a patch")


def register(entry: ModelEntry) -> None:
    """Make the name of `entry` known to `timm.create_model`; one that timm has itself stays timm's."""

    def build(pretrained: bool = False, **options: Any) -> nn.Module:
        for name in ("pretrained_cfg", "pretrained_cfg_overlay"):  # timm's: the zoo says where weights come from
            options.pop(name, None)
        model = create(entry, **options)
        if pretrained:
            load_weights(model, official_file(entry))
        return model

    if not timm.is_model(entry.name):
        build.__name__ = build.__qualname__ = entry.name
        setattr(sys.modules[__name__], entry.name, build)  # timm looks builders up in their module
        timm.models.register_model(build)


for _entry in ZOO.values():
    register(_entry)


def entry_of(name: str) -> ModelEntry:
    """The entry of a model: the zoo's by its names there, any other as timm says.

    A name that timm has replaced stands for its replacement, and one without a pretrained tag for the one with
    timm's default tag.

    Raises:
        UnknownModelError: there is no such model, tag or repository; or it reads no colour images.
    """
    return find(name) or _entry_of_timm(name if name.startswith(SOURCES) else full_name(name))


def bare_name(name: str) -> str:
    """`name` without timm's pretrained tag, if it has one: what a model is called that has other weights."""
    architecture, _ = split_model_name_tag(name)
    return architecture if name in get_arch_pretrained_cfgs(architecture) else name


def full_name(name: str) -> str:
    """timm's name in use for `name`, with a pretrained tag where timm has one.

    Raises:
        UnknownModelError: timm has no such model, or no such tag of it.
    """
    spelled = name if timm.is_model(name) else name.replace("-", "_")
    known = timm.is_model(spelled)
    architecture, tag = split_model_name_tag(spelled)
    current = timm.models.get_deprecated_models().get(architecture, architecture) if known else None
    if current is None:
        reason = "no longer in timm" if known else "unknown model"
        raise UnknownModelError(f"--model {name}: {reason}; accepted: the names of --list-models")
    architecture, own_tag = split_model_name_tag(current)
    tag, configurations = tag or own_tag, get_arch_pretrained_cfgs(architecture)
    full = f"{architecture}.{tag}" if tag else next(iter(configurations), architecture)
    if tag and full not in configurations:
        accepted = ", ".join(configurations) or architecture
        raise UnknownModelError(f"--model {name}: timm knows no {tag!r} of {architecture}; accepted: {accepted}")
    return full


def _entry_of_timm(name: str) -> ModelEntry:
    """The entry of a name that timm takes."""
    try:
        source, identifier = timm.models.parse_model_name(name)
        with downloading(name), hub_or_cache() if source == "hf-hub" else nullcontext():
            options: dict[str, Any] = {}
            if not source:
                architecture, tag = split_model_name_tag(identifier)
                config = tag or None
            else:
                read = timm.models.load_model_config_from_hf if source == "hf-hub" else load_model_config_from_path
                config, architecture, options = read(identifier)
                if not timm.is_model(architecture):
                    raise ValueError(f"its architecture {architecture!r} is none of timm's")
            config = resolve_pretrained_cfg(architecture, config).to_dict()
    except Exception as error:  # no network, repository, file or architecture: an error of its own each
        raise UnknownModelError(
            f"--model {name}: cannot read its config.json ({first_line(error)}); accepted: a timm model's repository "
            "that can be reached or is in the Hugging Face cache (HF_HOME), or a timm name with --checkpoint FILE"
        ) from error
    options, inputs = options or {}, resolve_data_config({}, pretrained_cfg=config)
    channels, rows, columns = inputs["input_size"]
    if channels != 3:
        raise UnknownModelError(f"--model {name}: reads images of {channels} channels; accepted: 3")
    given: dict[str, Any] = {key: tuple(inputs[key]) if key in ("mean", "std") else inputs[key] for key in INPUTS}
    # Where timm finds the weights, in the order in which it looks.
    file, hub, url = (config.get(key) for key in ("file", "hf_hub_id", "url"))
    return ModelEntry(
        name=name,
        architecture=architecture,
        schedule_key=name,
        weights=str(file or (hub and f"{HUB_SITE}{hub}") or url or "") or None,
        options={key: value for key, value in options.items() if key not in ("num_classes", "in_chans", "img_size")},
        num_classes=options.get("num_classes", config["num_classes"]),
        input_size=(rows, columns),
        config=config,
        **given,
    )


def supported_names(
    pattern: str, kinds: Collection[type[nn.Module]], accepts: Callable[[nn.Module], bool]
) -> Iterator[str]:
    """The names that match `pattern`, a shell's, of models that are of one of timm's `kinds` and that `accepts` takes.

    The zoo's come first. Then timm's, each with its pretrained tags, or alone where it has none.
    """
    yield from (name for name in ZOO if fnmatchcase(name, pattern))
    tags: dict[str, list[str]] = {}
    for name in timm.list_models(pattern, include_tags=True):  # a pattern without a tag is for all tags, as in timm
        tags.setdefault(timm.models.get_arch_name(name), []).append(name)
    pretrained = set(timm.list_pretrained())
    for architecture, names in tags.items():
        # Most of timm's files have none of the kinds, and the zoo's own names, which have come already, are in none.
        module = sys.modules[timm.model_entrypoint(architecture).__module__]
        known = any(getattr(module, kind.__name__, None) is kind for kind in kinds)
        if known and _is_accepted(architecture, accepts):
            yield from [name for name in names if name in pretrained] or [architecture]


def _is_accepted(architecture: str, accepts: Callable[[nn.Module], bool]) -> bool:
    """Whether a model without storage is accepted: with few blocks, or whole where timm builds none with few."""
    for depth in (DEPTH, None):
        # Families of stages have no depth, and some models fix how many blocks are of a kind.
        with suppress(Exception), shapes_alone():
            if accepts(timm.create_model(architecture, depth=depth)):
                return True
    return False
