"""Small models in transformers' layout of files, and embeddings of texts, written without transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

NAMES = ("cat", "dog", "emu")
WIDTH, HIDDEN, PATCH, PATCHES, DEPTH, PROJECTED = 32, 64, 8, 16, 3, 16
SIZED = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": DEPTH, "num_attention_heads": 4}
SIZED |= {"image_size": 32, "patch_size": PATCH}
PROCESSOR = {
    **{"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 32, "width": 32}},
    **{"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.5], "resample": 3},
}
CONFIGS: Mapping[str, dict[str, Any]] = {
    "vit": {
        **{"architectures": ["ViTForImageClassification"], "model_type": "vit", **SIZED},
        **{"layer_norm_eps": 1e-12, "hidden_act": "gelu"},
        "id2label": {str(number): name for number, name in enumerate(NAMES)},
    },
    "clip": {
        **{"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": PROJECTED},
        "vision_config": SIZED,
    },
    "siglip": {"architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model", **SIZED},
}
# Layers of a block, by what they take and give: transformers' names in its first models, and in its later ones.
EARLY = {"attention.attention.query": 1, "attention.attention.key": 1, "attention.attention.value": 1}
EARLY |= {"attention.output.dense": 1, "intermediate.dense": 2, "output.dense": 3}
LATER = {"self_attn.q_proj": 1, "self_attn.k_proj": 1, "self_attn.v_proj": 1, "self_attn.out_proj": 1}
LATER |= {"mlp.fc1": 2, "mlp.fc2": 3}


def _shapes(kind: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    def layer(name: str, inputs: int = WIDTH, outputs: int = WIDTH, bias: bool = True) -> Iterator[Any]:
        yield f"{name}.weight", (outputs, inputs)
        if bias:
            yield f"{name}.bias", (outputs,)

    early = kind == "vit"
    trunk, blocks = ("vit.", "encoder.layer") if early else ("vision_model.", "encoder.layers")
    norms = ("layernorm_before", "layernorm_after") if early else ("layer_norm1", "layer_norm2")
    sides = {1: (WIDTH, WIDTH), 2: (WIDTH, HIDDEN), 3: (HIDDEN, WIDTH)}
    for block in range(DEPTH):
        for name, kind_of in (EARLY if early else LATER).items():
            yield from layer(f"{trunk}{blocks}.{block}.{name}", *sides[kind_of])
        for norm in norms:
            yield from ((f"{trunk}{blocks}.{block}.{norm}.{part}", (WIDTH,)) for part in ("weight", "bias"))
    ends = {"vit": ("layernorm",), "clip": ("pre_layrnorm", "post_layernorm"), "siglip": ("post_layernorm",)}[kind]
    yield from ((f"{trunk}{name}.{part}", (WIDTH,)) for name in ends for part in ("weight", "bias"))
    patches, patch = (WIDTH, 3, PATCH, PATCH), f"{trunk}embeddings.patch_embedding"
    if early:
        yield f"{trunk}embeddings.cls_token", (1, 1, WIDTH)
        yield f"{trunk}embeddings.position_embeddings", (1, PATCHES + 1, WIDTH)
        patch += "s.projection"
        yield from layer("classifier", WIDTH, len(NAMES))
    else:
        yield f"{trunk}embeddings.position_embedding.weight", (PATCHES + (kind == "clip"), WIDTH)
    yield f"{patch}.weight", patches
    if kind != "clip":
        yield f"{patch}.bias", (WIDTH,)
    if kind == "clip":
        yield f"{trunk}embeddings.class_embedding", (WIDTH,)
        yield from layer("visual_projection", WIDTH, PROJECTED, bias=False)
        yield from ((name, shape) for name, shape in (("logit_scale", ()), ("text_projection.weight", (16, 8))))
    if kind == "siglip":
        yield f"{trunk}head.probe", (1, 1, WIDTH)
        yield f"{trunk}head.attention.in_proj_weight", (3 * WIDTH, WIDTH)
        yield f"{trunk}head.attention.in_proj_bias", (3 * WIDTH,)
        yield from layer(f"{trunk}head.attention.out_proj")
        yield from ((f"{trunk}head.layernorm.{part}", (WIDTH,)) for part in ("weight", "bias"))
        yield from (*layer(f"{trunk}head.mlp.fc1", WIDTH, HIDDEN), *layer(f"{trunk}head.mlp.fc2", HIDDEN, WIDTH))


def tensors_of(kind: str) -> dict[str, Tensor]:
    """Weights of one of `CONFIGS`, under transformers' names."""
    rng = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(shape, generator=rng) for name, shape in _shapes(kind)}
    return {
        name: (0.1 if value.ndim > 1 else 0.2) * value + float("norm" in name and name.endswith("weight"))
        for name, value in drawn.items()
    }


def write_folder(folder: Path, kind: str, processor: dict[str, Any] | None = PROCESSOR, **config: Any) -> Path:
    """A model of one of `CONFIGS` in a folder, its configuration changed by `config`; with a file for its images."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {name: value for name, value in {**CONFIGS[kind], **config}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))
    save_file(tensors_of(kind), folder / "model.safetensors")
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def write_texts(path: Path, width: int = PROJECTED, names: Any = NAMES, **tensors: Tensor | None) -> Path:
    """Embeddings of the names in a file; other or more `tensors`, or with None fewer."""
    rng = torch.Generator().manual_seed(3)
    rows = torch.randn(len(NAMES), width, generator=rng)
    given = {"embeddings": rows / rows.norm(dim=1, keepdim=True), "logit_scale": torch.tensor(2.0), **tensors}
    metadata = {} if names is None else {"classes": names if isinstance(names, str) else json.dumps(names)}
    save_file({name: tensor for name, tensor in given.items() if tensor is not None}, path, metadata)
    return path
