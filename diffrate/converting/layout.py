"""What plain ViTs of all libraries share: tensors under timm's names, and arguments read off them.

A table says what a library calls each part. Widths, depth, sizes of patches and which parts there are show in the
tensors; the number of heads, and what comes after the last block, is said by the reader of a class. What a table does
not know keeps its name, and is refused in the end since timm has no such part: nothing is passed over."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffrate.blocks.block import UnsupportedModelError

State = dict[str, Tensor]
# Architectures of timm, for the class of the model and what its images are normalised with.
IMAGENET_VIT, CLIP, BEIT = "deit_base_patch16_224", "vit_base_patch16_clip_224", "beit_base_patch16_224"
EVA = "vit_base_patch16_dinov3_qkvb"


class Parts(NamedTuple):
    """What a module is made of: its tensors under their own names, and the epsilons of its layer norms."""

    tensors: State
    epsilons: tuple[float, ...]


def parts_of(module: nn.Module) -> Parts:
    """Those of a live module."""
    epsilons = sorted({part.eps for part in module.modules() if isinstance(part, nn.LayerNorm)})
    return Parts({name: tensor.detach() for name, tensor in module.state_dict().items()}, tuple(epsilons))


class Names:
    """What a library calls the parts of a ViT.

    block: how the names of a block's tensors begin, as a pattern with one group, its number. table: timm's name of a
    layer or a tensor, then those that versions of the library have had; rows. unread: tensors that no image sees.
    """

    def __init__(self, block: str, table: str, unread: tuple[str, ...] = ()) -> None:
        self.block, self.unread = re.compile(block), unread
        rows = [row.split() for row in re.split("[;\n]", table) if row.strip()]
        self.ours = {theirs: ours for ours, *names in rows for theirs in names}

    def renamed(self, name: str) -> str:
        """timm's name of a tensor, or its own where the table does not have it."""
        layer, dot, part = name.rpartition(".")
        return self.ours.get(name) or (self.ours[layer] + dot + part if layer in self.ours else name)

    def read(self, tensors: State, kind: str) -> State:
        """The `tensors` of a module under timm's names, queries, keys and values joined."""
        state: State = {}
        for name, tensor in tensors.items():
            if name.startswith(self.unread):
                continue
            found = self.block.match(name)
            prefix = "" if found is None else f"blocks.{found[1]}."
            state[prefix + self.renamed(name if found is None else name[found.end() :])] = tensor
        _check_biases(state, kind)
        for prefix in [name.removesuffix("q.weight") for name in state if name.endswith(".attn.q.weight")]:
            _join(state, [prefix + part for part in "qkv"], prefix + "qkv")
        for prefix in [name.removesuffix("gate.weight") for name in state if name.endswith(".mlp.gate.weight")]:
            _join(state, [prefix + "gate", prefix + "fc1"], prefix + "fc1")  # timm has the gate's half first
        return state


def _check_biases(state: State, kind: str) -> None:
    """Refuse a block that lacks a bias which the same layer of another block has."""
    layers = [name.removesuffix(".weight") for name in state if re.match(r"blocks\..*\.weight$", name)]
    biased = {layer.split(".", 2)[2] for layer in layers if f"{layer}.bias" in state}
    for layer in layers:
        if layer.split(".", 2)[2] in biased and f"{layer}.bias" not in state:
            found = f"found nothing for timm's {layer}.bias"
            raise UnsupportedModelError(f"{kind}: {found}; accepted: a bias in all blocks, or in none")


def _join(state: State, parts: Iterable[str], joined: str) -> None:
    """Make one layer of several, with zeros for a bias that one of them lacks."""
    weights, biases = ([state.pop(f"{name}.{part}", None) for name in parts] for part in ("weight", "bias"))
    present = [weight for weight in weights if weight is not None]  # where one is missing, the shape will be refused
    state[f"{joined}.weight"] = torch.cat(present)
    if any(bias is not None for bias in biases):
        filled = [w.new_zeros(len(w)) if b is None else b for w, b in zip(present, biases, strict=False)]
        state[f"{joined}.bias"] = torch.cat(filled)


@dataclass
class Plan:
    """A timm model to be built: architecture, arguments as JSON values, and tensors by timm's names.

    kind: what messages call the model that is read. even_depth: one rate of stochastic depth for all blocks, where
    timm's rise. drops_inside: dropout after the MLP's activation, too, as timm has. buffers: tensors that timm
    computes, and other libraries otherwise rounded.
    """

    kind: str
    architecture: str
    arguments: dict[str, Any]
    state: State
    even_depth: bool = False
    drops_inside: bool = True
    buffers: State = field(default_factory=dict)

    def add_head(self, layer: State, feature_head: str | None = None) -> None:
        """Have the head `layer`, "head.weight" and perhaps a bias: with an activation's name, one of features."""
        self.state |= layer
        self.arguments["num_classes"] = len(self.state["head.weight"])
        if feature_head is not None:
            self.arguments["feature_head"] = feature_head

    def end_at(self, layer: int) -> None:
        """Have the blocks up to hidden state `layer` alone, counted as in transformers, and nothing after them."""
        arguments, depth = self.arguments, self.arguments["depth"]
        blocks = layer % (depth + 1) if -depth <= layer <= depth else 0
        if self.architecture in (BEIT, EVA) or not blocks:
            accepted = (
                f"1 to {depth}, or -{depth} to -1" if self.architecture not in (BEIT, EVA) else "None, all blocks"
            )
            raise UnsupportedModelError(f"layer: found {layer} for {self.kind}; accepted: {accepted}")
        parts = ("norm.", "fc_norm.", "head", "attn_pool.", *(f"blocks.{number}." for number in range(blocks, depth)))
        self.state = {name: tensor for name, tensor in self.state.items() if not name.startswith(parts)}
        for name in ("feature_head", "class_and_mean", "pool_include_prefix"):
            arguments.pop(name, None)
        pool = "token" if arguments.get("class_token", True) else "avg"
        arguments |= {"depth": blocks, "num_classes": 0, "final_norm": False, "fc_norm": False, "global_pool": pool}

    def name_as_eva(self, key_bias: bool = False) -> None:
        """Name parts of blocks as timm's BEiT and EVA do: scales otherwise, without `key_bias` two biases alone."""
        width = self.arguments["embed_dim"]
        for name in list(self.state):
            if name.endswith(".attn.qkv.bias") and not key_bias:
                prefix, bias = name.removesuffix("qkv.bias"), self.state.pop(name)
                self.state |= {f"{prefix}q_bias": bias[:width], f"{prefix}v_bias": bias[2 * width :]}
            elif name.endswith((".ls1.gamma", ".ls2.gamma")):
                prefix, scale, _ = name.rsplit(".", 2)
                self.state[f"{prefix}.gamma_{scale[-1]}"] = self.state.pop(name)


def planned(
    kind: str, parts: Parts, names: Names, architecture: str, heads: int, size: Iterable[int], **arguments: Any
) -> Plan:
    """The plan of a ViT without a head from `parts`, which have all its tensors but the head's.

    Raises:
        UnsupportedModelError: parts that all ViTs have are missing, or layer norms differ.
    """
    state, epsilons = names.read(parts.tensors, kind), list(parts.epsilons)
    missing = [name for name in ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight") if name not in state]
    if missing or len(epsilons) != 1:
        found = f"found nothing for timm's {missing[0]}" if missing else f"found layer norms of epsilon {epsilons}"
        raise UnsupportedModelError(f"{kind}: {found}; accepted: the parts of its class, with one epsilon")
    patch = state["patch_embed.proj.weight"]
    shapes = {"cls_token": (1, 1, -1), "pos_embed": (1, -1, len(patch))}
    state |= {name: state[name].reshape(shape) for name, shape in shapes.items() if name in state}
    made = {
        "img_size": list(size),
        "patch_size": list(patch.shape[2:]),
        "in_chans": patch.shape[1],
        "embed_dim": len(patch),
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "num_heads": heads,
        "mlp_ratio": ratio(len(state["blocks.0.mlp.fc1.weight"]), len(patch)),
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "num_classes": 0,
        "norm_eps": epsilons[0],
    } | ({"init_values": 1.0} if "blocks.0.ls1.gamma" in state else {})
    return Plan(kind, architecture, made | arguments, state)


def ratio(hidden: int, width: int) -> float:
    """The `mlp_ratio` of which timm makes `hidden` channels: it rounds down."""
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width
