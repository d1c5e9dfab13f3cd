"""From pictures to input tensors: the published evaluation transform and DeiT's training recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torchvision import transforms

SMALL = 32  # DeiT's recipe crops inputs up to this many pixels after padding, not after resizing
SMALL_PADDING = 4


@dataclass(frozen=True)
class Augmentation:
    """DeiT's training augmentation; `affine` is (degrees, shift, rescale), the last two fractions."""

    color_jitter: float
    auto_augment: str | None
    interpolation: str
    erase_probability: float
    erase_mode: str
    erase_count: int
    hflip: float
    affine: tuple[float, float, float] | None


def eval_transform(input_size: int, crop_pct: float) -> transforms.Compose:
    """Resize the short side to `input_size / crop_pct` (bicubic), crop the centre, normalise."""
    return transforms.Compose(
        [
            transforms.Resize(int(input_size / crop_pct), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(input_size),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
    )


def crop_view(photograph: Image.Image, input_size: int, crop_pct: float, side: int) -> Image.Image:
    """The square of `photograph` that `eval_transform` makes the input of, `side` pixels wide."""
    width, height = photograph.size
    cropped = min(width, height) * input_size / int(input_size / crop_pct)
    left, top = (width - cropped) / 2, (height - cropped) / 2
    return photograph.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + cropped, top + cropped))


def train_transform(input_size: int, augmentation: Augmentation) -> transforms.Compose:
    """DeiT's training transform through timm's factory, with random affine moves when asked for."""
    composed: Any = create_transform(
        input_size=input_size,
        is_training=True,
        hflip=augmentation.hflip,
        color_jitter=augmentation.color_jitter,
        auto_augment=augmentation.auto_augment,
        interpolation=augmentation.interpolation,
        re_prob=augmentation.erase_probability,
        re_mode=augmentation.erase_mode,
        re_count=augmentation.erase_count,
    )
    steps = list(composed.transforms)
    if input_size <= SMALL:
        steps[0] = transforms.RandomCrop(input_size, padding=SMALL_PADDING)
    if augmentation.affine is not None:
        degrees, shift, rescale = augmentation.affine
        steps.insert(
            0,
            transforms.RandomAffine(
                degrees,
                translate=(shift, shift),
                scale=(1 - rescale, 1 + rescale),
                interpolation=transforms.InterpolationMode.BILINEAR,
            ),
        )
    return transforms.Compose(steps)
