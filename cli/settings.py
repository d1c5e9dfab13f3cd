"""Every flag, declared once as a field of the frozen settings that it becomes, a class per concern. No torch here.

`flag` declares a flag: its help, accepted values, spelling, metavar and default, and arguments of argparse that do not
follow from the field's type. `free` declares one that may change when a training is resumed. `group` starts a group of
the help. `becomes` converts the parsed value to the setting. A field without either takes the value of the flag, or of
the field, that has its name in another class.
"""

# ruff: noqa: RUF009  (`flag` gives a field)
from __future__ import annotations

import argparse
import math
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator
from dataclasses import Field, dataclass, fields
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

from diffrate import ROUNDS
from diffrate.budget import BASELINES, FLOPS, LATENCY, SHARE, SPEEDUP, Target
from diffrate.files.header import PRECISIONS as EXPORTED_PRECISIONS
from diffrate.files.header import TARGETS
from diffrate.searching.settings import FLAGS, OPTIONS, SMOOTHING, Range, SearchSettings, flag_of, option

PROJECT = Path(__file__).resolve().parent.parent
OFFICIAL = "official"
FROM_SCRATCH = "scratch"
SEARCH = "search"
DEFAULT_BATCH = 64  # images
LATENCY_BATCH = 8  # images
# The modes that a flag asks for; without one, it is a search.
MODES = ("eval", "finetune", "benchmark", "baseline", "sensitivity", "visualize", "export", "plot", "list_models")
BENCHMARKS = ("eval", "search", "scaling", "loading", "latency")
FILES = "files"  # the benchmark of exported files
# Headings of the help, of flags that go with some modes alone.
OF_SEARCH, OF_TRAINING = "search", "training (--finetune)"
OF_IMAGES = "augmentation (training; of few images, --finetune has the mildest by default)"
PRECISIONS = ("off", "bf16", "fp16")
DATA_SETS = ("IMNET", "CIFAR10", "CIFAR", "INAT", "INAT19", "SAMPLE")
SCHEDULES = ("cosine", "tanh", "step", "poly", "constant", "none")
ALL_NAMES = "*"
LARGEST_INPUT = 8192  # pixels: beyond, the position embedding alone takes gigabytes
CALIBRATION = 256  # images that --sensitivity measures on
DISTILL = 0.9  # of the loss
COUNT, NOT_NEGATIVE, FRACTION = Range(1), Range(0), Range(0, 1)
DROPPED, CROPPED, POSITIVE = Range(0, 1, below=True), Range(0, 1, above=True), Range(0, above=True)


def flag(help: str = "", accepted: Any = None, flag: str = "", default: Any = None, **shown: Any) -> Any:
    """A field that has a flag, as an `option` of a search has. Without a default it is off, empty or None."""
    return option(default, help, accepted, flag, **shown)


free = partial(flag, saved=False)  # for what may differ when a training goes on


def in_plain_digits(text: str) -> bool:
    """Whether a number has neither underscores nor digits of other scripts, which Python reads, and nobody means."""
    return text.isascii() and "_" not in text


def gflops(text: str) -> Target:
    """An argparse type: GFLOPs, or with `%` a share of the dense model's."""
    share = text.endswith("%")
    try:
        if not in_plain_digits(text):
            raise ValueError
        value = float(text.removesuffix("%"))
    except ValueError as error:
        raise ArgumentTypeError(f"found {text}; accepted: GFLOPs, or a share such as 50%") from error
    if not (0 < value <= 100 if share else 0 < value < math.inf):
        raise ArgumentTypeError(f"found {text}; accepted: above {'0% to 100%' if share else '0'}")
    return Target(SHARE, value / 100) if share else Target(FLOPS, value * 1e9)


def location(text: str) -> str:
    """An argparse type: a path or URL, with `~` for a user's folder also where the shell leaves it, as after `=`."""
    if not text:
        raise ArgumentTypeError("found an empty name; accepted: a path")
    try:
        return str(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError as error:
        raise ArgumentTypeError(f"found {text}; accepted: the folder of a user that there is") from error


def file_path(text: str) -> Path:
    """An argparse type: as `location`, as a path."""
    return Path(location(text))


def folder_path(text: str) -> Path:
    """An argparse type: as `file_path`; an empty name is the current folder."""
    return file_path(text or ".")


class Benchmark(argparse.Action):
    """One of `BENCHMARKS`, the first where nothing is said, or names of files."""

    def __call__(self, parser: object, namespace: Namespace, values: Any, option: object = None) -> None:
        words = list(values) or [BENCHMARKS[0]]
        named = [word for word in words if word in BENCHMARKS or Path(word).suffix not in TARGETS]
        if named and (len(words) > 1 or named[0] not in BENCHMARKS):
            wrong = next((word for word in named if word not in BENCHMARKS), named[0])
            kinds = f"{', '.join(BENCHMARKS)}, or files that end in {', '.join(TARGETS)}"
            raise argparse.ArgumentError(self, f"found {wrong}; accepted: one of {kinds}")
        namespace.benchmark = words


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a run does, where and how it computes, and what it leaves.

    flags: all of them as plain values, for checkpoints. words: the command line as it was typed.
    """

    mode: str
    flags: MappingProxyType[str, Any]
    words: tuple[str, ...]
    eval: bool = flag("evaluate the model, compressed or dense", group="what to do; without any of these, search")
    finetune: str | bool | None = free(
        "train the weights at the given rates, from a checkpoint or from scratch",
        location,
        "--finetune CHECKPOINT",
        const=True,
    )
    timed: tuple[str, ...] = flag(
        f"time dense against compressed ({BENCHMARKS[0]}, the default), or {BENCHMARKS[1]}: a search step; "
        f"{BENCHMARKS[2]}: by the size of input and batch; {BENCHMARKS[3]}; {BENCHMARKS[4]}: of the parts of a block, "
        "which --target_speedup goes by; or files of --export, beside their model",
        location,
        "--benchmark KIND|FILE",
        nargs="*",
        action=Benchmark,
    )
    baseline: str | None = flag("evaluate a uniform schedule that meets the target", BASELINES)
    sensitivity: int | None = flag(
        f"what each block can lose alone, on training images without their labels, default {CALIBRATION}",
        COUNT,
        "--sensitivity IMAGES",
        const=CALIBRATION,
    )
    images: tuple[Path, ...] = flag("draw which tokens merge and go, block by block", flag="--visualize IMAGE")
    export: Path | None = free(
        "write the model for another runtime: .onnx (onnxruntime), .pt2 (torch alone) or .xml (OpenVINO)",
        flag="--export PATH",
    )
    folder: Path | None = flag("draw the plots of an output folder again, from its logs", flag="--plot DIR")
    pattern: str | None = flag(
        "print the names that --model takes, all or those that match, such as 'vit_*dinov2*'",
        lambda text: text or ALL_NAMES,
        "--list-models PATTERN",
        const=ALL_NAMES,
    )
    output_dir: Path | None = free(
        "where logs and checkpoints go", folder_path, "--output_dir DIR", group="what it leaves"
    )
    save: Path | None = free("leave the model, schedule included, in one file", flag="--save PATH")
    save_rates: bool = flag("add the result to compression_rate.json", flag="--save_compression_rate")
    export_dtype: str = free("precision of the weights in --export", EXPORTED_PRECISIONS, default="float32")
    export_normalize: bool = free("let the file of --export take RGB in 0..1, and normalise it")
    export_opset: int | None = free("of an .onnx file, from 18, the default", COUNT, "--export-opset OPSET")
    tensorboard: bool = free("also log to TensorBoard in --output_dir")
    print_freq: int = free("steps between log lines", COUNT, "--print-freq STEPS", default=10)
    quiet: bool = free("no progress on the terminal: results and warnings alone")
    device: str = free("auto (CUDA where there is one), cpu, cuda or cuda:N", default="auto", group="run")
    amp: str | None = flag("mixed precision; default fp16 on CUDA, off on CPU", PRECISIONS)
    seed: int
    resume: str | None = free(
        "go on from a checkpoint of a search or of --finetune; with --eval, score a searched schedule",
        location,
        "--resume PATH|auto",
    )
    blocks: tuple[int, ...] | None = flag("blocks to draw with --visualize, counted from 0", NOT_NEGATIVE)
    attention: bool = flag("add maps of attention to the pages of --visualize, dense beside compressed")
    compile: bool = free("run as one compiled graph; --benchmark times both")
    rounds: int = flag("timed pairs of --benchmark", COUNT, default=ROUNDS)

    @property
    def benchmark(self) -> str | None:
        """One of `BENCHMARKS`, or that of exported files."""
        return benchmark_of(self.timed)


@dataclass(frozen=True)
class DataSettings:
    """What is read, and how. Without batch sizes it is the usual one, or less where there are fewer images."""

    path: str | None = free(
        "folder of the data set; none: the digits that ship", location, "--data-path DIR", group="data"
    )
    data_set: str = flag("IMNET is any ImageFolder layout; CIFAR is CIFAR-100", DATA_SETS)
    crop_pct: float | None = flag("part of the short side that is seen", CROPPED)
    batch_sizes: tuple[int, ...] = free(
        f"images a step, on each process, default {DEFAULT_BATCH}, or fewer where training has fewer; "
        "--benchmark takes several sizes in turn",
        COUNT,
        "--batch-size IMAGES",
        dest="batch_sizes",
    )
    workers: int | None = free("loader processes of each process, default one per core", NOT_NEGATIVE, "--num_workers")
    exif: bool = flag(
        "turn images upright as their EXIF says, which published accuracies do not; --visualize always does"
    )
    # What a training that met such a file goes on with.
    skip_unreadable: bool = free(
        "leave out files that cannot be read, and say which at the end; in training, the next image stands in"
    )
    pin_memory: bool = free("pinned host memory on CUDA", flag="--pin-mem", default=True)

    @property
    def batch_size(self) -> int:
        """Images a step, on each process; the first where a benchmark takes several."""
        return self.batch_sizes[0] if self.batch_sizes else DEFAULT_BATCH


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model, with which weights, at which kept counts.

    checkpoint: path, URL, or one of the words for the official weights and for none.
    """

    name: str | None = flag(
        "a published model (README: Reproduce the paper) such as vit_deit_small_patch16_224, any other ViT of timm "
        "with or without a pretrained tag, a folder of transformers, or hf-hub:USER/NAME; a file of --save as "
        "--checkpoint says it itself",
        flag="--model NAME",
        group="model and compression",
    )
    checkpoint: str = free(
        f"weights, or a file of --save; '{OFFICIAL}' are the published ones, which --eval takes on its own",
        location,
        "--checkpoint PATH_OR_URL",
    )
    multi_label: bool
    dense: bool = free("keep all tokens, whatever the checkpoint was trained at")
    input_size: tuple[int, int] | None = flag(
        "side of the input, or its rows and columns, default the model's own",
        Range(1, LARGEST_INPUT),
        "--input-size PIXELS",
        becomes=lambda sizes: (sizes[0], sizes[-1]),
    )
    text_head: Path | None = flag(
        "classes of a CLIP or SigLIP model, from a file of their texts' embeddings (docs/convert.md)",
        flag="--text-head FILE",
    )
    drop_path: float = flag("stochastic depth in training", DROPPED, "--drop-path RATE", default=0.1)
    load: bool = free("compress at a schedule of the compression rate file", flag="--load_compression_rate")
    target_flops: tuple[Target, ...] = free(
        "schedule to load, or budgets to meet, as GFLOPs or as a share of the dense model's, such as 50%%",
        gflops,
        "--target_flops GFLOPS",
    )
    target_speedup: tuple[float, ...] = free(
        "instead, how many times as fast as dense a search or a --baseline is to be, measured on this machine",
        POSITIVE,
        "--target_speedup TIMES",
    )
    target_latency: tuple[float, ...] = free("or what an image is to take", POSITIVE, "--target_latency SECONDS")
    scale: bool = free(
        "scale a schedule that was made for another number of tokens, as with --input-size",
        flag="--scale_compression_rate",
    )
    rate_file: Path | None = free(
        "schedules to load from, default compression_rate.json", flag="--compression_rate_file PATH"
    )
    granularity: int
    start: Target | None = flag("start from this schedule of the rate file", gflops, "--init_compression_rate GFLOPS")

    @property
    def targets(self) -> tuple[Target, ...]:
        """The schedule to load, or what to meet."""
        timed = ((SPEEDUP, self.target_speedup), (LATENCY, self.target_latency))
        return self.target_flops or tuple(Target(kind, value) for kind, values in timed for value in values)


@dataclass(frozen=True, kw_only=True)
class LatencySettings:
    """How a model is to be used where its seconds count."""

    batch_size: int = free(
        f"at a time, where speed counts, default {LATENCY_BATCH}",
        COUNT,
        "--latency_batch IMAGES",
        default=LATENCY_BATCH,
    )
    asked: str | None = free(
        "of weights there, default that of --amp, or float32; see --compile", PRECISIONS, "--latency_precision"
    )
    file: Path | None = free(
        "that keeps what was measured, default one in the user's cache", flag="--latency_file FILE"
    )
    amp: str | None
    compile: bool

    @property
    def precision(self) -> str:
        """One of `PRECISIONS`."""
        return self.asked or self.amp or "off"


@dataclass(frozen=True)
class RecipeSettings:
    """How a search goes about it, None where the model decides."""

    transform: str | None = free(
        "images as in training (the paper, default of its models), or as in evaluation, mirrored by --hflip",
        ("train", "eval"),
        "--search_transform",
        group=OF_SEARCH,
    )
    loss: str | None = None
    budget: str | None = None
    method: str | None = None


PAPER = RecipeSettings(
    loss=SearchSettings.loss, transform="train", budget=SearchSettings.budget, method=SearchSettings.method
)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How weights are trained: optimizer, its learning rate's course, average of the weights."""

    epochs: int
    optimizer: str = flag("any optimizer of timm", flag="--opt NAME", default="adamw", group=OF_TRAINING)
    learning_rate: float = flag(
        "learning rate for 512 images a step; the default goes by what is trained", POSITIVE, "--lr", default=1e-5
    )
    unscaled: bool = flag("take --lr as it is, whatever the batch size", flag="--unscale-lr")
    least_learning_rate: float = flag(
        "where the schedule ends, default 1e-6 or lower", NOT_NEGATIVE, "--min-lr", default=1e-6
    )
    warmup_learning_rate: float = flag("where the warm-up starts", NOT_NEGATIVE, "--warmup-lr", default=1e-6)
    warmup_epochs: int | None = flag("default 5, or none in runs of up to 5 epochs", NOT_NEGATIVE)
    schedule: str = flag("", SCHEDULES, "--sched", default="cosine")
    weight_decay: float = flag("", NOT_NEGATIVE, default=0.05)
    momentum: float = flag("for optimizers that have one", FRACTION, default=0.9)
    clip_grad: float | None = flag("clip the gradient's norm", POSITIVE, "--clip-grad NORM")
    average: bool = flag("average the weights over steps, and save the average", flag="--model-ema")
    average_decay: float = flag("", FRACTION, "--model-ema-decay", default=0.99996)
    distill: float | None = flag(
        "the dense model, with the weights to start from, as a teacher beside the labels: how much it counts, "
        f"{DISTILL} where nothing is said; 0 for none",
        FRACTION,
        "--distill WEIGHT",
        const=DISTILL,
    )


@dataclass(frozen=True)
class Augmentation:
    """DeiT's training augmentation; `affine` is (degrees, shift, rescale), the last two fractions."""

    color_jitter: float = flag("", NOT_NEGATIVE, default=0.3, group=OF_IMAGES)
    auto_augment: str | None = flag(
        "timm's AutoAugment policy, or none",
        flag="--aa POLICY",
        default="rand-m9-mstd0.5-inc1",
        becomes=lambda policy: None if policy in ("", "none") else policy,
    )
    interpolation: str = flag("", ("random", "bilinear", "bicubic"), "--train-interpolation", default="bicubic")
    erase_probability: float = flag("probability of random erasing", FRACTION, "--reprob", default=0.25)
    erase_mode: str = flag("", ("const", "rand", "pixel"), "--remode", default="pixel")
    erase_count: int = flag("erased areas", COUNT, "--recount", default=1)
    hflip: float = flag("probability of a mirror image", FRACTION, default=0.5)
    affine: tuple[float, float, float] | None = flag(
        "random rotations, shifts and rescalings up to these, the last two as fractions",
        float,
        "--affine DEGREES SHIFT RESCALE",
    )
    repeated: bool = flag("three views an image", flag="--repeated-aug", default=True)


@dataclass(frozen=True)
class Mixing:
    """The labels' part of DeiT's recipe: smoothing, and images mixed by mixup and cutmix."""

    smoothing: float = flag("label smoothing", FRACTION, default=SMOOTHING)
    mixup: float = flag("", NOT_NEGATIVE, "--mixup ALPHA", default=0.8)
    cutmix: float = flag("", NOT_NEGATIVE, "--cutmix ALPHA", default=1.0)
    probability: float = flag("", FRACTION, "--mixup-prob", default=1.0)
    switch_probability: float = flag(
        "probability of cutmix when both are on", FRACTION, "--mixup-switch-prob", default=0.5
    )
    mode: str = flag("", ("batch", "pair", "elem"), "--mixup-mode", default="batch")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed at all."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class Settings:
    """All that a command line says."""

    run: RunSettings
    data: DataSettings
    model: ModelSettings
    latency: LatencySettings
    recipe: RecipeSettings
    search: SearchSettings
    training: TrainingSettings
    augmentation: Augmentation
    mixing: Mixing


PARTS: dict[str, type[Any]] = get_type_hints(Settings)


def declared() -> Iterator[Field[Any]]:
    """The fields that have a flag, in the order of the help; those of several classes in the first."""
    seen = set()
    for part in PARTS.values():
        for item in fields(part):
            item = item if item.metadata else OPTIONS.get(item.name, item)
            if item.metadata and item.metadata["flag"] is not None and flag_of(item) not in seen:
                seen.add(flag_of(item))
                yield item


def dest_of(flag: str) -> str:
    """The name under which a flag is parsed."""
    return flag.removeprefix("--").replace("-", "_")


def settings_from(args: Namespace, words: tuple[str, ...]) -> Settings:
    """The settings that parsed and checked flags stand for; `words` are what was parsed."""
    flags = {name: _plain(value) for name, value in vars(args).items()}
    if args.input_size is not None and len(set(args.input_size)) == 1:
        flags["input_size"] = args.input_size[0]  # as checkpoints have a square's
    args.mode, args.flags, args.words = mode_of(args), MappingProxyType(flags), words
    options = {name: getattr(args, dest_of(flag)) for name, flag in FLAGS.items()}
    search = SearchSettings(**{name: value for name, value in options.items() if value is not None})
    others = {name: kind for name, kind in PARTS.items() if kind is not SearchSettings}
    parts = {name: kind(**{item.name: _value(item, args) for item in fields(kind)}) for name, kind in others.items()}
    return Settings(search=search, **parts)


def _value(item: Field[Any], args: Namespace) -> Any:
    """The value of a field."""
    shown = item.metadata.get("shown", {})
    spelled = flag_of(item) if item.metadata else FLAGS.get(item.name, item.name)
    value = getattr(args, shown.get("dest") or dest_of(spelled))
    if value is None:
        return () if str(item.type).startswith("tuple") and "None" not in str(item.type) else None
    value = tuple(value) if isinstance(value, list) else value
    return shown["becomes"](value) if "becomes" in shown else value


def mode_of(args: Namespace) -> str:
    """The mode that the flags ask for."""
    return next((mode for mode in MODES if getattr(args, mode)), SEARCH)


def benchmark_of(words: list[str] | tuple[str, ...] | None) -> str | None:
    """What `--benchmark` asks for by its words: a benchmark by its name, or that of exported files."""
    return None if not words else words[0] if words[0] in BENCHMARKS else FILES


def size_words(size: tuple[int, int]) -> str:
    """What to write after `--input-size`."""
    return " ".join(map(str, dict.fromkeys(size)))


def _plain(value: Any) -> Any:
    """A flag's value as `torch.load` reads it with `weights_only`."""
    if isinstance(value, Path | Target):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
