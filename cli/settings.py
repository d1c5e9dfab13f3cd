"""What the flags become: frozen settings, a class per concern. No torch here.

Nothing but this folder sees the parsed flags: `settings_from` is where they end.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from diffrate.budget import LATENCY, SPEEDUP, Target
from diffrate.searching.settings import FLAGS, SearchSettings

Taken = TypeVar("Taken")
PROJECT = Path(__file__).resolve().parent.parent
OFFICIAL = "official"
FROM_SCRATCH = "scratch"
SEARCH = "search"
DEFAULT_BATCH = 64  # images
# The modes that a flag asks for; without one, it is a search.
MODES = ("eval", "finetune", "benchmark", "baseline", "sensitivity", "visualize", "export", "plot", "list_models")
BENCHMARKS = ("eval", "search", "scaling", "loading", "latency")
FILES = "files"  # the benchmark of exported files


@dataclass(frozen=True)
class DataSettings:
    """What is read, and how. Without batch sizes it is the usual one, or less where there are fewer images.

    exif: turn images as it says. skip_unreadable: go on without files that cannot be read.
    """

    data_set: str
    path: str | None
    crop_pct: float | None
    batch_sizes: tuple[int, ...]
    workers: int | None
    pin_memory: bool
    exif: bool
    skip_unreadable: bool

    @property
    def batch_size(self) -> int:
        """Images a step, on each process; the first where a benchmark takes several."""
        return self.batch_sizes[0] if self.batch_sizes else DEFAULT_BATCH


@dataclass(frozen=True)
class ModelSettings:
    """Which model, with which weights, at which kept counts.

    checkpoint: path, URL, or one of the words for the official weights and for none.
    input_size: rows and columns in pixels, None for the model's own.
    load: take a schedule from the file of schedules; scale: to this model's number of tokens.
    dense: keep all tokens, whatever the checkpoint says. start: where a search begins.
    multi_label: outputs stand for labels of their own.
    """

    name: str | None
    checkpoint: str
    input_size: tuple[int, int] | None
    drop_path: float
    granularity: int
    load: bool
    targets: tuple[Target, ...]
    rate_file: Path | None
    scale: bool
    dense: bool
    start: Target | None
    multi_label: bool


@dataclass(frozen=True)
class RecipeSettings:
    """How a search goes about it, None where the model decides: options of the search, and `transform` of the images,
    `train` or `eval`."""

    loss: str | None
    transform: str | None
    budget: str | None
    method: str | None


@dataclass(frozen=True)
class LatencySettings:
    """How a model is to be used where its seconds count: images at a time, precision, compiled or not. file: that
    keeps what was measured, None for one of its own."""

    batch_size: int
    precision: str
    compiled: bool
    file: Path | None


@dataclass(frozen=True)
class RunSettings:
    """Where and how a run computes, and what it leaves.

    images, folder, baseline, benchmark, pattern: what the mode is about, and sensitivity: on how many images.
    exported: files to time, of the benchmark that has them. export, export_dtype, export_normalize, export_opset: the
    file to write, the precision of its weights, whether it takes images in [0, 1], and which operators it has.
    resume: a path or `auto`.
    flags: all of them as plain values, for checkpoints. words: the command line as it was typed.
    """

    mode: str
    images: tuple[Path, ...]
    folder: Path | None
    baseline: str | None
    benchmark: str | None
    exported: tuple[Path, ...]
    export: Path | None
    export_dtype: str
    export_normalize: bool
    export_opset: int | None
    sensitivity: int | None
    pattern: str | None
    output_dir: Path | None
    save: Path | None
    save_rates: bool
    resume: str | None
    device: str
    amp: str | None
    seed: int
    print_freq: int
    blocks: tuple[int, ...] | None
    quiet: bool
    compile: bool
    rounds: int
    tensorboard: bool
    flags: MappingProxyType[str, Any]
    words: tuple[str, ...]


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


@dataclass(frozen=True)
class Settings:
    """All that a command line says."""

    run: RunSettings
    data: DataSettings
    model: ModelSettings
    search: SearchSettings
    recipe: RecipeSettings
    latency: LatencySettings
    training: TrainingSettings
    augmentation: Augmentation
    mixing: Mixing


def settings_from(args: Namespace, words: tuple[str, ...]) -> Settings:
    """The settings that parsed and checked flags stand for; `words` are what was parsed."""
    return Settings(
        run=_run(args, words),
        data=_taken(
            DataSettings,
            args,
            path=args.data_path,
            batch_sizes=tuple(args.batch_sizes or ()),
            workers=args.num_workers,
            pin_memory=args.pin_mem,
        ),
        model=_taken(
            ModelSettings,
            args,
            name=args.model,
            input_size=_rows_columns(args.input_size),
            load=args.load_compression_rate,
            targets=tuple(args.target_flops or ()) or _timed_targets(args),
            rate_file=args.compression_rate_file,
            scale=args.scale_compression_rate,
            start=args.init_compression_rate,
        ),
        search=_search(args),
        recipe=RecipeSettings(args.search_loss, args.search_transform, args.budget, args.search),
        latency=LatencySettings(
            args.latency_batch, args.latency_precision or args.amp or "off", args.compile, args.latency_file
        ),
        training=_training(args),
        augmentation=_augmentation(args),
        mixing=_taken(
            Mixing,
            args,
            probability=args.mixup_prob,
            switch_probability=args.mixup_switch_prob,
            mode=args.mixup_mode,
        ),
    )


def _taken(kind: type[Taken], args: Namespace, **own: Any) -> Taken:
    """Settings of the flags that are called like their fields, and of what is their `own`."""
    alike = {item.name for item in fields(kind) if item.init} - own.keys()  # type: ignore[arg-type]
    return kind(**{name: getattr(args, name) for name in alike}, **own)


def _timed_targets(args: Namespace) -> tuple[Target, ...]:
    speedups = tuple(Target(SPEEDUP, value) for value in args.target_speedup or ())
    return speedups or tuple(Target(LATENCY, value) for value in args.target_latency or ())


def dest_of(flag: str) -> str:
    """The name under which a flag is parsed."""
    return flag.removeprefix("--").replace("-", "_")


def _search(args: Namespace) -> SearchSettings:
    """The options of the search that have flags; what is left open keeps its default."""
    given = {name: getattr(args, dest_of(flag)) for name, flag in FLAGS.items()}
    return SearchSettings(**{name: value for name, value in given.items() if value is not None})


def mode_of(args: Namespace) -> str:
    """The mode that the flags ask for."""
    return next((mode for mode in MODES if getattr(args, mode)), SEARCH)


def benchmark_of(args: Namespace) -> str | None:
    """The benchmark that the flags ask for: one by its name, or that of exported files."""
    if args.benchmark is None:
        return None
    return args.benchmark[0] if args.benchmark[0] in BENCHMARKS else FILES


def size_words(size: tuple[int, int]) -> str:
    """What to write after `--input-size`."""
    return " ".join(map(str, dict.fromkeys(size)))


def _rows_columns(sizes: list[int] | None) -> tuple[int, int] | None:
    """Of one number or two."""
    return None if sizes is None else (sizes[0], sizes[-1])


def _run(args: Namespace, words: tuple[str, ...]) -> RunSettings:
    return _taken(
        RunSettings,
        args,
        mode=mode_of(args),
        images=tuple(args.visualize or ()),
        folder=args.plot,
        benchmark=benchmark_of(args),
        exported=tuple(map(Path, args.benchmark)) if benchmark_of(args) == FILES else (),
        pattern=args.list_models,
        save_rates=args.save_compression_rate,
        blocks=None if args.blocks is None else tuple(args.blocks),
        flags=MappingProxyType({name: _plain(value) for name, value in vars(args).items()} | _side(args.input_size)),
        words=words,
    )


def _training(args: Namespace) -> TrainingSettings:
    return _taken(
        TrainingSettings,
        args,
        optimizer=args.opt,
        learning_rate=args.lr,
        unscaled=args.unscale_lr,
        least_learning_rate=args.min_lr,
        warmup_learning_rate=args.warmup_lr,
        schedule=args.sched,
        average=args.model_ema,
        average_decay=args.model_ema_decay,
        distill=args.distill or None,
    )


def _augmentation(args: Namespace) -> Augmentation:
    return _taken(
        Augmentation,
        args,
        auto_augment=None if args.aa in ("", "none") else args.aa,
        interpolation=args.train_interpolation,
        erase_probability=args.reprob,
        erase_mode=args.remode,
        erase_count=args.recount,
        affine=None if args.affine is None else (args.affine[0], args.affine[1], args.affine[2]),
        repeated=args.repeated_aug,
    )


def _side(sizes: list[int] | None) -> dict[str, Any]:
    """A square input's size as one number, as checkpoints have it."""
    return {"input_size": sizes[0]} if sizes is not None and len(set(sizes)) == 1 else {}


def _plain(value: Any) -> Any:
    """A flag's value as `torch.load` reads it with `weights_only`."""
    if isinstance(value, Path | Target):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
