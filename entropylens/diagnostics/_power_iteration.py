"""The largest singular value, a step at a time."""

from collections.abc import Sequence
from contextlib import nullcontext
from math import sqrt
from typing import Final

import torch
from torch import Tensor

__all__ = ["power_iteration", "start_vector"]

_BLOCK: Final = 1 << 22
"""Entries of a matrix that are widened at once."""


def start_vector(n: int, device: torch.device | str) -> Tensor:
    """From which direction does a power iteration start?

    Signs hashed from the index (Murmur's finaliser), over sqrt(n): the same at every start, and
    with a part of about 1/sqrt(n) along whatever a network may have learned.

    Args:
        n: Length.
        device: Where it is made.

    Returns:
        ``[n]`` float32 of length 1.

    Device: as asked; no host synchronisation, no random numbers.
    Cost: O(n).

    Example:
        >>> start_vector(4, "cpu").square().sum()
        tensor(1.)
    """
    mask = 0xFFFFFFFF
    mixed = torch.arange(1, n + 1, device=device)
    for factor, shift in ((0x9E3779B1, 16), (0x85EBCA6B, 13), (0xC2B2AE35, 16)):
        mixed = (mixed * factor) & mask
        mixed = mixed ^ (mixed >> shift)
    return (2.0 * (mixed & 1) - 1.0) / sqrt(n)


def power_iteration(matrix: Tensor, vector: Tensor, steps: int = 1) -> tuple[Tensor, Tensor]:
    """How large is the largest singular value, going on from an earlier guess of its direction?

    Each step is ``u = W v / ||W v||``, ``v = W^T u / ||W^T u||``; the estimate is the last
    ``||W^T u||``. Where the guess has no image, as signs that sum to 0 have none in a constant
    matrix, the row with the largest entry is the next one. Products are in float32, in units of the
    largest entry, over blocks of rows, so that a matrix of a narrower dtype is neither multiplied
    in it nor widened whole.

    Args:
        matrix: ``[m, n]``, any floating dtype.
        vector: ``[n]`` the guess, of length 1: `start_vector`, or what the last call returned.
        steps: At least 1.

    Returns:
        The estimate ``[]``, float32: never above sigma_max, since it is taken down by 1e-6 of
        itself for rounding; NaN where an entry is NaN or infinite, 0 where all are 0. And the next
        guess ``[n]`` float32, which stays what it was in these cases.

    Device: the input's; no host synchronisation.
    Cost: 2 ``steps`` products of the matrix with a vector, and a look at its largest entry.
    Source: von Mises and Pollaczek-Geiringer (1929); warm-started as in spectral normalisation,
        Miyato et al. (2018).

    Example:
        >>> matrix = torch.diag(torch.tensor([1.0, 9.0]))
        >>> sigma, _ = power_iteration(matrix, start_vector(2, "cpu"), steps=3)
        >>> round(sigma.item(), 4)
        9.0
    """
    matrix = matrix.detach()
    rows = max(_BLOCK // matrix.shape[1], 1)
    blocks = (matrix,) if matrix.dtype == torch.float32 else matrix.split(rows)
    size = vector.new_zeros(())
    kind = matrix.device.type
    is_cast = torch.amp.is_autocast_available(kind)
    with torch.autocast(kind, enabled=False) if is_cast else nullcontext():
        unit, row = _largest_row(blocks)
        for _ in range(steps):
            product, image = torch.zeros_like(vector), vector.new_zeros(())
            for block in blocks:
                wide = block.float()
                part = wide @ (vector / unit)
                image = image + part.square().sum()
                product = product + (part / unit) @ wide
            image = image.sqrt()
            is_seen = image > 0
            following = torch.where(is_seen, product, row)
            length = following.norm()
            # A row without its image: sigma_max is no less than its length.
            size = length / torch.where(is_seen, image, 1.0)
            is_good = size.isfinite() & (size > 0)
            vector = torch.where(is_good, following / length, vector)
    return size * unit * (1 - 1e-6), vector


def _largest_row(blocks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The largest entry, and the row that it stands in, in units of it."""
    unit, row = _largest_row_of(blocks[0])
    for block in blocks[1:]:
        size, other = _largest_row_of(block)
        # What is NaN stays so.
        row = torch.where(size > unit, other, row)
        unit = torch.maximum(unit, size)
    unit = unit.clamp(min=torch.finfo(unit.dtype).tiny)
    return unit, row / unit


def _largest_row_of(block: Tensor) -> tuple[Tensor, Tensor]:
    sizes = torch.maximum(block.amax(1), -block.amin(1)).float()
    at = sizes.argmax(keepdim=True)
    return sizes[at].squeeze(0), block.index_select(0, at).squeeze(0).float()
