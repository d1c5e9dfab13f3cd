"""One block at fixed rates: attention, then compression, then MLP (paper, figure 2).

The submodules of timm's blocks are read by name, their `forward` is never called: its signature
moves between timm versions, and compression sits in the middle of it. Blocks are typed `Any`, since
their parts are attributes that only timm's classes, not `nn.Module`, declare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

from timm.models.beit import Block as BeitBlock
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.metaformer import MetaFormerBlock
from timm.models.vision_transformer import Block, ResPostBlock
from timm.models.vision_transformer_relpos import RelPosBlock, ResPostRelPosBlock
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from diffrate.blocks.attention import Heads, attend, attend_and_rank, attend_with_map, size_bias, weights_of
from diffrate.blocks.heads import PROJECTIONS, Positions, Projection, projection_of
from diffrate.blocks.reduction import ReductionRule, Seen
from diffrate.blocks.tokens import TokenState, replaced
from diffrate.schedule import Kept

Path = tuple[str, ...]


class UnsupportedModelError(TypeError):
    """A model with parts that compression does not handle; the message names them."""


@dataclass(frozen=True)
class BlockForm:
    """What timm calls the parts of one kind of block, and in which order they come.

    A block computes `skip1(x) + after1(attention(before1(x)))`, then `skip2(x) + after2(mlp(before2(x)))`. Each path
    is a chain of parts: a module is called, a parameter multiplies (layer scale), None is skipped.
    """

    attention: str = "attn"
    before1: Path = ("norm1",)
    after1: Path = ("ls1", "drop_path1")
    before2: Path = ("norm2",)
    after2: Path = ("ls2", "drop_path2")
    skip1: Path = ()
    skip2: Path = ()


_PLAIN = BlockForm()
_POST_NORM = BlockForm(before1=(), after1=("norm1", "drop_path1"), before2=(), after2=("norm2", "drop_path2"))
_GAMMAS = BlockForm(after1=("gamma_1", "drop_path1"), after2=("gamma_2", "drop_path2"))
_METAFORMER = BlockForm(
    attention="token_mixer",
    after1=("drop_path1", "layer_scale1"),
    after2=("drop_path2", "layer_scale2"),
    skip1=("res_scale1",),
    skip2=("res_scale2",),
)
FORMS: Mapping[type[nn.Module], BlockForm] = {
    Block: _PLAIN,
    RelPosBlock: _PLAIN,
    ResPostBlock: _POST_NORM,
    ResPostRelPosBlock: _POST_NORM,
    EvaBlockPostNorm: _POST_NORM,
    EvaBlock: _GAMMAS,
    BeitBlock: _GAMMAS,
    MetaFormerBlock: _METAFORMER,
}


def form_of(block: nn.Module) -> BlockForm:
    """The form of a block of a known type."""
    return FORMS[type(block)]


def through(block: Any, path: Iterable[str], x: Tensor) -> Tensor:
    """`x` through a chain of the block's parts."""
    for name in path:
        part = getattr(block, name)
        if isinstance(part, nn.Module):
            x = part(x)
        elif part is not None:
            x = part * x
    return x


def run_inside(
    module: Any, x: Tensor, *given: Any, run: Callable[[Tensor], Tensor] | None = None, **options: Any
) -> Any:
    """What stands for the `forward` of a module that a patched model reads by its parts.

    With `run`, that, so that hooks of the module see what enters and what leaves; else the class's own.
    """
    return type(module).forward(module, x, *given, **options) if run is None else run(x)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of `module` does more than its forward."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


# torch's for all modules, as profilers and counters put them on.
_KINDS_OF_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
_HOOKS_OF_ALL = tuple(getattr(torch_module, f"_global_{kind}") for kind in _KINDS_OF_HOOKS)


def _is_watched(module: nn.Module) -> bool:
    return has_hooks(module) or any(_HOOKS_OF_ALL)


def called(module: Any, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """`run(x)` as what `module` makes of `x`, with its hooks and those of all modules around it, if there are any."""
    if not _is_watched(module):
        return run(x)
    if not _runs_inside(module):
        module.forward = partial(run_inside, module)
    return module(x, run=run)


def _runs_inside(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return isinstance(forward, partial) and forward.func is run_inside


def is_read(block: nn.Module) -> bool:
    """Whether a block, and its attention, are of a known kind and run as their parts say: a quick look."""
    form = FORMS.get(type(block))
    if form is None:
        return False
    attention = getattr(block, form.attention)
    for module in (block, attention):
        timms = type(module).forward.__module__.startswith("timm.")
        if not timms or ("forward" in vars(module) and not _runs_inside(module)):
            return False
    return type(attention) in PROJECTIONS


def check_block(block: nn.Module, where: str) -> None:
    """Refuse a block of an unknown kind, or with parts that would be passed over, with an UnsupportedModelError."""
    form: BlockForm = _known(FORMS, block, where)
    attention, name = getattr(block, form.attention), f"{where}.{form.attention}"
    projection: Projection = _known(PROJECTIONS, attention, name)
    known = {"mlp", form.attention}.union(form.before1, form.after1, form.before2, form.after2, form.skip1, form.skip2)
    for module, parts, place in ((block, known, where), (attention, projection.parts, name)):
        own = (*module.named_children(), *module.named_parameters(recurse=False))
        unknown = [part for part, _ in own if part not in parts]
        if unknown:
            raise UnsupportedModelError(f"{place}: found {', '.join(unknown)}; accepted: {', '.join(sorted(parts))}")
    dropout = attention.attn_drop
    if not isinstance(dropout, nn.Dropout | nn.Identity):  # it is read, unless it has hooks
        raise UnsupportedModelError(f"{name}.attn_drop: found {type(dropout).__name__}; accepted: Dropout, Identity")
    check_methods(block, where)
    check_methods(attention, name)


def _known(kinds: Mapping[type[nn.Module], Any], module: nn.Module, where: str) -> Any:
    """What `kinds` has for a module's type; refused where it has nothing."""
    if type(module) not in kinds:
        accepted = ", ".join(sorted({kind.__name__ for kind in kinds}))
        raise UnsupportedModelError(f"{where}: found {type(module).__name__}; accepted: {accepted}")
    return kinds[type(module)]


def other_methods(module: nn.Module, names: Iterable[str] | None = None) -> list[str]:
    """The methods that a module has instead of its class's, all or of `names`."""
    own = [name for name in (vars(module) if names is None else names) if name in vars(module)]
    methods = [name for name in own if callable(getattr(type(module), name, None)) and not _runs_inside(module)]
    # The class's own, assigned, is no other: so accelerate's unwrap_model puts a forward back.
    return [name for name in methods if vars(module)[name] != MethodType(getattr(type(module), name), module)]


def check_methods(module: nn.Module, where: str, names: Iterable[str] = (), *, alone: bool = False) -> None:
    """Refuse a module whose methods were replaced, with an UnsupportedModelError: they would never be called.

    Looks at `forward` and `names` in its class, and at all methods of the module itself, or with `alone` at `names`.
    """
    found = other_methods(module, names if alone else None)
    kind = next(kind for kind in type(module).__mro__ if not kind.__module__.startswith("diffrate."))
    of = {name: getattr(kind, name, nn.Module).__module__ for name in ("forward", *names)}
    found += [name for name, module_of in of.items() if not module_of.startswith(("timm.", "torch."))]
    if found:
        accepted = f"{type(module).__name__}'s own"
        raise UnsupportedModelError(f"{where}: found another {', '.join(found)}; accepted: {accepted}")


def fixed_block(
    block: Any, positions: Positions, rule: ReductionRule, state: TokenState, kept: Kept, read: int | None = None
) -> TokenState:
    """Run one block that leaves `kept.merged` of the `kept.entering` tokens in `state`.

    With `read` nothing but that many first tokens is read of what it leaves, and they are all that is
    left: the others serve as keys and values, and need neither reduction nor MLP.
    """

    def step(state: TokenState, read: int | None) -> TokenState:
        state, seen = attended(block, positions, rule, state, kept, read)
        if seen is not None:
            state = rule.reduced(state, seen, kept)
        return replaced(state, x=mlp_branch(block, state.x))

    return with_hooks(block, state, read, step)


def with_hooks(
    block: Any, state: TokenState, read: int | None, step: Callable[[TokenState, int | None], TokenState]
) -> TokenState:
    """`step(state, read)`, with hooks around it: those of `block` see all tokens before and after, whatever is read of
    them; torch's hooks for all modules see what is computed without hooks."""
    if not _is_watched(block):
        return step(state, read)
    left, seen = state, None if has_hooks(block) else read

    def run(x: Tensor) -> Tensor:
        nonlocal left
        left = step(replaced(state, x=x), seen)
        return left.x

    x = called(block, state.x, run)
    return replaced(left, x=x) if seen == read else TokenState(x[:, :read])


def removes(kept: Kept, read: int | None) -> bool:
    """Whether a block lets tokens go: not where nothing is read of them anyway."""
    return kept.merged < kept.entering and read is None


def attended(
    block: Any, positions: Positions, rule: ReductionRule, state: TokenState, kept: Kept, read: int | None
) -> tuple[TokenState, Seen | None]:
    """The first part of a block: the tokens after attention, as of `attention_branch`, and what the rule goes by where
    some are to go."""
    removing = removes(kept, read)

    def mix(attention: Any, heads: Heads, pairs: Tensor | None) -> tuple[Tensor, Seen | None]:
        bias, drop = size_bias(state.size, pairs), attention.attn_drop
        dropout = getattr(drop, "p", 0.0) if attention.training else 0.0
        received: Tensor | None = None
        if has_hooks(drop):  # which are there to see the maps, each head's
            images = heads.query.shape[:2]
            mixed, received = attend_with_map(
                heads, bias, lambda maps: drop(maps.unflatten(0, images)).flatten(0, 1), rule.importance.queries
            )
        elif removing and rule.pairing.ranks(kept):
            mixed, received = attend_and_rank(heads, bias, dropout, rule.importance.queries)
        else:
            mixed = attend(heads, bias, dropout)
        return mixed, (received, heads) if removing else None

    return attention_branch(block, positions, state, read, mix)


def attention_map(block: Any, positions: Positions, state: TokenState) -> Tensor:
    """The weights `[B, N, N]` by which tokens that enter a block attend to each other, the mean over heads, in float32
    at least. An UnsupportedModelError where they are more than one softmax."""
    attention = getattr(block, form_of(block).attention)
    projection = projection_of(attention)
    if not projection.one_softmax:
        raise UnsupportedModelError(
            f"attention maps: found {type(attention).__name__}, the difference of two maps; accepted: one softmax"
        )
    entering = through(block, form_of(block).before1, state.x)
    heads = positions.turn(projection.split(attention, entering), state.place)
    return weights_of(heads, size_bias(state.size, positions.pairs(state.place))).mean(1)


def mlp_branch(block: Any, x: Tensor) -> Tensor:
    """The last part of a block, `[B, N, C]`."""
    form = form_of(block)
    y = through(block, (*form.before2, "mlp", *form.after2), x)
    return through(block, form.skip2, x) + y


def attention_branch(
    block: Any,
    positions: Positions,
    state: TokenState,
    read: int | None,
    mix: Callable[[Any, Heads, Tensor | None], tuple[Tensor, Any]],
) -> tuple[TokenState, Any]:
    """The tokens after attention, the first `read` alone if that says so, and what `mix` gives beside.

    `mix(attention, heads, pairs)` gives the heads' output `[B, H, Q, V]` for queries, keys and values, and the bias of
    pairs of positions `[B or 1, H, Q, N]` or None.
    """
    form, beside = form_of(block), None
    attention = getattr(block, form.attention)
    projection = projection_of(attention)

    def run(entering: Tensor) -> Tensor:
        nonlocal beside
        heads, pairs = positions.turn(projection.split(attention, entering), state.place), positions.pairs(state.place)
        if read is not None:
            heads = replaced(heads, query=heads.query[:, :, :read])
            pairs = None if pairs is None else pairs[:, :, :read]
        mixed, beside = mix(attention, heads, pairs)
        return projection.join(attention, mixed, entering)

    y = through(block, form.after1, called(attention, through(block, form.before1, state.x), run))
    x = through(block, form.skip1, state.x[:, : y.shape[1]]) + y
    return (replaced(state, x=x) if read is None else TokenState(x)), beside
