"""What plain ViTs of all libraries share, read from tensors by the names that a library has for them.

A reader says what the names are, how many heads there are, and what comes after the last block; widths, depth, sizes of
patches and which parts there are show in the tensors. A tensor that nothing takes is refused: no part is passed over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from diffrate.blocks.block import UnsupportedModelError

# timm's names of architectures, for the class of the model and what its images are normalised with.
VIT, IMAGENET_VIT, DISTILLED = "vit_base_patch16_224", "deit_base_patch16_224", "deit_base_distilled_patch16_224"
CLIP, SIGLIP = "vit_base_patch16_clip_224", "vit_base_patch16_siglip_224"
DINOV2, SWIGLU, EVA = "vit_base_patch14_dinov2", "vit_giant_patch14_dinov2", "vit_base_patch16_dinov3_qkvb"
BEIT = "beit_base_patch16_224"
# Where timm's families call a part otherwise.
GAMMAS = {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}


@dataclass(frozen=True)
class Names:
    """What a library calls the parts of a ViT: for each, all names that its versions have had. Of a block, within it.

    block: a prefix with a place for the number. qkv: one tensor for queries, keys and values, without "weight".
    """

    patch: tuple[str, ...]
    class_token: tuple[str, ...]
    positions: tuple[str, ...]
    norm: tuple[str, ...]
    block: tuple[str, ...]
    norm1: tuple[str, ...]
    proj: tuple[str, ...]
    norm2: tuple[str, ...]
    fc1: tuple[str, ...]
    fc2: tuple[str, ...]
    qkv: tuple[str, ...] = ()
    query: tuple[str, ...] = ()
    key: tuple[str, ...] = ()
    value: tuple[str, ...] = ()
    gate: tuple[str, ...] = ()
    scale1: tuple[str, ...] = ()
    scale2: tuple[str, ...] = ()
    norm_pre: tuple[str, ...] = ()


@dataclass
class Plan:
    """A timm model to be built: architecture, arguments as JSON values, and tensors by timm's names.

    even_depth: one rate of stochastic depth for all blocks, where timm's rise. drops_inside: whether the MLP has dropout
    after its activation, too, as timm's has. buffers: tensors that timm computes, and other libraries otherwise rounded.
    """

    architecture: str
    arguments: dict[str, Any]
    state: dict[str, Tensor]
    even_depth: bool = False
    drops_inside: bool = True
    buffers: dict[str, Tensor] = field(default_factory=dict)


class Tensors:
    """The tensors of `module`, by their names; each is taken once. `kind` is what messages call their model."""

    def __init__(self, module: nn.Module, kind: str) -> None:
        self.kind = kind
        self._left = {name: tensor.detach() for name, tensor in module.state_dict().items()}

    def find(self, *names: str) -> Tensor | None:
        """The tensor under the first of the names that there is, None for none of them."""
        return next((self._left.pop(name) for name in names if name in self._left), None)

    def take(self, *names: str) -> Tensor:
        """The same, where there must be one."""
        found = self.find(*names)
        if found is None:
            raise UnsupportedModelError(f"{self.kind}: found no tensor {names[0]}; accepted: the class's own parts")
        return found

    def layer(self, ours: str, names: Iterable[str]) -> dict[str, Tensor]:
        """Weight and bias of the layer under one of the `names`, under our name; without a bias where it has none."""
        names = tuple(names)
        weight, bias = (self.find(*(f"{name}.{part}" for name in names)) for part in ("weight", "bias"))
        if weight is None:
            raise UnsupportedModelError(f"{self.kind}: found no layer {names[0]}; accepted: the class's own parts")
        return {f"{ours}.weight": weight} | ({} if bias is None else {f"{ours}.bias": bias})

    def blocks(self, names: Names) -> list[str]:
        """The prefixes of all blocks, in order."""
        for pattern in names.block:
            count = 0
            while any(name.startswith(pattern.format(count)) for name in self._left):
                count += 1
            if count:
                return [pattern.format(number) for number in range(count)]
        raise UnsupportedModelError(f"{self.kind}: found no block {names.block[0].format(0)}; accepted: from 1")

    def check_taken(self, ignored: Iterable[str] = ()) -> None:
        """Refuse tensors that nothing took, but for those below the `ignored` names."""
        left = [name for name in self._left if not name.startswith(tuple(ignored))]
        if left:
            shown = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
            raise UnsupportedModelError(f"{self.kind}: found {shown}; accepted: the class's own parts, as built")


def read_vit(
    tensors: Tensors, names: Names, architecture: str, heads: int, size: tuple[int, int], **arguments: Any
) -> Plan:
    """The plan of a ViT from its tensors: all but what comes after the last norm.

    Register and distillation tokens are the reader's: `state` has what stands in front, patches' positions last.
    """
    patch = tensors.layer("patch_embed.proj", names.patch)
    width, channels, *sides = patch["patch_embed.proj.weight"].shape  # of a layer on flat patches, the reader's
    state = {**patch}
    class_token, positions = tensors.find(*names.class_token), tensors.find(*names.positions)
    if class_token is not None:
        state["cls_token"] = class_token.reshape(1, 1, -1)
    if positions is not None:
        state["pos_embed"] = positions.reshape(1, -1, width)
    blocks = [read_block(tensors, prefix, names) for prefix in tensors.blocks(names)]
    for number, block in enumerate(blocks):
        state |= {f"blocks.{number}.{name}": tensor for name, tensor in block.items()}
    first = blocks[0]
    made = {
        "img_size": list(size),
        "patch_size": list(sides),
        "in_chans": channels,
        "embed_dim": width,
        "depth": len(blocks),
        "num_heads": heads,
        "mlp_ratio": ratio(first["mlp.fc1.weight"].shape[0], width),
        "qkv_bias": "attn.qkv.bias" in first,
        "num_classes": 0,
    }
    if "ls1.gamma" in first:
        made["init_values"] = 1.0
    return Plan(architecture, made | arguments, state)


def read_block(tensors: Tensors, prefix: str, names: Names) -> dict[str, Tensor]:
    """The tensors of the block below `prefix`, under timm's names."""

    def under(parts: Iterable[str]) -> list[str]:
        return [prefix + part for part in parts]

    block: dict[str, Tensor] = {}
    for ours, theirs in (("norm1", names.norm1), ("norm2", names.norm2), ("attn.proj", names.proj)):
        block |= tensors.layer(ours, under(theirs))
    block |= _joined(tensors, under(names.qkv), [under(part) for part in (names.query, names.key, names.value)])
    first = tensors.layer("mlp.fc1", under(names.fc1))
    if any(f"{name}.weight" in tensors._left for name in under(names.gate)):  # its half comes first in timm
        gate = tensors.layer("mlp.fc1", under(names.gate))
        first = {name: torch.cat([gate[name], first[name]]) for name in first}
    block |= first | tensors.layer("mlp.fc2", under(names.fc2))
    for ours, theirs in (("ls1.gamma", names.scale1), ("ls2.gamma", names.scale2)):
        scale = tensors.find(*under(theirs))
        if scale is not None:
            block[ours] = scale
    return block


def _joined(tensors: Tensors, qkv: list[str], three: list[list[str]]) -> dict[str, Tensor]:
    """One layer for queries, keys and values: as it is, or of three, with zeros for the bias that one of them lacks."""
    for name in qkv:
        weight, bias = tensors.find(f"{name}_weight"), tensors.find(f"{name}_bias")
        if weight is not None:
            return {"attn.qkv.weight": weight} | ({} if bias is None else {"attn.qkv.bias": bias})
    layers = [tensors.layer("x", names) for names in three]
    weights = [layer["x.weight"] for layer in layers]
    joined = {"attn.qkv.weight": torch.cat(weights)}
    if any("x.bias" in layer for layer in layers):
        biases = [
            layer.get("x.bias", weight.new_zeros(len(weight))) for layer, weight in zip(layers, weights, strict=True)
        ]
        joined["attn.qkv.bias"] = torch.cat(biases)
    return joined


def rename_as_eva(plan: Plan, key_bias: bool = False) -> None:
    """Give the blocks of `plan` the names that BEiT and EVA have in timm: scales by another and, without `key_bias`,
    biases of queries and values alone."""
    width = plan.arguments["embed_dim"]
    for name in list(plan.state):
        if name.endswith(".attn.qkv.bias") and not key_bias:
            prefix = name.removesuffix(".attn.qkv.bias")
            bias = plan.state.pop(name)
            plan.state |= {f"{prefix}.attn.q_bias": bias[:width], f"{prefix}.attn.v_bias": bias[2 * width :]}
        for vit, gamma in GAMMAS.items():
            if name.endswith(vit):
                plan.state[name.removesuffix(vit) + gamma] = plan.state.pop(name)


def add_head(plan: Plan, layer: Mapping[str, Tensor], feature_head: str | None = None) -> None:
    """Give `plan` the head `layer` ("head.weight" and perhaps "head.bias"), of logits or, with an activation's name, of
    features."""
    plan.state |= layer
    plan.arguments["num_classes"] = len(layer["head.weight"])
    if feature_head is not None:
        plan.arguments["feature_head"] = feature_head


def ratio(hidden: int, width: int) -> float:
    """The `mlp_ratio` of which timm makes `hidden` channels; it rounds down."""
    found = hidden / width
    return found if int(width * found) == hidden else float(Fraction(2 * hidden + 1, 2 * width))


def epsilon_of(module: nn.Module, kind: str) -> float:
    """The epsilon of all layer norms in `module`."""
    found = sorted({part.eps for part in module.modules() if isinstance(part, nn.LayerNorm)})
    if len(found) != 1:
        raise UnsupportedModelError(f"{kind}: found layer norms with the epsilons {found}; accepted: one for all")
    return found[0]
