"""Straight-through operations: exact values forward, a chosen gradient backward.

Each is `value.detach() + (x - x.detach())`: the bracket is exactly 0 forward and carries the
gradient backward, so that integers stay integers to the last bit.
"""

from __future__ import annotations

from torch import Tensor


def with_gradient_of(value: Tensor, *carriers: Tensor) -> Tensor:
    """`value` forward; backward its gradient goes unchanged to each of `carriers`."""
    result = value.detach()
    for carrier in carriers:
        result = result + (carrier - carrier.detach())
    return result


def ste_ceil(x: Tensor) -> Tensor:
    """Round up; the gradient is that of `x` (paper, section 3.3)."""
    return with_gradient_of(x.ceil(), x)


def ste_leaving(entering: Tensor, pruned: Tensor, merged: Tensor) -> Tensor:
    """Tokens that leave a block: the minimum of all three.

    The gradient goes in full to the block's own two counts and not to the tokens that enter,
    whichever is the smallest, as in the published code.
    """
    return with_gradient_of(entering.minimum(pruned).minimum(merged), pruned, merged)
