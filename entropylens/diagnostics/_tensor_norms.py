"""Norms of many tensors at once, and what they say of an update, tensor by tensor."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.diagnostics._summaries import wide_dtype

__all__ = [
    "SQUARES",
    "joined_norms",
    "limit_shares",
    "sizes_of",
    "staleness",
    "tensor_norms",
    "update_norms",
    "zero_update_shares",
]

_HELD: Final = 1 << 24
"""Elements that are worked on at once; more would hold further copies of the model."""
_EPSILON: Final = 1e-8
"""Adam's usual one; below its square a second moment counts as that."""

SQUARES: Final = 2.0
_COUNT: Final = 1.0
_LARGEST: Final = float("inf")
"""Orders of norms: what several parts of one tensor make together is the norm of their norms."""

_Tensors = list[Tensor] | tuple[Tensor, ...]
_Parts = Iterable[tuple[Any, ...]]
"""Tensors of one shape that belong together; what else is among them goes with all of them."""


def tensor_norms(tensors: Iterable[Tensor], order: float = SQUARES) -> Tensor:
    """How large is each of these tensors?

    ``(sum |x|^order)^(1/order)``, accumulated in float64 where the device has it.

    Args:
        tensors: ``n`` real tensors of any shape and floating dtype, on one device; taken one after
            the other, few at once.
        order: 1, 2 or infinity.

    Returns:
        ``[n]``, in float64 where the device has it; NaN where an element is.

    Device: the input's; no host synchronisation.
    Cost: one read, and some kernels for each 2^24 elements.

    Example:
        >>> tensor_norms([torch.tensor([3.0, 4.0]), torch.zeros(2, 2)])
        tensor([5., 0.], dtype=torch.float64)
    """
    return _norms(lambda values: values, order, ((one,) for one in tensors))


def update_norms(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """How far did each tensor move?

    ``||after - before||_2``, differences in float32 or, of float64 tensors, in that.

    Args:
        before: ``n`` tensors of any floating dtype, on one device.
        after: The same after the step.

    Returns:
        ``[n]``, in float64 where the device has it.

    Device: the input's; no host synchronisation.
    Cost: two reads, and some kernels for each 2^24 elements.
    """
    return _norms(torch._foreach_sub, SQUARES, zip(after, before, strict=True))


def staleness(
    gradients: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    corrections: Sequence[Tensor | float],
) -> Tensor:
    """Does each second moment still know how large the gradient is?

    ``RMS_t = sqrt(mean(g^2 / max(v / c, eps^2)))`` with ``eps = 1e-8``. 1 where v is as large as
    the squared gradient; above about 2 the gradient has outgrown it.

    Args:
        gradients: ``n`` tensors, on one device.
        second_moments: v of each, of its shape.
        corrections: c of each, ``[]`` or a number; 1 - beta_2^t of Adam, 1 where there is none.

    Returns:
        ``[n]``, in float64 where the device has it.

    Device: the input's; no host synchronisation.
    Cost: two reads, and one kernel for each tensor beside some for each 2^24 elements.
    Source: Wortsman et al. (2023), arXiv 2304.13013, Sec. 3 and Algorithm 2.

    Example:
        >>> g = torch.full((4,), 2.0)
        >>> staleness([g], [torch.ones(4)], [1.0])
        tensor([2.], dtype=torch.float64)
    """
    parts = zip(gradients, second_moments, corrections, strict=True)
    return _norms(_stale, SQUARES, parts) / sizes_of(gradients).sqrt()


def zero_update_shares(
    before: Sequence[Tensor], after: Sequence[Tensor], gradients: Sequence[Tensor]
) -> Tensor:
    """Which share of the elements that have a gradient did the step leave as they were?

    ``#(after = before and g != 0) / #(g != 0)``; elements whose gradient is NaN are in neither.

    Args:
        before: ``n`` tensors of any floating dtype, as they are stored, on one device.
        after: The same after the step.
        gradients: Of each, of its shape.

    Returns:
        ``[n]`` in 0..1, in float64 where the device has it; NaN where no gradient differs from 0,
        or the tensor's move is not finite.

    Device: the input's; no host synchronisation.
    Cost: six reads, and some kernels for each 2^24 elements.

    Example:
        >>> old = torch.ones(4, dtype=torch.bfloat16)
        >>> new = old - torch.tensor([0.0, 1e-4, 1e-2, 0.0]).bfloat16()
        >>> zero_update_shares([old], [new], [torch.tensor([0.0, 1e-4, 1e-2, 1e-9])])
        tensor([0.6667], dtype=torch.float64)
    """
    having = _norms(torch._foreach_sign, _COUNT, ((g,) for g in gradients))
    moved = _norms(_moved, _COUNT, zip(after, before, gradients, strict=True))
    is_known = (having > 0) & update_norms(before, after).isfinite()
    return torch.where(is_known, (having - moved) / having, torch.nan)


def limit_shares(gradients: Sequence[Tensor]) -> Tensor:
    """Which share of each gradient's elements is at one limit?

    ``#(|g| = max |g|) / size`` where more than one element has it, else 0; also 0 where all are 0.

    Args:
        gradients: ``n`` tensors, on one device.

    Returns:
        ``[n]`` in 0..1, in float64 where the device has it; NaN where an element is not finite.

    Device: the input's; no host synchronisation.
    Cost: two reads, and one kernel for each tensor beside some for each 2^24 elements.

    Example:
        >>> gradient = torch.tensor([0.5, -3.0, 3.0, 1.0]).clamp(-1, 1)
        >>> limit_shares([gradient, torch.tensor([1.0, 2.0])])
        tensor([0.7500, 0.0000], dtype=torch.float64)
    """
    largest = tensor_norms(gradients, _LARGEST)
    sizes = sizes_of(gradients)
    below = _norms(_below, _COUNT, zip(gradients, largest, strict=True))
    count = sizes - below
    share = torch.where((count > 1) & (largest > 0), count / sizes, 0.0)
    return torch.where(largest.isfinite(), share, torch.nan)


def _stale(gradients: _Tensors, moments: _Tensors, corrections: Sequence[Any]) -> _Tensors:
    hats = [moment / by for moment, by in zip(moments, corrections, strict=True)]
    floored = torch._foreach_clamp_min(hats, _EPSILON**2)
    return torch._foreach_div(gradients, list(torch._foreach_sqrt(floored)))


def _moved(after: _Tensors, before: _Tensors, gradients: _Tensors) -> _Tensors:
    moves = torch._foreach_sign(torch._foreach_sub(after, before))
    return torch._foreach_mul(moves, list(torch._foreach_sign(gradients)))


def _below(gradients: _Tensors, largest: _Tensors) -> _Tensors:
    return torch._foreach_sign(torch._foreach_sub(torch._foreach_abs(gradients), largest))


def sizes_of(tensors: Sequence[Tensor]) -> Tensor:
    """How many elements does each tensor have?

    Args:
        tensors: ``n`` of any shape, at least one, on one device.

    Returns:
        ``[n]``, in float64 where the device has it.

    Device: the input's; no host synchronisation.
    Cost: some kernels; no tensor is read.

    Example:
        >>> sizes_of([torch.ones(2, 3), torch.tensor(1.0)])
        tensor([6., 1.], dtype=torch.float64)
    """
    # Numbers of the host that a kernel is called with: no copy, which would wait for the stream.
    first = tensors[0]
    zeros = torch.zeros(len(tensors), dtype=wide_dtype(first), device=first.device)
    counts = [float(tensor.numel()) for tensor in tensors]
    return torch.stack(torch._foreach_add(list(zeros.unbind()), counts))


def _norms(make: Callable[..., _Tensors], order: float, parts: _Parts) -> Tensor:
    """Norms of what ``make`` makes of each part; large ones go through it in pieces."""
    found: list[Tensor] = []
    pieces: list[int] = []
    held: list[tuple[Any, ...]] = []
    elements = 0
    for part in parts:
        cut = _cut(part)
        pieces.append(len(cut))
        for piece in cut:
            held.append(piece)
            elements += piece[0].numel()
            if elements >= _HELD:
                found += _measured(make, order, held)
                held, elements = [], 0
    if held:
        found += _measured(make, order, held)
    return joined_norms(torch.stack(found), pieces, order)


def _cut(part: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    size = part[0].numel()
    if size <= _HELD:
        return [part]
    count = -(-size // _HELD)
    columns = [
        one.reshape(-1).split(_HELD)
        if isinstance(one, Tensor) and one.numel() == size
        else [one] * count
        for one in part
    ]
    return list(zip(*columns, strict=True))


def _measured(
    make: Callable[..., _Tensors], order: float, held: Sequence[tuple[Any, ...]]
) -> Sequence[Tensor]:
    made = make(*[_full(column) for column in zip(*held, strict=True)])
    return torch._foreach_norm(made, order, dtype=wide_dtype(made[0]))


def _full(column: Sequence[Any]) -> list[Any]:
    """The tensors of a column in float32, where they have less."""
    halves = [one for one in column if isinstance(one, Tensor) and one.itemsize < 4]
    if not halves:
        return list(column)
    full = [torch.empty_like(half, dtype=torch.float32) for half in halves]
    torch._foreach_copy_(full, halves)
    filled = iter(full)
    return [next(filled) if isinstance(one, Tensor) and one.itemsize < 4 else one for one in column]


def joined_norms(norms: Tensor, counts: Sequence[int], order: float) -> Tensor:
    """Norms of so many of the norms each, in turn."""
    if len(counts) == len(norms):
        return norms
    return torch.stack(list(torch._foreach_norm(list(norms.split(list(counts))), order)))
