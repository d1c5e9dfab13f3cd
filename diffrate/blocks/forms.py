"""What timm calls the parts of each kind of block, and in which order they come.

A block computes `skip1(x) + after1(attention(before1(x)))`, then `skip2(x) + after2(mlp(before2(x)))`.
Each path is a chain of parts: a module is called, a parameter multiplies (layer scale), None is skipped.
Someone who adds a block adds a row here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from timm.models.beit import Block as BeitBlock
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.metaformer import MetaFormerBlock
from timm.models.vision_transformer import Block, ResPostBlock
from timm.models.vision_transformer_relpos import RelPosBlock, ResPostRelPosBlock
from torch import Tensor, nn

from diffrate.blocks.heads import PROJECTIONS, projection_of

Path = tuple[str, ...]


class UnsupportedModelError(TypeError):
    """A model with parts that compression does not handle; the message names them."""


@dataclass(frozen=True)
class BlockForm:
    """The parts of one kind of block, by their names."""

    attention: str = "attn"
    before1: Path = ("norm1",)
    after1: Path = ("ls1", "drop_path1")
    before2: Path = ("norm2",)
    after2: Path = ("ls2", "drop_path2")
    skip1: Path = ()
    skip2: Path = ()

    def parts(self) -> set[str]:
        """All names that the block's paths know."""
        paths = (self.before1, self.after1, self.before2, self.after2, self.skip1, self.skip2)
        return {"mlp", self.attention, *(name for path in paths for name in path)}


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
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def called(module: Any, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """`run(x)` as what `module` makes of `x`, with its hooks around it, where it has any."""
    if not has_hooks(module):
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
    attention = None if form is None else getattr(block, form.attention)
    if attention is None or type(attention) not in PROJECTIONS:
        return False
    return all("forward" not in vars(module) or _runs_inside(module) for module in (block, attention))


def check_block(block: nn.Module, where: str) -> None:
    """Refuse a block of an unknown kind, or with parts that would be passed over.

    Raises:
        UnsupportedModelError: names the kind or the parts.
    """
    form = FORMS.get(type(block))
    if form is None:
        kinds = ", ".join(sorted({kind.__name__ for kind in FORMS}))
        raise UnsupportedModelError(f"{where}: found {type(block).__name__}; accepted: {kinds}")
    attention = getattr(block, form.attention)
    if type(attention) not in PROJECTIONS:
        kinds = ", ".join(sorted({kind.__name__ for kind in PROJECTIONS}))
        raise UnsupportedModelError(f"{where}.{form.attention}: found {type(attention).__name__}; accepted: {kinds}")
    _check_parts(block, form.parts(), where)
    _check_parts(attention, set(projection_of(attention).parts), f"{where}.{form.attention}")
    dropout = attention.attn_drop
    if not isinstance(dropout, nn.Dropout | nn.Identity):  # it is read, unless it has hooks
        found = f"{where}.{form.attention}.attn_drop: found {type(dropout).__name__}"
        raise UnsupportedModelError(f"{found}; accepted: Dropout, Identity")
    for module, name in ((block, where), (attention, f"{where}.{form.attention}")):
        check_methods(module, name)


def check_methods(module: nn.Module, where: str) -> None:
    """Refuse a module whose methods were replaced: what is read by its parts never calls them.

    Raises:
        UnsupportedModelError: names them.
    """
    kind = type(module)
    found = [name for name in vars(module) if callable(getattr(kind, name, None)) and not _runs_inside(module)]
    own = kind.__module__.startswith("timm.")
    if own and not kind.forward.__module__.startswith("timm."):  # changed in the class, for all modules
        found.append("forward")
    if found:
        raise UnsupportedModelError(f"{where}: found another {', '.join(found)}; accepted: {kind.__name__}'s own")


def _check_parts(module: nn.Module, known: set[str], where: str) -> None:
    parts = (*module.named_children(), *module.named_parameters(recurse=False))
    unknown = [name for name, _ in parts if name not in known]
    if unknown:
        raise UnsupportedModelError(f"{where}: found {', '.join(unknown)}; accepted: {', '.join(sorted(known))}")
