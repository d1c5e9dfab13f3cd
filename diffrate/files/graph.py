"""A model as a graph, and the ONNX operators for it, chosen by measurement in onnxruntime."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from diffrate.atomic import first_line
from diffrate.device import no_warnings_of, placement_of
from diffrate.files.header import TRACES, ExportError, check_torch
from diffrate.files.save import check_patched
from diffrate.patch.base import CompressedModel
from diffrate.patch.shapes import input_size

ATTENTION_OPSET = 23  # the first with an operator for attention
GELU_OPSET = 20  # the first with one for GELU
TRACED_BATCH = 2  # of one image torch would make a constant


def translations(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """What torch's exporter is to take for each of its operators, over its own choice, in files of `opset`."""
    import onnxscript

    op: Any = onnxscript.opset23 if opset >= ATTENTION_OPSET else onnxscript.opset18

    def length(x: Any, ord: float = 2.0, dim: Any = None, keepdim: bool = False, dtype: int = -1) -> Any:
        """The Euclidean length along `dim`: onnxruntime's quantizer knows the shape of a sum, not that of a norm."""
        if ord != 2 or dim is None:
            raise ValueError(f"norm: found order {ord} over {dim}; accepted: order 2 over some dimensions")
        x, axes = x if dtype == -1 else op.Cast(x, to=dtype), op.Constant(value_ints=list(dim))
        return op.Sqrt(op.ReduceSum(op.Mul(x, x), axes, keepdims=int(keepdim)))

    def highest(x: Any, dim: int, keepdim: bool = False) -> Any:
        """The highest values along `dim`, and where they are, by operators whose shapes the quantizer knows."""
        found = op.TopK(x, op.Constant(value_ints=[1]), axis=dim)
        return found if keepdim else tuple(op.Squeeze(part, op.Constant(value_ints=[dim])) for part in found)

    def gelu(x: Any, approximate: str = "none") -> Any:
        """In the order of operations that onnxruntime has a kernel for: it does not know that of torch's exporter."""

        def number(value: float) -> Any:
            return op.CastLike(op.Constant(value_float=value), x)

        if approximate == "tanh":
            cubic = op.Add(x, op.Mul(op.Pow(x, number(3.0)), number(0.044715)))
            bent = op.Tanh(op.Mul(cubic, number(math.sqrt(2 / math.pi))))
        else:
            bent = op.Erf(op.Div(x, number(math.sqrt(2))))
        return op.Mul(op.Mul(x, number(0.5)), op.Add(bent, number(1.0)))

    own: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.aten.max.dim: highest,
        torch.ops.aten.scaled_dot_product_attention.default: _attention(op, opset),
        torch.ops.aten.linalg_vector_norm.default: length,
    }
    return own if opset >= GELU_OPSET else own | {torch.ops.aten.gelu.default: gelu}


def _attention(op: Any, opset: int) -> Callable[..., Any]:
    """Fused attention in files of `opset`."""

    def side_by_side(heads: Any) -> Any:
        """`[B, N, H D]` of heads `[B, H, N, D]`."""
        _, count, tokens, width = heads.shape
        return op.Reshape(op.Transpose(heads, perm=[0, 2, 1, 3]), op.Constant(value_ints=[-1, tokens, count * width]))

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        """Fused attention `[B, H, Q, V]`, with heads side by side in the last axis, as the layers before leave them.

        onnxruntime's kernel takes a bias for every query, not one for all.
        """
        if opset < ATTENTION_OPSET:
            return _by_products(op, query, key, value, attn_mask, scale)
        heads, queries, width = query.shape[1], query.shape[2], value.shape[3]
        bias = attn_mask
        if bias is not None and bias.shape[2] == 1 and queries != 1:
            bias = op.Expand(bias, op.Constant(value_ints=[1, 1, queries, 1]))
        mixed, *_ = op.Attention(
            *map(side_by_side, (query, key, value)),
            *([] if bias is None else [bias]),
            q_num_heads=heads,
            kv_num_heads=heads,
            **({} if scale is None else {"scale": scale}),
        )
        apart = op.Reshape(mixed, op.Constant(value_ints=[-1, queries, heads, width]))
        return op.Transpose(apart, perm=[0, 2, 1, 3])

    return attention


def _by_products(op: Any, query: Any, key: Any, value: Any, bias: Any, scale: float | None) -> Any:
    """The same as two products, the first of which onnxruntime fuses with the transposition and the scale.

    It does so with the heads of all images in one axis alone: where heads and images have an axis each, it copies the
    keys once more.
    """
    (heads, queries, width), keys = query.shape[1:], key.shape[2]
    query, key = (
        op.Reshape(item, op.Constant(value_ints=[-1, count, width])) for item, count in ((query, queries), (key, keys))
    )
    scores = op.MatMul(query, op.Transpose(key, perm=[0, 2, 1]))
    scores = op.Mul(scores, op.CastLike(op.Constant(value_float=scale or 1 / math.sqrt(width)), scores))
    scores = op.Reshape(scores, op.Constant(value_ints=[-1, heads, queries, keys]))
    return op.MatMul(op.Softmax(scores if bias is None else op.Add(scores, bias), axis=-1), value)


class Normalization(nn.Module):
    """Normalises images in [0, 1] by `mean` and `std`, a number for each channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Images `[B, C, H, W]` as the model takes them."""
        return (images - self.mean) / self.std


class Logits(nn.Module):
    """Logits `[B, K]` in float32 of images `[B, C, H, W]` in float32, whatever the precision of the weights."""

    def __init__(self, model: CompressedModel, dtype: torch.dtype, normalization: nn.Module | None) -> None:
        super().__init__()
        self.model, self.dtype, self.normalization = model, dtype, normalization or nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Of the model at its kept counts."""
        return self.model(self.normalization(images).to(self.dtype), return_flop=False).float()


def traced(model: CompressedModel, dtype: torch.dtype, normalization: nn.Module | None) -> ExportedProgram:
    """`model` at its kept counts as a graph on the CPU, with weights in `dtype`; the model itself is not touched.

    Raises:
        ExportError: torch cannot trace it.
    """
    still = copy.deepcopy(model)
    still.compression.schedule = model.compression.current()
    still.compression._parameters.clear()  # rate logits, which nothing reads at fixed counts
    still = still.to("cpu", dtype).eval().requires_grad_(False)
    still.settle()
    images = torch.zeros(TRACED_BATCH, *input_size(model))
    try:
        # torch's own code, at what it copies from and at what it deprecates.
        with torch.no_grad(), no_warnings_of(r"torch\.|copyreg"):
            return torch.export.export(
                Logits(still, dtype, normalization).eval(), (images,), dynamic_shapes=({0: Dim("batch")},)
            )
    except Exception as error:  # torch has a class for each thing that it cannot trace
        raise ExportError(f"{type(model).__name__}: torch cannot trace it ({first_line(error)})") from error


def plain(model: CompressedModel) -> nn.Module:
    """`model` at its kept counts as a module of images `[B, C, H, W]` -> logits `[B, K]`, for inference, on the CPU.

    It has copies of the weights, pickles, compiles and exports for batches of any size. What `torch.save` leaves of it
    `torch.load(..., weights_only=False)` reads where torch alone is installed. Images are float32 in any precision.

    Raises:
        ExportError: `model` is not patched, torch is older than 2.8, or cannot trace it.
    """
    check_patched(model, ExportError)
    check_torch("diffrate.plain", TRACES)
    program = traced(model, placement_of(model).dtype, None)
    # torch's own module of the graph has checks of its input inside that do not pickle.
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
