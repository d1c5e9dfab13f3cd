"""From pictures to input tensors: the published evaluation transform and DeiT's training recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.auto_augment import AugmentOp, posterize
from torchvision import transforms

from cli.settings import Augmentation
from utils import UsageError

SMALL = 32  # DeiT's recipe crops inputs up to this many pixels after padding, not after resizing
SMALL_PADDING = 4
LONGEST_SHAPE = 16  # rows to columns of an input, or columns to rows; of pictures beyond twice that the middle is read
LARGEST_SIDE = 16384  # pixels of a resized picture's short side: 800 MB


@dataclass(frozen=True)
class View:
    """How a picture becomes a model's input of `input_size`, a side or rows and columns.

    crop_mode, as in timm: `center` resizes the picture until it covers the input at `crop_pct` and cuts
    its centre out, `squash` resizes both sides to the input's at `crop_pct`, and `border` resizes it until
    it fits and pads it.
    """

    input_size: int | tuple[int, int]
    crop_pct: float
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"
    crop_mode: str = "center"

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the input."""
        return (self.input_size, self.input_size) if isinstance(self.input_size, int) else self.input_size


def eval_transform(view: View, hflip: float = 0.0) -> transforms.Compose:
    """timm's for evaluation: resize, crop the centre, normalise; after mirroring at probability `hflip`.

    Raises:
        UsageError: a crop share with which pictures would not fit in memory.
    """
    longest = max(view.size)
    if longest / view.crop_pct > LARGEST_SIDE:
        least = longest / LARGEST_SIDE
        raise UsageError(f"--crop-pct {view.crop_pct:g}: accepted: {least:.3g} to 1 at {longest} pixels")
    crop = {"crop_pct": view.crop_pct, "crop_mode": view.crop_mode}
    flips = [transforms.RandomHorizontalFlip(hflip)] if hflip else []
    flips += [_cut_long] if view.crop_mode == "center" and longest <= LONGEST_SHAPE * min(view.size) else []
    return transforms.Compose([*flips, *_timm_steps(view, is_training=False, interpolation=view.interpolation, **crop)])


def _timm_steps(view: View, **options: Any) -> list[Any]:
    composed: Any = create_transform(view.size, mean=view.mean, std=view.std, **options)
    return list(composed.transforms)


def _cut_long(image: Image.Image) -> Image.Image:
    """The middle of a picture that is far longer than wide: resized as a whole, it would not fit in memory."""
    width, height = image.size
    most = 2 * LONGEST_SHAPE * min(width, height)
    left, top = max(0, (width - most) // 2), max(0, (height - most) // 2)
    return image if max(width, height) <= most else image.crop((left, top, width - left, height - top))


def crop_view(photograph: Image.Image, view: View, size: int | tuple[int, int]) -> Image.Image:
    """The part of `photograph` that `eval_transform` makes the input of, at `size`: a side, or rows and columns."""
    for step in eval_transform(replace(view, input_size=size, interpolation="bicubic")).transforms[:-2]:
        photograph = step(photograph)  # resized and cropped, and not made a tensor of
    return photograph


def train_transform(view: View, augmentation: Augmentation) -> transforms.Compose:
    """DeiT's training transform through timm's factory, with random affine moves when asked for.

    Raises:
        UsageError: an augmentation policy that timm does not know.
    """
    try:
        steps = _timm_steps(
            view,
            is_training=True,
            hflip=augmentation.hflip,
            color_jitter=augmentation.color_jitter,
            auto_augment=augmentation.auto_augment,
            interpolation=augmentation.interpolation,
            re_prob=augmentation.erase_probability,
            re_mode=augmentation.erase_mode,
            re_count=augmentation.erase_count,
        )
    except (AssertionError, KeyError, ValueError) as error:  # how timm refuses a policy
        raise UsageError(f"--aa {augmentation.auto_augment}: {error}; accepted: a policy of timm, or none") from error
    for operation in _operations(steps):
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize
    if max(view.size) <= SMALL:
        steps[0] = transforms.RandomCrop(view.size, padding=SMALL_PADDING)
    if augmentation.affine is not None:
        degrees, shift, rescale = augmentation.affine
        moves, scales = (shift, shift), (1 - rescale, 1 + rescale)
        bilinear = transforms.InterpolationMode.BILINEAR
        steps.insert(0, transforms.RandomAffine(degrees, moves, scales, interpolation=bilinear))
    return transforms.Compose(steps)


def _operations(steps: list[Any]) -> Iterator[AugmentOp]:
    """Those that the policies among `steps` draw from."""
    for step in steps:
        yield from getattr(step, "ops", ())  # RandAugment, AugMix
        yield from chain(*getattr(step, "policy", ()))  # AutoAugment


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's, which at the strongest asks for no bits: black from Pillow before 13, which refuses it."""
    try:
        return posterize(image, bits, **options)
    except ValueError:
        if bits >= 1:
            raise
        return Image.new(image.mode, image.size)
