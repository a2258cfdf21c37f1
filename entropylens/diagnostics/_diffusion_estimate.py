"""Diffusion spectral entropy of more points than an eigensolver takes."""

from collections.abc import Callable, Iterator
from math import log
from typing import Final

import torch
from torch import Tensor

from entropylens.diagnostics._summaries import wide_dtype

__all__ = ["estimated_diffusion_entropy"]

_ROWS: Final = 1024
"""Rows of affinities that a product without the matrix holds at a time."""


def estimated_diffusion_entropy(
    states: Tensor,
    *,
    generator: torch.Generator,
    bandwidth: Tensor | float,
    alpha: float = 0.0,
    probes: int = 24,
    steps: int = 40,
) -> tuple[Tensor, Tensor]:
    """What is about the DSE of more points than an eigensolver takes?

    The DSE of all N points at t = 1: ``log2 tr S - sum lambda log2 lambda / tr S``. The sum is
    estimated by stochastic Lanczos quadrature with random signs, orthogonal to the eigenvector of
    1, and regressed on what the same probes say of ``tr S`` and ``||S||_F^2``, both of which are
    known. (A sub-sample of the points would have another, lower DSE.)

    Args:
        states: ``[N, D]``, any floating dtype.
        generator: What probes are drawn with, of the CPU.
        bandwidth: s; for a median take `median_bandwidth` of some of the rows.
        alpha: As in `diffusion_matrix`.
        probes: Random vectors, 4 or more.
        steps: Of Lanczos, with full orthogonalisation.

    Returns:
        The estimate and its standard error over probes (of a regression, residuals as if left out
        one by one). The quadrature's own error is not in it: none is seen at 40 steps. Both are NaN
        where a state or the bandwidth is not finite.

    Unit: bits.
    Device: the input's; no host synchronisation but in eigensolvers of ``[steps, steps]``.
    Cost: O(steps * N^2 (D + probes)) time, O(N (D + steps * probes)) memory.

    Source: Ubaru, Chen and Saad (2017), Fast estimation of tr(f(A)) via stochastic Lanczos
    quadrature.
    """
    points = states.to(wide_dtype(states))
    is_finite = points.isfinite().all() & (points.new_ones(()) * bandwidth).isfinite()
    # An eigensolver would raise.
    points = torch.where(is_finite, points, 0.0)
    bandwidth = torch.where(is_finite, bandwidth, points.new_ones(()))
    points = points - points.mean(0)
    count, one = len(points), torch.ones_like(points[:, :1])

    def product(vectors: Tensor, power: int = 1) -> Tensor:
        return torch.cat([rows @ vectors for rows in _rows(points, bandwidth, power)])

    density = product(one).pow(-alpha)
    degree = density * product(density)
    scale, top = density * degree.rsqrt(), degree.sqrt() / degree.sum().sqrt()
    trace = scale.square().sum()
    frobenius = (scale.square() * product(scale.square(), 2)).sum()
    signs = torch.randint(0, 2, (probes, count), generator=generator).to(points) * 2.0 - 1.0
    nodes, weights = _lanczos(lambda v: scale * product(scale * v), signs, top[:, 0], steps)
    nodes = nodes.clamp(min=0.0)
    sums = torch.special.entr(nodes).mul(weights).sum(-1)
    controls = torch.stack(
        [torch.ones_like(sums), (nodes * weights).sum(-1), (nodes.square() * weights).sum(-1)], 1
    )
    known = torch.stack([torch.ones_like(trace), trace - 1.0, frobenius - 1.0])
    # Columns of size 1 keep the normal equations apart.
    size = controls.square().mean(0).sqrt().clamp(min=1e-12)
    controls, known = controls / size, known / size
    inverse = torch.linalg.pinv(controls)
    share = known @ inverse
    left_over = sums - controls @ (inverse @ sums)
    # Each as if its probe had not been fitted: probes that scatter more are those that pull.
    alone = left_over / (1.0 - (controls * inverse.T).sum(1)).clamp(min=1e-3)
    error = (share * alone).norm()
    found = torch.stack([trace.log() + share @ sums / trace, error / trace]) / log(2.0)
    estimate, standard_error = torch.where(is_finite, found, torch.nan)
    return estimate, standard_error


def _rows(points: Tensor, bandwidth: Tensor | float, power: int) -> Iterator[Tensor]:
    """Affinities to a power, some rows at a time."""
    lengths = points.square().sum(1)
    for some, own in zip(points.split(_ROWS), lengths.split(_ROWS), strict=True):
        squared = (own[:, None] + lengths).addmm_(some, points.T, alpha=-2.0)
        yield squared.clamp_(min=0.0).mul_(-0.5 * power / bandwidth**2).exp_()


def _lanczos(
    product: Callable[[Tensor], Tensor], start: Tensor, top: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss quadrature for each row of ``start`` without ``top``."""
    start = start - (start @ top)[:, None] * top
    size = start.norm(dim=1)
    steps = min(steps, start.shape[1] - 1)
    basis = start.new_zeros(len(start), steps, start.shape[1])
    basis[:, 0] = start / size[:, None]
    matrix = start.new_zeros(len(start), steps, steps)
    for step in range(steps):
        following = product(basis[:, step].T).T
        matrix[:, step, step] = (basis[:, step] * following).sum(1)
        if step + 1 < steps:
            known = basis[:, : step + 1]
            for _ in range(2):  # twice is enough to be orthogonal to rounding
                following = following - (following @ top)[:, None] * top
                along = known @ following[:, :, None]
                following = following - (known.mT @ along).squeeze(-1)
            length = following.norm(dim=1)
            matrix[:, step, step + 1] = matrix[:, step + 1, step] = length
            basis[:, step + 1] = torch.where(length > 1e-13, following.T / length, 0.0).T
    nodes, vectors = torch.linalg.eigh(matrix)
    return nodes, vectors[:, 0].square() * size.square()[:, None]
