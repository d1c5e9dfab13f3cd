"""Build the zoo's models, as themselves or as shapes alone, and make their names known to timm."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import timm
import torch
from timm.models import is_model, register_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models.download import official_file
from models.weights import load_weights
from models.zoo import INPUTS, ZOO, InputSizeError, ModelEntry, Size

# What fills a tensor in place when a model is built, most of the time that it takes without storage.
FILLING = frozenset(
    {
        *(Tensor.uniform_, Tensor.normal_, Tensor.fill_, Tensor.zero_),
        *(Tensor.erfinv_, Tensor.mul_, Tensor.add_, Tensor.clamp_),
    }
)


def create(entry: ModelEntry, input_size: int | Size | None = None, **options: Any) -> nn.Module:
    """The dense timm model of an entry with fresh weights, for images of `input_size`: a side, or rows and columns.

    `options` override the entry's. What the model's inputs are like is in its `pretrained_cfg`.

    Raises:
        InputSizeError: the patches of a ViT do not tile the input, or it is smaller than a convolution.
    """
    # The class count is given always: timm's default for ViT-H has no head.
    options = {"num_classes": entry.num_classes, **entry.options, **options}
    given = options.pop("img_size", entry.input_size)
    size = _rows_columns(input_size or given)
    model: Any = timm.create_model(
        entry.architecture,
        pretrained=False,
        pretrained_cfg=None if entry.config is None else dict(entry.config),
        pretrained_cfg_overlay={name: getattr(entry, name) for name in INPUTS} | {"input_size": (3, *size)},
        **options,
    )
    # timm hands the size to models whose configuration says that it is fixed. Of the others, some are built for
    # one all the same, and the convolutions of CAFormer and NaFlexViT take any.
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if built is not None and tuple(built) != size and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=size)
    _check_size(model, size, entry.input_size)
    return model


@contextmanager
def shapes_alone() -> Iterator[None]:
    """What is built inside is on the meta device: it has no storage, and takes little time."""
    with torch.device("meta"), _WithoutFilling():
        yield


class _WithoutFilling(TorchFunctionMode):
    """Passes over the filling of tensors on the meta device."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, values: Sequence[Any] = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        return values[0] if func in FILLING and values[0].is_meta else func(*values, **(named or {}))


def _rows_columns(size: int | Sequence[int]) -> Size:
    rows, columns = (size, size) if isinstance(size, int) else size
    return rows, columns


def _check_size(model: Any, size: Size, own: Size) -> None:
    """Refuse a size that loses pixels, unless it is the model's `own`: some published ones do.

    Raises:
        InputSizeError: as `create`.
    """
    flag = f"--input-size {size[0]}" if size[0] == size[1] else f"--input-size {size[0]} {size[1]}"
    conv = getattr(getattr(model, "stem", None), "conv", None)
    if isinstance(conv, nn.Conv2d):
        least = conv.kernel_size[0] - 2 * int(conv.padding[0])
        if min(size) < least:
            raise InputSizeError(f"{flag}: accepted: from {least}, what the first convolution takes")
    # A convolutional stem before the patches leaves one pixel of each.
    embedding = getattr(model, "patch_embed", None) or getattr(model, "embeds", None)
    patch = _rows_columns(getattr(embedding, "patch_size", 1))
    if size != own and (size[0] % patch[0] or size[1] % patch[1]):
        if patch[0] == patch[1]:
            raise InputSizeError(f"{flag}: accepted: a multiple of {patch[0]}, the side of a patch")
        raise InputSizeError(f"{flag}: accepted: multiples of {patch[0]} and {patch[1]}, the sides of a patch")


def register(entry: ModelEntry) -> None:
    """Make the name of `entry` known to `timm.create_model`; one that timm has itself stays timm's."""

    def build(
        pretrained: bool = False,
        pretrained_cfg: object = None,  # timm passes both; the zoo says where weights come from
        pretrained_cfg_overlay: object = None,
        **options: Any,
    ) -> nn.Module:
        model = create(entry, **options)
        if pretrained:
            load_weights(model, official_file(entry))
        return model

    if not is_model(entry.name):
        build.__name__ = build.__qualname__ = entry.name
        setattr(sys.modules[__name__], entry.name, build)  # timm looks builders up in their module
        register_model(build)


for _entry in ZOO.values():
    register(_entry)
