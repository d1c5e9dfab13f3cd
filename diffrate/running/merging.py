"""`diffrate.compile_merging`: merging as one call of compiled code instead of some thirty of torch's.

With few images most of what merging takes is asking for operations, not computing. Pruning alone has too few of them
to gain. What is compiled, and how it is kept, stands in `merging_code.py`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from diffrate.blocks.rules import ReductionRules
from diffrate.blocks.tokens import TokenState, in_graph
from diffrate.budgets.schedule import Kept, Schedule, running_counts
from diffrate.patch.base import CompressedModel, require_patched
from diffrate.patch.sizes import input_size
from diffrate.running.merging_code import Kind, merging_of
from diffrate.running.precision import place_of

FOLLOWED = ("place", "origin", "last")  # what may be known of tokens


def merged_by_code(rules: ReductionRules, state: TokenState, importance: Tensor, kept: Kept) -> TokenState | None:
    """The tokens that are left by `importance` `[B, N - prefix]`, pruned and merged by compiled code; None for those
    that it is not for: it merges on a CPU, where no gradient is asked for.

    It is compiled when it is first needed, which takes some ten seconds unless it is on disk.

    Raises:
        MergingCompileError: there is no compiler that works.
    """
    if kept.merged == kept.pruned or kept.merged <= rules.spared or not _takes(state):
        return None
    # Few operations, here above all: with the caches full of a model's weights, each takes microseconds.
    x, sizes, kind = state.x, state.sizes(), kind_of(rules, state)
    counts = torch.empty(kept.merged, kept.pruned - kept.merged, device=x.device)
    inputs = [x.contiguous(), sizes.contiguous(), importance.to(sizes.dtype).contiguous(), counts]
    for name in kind.followed:
        known = getattr(state, name)
        inputs.append(known.expand(x.shape[0], *known.shape[1:]).contiguous())
    features, merged, *others = merging_of(kind)(inputs)
    return TokenState(features, merged, **dict(zip(kind.followed, others, strict=True)))


def compile_merging(model: CompressedModel) -> CompressedModel:
    """`model`, which from here on merges tokens by compiled code on a CPU, where no gradients are asked for.

    Results are the same but for rounding. With few images it is faster, and with many about as fast. torch's own
    compiler needs a C++ compiler on the machine. Each precision is compiled by the first forward pass in it, in some
    ten seconds, and kept in the user's cache; where that fails, the forward pass raises `MergingCompileError`.

    Raises:
        UnsupportedModelError: the model is not patched.
    """
    require_patched(model)
    model.rules = replace(model.rules, compiled=merged_by_code)
    return model


def merges_compiled(model: CompressedModel, device: torch.device) -> bool:
    """Whether `model` would merge by compiled code on `device`."""
    return model.rules.compiled is not None and device.type == "cpu"


def ready(model: CompressedModel, schedule: Schedule) -> None:
    """Compile or load now what `model` merges with at `schedule` in its present precision, if it is to: before its time
    is taken.

    Raises:
        MergingCompileError: there is no compiler that works.
    """
    device, dtype = place_of(model)
    if not merges_compiled(model, device):
        return
    if all(kept.merged == kept.pruned for kept in running_counts(schedule, model.compression.space.limits[0])):
        return
    with torch.no_grad():
        entry = model.enter(torch.zeros(1, *input_size(model), dtype=dtype, device=device))
    merging_of(kind_of(model.rules, model.prepared(entry.state, schedule)))


def kind_of(rules: ReductionRules, state: TokenState) -> Kind:
    """What merges these tokens."""
    followed = tuple(name for name in FOLLOWED if getattr(state, name) is not None)
    return Kind(state.x.dtype, followed, rules.prefix, rules.spared, rules.weigh_by_similarity, torch.get_num_threads())


def _takes(state: TokenState) -> bool:
    """Whether compiled code is for these tokens: not where operations are followed, to learn or to make a graph."""
    x = state.x
    if in_graph() or type(x) is not Tensor:
        return False
    return x.device.type == "cpu" and state.mask is None and not (x.requires_grad and torch.is_grad_enabled())
