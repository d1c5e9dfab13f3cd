"""timm's VisionTransformer: ViT, DeiT, MAE, CLIP, DINOv2, SigLIP, AIMv2, hybrids, and others."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer

from diffrate.patch.plain_vit import CompressedVit


class CompressedVisionTransformer(CompressedVit, VisionTransformer):
    """Positions are in the embeddings; any pooling."""
