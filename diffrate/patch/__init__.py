"""Turn a timm model into one that compresses its tokens, in place: `vit`, or one function per published family."""

from diffrate.patch.base import CompressedModel
from diffrate.patch.caformer import caformer
from diffrate.patch.timm_families import deit, families, mae, vit

__all__ = ["CompressedModel", "caformer", "deit", "families", "mae", "vit"]
