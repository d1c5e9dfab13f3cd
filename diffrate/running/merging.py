"""`diffrate.compile_merging`: merging as one call of compiled code instead of some thirty of torch's.

With few images most of what merging takes is asking for operations, not computing. The function that runs in eager
mode is compiled ahead of time by torch, for any number of images, tokens, kept tokens and channels. All blocks, and all
models with the same rules, share that, and it is kept on disk. Pruning alone has too few operations to gain.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

from diffrate import blocks
from diffrate.blocks.block import kept_and_merged
from diffrate.blocks.forms import UnsupportedModelError
from diffrate.blocks.rules import ReductionRules
from diffrate.blocks.tokens import TokenState, size_dtype
from diffrate.budgets.schedule import Kept
from diffrate.files import cache_folder, first_line
from diffrate.patch.base import CompressedModel
from diffrate.running.machine import machine_name
from diffrate.running.precision import place_of
from diffrate.running.quiet import errors_alone

FEW_ELEMENTS = 2**21  # of features: with more, operations take so long that asking for them does not matter
# What the graph is traced with; it runs with any. All differ, or torch would take two for the same.
IMAGES, OTHERS, STAYING, LEAVING, CHANNELS = 2, 31, 13, 7, 64

Run = Callable[[list[Tensor]], list[Tensor]]


class MergingCompileError(RuntimeError):
    """Merging cannot be compiled on this machine; one line."""


@dataclass(frozen=True)
class CompiledMerging:
    """Prunes and merges the tokens of a few images on a CPU, where no gradient is asked for and none is followed.

    It is compiled when it is first needed, which takes some ten seconds unless it is on disk.
    """

    def __call__(self, rules: ReductionRules, state: TokenState, importance: Tensor, kept: Kept) -> TokenState | None:
        """The tokens that are left; None for those that it is not for.

        Raises:
            MergingCompileError: there is no compiler that works.
        """
        if kept.merged == kept.pruned or kept.merged <= rules.spared or not _takes(state):
            return None
        # Few operations, here above all: with the caches full of a model's weights, each takes microseconds.
        x, size, place = state.x, state.size, state.place
        run = merging_of(
            *(x.dtype, importance.dtype, place is not None),
            *(rules.prefix, rules.spared, rules.weigh_by_similarity),
        )
        if size is None:
            size = importance.new_ones(x.shape[:2])
        counts = torch.empty(kept.merged, kept.pruned - kept.merged)
        inputs = [x.contiguous(), size.contiguous(), importance.contiguous(), counts]
        if place is not None:
            inputs.append(place.expand(x.shape[0], -1).contiguous())
        return TokenState(*run(inputs)[:2]) if place is None else _placed(*run(inputs))


def compile_merging(model: CompressedModel) -> CompressedModel:
    """`model`, which from here on merges tokens by compiled code where that is faster: on a CPU, a few images at a
    time, without gradients. Results are the same but for rounding.

    torch's own compiler needs a C++ compiler on the machine. Each precision is compiled when it is first needed, in
    some ten seconds, and kept in the user's cache.

    Raises:
        UnsupportedModelError: the model is not patched.
    """
    if not isinstance(model, CompressedModel):
        raise UnsupportedModelError(f"found {type(model).__name__}; accepted: a model after diffrate.patch.vit(model)")
    model.rules = replace(model.rules, compiled=CompiledMerging())
    return model


def ready(model: CompressedModel) -> None:
    """Compile or load now what `model` merges with in its present precision, if it is to: before its time is taken.

    Raises:
        MergingCompileError: there is no compiler that works.
    """
    device, dtype = place_of(model)
    if model.rules.compiled is None or device.type != "cpu":
        return
    with torch.no_grad():
        state = model.enter(torch.zeros(1, getattr(model, "in_chans", 3), *model.image_size, dtype=dtype)).state
    rules = model.rules
    merging_of(
        *(state.x.dtype, size_dtype(state.x), state.place is not None),
        *(rules.prefix, rules.spared, rules.weigh_by_similarity),
    )


def _takes(state: TokenState) -> bool:
    """Whether compiled code is for these tokens, and faster."""
    x = state.x
    if x.device.type != "cpu" or x.numel() > FEW_ELEMENTS or state.origin is not None or state.mask is not None:
        return False
    return not (x.requires_grad and torch.is_grad_enabled()) and not torch.compiler.is_compiling()


def _placed(features: Tensor, sizes: Tensor, place: Tensor) -> TokenState:
    return TokenState(features, sizes, place=place)


@cache
def merging_of(
    dtype: torch.dtype, precise: torch.dtype, placed: bool, prefix: int, spared: int, weigh_by_similarity: bool
) -> Run:
    """The compiled graph, from disk or made now: of features in `dtype`, importance and sizes in `precise`, with
    `placed` of tokens that have a place, in a family whose rules say the rest.

    Raises:
        MergingCompileError: there is no compiler that works.
    """
    rules = ReductionRules(prefix, 0, spared, weigh_by_similarity)
    example = _example(rules, dtype, precise, placed)
    folder = cache_folder("merging")
    with tempfile.TemporaryDirectory(dir=folder) as scratch, errors_alone("torch"):
        made = Path(scratch) / "merging.pt2"
        kept = made if folder is None else folder / f"{_name(rules, example)}.pt2"
        if not kept.exists():
            _compile(rules, example, made)
            made.replace(kept)
        # The loader itself: what wraps it looks up at each call how to flatten its arguments.
        return torch._inductor.aoti_load_package(str(kept)).loader.boxed_run


class _Merging(nn.Module):
    """Pruning and merging of tensors alone: the numbers of tokens that are kept, and that join them, are the shape of
    `counts` `[K, S]`, since compiled graphs take no integers."""

    def __init__(self, rules: ReductionRules) -> None:
        super().__init__()
        self.rules = rules

    def forward(
        self, x: Tensor, size: Tensor, importance: Tensor, counts: Tensor, place: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Features, sizes, and places where there are any."""
        stay, leave = counts.shape
        kept = Kept(x.shape[1], stay + leave, stay)
        left = kept_and_merged(self.rules, TokenState(x, size, place=place), importance, kept)
        assert left.size is not None
        return (left.x, left.size) if left.place is None else (left.x, left.size, left.place)


def _example(rules: ReductionRules, dtype: torch.dtype, precise: torch.dtype, placed: bool) -> tuple[Tensor, ...]:
    tokens = rules.prefix + OTHERS
    x = torch.zeros(IMAGES, tokens, CHANNELS, dtype=dtype)
    size, importance = torch.ones(IMAGES, tokens, dtype=precise), torch.zeros(IMAGES, OTHERS, dtype=precise)
    counts = torch.empty(rules.spared + STAYING, LEAVING)
    place = torch.arange(tokens).expand(IMAGES, -1).contiguous()
    return (x, size, importance, counts, place) if placed else (x, size, importance, counts)


def _compile(rules: ReductionRules, example: tuple[Tensor, ...], path: Path) -> None:
    shapes = tuple(dict.fromkeys(range(one.ndim), Dim.DYNAMIC) for one in example)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, at its own code
            program = torch.export.export(_Merging(rules), example, dynamic_shapes=shapes)
            # One small graph, for which a pool of compiling processes would only have to start.
            alone = {"compile_threads": 1}
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=alone)
    except Exception as error:  # torch has a class for each thing that goes wrong, and compilers have more
        raise MergingCompileError(
            f"compile_merging: {first_line(error)}; accepted: with a C++ compiler that works"
        ) from error


def _name(rules: ReductionRules, example: tuple[Tensor, ...]) -> str:
    """Of the file: another one for other code, another torch and another machine."""
    compiler = torch.__version__, machine_name(torch.device("cpu")), os.environ.get("CXX")
    said = rules, [(one.dtype, one.shape) for one in example], compiler
    sources = [Path(__file__), *sorted(Path(blocks.__file__).parent.glob("*.py"))]
    content = b"".join(source.read_bytes() for source in sources)
    return hashlib.sha256(repr(said).encode() + content).hexdigest()[:16]
