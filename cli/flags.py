"""The command line: a parser of the flags that `cli/settings.py` declares, and the checks that need nothing else."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, replace
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from cli.settings import (
    COUNT,
    DEFAULT_BATCH,
    FILES,
    FROM_SCRATCH,
    LATENCY_BATCH,
    MODES,
    OF_IMAGES,
    OF_SEARCH,
    OF_TRAINING,
    OFFICIAL,
    SEARCH,
    Settings,
    benchmark_of,
    declared,
    dest_of,
    file_path,
    in_plain_digits,
    mode_of,
    settings_from,
)
from diffrate.budget import PEERS
from diffrate.files.header import ExportError, SavedModelError, about, check_destination, is_saved_model, target_of
from diffrate.hub import HUB, SOURCES
from diffrate.schedule import GRANULARITY
from diffrate.searching.settings import CALIBRATED, FLAGS, GRADIENT, OF_METHOD, Range, SearchSettings, flag_of, help_of
from sample import MODEL as SAMPLE_MODEL
from utils import UsageError

SEARCH_EPOCHS, TRAINING_EPOCHS = 3, 30
# What the model, or other flags, decide where nobody says.
OPEN = ("epochs", "method", "loss", "budget", "flops_loss", "flops_weight")
PENALTY = ("flops_loss", "flops_weight")
# What nothing but the gradient search looks at.
OF_GRADIENT = tuple(dest_of(FLAGS[name]) for name in OF_METHOD[GRADIENT] if name in FLAGS)
OF_GRADIENT += ("init_compression_rate", "search_transform")
SAVED = ".safetensors"
WEIGHTS = (".pth", ".pt", ".bin", ".ckpt", ".tar", SAVED, ".npz")  # how files of weights end
MOST = 2**31 - 1  # of what is counted
LARGEST = 1e30  # of rates and weights: some way beyond, updates leave float32
EXAMPLE = "such as vit_deit_small_patch16_224, timm's (--list-models), or a file that --save left as --checkpoint"
NAMES = re.compile(r'(?:@register_model\s+def |name=")(\w+)')  # of models, in the sources of timm and the zoo
CLOSE = 3  # names that a refusal suggests
POLICIES = ("", "none", "rand", "augmix", "original", "originalr", "v0", "v0r", "3a")  # of timm
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
MEETING = (SEARCH, "baseline")  # the modes that meet a target
# Flags of some modes alone, by their group, and which; a baseline takes the command of the search it stands beside.
MET, TRAINED = "a search and --baseline", "a search, --baseline and --finetune"
GROUPS = {OF_SEARCH: MET, OF_TRAINING: "--finetune", OF_IMAGES: TRAINED}
GOES_WITH = {  # those that their group does not say it of
    **dict.fromkeys(("epochs", "drop_path"), TRAINED),
    **dict.fromkeys(("init_compression_rate", "save_compression_rate"), MET),
    "rounds": "--benchmark",
    "amp": "a search, --eval, --finetune, --baseline, --benchmark, --sensitivity and --visualize",
    **dict.fromkeys(("target_speedup", "target_latency"), "a search or a --baseline"),
    "resume": "a search, --finetune, --eval or --visualize",
    "text_head": "a search, --eval, --finetune, --baseline, --benchmark, --sensitivity, --visualize and --export",
    "rule": "a search and --baseline prune, merge or both",
    "multi_label": "a search, --eval, --baseline and --sensitivity",
    "distill": "--finetune",
    **dict.fromkeys(("blocks", "attention"), "--visualize"),
    **dict.fromkeys(("export_normalize", "export_dtype", "export_opset"), "--export"),
    "save": "a search, --eval and --finetune",
}


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
        known = {flag.replace("_", "-"): flag for flag in self._option_string_actions}
        longer = [flag for plain, flag in known.items() if plain.startswith(dashed)]
        return known.get(dashed, longer[0] if len(longer) == 1 else name) + equals + value


def _number(kind: type[int] | type[float], accepted: Range) -> Callable[[str], int | float]:
    """An argparse type: a number that is accepted; where it may be any, up to what computes."""
    limits = replace(accepted, high=MOST if kind is int else LARGEST) if math.isinf(accepted.high) else accepted

    def convert(text: str) -> int | float:
        if not in_plain_digits(text):
            raise argparse.ArgumentTypeError(f"found {text}; accepted: {limits}, in plain digits")
        value = kind(text)
        if value not in limits:
            raise argparse.ArgumentTypeError(f"found {text}; accepted: {limits}")
        return value

    convert.__name__ = "whole number" if kind is int else "number"
    return convert


# What the library leaves to the command line.
CHANGED: dict[str, dict[str, Any]] = {
    "epochs": {
        "help": f"default {SEARCH_EPOCHS} for a search, {TRAINING_EPOCHS} for --finetune and more from scratch, "
        f"{SAMPLE_TUNING['epochs']} where it tunes the sample"
    },
    "granularity": {"type": _number(int, COUNT), "default": GRANULARITY},
}


def get_args_parser() -> Parser:
    """The parser of `main.py`."""
    parser = Parser(
        prog="main.py",
        description="DiffRate: compress the tokens of pretrained Vision Transformers.",
        epilog="Without --data-path, the digits that ship are the data and their small ViT the model.",
    )
    group: Any = parser
    for item in declared():
        words = {**_argument(item), **item.metadata["shown"], **CHANGED.get(item.name, {})}
        words.pop("becomes", None)
        if "group" in words:
            group = parser.add_argument_group(words.pop("group"))
        group.add_argument(flag_of(item), **words)
    return parser


def _argument(item: Field[Any]) -> dict[str, Any]:
    """What argparse is to know of a flag by the type, default and accepted values of its field."""
    accepted, kind = item.metadata["accepted"], str(item.type)
    words: dict[str, Any] = {"help": help_of(item), "default": None if item.name in OPEN else item.default}
    if "const" in item.metadata["shown"]:
        words["nargs"] = "?"
    elif kind.startswith("tuple"):
        words["nargs"] = kind.count(",") + 1 if accepted is float else "+"
    if kind == "bool":
        words["action"] = argparse.BooleanOptionalAction if item.default else "store_true"
        words["default"] = bool(item.default)
    elif isinstance(accepted, tuple):
        words["choices"] = accepted
    elif isinstance(accepted, Range):
        words["type"] = _number(int if "int" in kind else float, accepted)
    elif accepted or "Path" in kind:
        words["type"] = accepted or file_path
    return words


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
    args.model, mode = model, mode_of(args)
    _check_modes(args, mode, parser)
    _fill(args, parser)
    _check_numbers(args, mode)
    _check_targets(args, mode)
    _check_combinations(args, mode)
    _check_files(args)
    return settings_from(args, words)


def check_paths(settings: Settings) -> None:
    """Refuse files that are not there, and models that nobody has, before torch is imported, which takes seconds.

    Raises:
        UsageError: names the flag.
    """
    checkpoint, data, run = settings.model.checkpoint, settings.data.path, settings.run
    name = settings.model.name or ""
    named = not is_saved_model(checkpoint)  # which says the name, and any
    if named and (Path(name).is_file() or (Path(name).suffix in WEIGHTS and not Path(name).is_dir())):
        raise UsageError(
            f"--model {name}: a file of weights is given as --checkpoint {name}; accepted: the model's name "
            "(--list-models), or no --model where --save left the file"
        )
    if named and name:
        _check_name(name)
    _check_checkpoint(checkpoint)
    for flag, folder in (("--data-path", data), ("--plot", run.folder)):
        if folder is not None and not Path(folder).is_dir():
            raise UsageError(f"{flag} {folder}: no such folder")
    if (texts := settings.model.text_head) is not None and not texts.is_file():
        raise UsageError(f"--text-head {texts}: no such file")
    for path in run.timed if run.benchmark == FILES else ():
        if not Path(path).exists():
            raise UsageError(f"{path}: found no such file; accepted: an exported file")
    resumed = [("--resume", run.resume)] if run.resume not in (None, "auto") else []
    for named, path in [*(("image", path) for path in run.images), *resumed]:
        if not Path(path).exists():
            raise UsageError(f"{named} {path}: cannot be read (no such file); accepted: a file that is there")


def _check_checkpoint(name: str) -> None:
    """Refuse a file that is not there."""
    elsewhere = name in (OFFICIAL, FROM_SCRATCH) or name.startswith(("http://", "https://"))
    if not elsewhere and not Path(name).is_file():
        raise UsageError(f"checkpoint {name}: no such file")


def _check_name(name: str) -> None:
    """Refuse a name that is nowhere in the sources of timm and the zoo, which are read, not imported."""
    if name.startswith(SOURCES) or Path(name).is_dir():
        return
    listed = "the names of --list-models"
    if "/" in name:
        raise UsageError(f"--model {name}: unknown model; accepted: {HUB}{name} for a repository, or {listed}")
    timm = find_spec("timm")
    folders = [Path(place, "models") for place in (timm and timm.submodule_search_locations) or ()]
    files = [Path(__file__).parent.parent / "models" / "zoo.py", *(file for at in folders for file in at.glob("*.py"))]
    text = "\n".join(file.read_text() for file in files)
    architecture = name.partition(".")[0].replace("-", "_")
    if architecture == SAMPLE_MODEL or re.search(rf"\b{re.escape(architecture)}\b", text):
        return
    close = get_close_matches(architecture, {SAMPLE_MODEL, *NAMES.findall(text)}, CLOSE)
    nearest = f"nearest: {', '.join(close)}; " if close else ""
    raise UsageError(f"--model {name}: unknown model; {nearest}accepted: {listed}")


def _model_name(args: argparse.Namespace) -> str | None:
    """What `--model` says, or the file of `--save` that is given as the checkpoint, or the sample's."""
    if args.model is not None:
        return args.model
    checkpoint, reason = args.checkpoint or "", ""
    if checkpoint and is_saved_model(checkpoint):
        saved = about(checkpoint)
        return saved.name or saved.architecture
    if benchmark_of(args.benchmark) == FILES:
        return None  # the files say it
    if args.data_path is None and args.data_set in (None, "SAMPLE"):
        return SAMPLE_MODEL
    if checkpoint:
        _check_checkpoint(checkpoint)
    if "://" not in checkpoint and Path(checkpoint).suffix == SAVED:
        try:
            about(checkpoint)
        except SavedModelError as error:
            reason = f" where --checkpoint does not say it ({error})"
    raise UsageError(f"--model is needed with --data-path{reason}; accepted: a model's name, {EXAMPLE}")


def _fill(args: argparse.Namespace, parser: Parser) -> None:
    """What some flags say of others, and the defaults of a mode; what is left open, the model decides."""
    mode = mode_of(args)
    args.data_set = args.data_set or ("SAMPLE" if args.data_path is None else "IMNET")
    args.checkpoint = args.checkpoint or (FROM_SCRATCH if args.finetune else OFFICIAL)
    args.distill = args.distill or None
    changed = [name for name in OF_GRADIENT if getattr(args, name) != parser.get_default(name)]
    if mode == SEARCH and changed and args.search == CALIBRATED:
        raise UsageError(f"--{changed[0]} goes with --search {GRADIENT}; accepted: without it, or that search")
    if args.search is None and (changed or args.search_loss == SearchSettings.loss):
        args.search = GRADIENT
    given = [name for name in PENALTY if getattr(args, name) is not None]
    given += ["warmup_compression_rate"] if args.warmup_compression_rate else []
    if given and args.budget == "held":
        raise UsageError(f"--{given[0]} goes with a penalty; accepted: --budget penalty, or none of both")
    args.budget = "penalty" if given else args.budget
    own = SAMPLE_COST if args.model == SAMPLE_MODEL else {}
    usual = {name: own.get(name, getattr(SearchSettings, name)) for name in PENALTY}
    usual["arch_min_lr"] = SearchSettings(learning_rate=args.arch_lr).last_rate
    usual["epochs"] = SEARCH_EPOCHS if mode == SEARCH else TRAINING_EPOCHS
    usual["output_dir"] = Path("output") if mode in (SEARCH, "visualize", "sensitivity") else None
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def _check_modes(args: argparse.Namespace, mode: str, parser: Parser) -> None:
    """The flags that go with some modes alone."""
    group = None
    for item in declared():
        flag, shown = flag_of(item), item.metadata["shown"]
        name, group = shown.get("dest") or dest_of(flag), shown.get("group", group)
        value = getattr(args, name)
        modes = GOES_WITH.get(name, GROUPS.get(group))
        if modes and value is not None and value != parser.get_default(name) and mode not in modes:
            raise UsageError(f"{flag} goes with {modes}")
    if args.rule is not None and args.baseline in ("random", *PEERS):
        raise UsageError(f"--rule goes with {GOES_WITH['rule']}; --baseline {args.baseline} has its own")
    if args.load_compression_rate and mode in (*MEETING, "sensitivity"):
        raise UsageError("--load_compression_rate goes with --eval, --finetune, --visualize, --export and --benchmark")


def _check_numbers(args: argparse.Namespace, mode: str) -> None:
    if args.input_size is not None and len(args.input_size) > 2:
        raise UsageError(f"--input-size: found {len(args.input_size)} numbers; accepted: a side, or rows and columns")
    sizes = args.batch_sizes or [DEFAULT_BATCH]
    if len(sizes) > 1 and benchmark_of(args.benchmark) not in ("eval", "scaling", FILES):
        raise UsageError(f"--batch-size: found {len(sizes)} sizes; accepted: one, or --benchmark")
    if args.warmup_epochs is not None and args.warmup_epochs >= args.epochs > 0:
        raise UsageError(f"--warmup-epochs {args.warmup_epochs}: accepted: less than --epochs {args.epochs}")
    # A search may mix nothing, whatever the flags say: `cli/search.py`.
    if mode == "finetune" and (args.mixup > 0 or args.cutmix > 0) and sizes[0] % 2:
        raise UsageError(f"--batch-size {sizes[0]}: accepted: an even number with --mixup or --cutmix")
    if args.affine is not None:
        degrees, shift, rescale = args.affine
        if not (0 <= degrees <= 180 and 0 <= shift <= 1 and 0 <= rescale < 1):
            raise UsageError(f"--affine {degrees} {shift} {rescale}: accepted: 0 to 180, 0 to 1, 0 to below 1")
    policy, *sections = args.aa.split("-")
    if policy not in POLICIES:
        raise UsageError(f"--aa {args.aa}: Unknown AA policy {policy}; accepted: a policy of timm, or none")
    for section in sections if policy == "rand" else ():  # timm passes over sections without a number
        if not section.startswith("t") and not re.fullmatch(r"[a-z]+\d+(\.\d*)?", section, re.ASCII):
            raise UsageError(f"--aa {args.aa}: found {section!r}; accepted: a name and a number")
    if args.smoothing == 1:
        raise UsageError("--smoothing 1: accepted: from 0 to below 1")
    if args.arch_min_lr > args.arch_lr:
        raise UsageError(f"--arch-min-lr {args.arch_min_lr:g}: accepted: up to --arch-lr {args.arch_lr:g}")


def _check_targets(args: argparse.Namespace, mode: str) -> None:
    """The flags that say which schedule, or what it is to meet."""
    names = ("target_flops", "target_speedup", "target_latency")
    targets = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if len(targets) > 1:
        raise UsageError(f"{', '.join(f'--{name}' for name in names)}: found several; accepted: one of them")
    idle = [name for name in ("latency_precision", "latency_file") if getattr(args, name) is not None]
    idle = ["latency_batch"] * (args.latency_batch != LATENCY_BATCH) + idle
    latency = benchmark_of(args.benchmark) == "latency"
    if idle and not latency and not targets.keys() - {"target_flops"}:
        raise UsageError(f"--{idle[0]} goes with --target_speedup, --target_latency and --benchmark latency")
    both = [("amp", args.amp, "latency_precision", args.latency_precision)]
    if args.batch_sizes and args.latency_batch != LATENCY_BATCH:
        both.append(("batch-size", args.batch_sizes[0], "latency_batch", args.latency_batch))
    for first, one, second, other in both if latency else ():  # where both say what to measure
        if None not in (one, other) and one != other:
            raise UsageError(f"--{first} {one} --{second} {other}: found two values; accepted: one of the flags")
    if args.target_flops is not None and mode not in MEETING:
        if not args.load_compression_rate:
            raise UsageError("--target_flops needs --load_compression_rate, a search or a --baseline")
        if len(args.target_flops) > 1:
            raise UsageError(f"--target_flops: found {len(args.target_flops)} targets; accepted: one, or a search")
    for name, values in targets.items():
        if len(set(values)) < len(values):
            found = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
            raise UsageError(f"--{name} {found}: accepted: each once")
    if mode in MEETING and not targets and args.model != SAMPLE_MODEL:
        raise UsageError(
            "--target_flops is needed: the GFLOPs that the schedule is to meet, or a share such as 50%; or "
            "--target_speedup or --target_latency"
        )


def _check_combinations(args: argparse.Namespace, mode: str) -> None:
    """Flags that other flags need or exclude."""
    loads, starts = args.load_compression_rate, args.init_compression_rate is not None
    if args.compression_rate_file and not loads and not starts:
        raise UsageError("--compression_rate_file needs --load_compression_rate or --init_compression_rate")
    if args.scale_compression_rate and mode in MEETING and not starts:
        raise UsageError("--scale_compression_rate goes with a schedule to load; a search or --baseline has none")
    if args.dense and (loads or mode in MEETING):
        raise UsageError("--dense keeps all tokens; accepted: no --load_compression_rate, search or --baseline")
    kind = benchmark_of(args.benchmark)
    if kind in ("search", "scaling", "latency") and loads:
        raise UsageError(f"--benchmark {kind} has schedules of its own; accepted: no --load_compression_rate")
    if args.resume and mode in ("eval", "visualize") and (loads or args.dense):
        other = "--dense" if args.dense else "--load_compression_rate"
        raise UsageError(f"--resume and {other} name two schedules; accepted: one of them")
    if args.distill and args.checkpoint == FROM_SCRATCH:
        raise UsageError("--distill needs weights to start from; accepted: --finetune CHECKPOINT, such as official")
    if args.text_head and mode == "finetune" and args.checkpoint == FROM_SCRATCH:
        raise UsageError(f"--text-head {args.text_head} needs weights to start from; accepted: --finetune official")
    timed = args.target_speedup is not None or args.target_latency is not None
    compiles = mode in ("eval", "finetune") or timed or kind in ("eval", "loading", "latency", FILES)
    if args.compile and not compiles:
        raise UsageError("--compile goes with --eval, --finetune and --benchmark, or a target in seconds")


def _check_files(args: argparse.Namespace) -> None:
    """The files to export to, to time, and to leave."""
    try:
        flag = "--export"
        if args.export is not None:
            check_destination(args.export, args.export_dtype, args.export_opset)
        flag = "--benchmark"
        for name in args.benchmark if benchmark_of(args.benchmark) == FILES else ():
            target_of(Path(name))
    except ExportError as error:
        raise UsageError(f"{flag} {error}") from error
    save, targets = args.save, args.target_flops or args.target_speedup or args.target_latency or ()
    if save is None:
        return
    if len(targets) > 1:
        raise UsageError(f"--save: found {len(targets)} targets; accepted: one")
    if save.suffix != SAVED:
        raise UsageError(f"--save {save}: accepted: a name that ends in {SAVED}")
    if not save.parent.is_dir():
        raise UsageError(f"--save {save}: no folder {save.parent}")
    if save.is_dir():
        raise UsageError(f"--save {save}: found a folder; accepted: the name of a file")
