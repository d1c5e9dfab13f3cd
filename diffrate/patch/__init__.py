"""Turn a timm model into one that compresses its tokens, in place: `vit`, or one function per published family."""

from diffrate.patch.any import families, vit
from diffrate.patch.base import CompressedModel
from diffrate.patch.caformer import caformer
from diffrate.patch.deit import deit
from diffrate.patch.mae import mae

__all__ = ["CompressedModel", "caformer", "deit", "families", "mae", "vit"]
