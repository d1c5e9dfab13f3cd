"""The zoo: what each command-line name of a model stands for. Data only, and the errors of this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from sample import MODEL as SAMPLE_MODEL

Size = tuple[int, int]  # rows and columns, in pixels
HUB_SITE = "huggingface.co/"
FACEBOOK = "https://dl.fbaipublicfiles.com"
# What inputs are like beside their size, by the names that timm has for it, and files of `diffrate.save`.
INPUTS = ("crop_pct", "crop_mode", "mean", "std", "interpolation")


class CheckpointError(ValueError):
    """Weights that cannot be fetched, read or fitted to the model; one line."""


class InputSizeError(ValueError):
    """An input that a model's patches do not tile."""


class UnknownModelError(ValueError):
    """A model name that stands for no model."""


class OfficialWeights(NamedTuple):
    """The file's name once downloaded, and where it is published, in order: URLs and the hub's repositories."""

    file: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class ModelEntry:
    """A model: timm's architecture with `options`, and what its inputs are like.

    weights: a file, or as text the URL, folder or repository from which timm's own loader gets those of this name, or
    what reads them in another layout; None where there are no official ones. num_classes: 0 for a model without a head.
    aliases: timm's names for the same model. config: timm's pretrained configuration, where it is not the one that goes
    with the architecture. published: whether it is one of the paper's models. complete: gives timm's model, in place,
    what no option asks for, by `own` arguments.
    """

    name: str
    architecture: str
    schedule_key: str
    weights: OfficialWeights | Path | str | object | None
    options: Mapping[str, Any] = field(default_factory=dict)
    num_classes: int = 1000
    input_size: Size = (224, 224)
    crop_pct: float = 224 / 256
    crop_mode: str = "center"
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"
    aliases: tuple[str, ...] = ()
    config: Mapping[str, Any] | None = None
    published: bool = False
    complete: Callable[..., None] | None = None
    own: Mapping[str, Any] = field(default_factory=dict)

    @property
    def features(self) -> bool:
        """Whether its outputs are features of an image, and no logits."""
        return self.own.get("feature_head") is not None and self.own.get("text_width") is None

    @property
    def headless(self) -> bool:
        """Whether there are no classes to compare with labels."""
        return self.num_classes == 0 or self.features


def _deit(name: str, letter: str, digest: str) -> ModelEntry:
    architecture = name.removeprefix("vit_")
    file = f"{architecture}-{digest}.pth"
    return ModelEntry(
        name=name,
        architecture=architecture,
        schedule_key=f"ViT-{letter}-DeiT",
        weights=OfficialWeights(file, (f"{FACEBOOK}/deit/{file}", f"{HUB_SITE}timm/{architecture}.fb_in1k")),
        aliases=(architecture, f"{architecture}.fb_in1k"),
        published=True,
    )


def _mae(name: str, letter: str) -> ModelEntry:
    file = f"mae_finetuned_vit_{name.split('_')[1]}.pth"
    return ModelEntry(
        name=name,
        architecture=name.replace("mae", "224"),
        schedule_key=f"ViT-{letter}-MAE",
        weights=OfficialWeights(file, (f"{FACEBOOK}/mae/finetune/{file}",)),
        options={"global_pool": "avg"},
        published=True,
    )


_ENTRIES = (
    _deit(name="vit_deit_tiny_patch16_224", letter="T", digest="a1311bcf"),
    _deit(name="vit_deit_small_patch16_224", letter="S", digest="cd65a155"),
    _deit(name="vit_deit_base_patch16_224", letter="B", digest="b5f2ef4d"),
    _mae(name="vit_base_patch16_mae", letter="B"),
    _mae(name="vit_large_patch16_mae", letter="L"),
    _mae(name="vit_huge_patch14_mae", letter="H"),
    ModelEntry(
        name="caformer_s36",
        architecture="caformer_s36",
        schedule_key="CAFormer-S36",
        weights=OfficialWeights("caformer_s36.pth", (f"{HUB_SITE}timm/caformer_s36.sail_in1k",)),
        aliases=("caformer_s36.sail_in1k",),
        published=True,
    ),
    ModelEntry(
        name=SAMPLE_MODEL,
        architecture="vit_tiny_patch16_224",
        schedule_key="ViT-Sample",
        weights=Path(__file__).resolve().parent.parent / "sample" / "vit_sample_patch4_28.pth",
        options={"patch_size": 4, "embed_dim": 96, "depth": 8, "num_heads": 3},
        num_classes=10,
        input_size=(28, 28),
        crop_pct=1.0,
    ),
)

ZOO: Mapping[str, ModelEntry] = {entry.name: entry for entry in _ENTRIES}
_BY_NAME = {name: entry for entry in _ENTRIES for name in (entry.name, *entry.aliases)}


def find(name: str) -> ModelEntry | None:
    """The entry of a model, by its published name or by timm's; None where the zoo has no such name."""
    return _BY_NAME.get(name.replace("-", "_"))
