"""ONNX operators in place of those that torch's exporter takes, chosen by measurement in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

OPSET = 23  # the first with an operator for attention


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What torch's exporter is to take for each of its operators, over its own choice."""
    import onnxscript

    op: Any = onnxscript.opset23

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

    return {torch.ops.aten.scaled_dot_product_attention.default: attention}


def _side_by_side(op: Any, heads: Any) -> Any:
    """`[B, N, H D]` of heads `[B, H, N, D]`."""
    count, tokens, width = heads.shape[1], heads.shape[2], heads.shape[3]
    return op.Reshape(op.Transpose(heads, perm=[0, 2, 1, 3]), op.Constant(value_ints=[-1, tokens, count * width]))
