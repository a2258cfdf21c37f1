"""Diffusion spectral entropy of a cloud of points and what its bandwidth makes of it.

Throughout, ``G_ij = exp(-|x_i - x_j|^2 / (2 s^2))`` are the affinities of N points (the diagonal is
kept: each point is its own neighbour), ``K = D_G^-a G D_G^-a`` the same with the density divided
out to the power a, ``S = D_K^-1/2 K D_K^-1/2`` the symmetric matrix with the eigenvalues of the
diffusion operator ``D_K^-1 K``; D are row sums. S is positive semidefinite (Bochner), so what
rounding makes negative is 0. Its largest eigenvalue is 1, of the vector sqrt(D_K).
"""

from collections import defaultdict
from collections.abc import Sequence
from math import log
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from entropylens.diagnostics._summaries import ROUNDING, wide_dtype

__all__ = [
    "RELEASED_BANDWIDTH",
    "Bandwidth",
    "BandwidthHealth",
    "affinities",
    "affinity_health",
    "affinity_information",
    "bandwidth_health",
    "diffusion_matrix",
    "diffusion_mutual_information",
    "diffusion_spectral_entropy",
    "median_bandwidth",
    "renyi_diffusion_entropy",
    "spectral_entropy",
    "squared_distances",
    "symmetric_diffusion",
]

Bandwidth = Tensor | float | Literal["median"]
Precision = Literal["exact", "fast"]
RELEASED_BANDWIDTH: Final = 10.0
"""s of the released code, whatever the scale of the data."""


def squared_distances(states: Tensor) -> Tensor:
    """How far apart is each pair of points, squared?

    Points are centred and ``|x|^2 + |y|^2 - 2 x y`` is taken in float64, whose error, about
    2e-16 of the greatest centred |x|^2, moves no affinity by more than that over s^2. Where the
    device has no float64, differences are taken one by one instead.

    Args:
        states: ``[N, D]``, any floating dtype.

    Returns:
        ``[N, N]``, at least 0 and 0 on the diagonal, in float64 where the device has it.

    Unit: that of the states, squared.
    Device: the input's; no host synchronisation.
    Cost: O(N^2 D) time, O(N^2) memory.
    """
    points = states.to(wide_dtype(states))
    points = points - points.mean(0)
    if points.dtype == torch.float32:
        return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").square()
    lengths = points.square().sum(1)
    squared = (lengths[:, None] + lengths).addmm_(points, points.T, alpha=-2.0)
    return squared.clamp_(min=0.0).fill_diagonal_(0.0)


def median_bandwidth(states: Tensor, squared: Tensor, factor: float = 1.0) -> Tensor:
    """At which scale do the points themselves lie?

    ``factor * median of |x_i - x_j|`` over the pairs that differ (the lower of two middle ones),
    which are those further apart than 1e-6 of the root mean square of |x|: what lies closer may
    differ by float32 rounding alone. Over all pairs the median would be 0 as soon as 71 % of the
    rows were one point, and whatever is left would look like so many directions. No less than those
    1e-6, which is what it is where no pair differs: then all affinities are near 1 and the DSE 0.

    Args:
        states: ``[N, D]``, at least two rows.
        squared: Their `squared_distances`.
        factor: What the median is multiplied by.

    Returns:
        ``[]``, above 0.

    Unit: that of the states.
    Device: the input's; no host synchronisation.
    Cost: O(N^2).
    """
    rounding = ROUNDING * states.to(squared.dtype).square().sum(1).mean().sqrt()
    is_apart = squared > rounding.square()
    apart = torch.where(is_apart, squared, torch.nan).nanmedian()
    median = torch.where(is_apart.any(), apart, squared.amax()).sqrt()
    return torch.maximum(factor * median, rounding).clamp(min=1e-18)


def affinities(states: Tensor, bandwidth: Bandwidth = "median") -> Tensor:
    """How near is each pair of points, from 0 to 1?

    ``G_ij = exp(-|x_i - x_j|^2 / (2 s^2))``. The released code's ``1 / (s sqrt(2 pi))`` cancels in
    all that is made of it.

    Args:
        states: ``[N, D]``, any floating dtype.
        bandwidth: s, or "median" for `median_bandwidth`.

    Returns:
        ``[N, N]``, symmetric, 1 on the diagonal, float64 where the device has it.

    Unit: 1.
    Device: the input's; no host synchronisation.
    Cost: O(N^2 D) time, O(N^2) memory.
    """
    squared = squared_distances(states)
    if isinstance(bandwidth, str):
        bandwidth = median_bandwidth(states, squared)
    return squared.mul_(-0.5 / bandwidth**2).exp_()


def _scales(affinity: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """``w`` with S = w G w, and the unit vector whose eigenvalue is 1."""
    density = affinity.sum(-1).pow(-alpha)
    degree = density * (affinity @ density[..., None]).squeeze(-1)
    return density * degree.rsqrt(), degree.sqrt() / degree.sum(-1, keepdim=True).sqrt()


def symmetric_diffusion(affinity: Tensor, alpha: float = 0.0) -> Tensor:
    """What is S of these affinities?

    Args:
        affinity: ``[..., N, N]`` G, symmetric, 1 on the diagonal.
        alpha: a: 0 keeps the density of the points, 1 divides it out.

    Returns:
        ``[..., N, N]``.

    Device: the input's; no host synchronisation.
    Cost: O(N^2).
    """
    scale, _ = _scales(affinity, alpha)
    return (affinity * scale[..., :, None]).mul_(scale[..., None, :])


def diffusion_matrix(states: Tensor, bandwidth: Bandwidth = "median", alpha: float = 0.0) -> Tensor:
    """With which probability does a random walk on the points pass from one to another?

    ``S = D_K^-1/2 K D_K^-1/2``, ``K = D_G^-a G D_G^-a``: symmetric, with the eigenvalues of the
    walk ``D_K^-1 K``. The released code says a = 1/2 but forms ``D_G^-1/2 G D_G^-1/2``, which has
    the eigenvalues of a = 0: density is not corrected for.

    Args:
        states: ``[N, D]``, any floating dtype.
        bandwidth: s, or "median" for `median_bandwidth`.
        alpha: a: 0 as released, 1/2 Fokker-Planck, 1 Laplace-Beltrami.

    Returns:
        ``[N, N]`` S, float64 where the device has it.

    Device: the input's; no host synchronisation.
    Cost: O(N^2 D) time, O(N^2) memory.
    Source: Coifman and Lafon (2006), Diffusion maps; Liao et al. (2023), arXiv 2312.04823.

    Example:
        >>> diffusion_matrix(torch.ones(2, 3), 1.0)
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]], dtype=torch.float64)
    """
    return symmetric_diffusion(affinities(states, bandwidth), alpha)


def spectral_entropy(
    affinity: Tensor, *, alpha: float = 0.0, t: float = 1.0, precision: Precision = "exact"
) -> Tensor:
    """Over how many eigenvalues does the diffusion of these affinities spread?

    ``-sum_i p_i log2 p_i``, ``p_i = lambda_i^t / sum lambda^t`` over all N eigenvalues of S.

    Args:
        affinity: ``[..., N, N]`` G.
        alpha: As in `symmetric_diffusion`.
        t: Steps of the walk, above 0.
        precision: "fast" takes the eigenvalue 1 out, whose vector is known, and the others in
            float32: half the time, within 1e-6 bits where the spectrum is spread, 1e-3 where most
            of it is 0.

    Returns:
        ``[...]``, 0..log2 N; NaN where an affinity is not finite.

    Unit: bits.
    Device: the input's; `torch.linalg.eigvalsh` waits for a GPU.
    Cost: O(N^3).
    """
    scale, top = _scales(affinity, alpha)
    matrix = (affinity * scale[..., :, None]).mul_(scale[..., None, :])
    if precision == "fast":
        matrix = matrix.addcmul_(top[..., :, None], top[..., None, :], value=-1.0).float()
    # What is not finite anywhere is not finite in a row sum; an eigensolver would raise.
    is_finite = scale.isfinite().all(-1, keepdim=True)
    found = torch.linalg.eigvalsh(matrix.masked_fill_(~is_finite[..., None], 0.0))
    found = torch.where(is_finite, found.to(affinity.dtype).clamp(min=0.0), torch.nan)
    if precision == "fast":
        found = torch.cat([found, torch.ones_like(found[..., :1])], -1)
    power = found if t == 1.0 else found.pow(t)
    return torch.special.entr(power / power.sum(-1, keepdim=True)).sum(-1) / log(2.0)


def diffusion_spectral_entropy(
    states: Tensor,
    *,
    bandwidth: Bandwidth = "median",
    alpha: float = 0.0,
    t: float = 1.0,
    precision: Precision = "exact",
) -> Tensor:
    """Along how many directions, in bits, does the cloud of points spread?

    DSE ``= -sum_i p_i log2 p_i``, ``p_i = lambda_i^t / sum lambda^t``, of the eigenvalues of
    `diffusion_matrix`. It grows with N: compare none of different N. ``bandwidth=10.0`` with
    ``alpha=0`` is the released number (which adds 2.2e-16 to each p, 1e-11 bits at N = 1,000); it
    follows the scale of the states, so that growing activations alone take it from 0 to log2 N.
    "median" does not: ``DSE(c X) = DSE(X)``.

    Args:
        states: ``[N, D]``, any floating dtype, at least two rows.
        bandwidth: s, or "median" for `median_bandwidth`.
        alpha: As in `diffusion_matrix`.
        t: Steps of the walk, above 0.
        precision: As in `spectral_entropy`.

    Returns:
        ``[]``, 0..log2 N: 0 for identical rows, log2 m for m far clusters of one size whose points
        coincide; NaN where a state is not finite.

    Unit: bits.
    Device: the input's; `torch.linalg.eigvalsh` waits for a GPU.
    Cost: O(N^2 D + N^3) time, O(N^2) memory; for N above 4,000 see `_diffusion_estimate`.
    Source: Liao et al. (2023), arXiv 2312.04823, and ChenLiu-1996/DiffusionSpectralEntropy.

    Example:
        >>> diffusion_spectral_entropy(1e3 * torch.eye(8), bandwidth=1.0)
        tensor(3., dtype=torch.float64)
    """
    return spectral_entropy(affinities(states, bandwidth), alpha=alpha, t=t, precision=precision)


def renyi_diffusion_entropy(matrix: Tensor) -> Tensor:
    """How spread is the diffusion's spectrum, without an eigenvalue?

    ``-log2(||S||_F^2 / tr(S)^2) = -log2 sum_i p_i^2``: the Renyi entropy of order 2 at t = 1 (t = 2
    would take ||S^2||, O(N^3)). It is at most the DSE.

    Args:
        matrix: ``[..., N, N]`` S of `diffusion_matrix`.

    Returns:
        ``[...]``, 0..log2 N.

    Unit: bits.
    Device: the input's; no host synchronisation.
    Cost: O(N^2).

    Example:
        >>> renyi_diffusion_entropy(torch.eye(8))
        tensor(3.)
    """
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    return 2.0 * trace.log2() - matrix.square().sum((-2, -1)).log2()


class BandwidthHealth(NamedTuple):
    """Whether a bandwidth shows the points, or only itself; each ``[]``."""

    neighbours: Tensor
    """Median over rows of ``(sum_{j!=i} G_ij)^2 / sum_{j!=i} G_ij^2``: neighbours that count."""
    self_share: Tensor
    """Median over rows of ``G_ii / sum_j G_ij``."""
    least_affinity: Tensor
    """``min_ij G_ij``."""
    is_condensed: Tensor
    """1 where fewer than 5 neighbours count, else 0."""
    is_saturated: Tensor
    """1 where more than half of a row is the point itself: S nears I and the DSE log2 N."""
    is_too_wide: Tensor
    """1 where every affinity is above 1/2: all points look like one."""


def affinity_health(affinity: Tensor) -> BandwidthHealth:
    """Do these affinities show the points, or only their bandwidth?

    Args:
        affinity: ``[N, N]`` G, 1 on the diagonal, at least two rows.

    Returns:
        `BandwidthHealth`; a row without any neighbour above 0 counts 0 of them. Flags are 0 where
        an affinity is not finite, the other fields NaN.

    Device: the input's; no host synchronisation.
    Cost: O(N^2).
    """
    others = affinity - torch.diag_embed(affinity.diagonal())
    # In units of the nearest neighbour: squares of far ones would underflow.
    nearest = others.amax(-1, keepdim=True)
    others = torch.where(nearest == 0, others, others / nearest)
    squares = others.square().sum(-1)
    counts = torch.where(squares == 0, squares, others.sum(-1).square() / squares)
    neighbours, self_share = _median(counts), _median(1.0 / affinity.sum(-1))
    least = affinity.amin()
    flags = (neighbours < 5, self_share > 0.5, least > 0.5)
    return BandwidthHealth(
        neighbours, self_share, least, *(flag.to(affinity.dtype) for flag in flags)
    )


def _median(values: Tensor) -> Tensor:
    ordered = values.sort().values
    count = len(values)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def bandwidth_health(states: Tensor, bandwidth: Bandwidth = "median") -> BandwidthHealth:
    """Does this bandwidth show the points, or only itself?

    A check that assumes no distribution, where `kde_bandwidths` is for Gaussian data.

    Args:
        states: ``[N, D]``, at least two rows.
        bandwidth: s, or "median" for `median_bandwidth`.

    Returns:
        As `affinity_health`.

    Device: the input's; no host synchronisation.
    Cost: O(N^2 D).

    Example:
        >>> bandwidth_health(1e3 * torch.eye(8), 1.0).is_saturated
        tensor(1., dtype=torch.float64)
    """
    return affinity_health(affinities(states, bandwidth))


def affinity_information(
    affinity: Tensor,
    labels: Sequence[int],
    *,
    repeats: int = 5,
    generator: torch.Generator,
    alpha: float = 0.0,
    t: float = 1.0,
) -> Tensor:
    """How many bits does the class of a point tell about where it lies?

    As `diffusion_mutual_information`, of affinities that are already there.

    Args:
        affinity: ``[N, N]`` G of all points: one bandwidth for every class.
        labels: N classes, on the host.
        repeats: Subsets that each class is compared with.
        generator: What subsets are drawn with, of the CPU.
        alpha: As in `diffusion_matrix`.
        t: As in `spectral_entropy`.

    Returns:
        ``[]``.

    Raises:
        ValueError: The number of labels is not N, or a class has one member.

    Unit: bits.
    Device: that of the affinities; `torch.linalg.eigvalsh` waits for a GPU.
    Cost: O((repeats + 1) * sum_c n_c^3).
    """
    count = len(affinity)
    members: defaultdict[int, list[int]] = defaultdict(list)
    for at, label in enumerate(labels):
        members[label].append(at)
    if len(labels) != count:
        raise ValueError(
            f"diffusion_mutual_information: expected a label for each of {count} rows, "
            f"got {len(labels)}"
        )
    if alone := sum(len(rows) == 1 for rows in members.values()):
        raise ValueError(
            f"diffusion_mutual_information: expected classes of two rows or more, got {alone} of "
            f"{len(members)} with one; a single point has no spread to compare, and labels that "
            "are tokens are mostly such"
        )
    gains = []
    for rows in members.values():
        drawn = [torch.randperm(count, generator=generator)[: len(rows)] for _ in range(repeats)]
        index = torch.stack([torch.tensor(rows), *drawn]).to(affinity.device)
        blocks = affinity[index[:, :, None], index[:, None, :]]
        found = spectral_entropy(blocks, alpha=alpha, t=t)
        gains.append(len(rows) / count * (found[1:].mean() - found[0]))
    return torch.stack(gains).sum()


def diffusion_mutual_information(
    states: Tensor,
    labels: Sequence[int],
    *,
    repeats: int = 5,
    generator: torch.Generator,
    bandwidth: Bandwidth = "median",
) -> Tensor:
    """How many bits does the class of a point tell about where it lies?

    DSMI ``= sum_c (n_c / N) (mean DSE of random subsets of n_c rows - DSE of class c)`` at t = 1
    and alpha = 0. Subsets are as large as the class since the DSE grows with N, and all take the
    bandwidth of the whole. With labels that tell nothing it scatters around 0 and may be below.

    Args:
        states: ``[N, D]``, any floating dtype.
        labels: N classes, on the host.
        repeats: Subsets that each class is compared with.
        generator: What subsets are drawn with, of the CPU.
        bandwidth: s, or "median" for `median_bandwidth`; 10 is as released.

    Returns:
        ``[]``; NaN where a state is not finite.

    Raises:
        ValueError: The number of labels is not N, or a class has one member: the released code
            counts it as a gain of 0, which would make a run over tokens look uninformative.

    Unit: bits.
    Device: the input's; `torch.linalg.eigvalsh` waits for a GPU.
    Cost: O(N^2 D + (repeats + 1) * sum_c n_c^3).
    Source: Liao et al. (2023), arXiv 2312.04823.
    """
    affinity = affinities(states, bandwidth)
    return affinity_information(affinity, labels, repeats=repeats, generator=generator)
