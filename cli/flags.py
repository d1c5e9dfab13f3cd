"""The command line: every flag, and the checks that need nothing but the flags."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from cli.settings import (
    BENCHMARKS,
    DEFAULT_BATCH,
    FILES,
    FROM_SCRATCH,
    MODES,
    OFFICIAL,
    SEARCH,
    Settings,
    benchmark_of,
    mode_of,
    settings_from,
)
from diffrate import ROUNDS
from diffrate.budget import BASELINES, FLOPS, SHARE, Target
from diffrate.files.header import PRECISIONS as EXPORTED_PRECISIONS
from diffrate.files.header import (
    TARGETS,
    ExportError,
    SavedModelError,
    about,
    check_destination,
    is_saved_model,
    target_of,
)
from diffrate.schedule import GRANULARITY
from diffrate.searching.settings import FLAGS, GRADIENT, OPTIONS, SMOOTHING, Range, SearchSettings, help_of
from sample import MODEL as SAMPLE_MODEL
from utils import UsageError

LATENCY_BATCH = 8  # images
TRANSFORMS = ("train", "eval")
SEARCH_EPOCHS = 3
# What the model, or other flags, decide where nobody says.
OPEN = ("epochs", "method", "loss", "budget", "flops_loss", "flops_weight")
DATA_SETS = ("IMNET", "CIFAR10", "CIFAR", "INAT", "INAT19", "SAMPLE")
PRECISIONS = ("off", "bf16", "fp16")
SAVED = ".safetensors"
ALL_NAMES = "*"
MOST = 2**31 - 1  # of what is counted
LARGEST = 1e30  # of rates and weights: some way beyond, updates leave float32
CALIBRATION = 256  # images that --sensitivity measures on
DISTILL = 0.9  # of the loss
LARGEST_INPUT = 8192  # pixels: beyond, the position embedding alone takes gigabytes
EXAMPLE = "such as vit_deit_small_patch16_224, timm's (--list-models), or a file that --save left as --checkpoint"
# What suits small digits, where DeiT's recipe is made for photographs.
SAMPLE_RECIPE = {
    **{"aa": "none", "color_jitter": 0.0, "reprob": 0.0, "hflip": 0.0, "mixup": 0.0, "cutmix": 0.0},
    **{"drop_path": 0.0, "affine": (10.0, 0.0, 0.1), "repeated_aug": False},
    # Fewer steps than on ImageNet, and fewer tokens: larger strides, finer candidates.
    **{"arch_lr": 0.1, "granularity": 1},
}
SAMPLE_COST = {"flops_loss": "relative", "flops_weight": 1.0}  # where its budget is no more than a penalty
# What gives its compressed model most back within minutes, where weights are there to start from.
SAMPLE_TUNING = {"epochs": 25, "lr": 8e-3, "warmup_epochs": 0}


class Parser(argparse.ArgumentParser):
    """argparse with `-` and `_` interchangeable in flags, and errors of one line."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: object = None):  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args([self._spelled(word) for word in words], namespace)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def _spelled(self, word: str) -> str:
        """The flag `word` as it was declared; abbreviations stay abbreviations of one flag."""
        if not word.startswith("--"):
            return word
        name, equals, value = word.partition("=")
        dashed = name.replace("_", "-")
        declared = {flag.replace("_", "-"): flag for flag in self._option_string_actions}
        if dashed in declared:
            return declared[dashed] + equals + value
        longer = [flag for plain, flag in declared.items() if plain.startswith(dashed)]
        return longer[0] + equals + value if len(longer) == 1 else word


def get_args_parser() -> Parser:
    """The parser of `main.py`."""
    parser = Parser(
        prog="main.py",
        description="DiffRate: compress the tokens of pretrained Vision Transformers.",
        epilog="Without --data-path, the digits that ship are the data and their small ViT the model.",
    )
    _add_mode_flags(parser)
    _add_model_flags(parser)
    _add_data_flags(parser)
    _add_run_flags(parser)
    _add_search_flags(parser)
    _add_training_flags(parser)
    _add_augmentation_flags(parser)
    return parser


def parse_flags(words: Sequence[str] | None = None, usual: Mapping[str, Any] = MappingProxyType({})) -> Settings:
    """Parse and check the command line; defaults that depend on other flags are filled in.

    usual: defaults in place of those declared, but for the sample's own.

    Raises:
        UsageError: a flag, a value, or a combination that makes no sense.
        SavedModelError: `--checkpoint` is a damaged file of `--save`.
    """
    parser = get_args_parser()
    parser.set_defaults(**usual)
    words = tuple(sys.argv[1:] if words is None else words)
    args = parser.parse_args(words)
    if sum(bool(getattr(args, mode)) for mode in MODES) > 1:
        flags = ", ".join("--" + mode.replace("_", "-") for mode in MODES)
        raise UsageError(f"accepted: one of {flags}, or none: a search")
    if isinstance(args.finetune, str):
        if args.checkpoint is not None:
            raise UsageError("--finetune CHECKPOINT and --checkpoint name two files; accepted: one of them")
        args.checkpoint = args.finetune
    model = _model_name(args)
    if model == SAMPLE_MODEL:
        tuned = args.finetune and args.checkpoint not in (None, FROM_SCRATCH) and args.data_path is None
        parser.set_defaults(**SAMPLE_RECIPE, **(SAMPLE_TUNING if tuned else {}))
        args = parser.parse_args(words, argparse.Namespace(checkpoint=args.checkpoint))
    args.model = model
    mode = mode_of(args)
    args.data_set = args.data_set or ("SAMPLE" if args.data_path is None else "IMNET")
    if args.arch_min_lr is None:
        args.arch_min_lr = SearchSettings(learning_rate=args.arch_lr).last_rate
    if args.checkpoint is None:
        args.checkpoint = FROM_SCRATCH if args.finetune else OFFICIAL
    _fill_search(args, parser)
    if args.epochs is None:
        args.epochs = SEARCH_EPOCHS if mode == SEARCH else 30
    if mode in (SEARCH, "visualize", "sensitivity") and args.output_dir is None:
        args.output_dir = Path("output")
    _check_numbers(args, mode)
    _check_targets(args, mode)
    _check_combinations(args, mode)
    return settings_from(args, words)


def check_paths(settings: Settings) -> None:
    """Refuse files that are not there before torch is imported, which takes seconds.

    Raises:
        UsageError: `--checkpoint` or `--data-path`.
    """
    checkpoint, data = settings.model.checkpoint, settings.data.path
    elsewhere = checkpoint in (OFFICIAL, FROM_SCRATCH) or checkpoint.startswith(("http://", "https://"))
    if not elsewhere and not Path(checkpoint).is_file():
        raise UsageError(f"checkpoint {checkpoint}: no such file")
    if data is not None and not Path(data).is_dir():
        raise UsageError(f"--data-path {data}: no such folder")


def _fill_search(args: argparse.Namespace, parser: Parser) -> None:
    """What some flags of a search say of others; what is left open, the model decides.

    Raises:
        UsageError: two of them contradict each other.
    """
    if args.search is None and _asks_for_gradient(args, parser):
        args.search = GRADIENT
    penalty = {name: getattr(args, name) for name in ("flops_loss", "flops_weight")}
    given = [name for name, value in penalty.items() if value is not None]
    given += ["warmup_compression_rate"] if args.warmup_compression_rate else []
    if given and args.budget == "held":
        raise UsageError(f"--{given[0]} goes with a penalty; accepted: --budget penalty, or none of both")
    if given:
        args.budget = "penalty"
    own = SAMPLE_COST if args.model == SAMPLE_MODEL else {}
    for name, value in penalty.items():
        if value is None:
            setattr(args, name, own.get(name, getattr(SearchSettings, name)))


def _asks_for_gradient(args: argparse.Namespace, parser: Parser) -> bool:
    """Whether there are flags that nothing but the gradient search looks at."""
    own = ("epochs", "arch_lr", "accum_steps", "budget", "flops_loss", "flops_weight", "warmup_compression_rate")
    own += ("init_compression_rate", "search_transform")
    changed = any(getattr(args, name) != parser.get_default(name) for name in own)
    return changed or args.search_loss == SearchSettings.loss


def _model_name(args: argparse.Namespace) -> str | None:
    """What `--model` says, or the file of `--save` that is given as the checkpoint, or the sample's.

    Raises:
        UsageError: nothing says it, and the data are not the sample's.
    """
    if args.model is not None:
        return args.model
    if args.checkpoint is not None and is_saved_model(args.checkpoint):
        saved = about(args.checkpoint)
        return saved.name or saved.architecture
    if benchmark_of(args) == FILES:
        return None  # the files say it
    if args.data_path is not None or args.data_set not in (None, "SAMPLE"):
        reason = _why_not_saved(args.checkpoint or "")
        raise UsageError(f"--model is needed with --data-path{reason}; accepted: a model's name, {EXAMPLE}")
    return SAMPLE_MODEL


def _why_not_saved(checkpoint: str) -> str:
    """What is wrong with a checkpoint that by its name could be a file of `--save`, for the middle of a message."""
    if "://" in checkpoint or Path(checkpoint).suffix != SAVED:
        return ""
    try:
        about(checkpoint)
    except SavedModelError as error:
        return f" where --checkpoint does not say it ({error})"
    return ""


def _check_numbers(args: argparse.Namespace, mode: str) -> None:
    if args.input_size is not None and len(args.input_size) > 2:
        raise UsageError(f"--input-size: found {len(args.input_size)} numbers; accepted: a side, or rows and columns")
    sizes = args.batch_sizes or [DEFAULT_BATCH]
    if len(sizes) > 1 and benchmark_of(args) not in ("eval", "scaling", FILES):
        raise UsageError(f"--batch-size: found {len(sizes)} sizes; accepted: one, or --benchmark")
    if args.warmup_epochs is not None and args.warmup_epochs >= args.epochs > 0:
        raise UsageError(f"--warmup-epochs {args.warmup_epochs}: accepted: less than --epochs {args.epochs}")
    # A search may mix nothing, whatever these say: `cli/recipe.py`.
    if mode == "finetune" and (args.mixup > 0 or args.cutmix > 0) and sizes[0] % 2:
        raise UsageError(f"--batch-size {sizes[0]}: accepted: an even number with --mixup or --cutmix")
    if args.affine is not None:
        degrees, shift, rescale = args.affine
        if not (0 <= degrees <= 180 and 0 <= shift <= 1 and 0 <= rescale < 1):
            raise UsageError(f"--affine {degrees} {shift} {rescale}: accepted: 0 to 180, 0 to 1, 0 to below 1")
    if args.smoothing == 1:
        raise UsageError("--smoothing 1: accepted: from 0 to below 1")
    if args.arch_min_lr > args.arch_lr:
        raise UsageError(f"--arch-min-lr {args.arch_min_lr:g}: accepted: up to --arch-lr {args.arch_lr:g}")


def _check_same(first: str, one: Any, second: str, other: Any) -> None:
    """Refuse two flags that say the same thing differently."""
    if None not in (one, other) and one != other:
        raise UsageError(f"--{first} {one} --{second} {other}: found two values; accepted: one of the flags")


def _check_targets(args: argparse.Namespace, mode: str) -> None:
    """The flags that say which schedule: `--target_flops` and those that name files of schedules."""
    meeting = mode in (SEARCH, "baseline")
    timed = [name for name in ("target_speedup", "target_latency") if getattr(args, name) is not None]
    if len(timed) + (args.target_flops is not None) > 1:
        names = "--target_flops, --target_speedup, --target_latency"
        raise UsageError(f"{names}: found several; accepted: one of them")
    if timed and not meeting:
        raise UsageError(f"--{timed[0]} goes with a search or a --baseline")
    about_times = {"latency_batch": LATENCY_BATCH, "latency_precision": None, "latency_file": None}
    idle = [name for name, usual in about_times.items() if getattr(args, name) != usual]
    if idle and not timed and benchmark_of(args) != "latency":
        raise UsageError(f"--{idle[0]} goes with --target_speedup, --target_latency and --benchmark latency")
    if benchmark_of(args) == "latency":  # where both flags of a pair say what to measure
        _check_same("amp", args.amp, "latency_precision", args.latency_precision)
        if args.batch_sizes and args.latency_batch != LATENCY_BATCH:
            _check_same("batch-size", args.batch_sizes[0], "latency_batch", args.latency_batch)
    for name in timed:
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            raise UsageError(f"--{name} {' '.join(f'{value:g}' for value in getattr(args, name))}: accepted: each once")
    if not meeting and args.target_flops is not None:
        if not args.load_compression_rate:
            raise UsageError("--target_flops needs --load_compression_rate, a search or a --baseline")
        if len(args.target_flops) > 1:
            raise UsageError(f"--target_flops: found {len(args.target_flops)} targets; accepted: one, or a search")
    if args.target_flops is not None and len(set(args.target_flops)) < len(args.target_flops):
        raise UsageError(f"--target_flops {' '.join(map(str, args.target_flops))}: accepted: each once")
    if (meeting or mode == "sensitivity") and args.load_compression_rate:
        raise UsageError("--load_compression_rate goes with --eval, --finetune, --visualize, --export and --benchmark")
    if meeting and args.target_flops is None and not timed and args.model != SAMPLE_MODEL:
        raise UsageError(
            "--target_flops is needed: the GFLOPs that the schedule is to meet, or a share such as 50%; or "
            "--target_speedup or --target_latency"
        )
    if args.compression_rate_file and not args.load_compression_rate and args.init_compression_rate is None:
        raise UsageError("--compression_rate_file needs --load_compression_rate or --init_compression_rate")
    if args.scale_compression_rate and meeting and args.init_compression_rate is None:
        raise UsageError("--scale_compression_rate goes with a schedule to load; a search or --baseline has none")
    if args.dense and (args.load_compression_rate or meeting):
        raise UsageError("--dense keeps all tokens; accepted: no --load_compression_rate, search or --baseline")
    if benchmark_of(args) in ("search", "scaling", "latency") and args.load_compression_rate:
        raise UsageError(
            f"--benchmark {args.benchmark[0]} has schedules of its own; accepted: no --load_compression_rate"
        )


def _check_combinations(args: argparse.Namespace, mode: str) -> None:
    """The other flags that go with some modes alone."""
    if args.resume and mode not in (SEARCH, "eval", "visualize", "finetune"):
        raise UsageError("--resume goes with a search, --finetune, --eval or --visualize")
    if args.resume and mode != SEARCH and mode != "finetune" and (args.load_compression_rate or args.dense):
        other = "--dense" if args.dense else "--load_compression_rate"
        raise UsageError(f"--resume and {other} name two schedules; accepted: one of them")
    if args.multi_label and mode not in (SEARCH, "eval", "baseline", "sensitivity"):
        raise UsageError("--multi-label goes with a search, --eval, --baseline and --sensitivity")
    if args.distill and mode != "finetune":
        raise UsageError("--distill goes with --finetune")
    if args.distill and args.checkpoint == FROM_SCRATCH:
        raise UsageError("--distill needs weights to start from; accepted: --finetune CHECKPOINT, such as official")
    if args.blocks is not None and not args.visualize:
        raise UsageError("--blocks goes with --visualize")
    timed = args.target_speedup is not None or args.target_latency is not None
    compiles = args.eval or args.finetune or timed or benchmark_of(args) in ("eval", "loading", "latency", FILES)
    if args.compile and not compiles:
        raise UsageError("--compile goes with --eval, --finetune and --benchmark, or a target in seconds")
    _check_exported(args)
    if args.save is not None:
        if mode not in (SEARCH, "eval", "finetune"):
            raise UsageError("--save goes with a search, --eval and --finetune")
        targets = args.target_flops or args.target_speedup or args.target_latency or ()
        if len(targets) > 1:
            raise UsageError(f"--save: found {len(targets)} targets; accepted: one")
        if args.save.suffix != SAVED:
            raise UsageError(f"--save {args.save}: accepted: a name that ends in {SAVED}")
        if not args.save.parent.is_dir():
            raise UsageError(f"--save {args.save}: no folder {args.save.parent}")
        if args.save.is_dir():
            raise UsageError(f"--save {args.save}: found a folder; accepted: the name of a file")


def _check_exported(args: argparse.Namespace) -> None:
    """The file to export to, and those to time."""
    if args.export is not None:
        try:
            check_destination(args.export, args.export_dtype, args.export_opset)
        except ExportError as error:
            raise UsageError(f"--export {error}") from error
    else:
        usual = {"export_normalize": False, "export_dtype": EXPORTED_PRECISIONS[0], "export_opset": None}
        idle = [name for name, value in usual.items() if getattr(args, name) != value]
        if idle:
            raise UsageError(f"--{idle[0].replace('_', '-')} goes with --export")
    if benchmark_of(args) == FILES:
        try:
            for name in args.benchmark:
                target_of(Path(name))
        except ExportError as error:
            raise UsageError(f"--benchmark {error}") from error


class _Benchmark(argparse.Action):
    """One of `BENCHMARKS`, the first where nothing is said, or names of files."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: Any, option: object = None) -> None:
        words = list(values) or [BENCHMARKS[0]]
        named = [word for word in words if word in BENCHMARKS or Path(word).suffix not in TARGETS]
        if named and (len(words) > 1 or named[0] not in BENCHMARKS):
            wrong = next((word for word in named if word not in BENCHMARKS), named[0])
            kinds = f"{', '.join(BENCHMARKS)}, or files that end in {', '.join(TARGETS)}"
            raise argparse.ArgumentError(self, f"found {wrong}; accepted: one of {kinds}")
        namespace.benchmark = words


def _number(kind: type[int] | type[float], accepted: Range) -> Callable[[str], int | float]:
    """An argparse type: a number that is accepted; where it may be any, up to what computes."""
    limits = replace(accepted, high=MOST if kind is int else LARGEST) if math.isinf(accepted.high) else accepted

    def convert(text: str) -> int | float:
        value = kind(text)
        if value not in limits:
            raise argparse.ArgumentTypeError(f"found {text}; accepted: {limits}")
        return value

    convert.__name__ = "whole number" if kind is int else "number"
    return convert


def _target(text: str) -> Target:
    """An argparse type: GFLOPs, or with `%` a share of the dense model's."""
    share = text.endswith("%")
    try:
        value = float(text.removesuffix("%"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"found {text}; accepted: GFLOPs, or a share such as 50%") from error
    if not (0 < value <= 100 if share else 0 < value < float("inf")):
        raise argparse.ArgumentTypeError(f"found {text}; accepted: above {'0% to 100%' if share else '0'}")
    return Target(SHARE, value / 100) if share else Target(FLOPS, value * 1e9)


def _path(text: str) -> str:
    """An argparse type: a path or URL, with `~` for a user's folder also where the shell leaves it, as after `=`."""
    if not text:
        raise argparse.ArgumentTypeError("found an empty name; accepted: a path")
    try:
        return str(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"found {text}; accepted: the folder of a user that there is") from error


COUNT, WHOLE, FRACTION = _number(int, Range(1)), _number(int, Range(0)), _number(float, Range(0, 1))
DROPPED, CROPPED = _number(float, Range(0, 1, below=True)), _number(float, Range(0, 1, above=True))
PIXELS = _number(int, Range(1, LARGEST_INPUT))
POSITIVE, NOT_NEGATIVE = _number(float, Range(0, above=True)), _number(float, Range(0))


def _add_option(group: Any, name: str, **changed: Any) -> None:
    """The flag of an option of the search."""
    item = OPTIONS[name]
    accepted, default = item.metadata["accepted"], None if name in OPEN else item.default
    words = {"help": help_of(item), "default": default, **item.metadata["shown"], **changed}
    if item.type == "bool":
        words["action"] = "store_true"
    elif isinstance(accepted, tuple):
        words["choices"] = accepted
    elif isinstance(accepted, Range):
        words["type"] = _number(int if "int" in str(item.type) else float, accepted)
    group.add_argument(FLAGS[name], **words)


def _add_mode_flags(parser: Parser) -> None:
    group = parser.add_argument_group("what to do; without any of these, search")
    group.add_argument("--eval", action="store_true", help="evaluate the model, compressed or dense")
    group.add_argument(
        "--finetune",
        nargs="?",
        type=_path,
        const=True,
        default=None,
        metavar="CHECKPOINT",
        help="train the weights at the given rates, from a checkpoint or from scratch",
    )
    group.add_argument(
        "--benchmark",
        nargs="*",
        type=_path,
        action=_Benchmark,
        metavar="KIND|FILE",
        help=f"time dense against compressed ({BENCHMARKS[0]}, the default), or {BENCHMARKS[1]}: a search step; "
        f"{BENCHMARKS[2]}: by the size of input and batch; {BENCHMARKS[3]}; {BENCHMARKS[4]}: of the parts of a block, "
        "which --target_speedup goes by; or files of --export, beside their model",
    )
    group.add_argument("--baseline", choices=BASELINES, help="evaluate a uniform schedule that meets the target")
    group.add_argument(
        "--sensitivity",
        nargs="?",
        type=COUNT,
        const=CALIBRATION,
        metavar="IMAGES",
        help=f"what each block can lose alone, on training images without their labels, default {CALIBRATION}",
    )
    group.add_argument(
        "--visualize", type=Path, nargs="+", metavar="IMAGE", help="draw which tokens merge and go, block by block"
    )
    group.add_argument(
        "--export",
        type=Path,
        metavar="PATH",
        help="write the model for another runtime: .onnx (onnxruntime), .pt2 (torch alone) or .xml (OpenVINO)",
    )
    group.add_argument(
        "--plot", type=Path, metavar="DIR", help="draw the plots of an output folder again, from its logs"
    )
    group.add_argument(
        "--list-models",
        nargs="?",
        type=lambda text: text or ALL_NAMES,
        const=ALL_NAMES,
        metavar="PATTERN",
        help="print the names that --model takes, all or those that match, such as 'vit_*dinov2*'",
    )


def _add_model_flags(parser: Parser) -> None:
    group = parser.add_argument_group("model and compression")
    group.add_argument(
        "--model",
        metavar="NAME",
        help="a published model (README: Reproduce the paper) such as vit_deit_small_patch16_224, any other ViT of "
        "timm with or without a pretrained tag, or hf-hub:USER/NAME; a file of --save as --checkpoint says it itself",
    )
    group.add_argument(
        "--checkpoint",
        type=_path,
        metavar="PATH_OR_URL",
        help=f"weights, or a file of --save; '{OFFICIAL}' are the published ones, which --eval takes on its own",
    )
    group.add_argument("--save", type=Path, metavar="PATH", help="leave the model, schedule included, in one file")
    group.add_argument(
        "--export-dtype", choices=EXPORTED_PRECISIONS, default="float32", help="precision of the weights in --export"
    )
    group.add_argument(
        "--export-normalize", action="store_true", help="let the file of --export take RGB in 0..1, and normalise it"
    )
    group.add_argument("--export-opset", type=COUNT, metavar="OPSET", help="of an .onnx file, from 18, the default")
    _add_option(group, "multi_label")
    group.add_argument("--dense", action="store_true", help="keep all tokens, whatever the checkpoint was trained at")
    group.add_argument(
        "--input-size",
        type=PIXELS,
        nargs="+",
        metavar="PIXELS",
        help="side of the input, or its rows and columns, default the model's own",
    )
    group.add_argument("--drop-path", type=DROPPED, default=0.1, metavar="RATE", help="stochastic depth in training")
    group.add_argument(
        "--load_compression_rate", action="store_true", help="compress at a schedule of the compression rate file"
    )
    group.add_argument(
        "--target_flops",
        type=_target,
        nargs="+",
        metavar="GFLOPS",
        help="schedule to load, or budgets to meet, as GFLOPs or as a share of the dense model's, such as 50%%",
    )
    group.add_argument(
        "--target_speedup",
        type=POSITIVE,
        nargs="+",
        metavar="TIMES",
        help="instead, how many times as fast as dense a search or a --baseline is to be, measured on this machine",
    )
    group.add_argument(
        "--target_latency", type=POSITIVE, nargs="+", metavar="SECONDS", help="or what an image is to take"
    )
    group.add_argument(
        "--latency_batch",
        type=COUNT,
        default=LATENCY_BATCH,
        metavar="IMAGES",
        help=f"at a time, where speed counts, default {LATENCY_BATCH}",
    )
    group.add_argument(
        "--latency_precision",
        choices=PRECISIONS,
        help="of weights there, default that of --amp, or float32; see --compile",
    )
    group.add_argument(
        "--latency_file",
        type=Path,
        metavar="FILE",
        help="that keeps what was measured, default one in the user's cache",
    )
    group.add_argument(
        "--scale_compression_rate",
        action="store_true",
        help="scale a schedule that was made for another number of tokens, as with --input-size",
    )
    group.add_argument(
        "--compression_rate_file",
        type=Path,
        metavar="PATH",
        help="schedules to load from, default compression_rate.json",
    )


def _add_data_flags(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-path", type=_path, metavar="DIR", help="folder of the data set; none: the digits that ship"
    )
    group.add_argument("--data-set", choices=DATA_SETS, help="IMNET is any ImageFolder layout; CIFAR is CIFAR-100")
    group.add_argument("--crop-pct", type=CROPPED, help="part of the short side that is seen")
    group.add_argument(
        "--batch-size",
        type=COUNT,
        nargs="+",
        dest="batch_sizes",
        metavar="IMAGES",
        help=f"images a step, on each process, default {DEFAULT_BATCH}, or fewer where training has fewer; "
        "--benchmark takes several sizes in turn",
    )
    group.add_argument("--num_workers", type=WHOLE, help="loader processes of each process, default one per core")
    group.add_argument(
        "--exif",
        action="store_true",
        help="turn images upright as their EXIF says, which published accuracies do not; --visualize always does",
    )
    group.add_argument(
        "--skip-unreadable",
        action="store_true",
        help="leave out files that cannot be read, and say which at the end; in training, the next image stands in",
    )
    group.add_argument(
        "--pin-mem", action=argparse.BooleanOptionalAction, default=True, help="pinned host memory on CUDA"
    )


def _add_run_flags(parser: Parser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", type=Path, metavar="DIR", help="where logs and checkpoints go")
    group.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda or cuda:N")
    group.add_argument("--amp", choices=PRECISIONS, help="mixed precision; default fp16 on CUDA, off on CPU")
    _add_option(group, "seed")
    group.add_argument("--print-freq", type=COUNT, default=10, metavar="STEPS", help="steps between log lines")
    group.add_argument("--blocks", type=WHOLE, nargs="+", help="blocks to draw with --visualize, counted from 0")
    group.add_argument("--quiet", action="store_true", help="no progress on the terminal: results and warnings alone")
    group.add_argument("--compile", action="store_true", help="run as one compiled graph; --benchmark times both")
    group.add_argument("--rounds", type=COUNT, default=ROUNDS, help="timed pairs of --benchmark")


def _add_search_flags(parser: Parser) -> None:
    group = parser.add_argument_group("search")
    changed: dict[str, dict[str, Any]] = {
        "epochs": {
            "help": f"default {SEARCH_EPOCHS} for a search, 30 for --finetune and more from scratch, "
            f"{SAMPLE_TUNING['epochs']} where it tunes the sample"
        },
        "granularity": {"type": COUNT, "default": GRANULARITY},
    }
    for name in FLAGS:
        if name not in ("seed", "multi_label"):
            _add_option(group, name, **changed.get(name, {}))
    group.add_argument(
        "--search_transform",
        choices=TRANSFORMS,
        help="images as in training (the paper, default of its models), or as in evaluation, mirrored by --hflip",
    )
    group.add_argument(
        "--init_compression_rate", type=_target, metavar="GFLOPS", help="start from this schedule of the rate file"
    )
    group.add_argument("--save_compression_rate", action="store_true", help="add the result to compression_rate.json")
    group.add_argument(
        "--resume",
        metavar="PATH|auto",
        help="go on from a checkpoint of a search or of --finetune; with --eval, score a searched schedule",
    )
    group.add_argument("--tensorboard", action="store_true", help="also log to TensorBoard in --output_dir")


def _add_training_flags(parser: Parser) -> None:
    group = parser.add_argument_group("training (--finetune)")
    group.add_argument("--opt", default="adamw", metavar="NAME", help="any optimizer of timm")
    group.add_argument(
        "--lr",
        type=POSITIVE,
        default=1e-5,
        help="learning rate for 512 images a step; the default goes by what is trained",
    )
    group.add_argument("--unscale-lr", action="store_true", help="take --lr as it is, whatever the batch size")
    group.add_argument(
        "--min-lr", type=NOT_NEGATIVE, default=1e-6, help="where the schedule ends, default 1e-6 or lower"
    )
    group.add_argument("--warmup-lr", type=NOT_NEGATIVE, default=1e-6, help="where the warm-up starts")
    group.add_argument("--warmup-epochs", type=WHOLE, help="default 5, or none in runs of up to 5 epochs")
    group.add_argument("--sched", choices=("cosine", "tanh", "step", "poly", "constant", "none"), default="cosine")
    group.add_argument("--weight-decay", type=NOT_NEGATIVE, default=0.05)
    group.add_argument("--momentum", type=FRACTION, default=0.9, help="for optimizers that have one")
    group.add_argument("--clip-grad", type=POSITIVE, metavar="NORM", help="clip the gradient's norm")
    group.add_argument("--model-ema", action="store_true", help="average the weights over steps, and save the average")
    group.add_argument("--model-ema-decay", type=FRACTION, default=0.99996)
    group.add_argument("--smoothing", type=FRACTION, default=SMOOTHING, help="label smoothing")
    group.add_argument(
        "--distill",
        nargs="?",
        type=FRACTION,
        const=DISTILL,
        metavar="WEIGHT",
        help="the dense model, with the weights to start from, as a teacher beside the labels: how much it counts, "
        f"{DISTILL} where nothing is said; 0 for none",
    )


def _add_augmentation_flags(parser: Parser) -> None:
    group = parser.add_argument_group("augmentation (training; of few images, --finetune has the mildest by default)")
    group.add_argument(
        "--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help="timm's AutoAugment policy, or none"
    )
    group.add_argument("--color-jitter", type=NOT_NEGATIVE, default=0.3)
    group.add_argument("--hflip", type=FRACTION, default=0.5, help="probability of a mirror image")
    group.add_argument(
        "--affine",
        type=float,
        nargs=3,
        metavar=("DEGREES", "SHIFT", "RESCALE"),
        help="random rotations, shifts and rescalings up to these, the last two as fractions",
    )
    group.add_argument("--train-interpolation", choices=("random", "bilinear", "bicubic"), default="bicubic")
    group.add_argument("--reprob", type=FRACTION, default=0.25, help="probability of random erasing")
    group.add_argument("--remode", choices=("const", "rand", "pixel"), default="pixel")
    group.add_argument("--recount", type=COUNT, default=1, help="erased areas")
    group.add_argument("--mixup", type=NOT_NEGATIVE, default=0.8, metavar="ALPHA")
    group.add_argument("--cutmix", type=NOT_NEGATIVE, default=1.0, metavar="ALPHA")
    group.add_argument("--mixup-prob", type=FRACTION, default=1.0)
    group.add_argument("--mixup-switch-prob", type=FRACTION, default=0.5, help="probability of cutmix when both are on")
    group.add_argument("--mixup-mode", choices=("batch", "pair", "elem"), default="batch")
    group.add_argument(
        "--repeated-aug", action=argparse.BooleanOptionalAction, default=True, help="three views an image"
    )
