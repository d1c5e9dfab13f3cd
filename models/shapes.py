"""Models as shapes alone: without storage, and without the time that first weights take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# What fills a tensor in place when a model is built, and changes nothing in one that has no values.
FILLING = frozenset(
    {
        *(Tensor.uniform_, Tensor.normal_, Tensor.fill_, Tensor.zero_),
        *(Tensor.erfinv_, Tensor.mul_, Tensor.add_, Tensor.clamp_),
    }
)


@contextmanager
def shapes_alone() -> Iterator[None]:
    """What is built inside is on the meta device."""
    with torch.device("meta"), _WithoutFilling():
        yield


class _WithoutFilling(TorchFunctionMode):
    """Passes over the filling of tensors on the meta device, most of the time that building takes there."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        values: Sequence[Any] = (),
        named: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in FILLING and values[0].is_meta:
            return values[0]
        return func(*values, **(named or {}))
