"""The options of a search, each declared once: name, type, default, accepted values, help. No torch here.

The command line's flags, the keywords of `diffrate.search`, their check, the record in checkpoints and the comparison
with it all follow from the fields of `SearchSettings`. The command line declares its other flags by `option`, too.
"""

# ruff: noqa: RUF009  (`option` gives a field)
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, SupportsIndex

from diffrate.budget import FLOPS, LATENCY, SHARE, SPEEDUP, BudgetError, Target
from diffrate.schedule import RULE_NAMES, SLICED

if TYPE_CHECKING:  # what takes its time to import
    import torch

    from diffrate.latency.table import LatencyTable
    from diffrate.schedule import Schedule

TARGETS = (FLOPS, SHARE, SPEEDUP, LATENCY)
GRADIENT, CALIBRATED = METHODS = ("gradient", "calibrated")
SMOOTHING = 0.1  # of labels, as in DeiT's recipe
TELLING = "a model, and a loss, that tell schedules apart"


class SearchSettingError(ValueError):
    """A setting of a search that makes no sense."""


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, or above `low` and below `high` where it says so."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: Any) -> bool:
        try:
            over = self.low < value if self.above else self.low <= value
            under = value < self.high if self.below or math.isinf(self.high) else value <= self.high
        except TypeError:
            return False
        return bool(over and under)

    def __str__(self) -> str:
        upper = "" if math.isinf(self.high) else f" to {'below ' if self.below else ''}{self.high:.10g}"
        return f"{'above' if self.above else 'from'} {self.low:g}{upper}"


def option(default: Any, help: str, accepted: Any = None, flag: str | None = "", **shown: Any) -> Any:
    """A field that is an option of a search.

    accepted: a `Range`, a tuple of words, or the name of a class; None for whatever its use accepts. flag: how the
    command line spells it, by default like the field, and what its help calls the value; None for no flag. shown: more
    for argparse; and `saved`: whether a run goes on with the same value alone, by default of those with a flag.
    """
    saved = shown.pop("saved", flag is not None)
    flag, *values = flag.split() if flag else [flag]
    if values:
        shown["metavar"] = values[0] if len(values) == 1 else tuple(values)
    known = {"help": help, "accepted": accepted, "flag": flag, "saved": saved, "shown": shown}
    return field(default=default, metadata=known)


def keyword(help: str, default: Any = None, accepted: Any = None) -> Any:
    """An option that the command line has no flag for."""
    return option(default, help, accepted, flag=None)


POSITIVE = Range(0, above=True)


@dataclass(frozen=True)
class SearchSettings:
    """What the user chooses of a search (paper, section 4.1). What each option is, its `help` says."""

    target_flops: float | None = keyword("the budget in multiply-accumulates of an image")
    share: float | None = keyword("or as a share of those of the dense model")
    target_speedup: float | None = keyword("or how many times as fast as dense")
    target_latency: float | None = keyword("or seconds of an image")
    latency: LatencyTable | None = keyword(
        "what schedules take, of `measure_latency`, for the batch size, precision and mode that a speed is asked for; "
        "by default measured with its defaults",
        accepted="LatencyTable",
    )
    epochs: int = option(1, "times that the images are gone through", Range(1))
    learning_rate: float = option(0.01, "learning rate of the rates, at the start", POSITIVE, "--arch-lr")
    least_learning_rate: float | None = option(
        None, "and in the last step, default a tenth of that", Range(0), "--arch-min-lr"
    )
    granularity: int | None = option(None, "tokens between the candidates of a count")
    method: str = option(
        GRADIENT,
        "learn rates by gradient (the paper, default of its models and beside flags of its own), or try schedules at "
        "hard counts on calibration images (default of all others)",
        METHODS,
        "--search",
        saved=False,
    )
    minutes: float | None = option(None, "end the search within this time, about", POSITIVE, "--minutes M", saved=False)
    loss: str = option(
        "labels",
        "hold the compressed model against labels (the paper, default of its models); the dense model's outputs, "
        "default of all others; or its features of every patch: the last two need no labels, and take any folder of "
        "images",
        ("labels", "distill", "tokens"),
        "--search_loss",
    )
    rule: str | None = option(
        None,
        "which tokens merge into which, in all blocks; default published, as in the paper, but by --search calibrated "
        "what is best in each block (not for the paper's models)",
        tuple(name for name in RULE_NAMES if name != SLICED),
    )
    budget: str = option(
        "penalty",
        "the cost is a penalty in the loss (the paper, default of its models; so are --flops_loss, --flops_weight "
        "and --warmup_compression_rate), or held on its target",
        ("penalty", "held"),
    )
    flops_loss: str = option(
        "absolute",
        "the penalty in GFLOPs (paper), or as a share of the target; default {default}",
        ("absolute", "relative"),
        "--flops_loss",
    )
    flops_weight: float = option(
        5.0, "weight of the penalty in the loss, default {default:g}", Range(0), "--flops_weight"
    )
    warmup: bool = option(False, "no cost in the first epoch's loss", flag="--warmup_compression_rate")
    accumulate: int = option(1, "batches an update", Range(1), "--accum-steps")
    seed: int = option(0, "of weights, order and augmentation", Range(0, 2**32 - 1))
    multi_label: bool = option(
        False,
        "outputs stand for labels of their own, by a sigmoid each: losses are binary cross-entropies, and scores "
        "mean average precisions",
    )
    steps: int | None = keyword("updates an epoch, where the loader has no length, or fewer", None, Range(1))
    calibration: Iterable[Any] | None = keyword("what hard counts are tried on, by default `loader`")
    images: int = keyword("of these, at most", 4096, Range(2))
    work: float | None = keyword(
        "of a search at hard counts, in forward passes of the dense model on an image; by default 22,000, or fewer "
        "where there are few images",
        accepted=POSITIVE,
    )
    criterion: Callable[[Any, Any], Any] | None = keyword(
        "loss of logits `[B, K]` against labels; by default cross-entropy with labels smoothed by 0.1, and with "
        "`multi_label` binary cross-entropy. A head with one output has no default",
    )
    mixup: Callable[[Any, Any], tuple[Any, Any]] | None = keyword(
        "mixes images and labels of a batch, such as timm's `Mixup`; by default nothing does"
    )
    start: Schedule | None = keyword("schedule to begin at; by default all candidates alike", accepted="Schedule")
    start_spread: float | None = keyword(
        "how wide the candidates around `start` are in play, a deviation as a share of the patches; by default as wide "
        "as the counts of `start` allow",
        accepted=POSITIVE,
    )
    device: torch.device | str | None = keyword("where to search and leave the model; by default where it is")
    precision: torch.dtype | None = keyword("of autocast; by default float16 on a GPU and none elsewhere")
    trials: Any = keyword("a `CalibrationObserver`, told how a search at hard counts goes on")
    save_every: int = keyword("steps between checkpoints", 10, Range(1))
    notes: Mapping[str, Any] | None = keyword(
        "plain values and tensors that go into the checkpoint beside the search's own"
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            value, accepted = getattr(self, item.name), item.metadata["accepted"]
            if accepted is None or (value is None and item.default is None):
                continue
            found, words = repr(value), str(accepted)
            if isinstance(accepted, str):
                found, words = type(value).__name__, f"a {accepted}"
                fine = accepted in {kind.__name__ for kind in type(value).__mro__}
            else:
                fine = value in accepted
                if fine and item.type in ("int", "int | None") and not isinstance(value, SupportsIndex):
                    fine, words = False, f"a whole number {words}"
            if isinstance(accepted, tuple):
                words = (" or " if len(accepted) == 2 else ", ").join(accepted)
            if not fine:
                words += ", or none" if item.default is None else ""
                raise SearchSettingError(f"{item.name}: found {found}; accepted: {words}")
        least = self.least_learning_rate
        if least is not None and least > self.learning_rate:
            raise SearchSettingError(f"least_learning_rate: found {least!r}; accepted: 0 to learning_rate")
        if self.warmup and self.held:
            raise SearchSettingError("warmup: found True; accepted: False where the budget is held")
        if self.criterion is not None and not self.labelled:
            raise SearchSettingError(
                f"criterion: found one with the loss {self.loss!r}; accepted: none, or the loss 'labels'"
            )

    @property
    def held(self) -> bool:
        """Whether a multiplier holds the cost on its target."""
        return self.budget == "held"

    @property
    def labelled(self) -> bool:
        """Whether the search itself looks at labels."""
        return self.loss == "labels"

    @property
    def last_rate(self) -> float:
        """The learning rate of the last step: a tenth of the first, where nobody says."""
        return self.learning_rate / 10 if self.least_learning_rate is None else self.least_learning_rate

    @property
    def target(self) -> Target:
        """The one target to meet; SearchSettingError where there are several or none, or it makes no sense."""
        given = {name: getattr(self, name) for name in TARGETS if getattr(self, name) is not None}
        if len(given) != 1:
            found = ", ".join(given) or "none"
            raise SearchSettingError(f"{', '.join(TARGETS)}: found {found}; accepted: one of them")
        try:
            return Target(*next(iter(given.items())))
        except BudgetError as error:
            raise SearchSettingError(str(error)) from None

    def record(self) -> dict[str, Any]:
        """The values with which alone a search goes on, for its checkpoint."""
        kept = {item.name: getattr(self, item.name) for item in fields(self) if item.metadata["saved"]}
        return kept | {"least_learning_rate": self.last_rate}


OPTIONS: Mapping[str, Field[Any]] = {item.name: item for item in fields(SearchSettings)}
# What one method alone looks at.
OF_METHOD: Mapping[str, tuple[str, ...]] = {
    GRADIENT: (
        *("epochs", "learning_rate", "least_learning_rate", "budget", "flops_loss", "flops_weight", "warmup"),
        *("accumulate", "steps", "criterion", "mixup", "start_spread", "save_every", "callback"),
    ),
    CALIBRATED: ("calibration", "images", "work", "trials"),
}


def flag_of(item: Field[Any]) -> str:
    """How the command line spells an option."""
    return item.metadata["flag"] or f"--{item.name.replace('_', '-')}"


# Of the options that the command line has.
FLAGS = {name: flag_of(item) for name, item in OPTIONS.items() if item.metadata["flag"] is not None}


def help_of(item: Field[Any]) -> str:
    """What an option is, for people."""
    return item.metadata["help"].format(default=item.default)
