"""From pictures to input tensors: the published evaluation transform and DeiT's training recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torchvision import transforms

from training.settings import Augmentation
from utils import UsageError

SMALL = 32  # DeiT's recipe crops inputs up to this many pixels after padding, not after resizing
SMALL_PADDING = 4
LARGEST_SIDE = 16384  # pixels of a resized picture's short side: 800 MB


@dataclass(frozen=True)
class View:
    """How a picture becomes a model's input: square, `crop_pct` of the short side, normalised."""

    input_size: int
    crop_pct: float
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"

    @property
    def resized(self) -> int:
        """The short side in pixels before cropping.

        Raises:
            UsageError: a picture of that size would not fit in memory.
        """
        side = self.input_size / self.crop_pct
        if side > LARGEST_SIDE:
            least = self.input_size / LARGEST_SIDE
            raise UsageError(f"--crop-pct {self.crop_pct:g}: accepted: {least:.3g} to 1 at {self.input_size} pixels")
        return int(side)


def eval_transform(view: View) -> transforms.Compose:
    """Resize the short side, crop the centre, normalise."""
    interpolation = transforms.InterpolationMode(view.interpolation)
    return transforms.Compose(
        [
            transforms.Resize(view.resized, interpolation=interpolation),
            transforms.CenterCrop(view.input_size),
            transforms.ToTensor(),
            transforms.Normalize(view.mean, view.std),
        ]
    )


def crop_view(photograph: Image.Image, view: View, side: int) -> Image.Image:
    """The square of `photograph` that `eval_transform` makes the input of, `side` pixels wide."""
    width, height = photograph.size
    cropped = min(width, height) * view.input_size / view.resized
    left, top = (width - cropped) / 2, (height - cropped) / 2
    return photograph.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + cropped, top + cropped))


def train_transform(view: View, augmentation: Augmentation) -> transforms.Compose:
    """DeiT's training transform through timm's factory, with random affine moves when asked for.

    Raises:
        UsageError: an augmentation policy that timm does not know.
    """
    try:
        composed: Any = create_transform(
            input_size=view.input_size,
            is_training=True,
            hflip=augmentation.hflip,
            color_jitter=augmentation.color_jitter,
            auto_augment=augmentation.auto_augment,
            interpolation=augmentation.interpolation,
            mean=view.mean,
            std=view.std,
            re_prob=augmentation.erase_probability,
            re_mode=augmentation.erase_mode,
            re_count=augmentation.erase_count,
        )
    except (AssertionError, KeyError, ValueError) as error:  # how timm refuses a policy
        raise UsageError(f"--aa {augmentation.auto_augment}: {error}; accepted: a policy of timm, or none") from error
    steps = list(composed.transforms)
    if view.input_size <= SMALL:
        steps[0] = transforms.RandomCrop(view.input_size, padding=SMALL_PADDING)
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
