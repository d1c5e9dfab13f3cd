"""Turn a timm model into one that compresses its tokens, in place: `vit`, or one function per family."""

from diffrate.patch.any import vit
from diffrate.patch.base import CompressedModel
from diffrate.patch.caformer import caformer
from diffrate.patch.deit import deit
from diffrate.patch.mae import mae

__all__ = ["CompressedModel", "caformer", "deit", "mae", "vit"]
