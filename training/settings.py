"""What a training is set to. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


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
    repeated: bool  # three views of an image follow each other


@dataclass(frozen=True)
class Mixing:
    """The labels' part of DeiT's recipe: smoothing, and images mixed by mixup and cutmix."""

    smoothing: float
    mixup: float
    cutmix: float
    probability: float
    switch_probability: float
    mode: str

    @property
    def mixes(self) -> bool:
        """Whether images are mixed at all."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class TrainingSettings:
    """How weights are trained: optimizer, its learning rate's course, average of the weights."""

    epochs: int
    optimizer: str
    learning_rate: float
    unscaled: bool  # the learning rate holds whatever the batch size
    least_learning_rate: float
    warmup_learning_rate: float
    warmup_epochs: int | None
    schedule: str
    weight_decay: float
    momentum: float
    clip_grad: float | None
    average: bool
    average_decay: float
    distill: float | None  # how much the dense outputs count beside the labels, None for labels alone
