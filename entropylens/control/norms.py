"""Norms of a rank's gradients and updates, and reading numbers on the host in one go."""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot
from typing import Any, Final

import torch
from torch import Tensor, nn

from entropylens.capture.asking import wide
from entropylens.control.ranks import local, stacked
from entropylens.diagnostics._summaries import wide_dtype

__all__ = [
    "as_number",
    "norm_of",
    "parts_of",
    "read",
    "stored",
    "sum_of_squares",
    "values_of",
]

_PLAIN: Final = frozenset((Tensor, nn.Parameter))


def sum_of_squares(gradients: list[Tensor], scale: Tensor | None = None) -> Tensor:
    """Their sum, over this rank's part of the gradients, divided by a gradient scaler's scale."""
    gradients = values_of(gradients)
    if scale is None:
        norms = wide(stacked(torch._foreach_norm(gradients, 2)))
        return norms.dot(norms)
    # The square of a scaled gradient may be too large for single precision.
    dtype = wide_dtype(gradients[0])
    norms = stacked(torch._foreach_norm(gradients, 2, dtype=dtype)) / scale.to(dtype)
    return norms.square().sum().float()


def parts_of(tensors: list[Tensor]) -> list[Tensor]:
    """This rank's parts, without a trace."""
    if all(type(one) in _PLAIN for one in tensors):
        return tensors
    return [local(one.detach()) for one in tensors]


def values_of(gradients: list[Tensor]) -> list[Tensor]:
    """What this rank has of them; of sparse ones what is there."""
    if any(one.is_sparse for one in gradients):
        gradients = [one.coalesce().values() if one.is_sparse else one for one in gradients]
    return parts_of(gradients)


def stored(gradient: Any) -> Tensor:
    """What to scale; of a sparse gradient several entries may stand for one."""
    return gradient._values() if gradient.is_sparse else local(gradient)


def norm_of(tensors: list[Tensor]) -> float:
    """Of all of them together; waits for the device."""
    return hypot(*stacked(torch._foreach_norm(tensors, 2)).tolist())


def as_number(value: Any, like: Tensor) -> Tensor:
    """``[]``, of another's device and dtype; the whole of one that is distributed."""
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    if isinstance(value, Tensor):
        return value.detach().to(like).reshape(())
    return torch.full_like(like, value)


def read(values: Sequence[Any]) -> list[float]:
    """On the host, with one wait for the device."""
    tensors = [one for one in values if isinstance(one, Tensor)]
    if not tensors:
        return [float(one) for one in values]
    try:
        joined = torch.stack(tensors)
    except RuntimeError:
        # They are on several devices, or not all of them without a dimension.
        joined = torch.stack([as_number(one, tensors[0]) for one in tensors])
    found = iter(joined.flatten().tolist())
    return [next(found) if isinstance(one, Tensor) else float(one) for one in values]
