"""What timm calls the parts of each kind of block, and in which order they come.

A block computes `skip1(x) + after1(attention(before1(x)))`, then `skip2(x) + after2(mlp(before2(x)))`.
Each path is a chain of parts: a module is called, a parameter multiplies (layer scale), None is skipped.
Someone who adds a block adds a row here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from timm.models.beit import Block as BeitBlock
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.metaformer import MetaFormerBlock
from timm.models.vision_transformer import Block, ResPostBlock
from timm.models.vision_transformer_relpos import RelPosBlock, ResPostRelPosBlock
from torch import Tensor, nn

from diffrate.blocks.projection import PROJECTIONS, projection_of

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


def _check_parts(module: nn.Module, known: set[str], where: str) -> None:
    parts = (*module.named_children(), *module.named_parameters(recurse=False))
    unknown = [name for name, _ in parts if name not in known]
    if unknown:
        raise UnsupportedModelError(f"{where}: found {', '.join(unknown)}; accepted: {', '.join(sorted(known))}")
