"""`diffrate.plain`: a compressed model as a module that needs nothing but torch."""

from __future__ import annotations

import inspect

import torch
from torch import fx, nn

from diffrate.exporting.graph import traced
from diffrate.exporting.targets import TRACES, ExportError, check_torch
from diffrate.patch.base import CompressedModel
from diffrate.running.precision import place_of


def plain(model: CompressedModel) -> nn.Module:
    """`model` at its kept counts as a module of images `[B, C, H, W]` -> logits `[B, K]`, for inference, on the CPU.

    It has copies of the weights, pickles, compiles and exports for batches of any size. What `torch.save` leaves of it
    `torch.load(..., weights_only=False)` reads where torch alone is installed. Images are float32 in any precision.

    Raises:
        ExportError: `model` is not patched, torch is older than 2.8, or cannot trace it.
    """
    check_patched(model)
    check_torch("diffrate.plain", TRACES)
    return module_of(traced(model, place_of(model).dtype, None))


def check_patched(model: object) -> None:
    """Refuse what was not patched.

    Raises:
        ExportError: says so.
    """
    if not isinstance(model, CompressedModel):
        raise ExportError(f"found {type(model).__name__}; accepted: a model that diffrate.patch has patched")


def module_of(program: torch.export.ExportedProgram) -> nn.Module:
    """The graph of `program` as a module of its own: torch's has checks of its input inside that do not pickle."""
    guarded = "check_guards" in inspect.signature(program.module).parameters  # since torch 2.9
    whole = program.module(**{"check_guards": False} if guarded else {})
    graph, copies = fx.Graph(), {}
    for node in whole.graph.nodes:
        if node.op == "output":
            graph.output(copies[node.args[0][0]])
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.eliminate_dead_code()  # such as types that were asked for while the graph was traced
    return fx.GraphModule(whole, graph, class_name="Plain").eval()
