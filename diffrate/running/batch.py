"""Batches as loaders give them: images alone, before labels, or in a mapping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffrate.running.precision import Place

IMAGES = ("pixel_values", "image", "images", "img", "input")
LABELS = ("labels", "label", "target", "targets")
ACCEPTED = (
    "images [B, channels, H, W] of floats, alone, in a tuple or list before labels, or in a mapping as "
    f"{', '.join(IMAGES)}, labels as {', '.join(LABELS)}"
)


def split_batch(batch: Any) -> tuple[Tensor, Any]:
    """The images `[B, channels, H, W]` of a batch, and its labels as they come; None where there are none.

    Raises:
        ValueError: the batch has another form, or its images have no batch dimension or are no floats.
    """
    whole = type(batch).__name__
    images, labels, inside = batch, None, ""
    if isinstance(batch, Mapping):
        images, labels = (next((batch[name] for name in names if name in batch), None) for names in (IMAGES, LABELS))
        inside = f" in a {whole} with the names {', '.join(map(repr, batch)) or 'none'}"
    elif isinstance(batch, tuple | list):
        images, labels = (*batch[:2], None, None)[:2]
        inside = f" in a {whole} of {len(batch)}"
    if not isinstance(images, Tensor):
        found = "no images" if images is None else type(images).__name__
    elif images.ndim != 4:
        found = f"images of the shape {list(images.shape)}"
    elif not images.is_floating_point():
        found = f"images of {str(images.dtype).removeprefix('torch.')}"
    else:
        return images, labels
    raise ValueError(f"batch: found {found}{inside}; accepted: {ACCEPTED}")


def images_of(batch: Any, place: Place) -> Tensor:
    """The images of a batch where they are computed.

    Raises:
        ValueError: as `split_batch`.
    """
    return split_batch(batch)[0].to(place.device, place.dtype, non_blocking=True)
