"""ONNX operators in place of those that torch's exporter takes, chosen by measurement in onnxruntime."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

ATTENTION_OPSET = 23  # the first with an operator for attention
GELU_OPSET = 20  # the first with one for GELU


def translations(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """What torch's exporter is to take for each of its operators, over its own choice, in files of `opset`."""
    import onnxscript

    op: Any = onnxscript.opset23 if opset >= ATTENTION_OPSET else onnxscript.opset18

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
            *(_side_by_side(op, item) for item in (query, key, value)),
            *([] if bias is None else [bias]),
            q_num_heads=heads,
            kv_num_heads=heads,
            **({} if scale is None else {"scale": scale}),
        )
        apart = op.Reshape(mixed, op.Constant(value_ints=[-1, queries, heads, width]))
        return op.Transpose(apart, perm=[0, 2, 1, 3])

    def length(x: Any, ord: float = 2.0, dim: Any = None, keepdim: bool = False, dtype: int = -1) -> Any:
        """The Euclidean length along `dim`: onnxruntime's quantizer knows the shape of a sum, not that of a norm."""
        if ord != 2 or dim is None:
            raise ValueError(f"norm: found order {ord} over {dim}; accepted: order 2 over some dimensions")
        axes = op.Constant(value_ints=list(dim))
        return op.Sqrt(op.ReduceSum(op.Mul(x, x), axes, keepdims=int(keepdim)))

    def highest(x: Any, dim: int, keepdim: bool = False) -> Any:
        """The highest values along `dim`, and where they are, by operators whose shapes the quantizer knows."""
        index = op.ArgMax(x, axis=dim, keepdims=1)
        found = op.GatherElements(x, index, axis=dim), index
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
        torch.ops.aten.scaled_dot_product_attention.default: attention,
        torch.ops.aten.linalg_vector_norm.default: length,
    }
    return own if opset >= GELU_OPSET else own | {torch.ops.aten.gelu.default: gelu}


def _by_products(op: Any, query: Any, key: Any, value: Any, bias: Any, scale: float | None) -> Any:
    """The same as two products, the first of which onnxruntime does with the transposing and the scale.

    It does so with the heads of all images in one axis alone: of keys with axes of their own for both, which come from
    a transposing, it makes one that takes longer.
    """
    (heads, queries, width), keys = query.shape[1:], key.shape[2]
    query, key = (
        op.Reshape(item, op.Constant(value_ints=[-1, count, width])) for item, count in ((query, queries), (key, keys))
    )
    scores = op.MatMul(query, op.Transpose(key, perm=[0, 2, 1]))
    scores = op.Mul(scores, op.CastLike(op.Constant(value_float=scale or 1 / math.sqrt(width)), scores))
    scores = op.Reshape(scores, op.Constant(value_ints=[-1, heads, queries, keys]))
    return op.MatMul(op.Softmax(scores if bias is None else op.Add(scores, bias), axis=-1), value)


def _side_by_side(op: Any, heads: Any) -> Any:
    """`[B, N, H D]` of heads `[B, H, N, D]`."""
    count, tokens, width = heads.shape[1], heads.shape[2], heads.shape[3]
    return op.Reshape(op.Transpose(heads, perm=[0, 2, 1, 3]), op.Constant(value_ints=[-1, tokens, count * width]))
