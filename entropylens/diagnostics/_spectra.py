"""Singular values of weight matrices, what they say, and what they would be by chance."""

from dataclasses import dataclass
from math import exp, log, sqrt
from typing import Final

import torch
from torch import Tensor

from entropylens.diagnostics._summaries import wide_dtype

__all__ = [
    "MarchenkoPastur",
    "Summary",
    "effective_shape",
    "gram_matrix",
    "marchenko_pastur",
    "null_entropy_deficit",
    "null_kappa",
    "null_log_kappa",
    "permuted",
    "rounding_floor",
    "singular_values",
    "summarise",
]

_BLOCK: Final = 1 << 22
"""Entries of a matrix that are widened at once."""
_RELATIVE: Final = 1e-6
"""Relative error up to which a singular value from a Gram matrix is taken."""
_GRAM_ERROR: Final = 2.0
"""Error of the Gram matrix's eigenvalues in units of sqrt(k) eps lambda_max; at most 1.5 was seen
over shapes 64 x 64 to 1024 x 1024 and 64 x 8192, four kinds of spectrum, kappa 1e3 to 1e6."""
_ROUNDING: Final = 0.2124
"""Root mean square of rounding to nearest, relative to that of the entries, in units of eps: the
error is uniform over a step of eps x / m, 1 / sqrt(12) of it, where m in 1..2 is the mantissa of x,
and E 1 / m^2 = 3 / (8 ln 2) for the log-uniform m of entries that spread over some octaves."""
_MOVED: Final = 0.1
"""Share by which rounding may move sigma_min before kappa counts as unknown."""
_LOST: Final = 0.01
"""Nats for each direction that rounding may move the log-volume before it counts as unknown."""
_EDELMAN: Final = 1.537
"""Limit of E log kappa - log n of a square real Gaussian matrix."""
_TRACY_WIDOM_MEAN: Final = -1.2065
_TRACY_WIDOM_99: Final = 2.02
_FEWEST: Final = 8
"""Eigenvalues below which they follow no law."""
_SUMMED: Final = 32
"""By how many roundings an entry may be off that is itself a sum, of a product of matrices."""
_PASSES: Final = 30
"""Of fitting the variance and leaving out what is above the edge by it: each leaves out more."""

Shape = tuple[int, int] | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Summary:
    """What the singular values of one matrix say; every field is ``[]``."""

    sigma_max: Tensor
    sigma_min: Tensor
    """Smallest of the min(m, n)."""
    kappa: Tensor
    """sigma_max / sigma_min as it stands in the numbers; infinite where sigma_min is 0."""
    kappa_floor: Tensor
    """What kappa is at least, given that storage rounded the entries."""
    is_kappa_known: Tensor
    """Bool: rounding moved sigma_min, and so kappa, by less than 10 %."""
    stable_rank: Tensor
    effective_rank: Tensor
    log_volume: Tensor
    """Nats."""
    entropy_deficit: Tensor
    """Nats, at least 0."""
    is_volume_known: Tensor
    """Bool: rounding moved ``log_volume`` and ``entropy_deficit`` by less than about 0.01 nats for
    each direction. False where a singular value is 0."""


@dataclass(frozen=True)
class MarchenkoPastur:
    """Singular values against those of independent entries; every field is ``[]``.

    NaN where too few singular values are above rounding.
    """

    variance: Tensor
    """Of one entry, without the outliers."""
    distance: Tensor
    """Kolmogorov and Smirnov's, 0..1."""
    outliers: Tensor
    """How many eigenvalues lie above the edge, in the singular values' dtype."""


def singular_values(matrix: Tensor) -> Tensor:
    """Which singular values does a matrix have?

    Square roots of the eigenvalues of the smaller Gram matrix in float64; where that does not
    resolve the smallest to 1e-6 of itself (`sqrt` of rounding: kappa above about 1.4e4 at k = 576)
    the singular values of the matrix in float64, of its triangular factor where it is twice as long
    as wide. Those are right to about ``sqrt(k) 2.2e-16 sigma_max``.

    Args:
        matrix: ``[m, n]``, any floating dtype; entries whose squares are finite in float64.

    Returns:
        ``[min(m, n)]`` descending, float64 (float32 on MPS, computed in float64 on the host); all
        NaN where an entry is NaN or infinite.

    Raises:
        ValueError: Not a matrix, or an empty one.

    Unit: that of the entries.
    Device: the input's. The solvers of `torch.linalg` wait for the device, so looking at whether
        the smallest is resolved adds no wait; on the meta device the first route is taken.
    Cost: O(m n min(m, n)) time, O(min(m, n)^2) memory besides a block of rows; the second route
        holds the whole matrix in float64, and the solver's copy of it. On one core, in ms,
        against svdvals in float64 (and float32): 21 to 32 (22) at 576 x 576, 30 to 64 (37) at
        1536 x 576, 30 to 182 (105) at 576 x 1536, 0.44 s to 1.4 (0.7) at 49152 x 576, 100 to 250
        (150) at 1024 x 1024, 0.56 s to 2.3 (1.4) at 2048 x 2048 (`benchmarks/spectra.py`). Where
        the second route has to follow, a square matrix takes 1.6 times svdvals alone; of Gaussian
        ones of 576 x 576 one in eleven does.

    Example:
        >>> singular_values(torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 4.0]]))
        tensor([4., 3.], dtype=torch.float64)
    """
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(
            f"singular_values: expected a matrix with entries, got shape {tuple(matrix.shape)}"
        )
    if matrix.device.type == "mps":
        return singular_values(matrix.cpu()).to(matrix.device, torch.float32)
    gram = gram_matrix(matrix)
    is_finite = gram.diagonal().isfinite().all()
    eigenvalues = torch.linalg.eigvalsh(torch.where(is_finite, gram, 0.0)).flip(0).clamp(min=0)
    found = eigenvalues.sqrt()
    if not matrix.is_meta and not _is_resolved(eigenvalues):
        found = _by_factors(matrix)
    return torch.where(is_finite, found, torch.nan)


def gram_matrix(matrix: Tensor) -> Tensor:
    """Which inner products do the rows or columns have, whichever are fewer?

    ``W W^T`` or ``W^T W``, accumulated over blocks, so that a matrix of a narrower dtype is never
    there whole in float64.

    Args:
        matrix: ``[m, n]``, any floating dtype.

    Returns:
        ``[k, k]``, ``k = min(m, n)``, float64 where the device has it.

    Device: the input's; no host synchronisation.
    Cost: O(m n k) time, O(k^2) memory and a block of rows.

    Example:
        >>> gram_matrix(torch.tensor([[1.0, 2.0, 0.0]]))
        tensor([[5.]], dtype=torch.float64)
    """
    tall = matrix.detach() if matrix.shape[0] >= matrix.shape[1] else matrix.detach().T
    k = tall.shape[1]
    gram = torch.zeros(k, k, dtype=wide_dtype(matrix), device=matrix.device)
    for block in tall.split(max(_BLOCK // k, 1)):
        wide = block.to(gram.dtype)
        gram.addmm_(wide.T, wide)
    return gram


def _is_resolved(eigenvalues: Tensor) -> Tensor:
    """Whether the smallest of a Gram matrix's eigenvalues, descending, is more than rounding."""
    eps = torch.finfo(eigenvalues.dtype).eps
    error = _GRAM_ERROR * sqrt(len(eigenvalues)) * eps * eigenvalues[0]
    return error <= 2 * _RELATIVE * eigenvalues[-1]


def _by_factors(matrix: Tensor) -> Tensor:
    tall = (matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T).detach().double()
    if tall.shape[0] >= 2 * tall.shape[1]:
        tall = torch.linalg.qr(tall, mode="r").R
    return torch.linalg.svdvals(tall)


def rounding_floor(singular: Tensor, shape: tuple[int, int], stored: torch.dtype) -> Tensor:
    """Below which size is the smallest singular value an effect of how the matrix is stored?

    Rounding to nearest adds independent errors of standard deviation
    ``nu = 0.212 eps ||W||_F / sqrt(m n)`` to the entries (at least ``1/sqrt(12)`` of the smallest
    number that the dtype has). To second order they move sigma_min by ``a nu`` either way and by
    ``d nu^2 / (2 sigma_min)`` upwards, with ``d = |m - n|`` and ``a = sqrt(2 t - 1)``, where t
    counts the singular values as small as the smallest, since t equal ones repel each other by
    ``nu sqrt(2 t)``: ``sum_i (sigma_min / sigma_i)^2``, or where that is more, the largest t whose
    t smallest are below ``3 nu sqrt(t)``. The floor is where both moves make 10 %:
    ``5 nu (a + sqrt(a^2 + d / 5))``. The error of the float64 solver counts in nu too.

    Args:
        singular: ``[k]`` descending.
        shape: ``(m, n)`` of the matrix, k its smaller side.
        stored: Precision of its entries.

    Returns:
        ``[]``, singular's dtype.

    Unit: that of the entries.
    Device: the input's; no host synchronisation.
    Cost: O(k).
    Source: derived; checked by rounding matrices of known kappa
        (`tests/diagnostics/test_spectra.py`).

    Example:
        >>> ones = torch.ones(100, dtype=torch.float64)
        >>> rounding_floor(ones, (100, 100), torch.bfloat16)
        tensor(0.0234, dtype=torch.float64)
    """
    noise = _noise(singular, shape, stored)
    return _floor(noise, noise * _repulsion(singular, noise), shape)


def _floor(noise: Tensor, moved: Tensor, shape: tuple[int, int]) -> Tensor:
    lift = 2 * _MOVED * abs(shape[0] - shape[1])
    return (moved + (moved.square() + lift * noise.square()).sqrt()) / (2 * _MOVED)


def _noise(singular: Tensor, shape: Shape, stored: torch.dtype) -> Tensor:
    """Standard deviation of what rounding adds to an entry, and to a singular value."""
    kept = torch.finfo(stored)
    entry = singular.square().sum().sqrt() / (shape[0] * shape[1]) ** 0.5
    rounding = _ROUNDING * kept.eps * entry
    coarsest = kept.smallest_normal * kept.eps / sqrt(12)
    solver = sqrt(len(singular)) * torch.finfo(torch.float64).eps * singular[0]
    return torch.hypot(rounding.clamp(min=coarsest), solver)


def _repulsion(singular: Tensor, noise: Tensor) -> Tensor:
    """By how many times ``noise`` it moves the smallest, for those that lie as low."""
    smallest = singular[-1]
    alike = torch.where(singular <= smallest, 1.0, smallest / singular).square().sum()
    count = torch.arange(1, len(singular) + 1, device=singular.device)
    is_drowned = singular.flip(0) <= 3 * noise * count.sqrt()
    return (2 * torch.maximum(alike, (count * is_drowned).amax()) - 1).sqrt()


def summarise(
    singular: Tensor,
    shape: tuple[int, int],
    stored: torch.dtype = torch.float32,
    *,
    rank: int | None = None,
) -> Summary:
    """What does the spectrum of a matrix say of what passes through it?

    - kappa: ``sigma_max / sigma_min``; it is known where sigma_min is above `rounding_floor`, and
      else at least ``sigma_max / (sigma_min + 2 a nu)``, two standard deviations of rounding.
    - stable rank: ``||W||_F^2 / sigma_max^2``.
    - effective rank: ``exp(-sum_i p_i log p_i)``, ``p_i = sigma_i / sum_j sigma_j``.
    - log-volume: ``sum_i log sigma_i``, the entropy that a Gaussian input of unit covariance gains.
    - entropy deficit: ``(k/2) log(||W||_F^2 / k) - sum_i log sigma_i``: how much less that is than
      with all singular values equal; at least ``log((kappa + 1/kappa) / 2)``.

    Args:
        singular: ``[min(m, n)]`` descending, as from `singular_values`.
        shape: ``(m, n)`` of the matrix.
        stored: Precision of its entries.
        rank: Rank that the matrix is known to have, as a product of thin factors: only that many
            singular values count. By default all do, and where some are 0 kappa is infinite and the
            volume unknown.

    Returns:
        The summary, singular's dtype; NaN where a singular value is, and ratios where all are 0.

    Unit: sigma that of the entries, volume and deficit nats, else 1.
    Device: the input's; no host synchronisation.
    Cost: O(min(m, n)).
    Source: Golub and Van Loan; Roy and Vetterli (2007); Ludwig (2025), KappaTune,
        arXiv 2506.16289; the deficit and its bound are derived from the latter's claim.

    Example:
        >>> of = summarise(torch.tensor([3.0, 2.0, 1.0]).double(), (3, 3))
        >>> of.kappa, of.stable_rank
        (tensor(3., dtype=torch.float64), tensor(1.5556, dtype=torch.float64))
    """
    noise = _noise(singular, shape, stored)
    counted = singular[:rank]
    moved = noise * _repulsion(counted, noise)
    largest, smallest = counted[0], counted[-1]
    square = counted.square().sum()
    relative = counted / (square / len(counted)).sqrt()
    share = counted / counted.sum()
    return Summary(
        sigma_max=largest,
        sigma_min=smallest,
        kappa=largest / smallest,
        kappa_floor=torch.where(
            largest > 0, (largest / (smallest + 2 * moved)).clamp(min=1), torch.nan
        ),
        is_kappa_known=smallest > _floor(noise, moved, shape),
        stable_rank=square / largest.square(),
        effective_rank=torch.special.entr(share).sum().exp(),
        log_volume=counted.log().sum(),
        entropy_deficit=0.0 - relative.log().sum().clamp(max=0),
        is_volume_known=(noise / counted).mean() <= _LOST,
    )


def null_log_kappa(m: int, n: int) -> float:
    """Which log condition number has a matrix of this shape whose entries are independent?

    E log kappa of Gaussian entries: ``log((s+ - c+) / (s- + c-))`` with Marchenko and Pastur's
    edges ``s+- = sqrt(N) +- sqrt(k)`` (k the smaller side, N the other), shifted by the mean of
    Tracy and Widom's law, ``c+- = 0.603 (1/sqrt(k) +- 1/sqrt(N) [+ w k^(-3/2)])^(1/3)``; w is such
    that square matrices have Edelman's ``log n + 1.537``.

    Args:
        m: Rows.
        n: Columns.

    Returns:
        Nats; 0 for a vector. Simulated for k = 8 .. 512 and k / N = 0.25, 0.5, 0.75, 0.9, 0.95,
        0.99 and 1, the error is below 0.03 from k = 16 on (beyond the simulation's own), below 0.09
        at k = 8; below that up to 0.4.

    Device: the host.
    Cost: O(1).
    Source: Marchenko and Pastur (1967); Edelman (1988); Johnstone (2001); joined here.

    Example:
        >>> round(null_log_kappa(2048, 2048) - log(2048), 2)
        1.53
    """
    k, longer = min(m, n), max(m, n)
    if k == 1:
        return 0.0
    half = -_TRACY_WIDOM_MEAN / 2
    hard = (2 * exp(-_EDELMAN) / half) ** 3 / k**1.5
    above, below = 1 / sqrt(k) + 1 / sqrt(longer), 1 / sqrt(k) - 1 / sqrt(longer)
    largest = sqrt(longer) + sqrt(k) - half * above ** (1 / 3)
    smallest = sqrt(longer) - sqrt(k) + half * (below + hard) ** (1 / 3)
    return log(largest / smallest)


def null_kappa(m: int, n: int) -> float:
    """Which condition number has a matrix of this shape whose entries are independent?

    The geometric mean, ``exp(E log kappa)`` of `null_log_kappa`: a square matrix's kappa has no
    mean.

    Args:
        m: Rows.
        n: Columns.

    Returns:
        At least 1.

    Device: the host.
    Cost: O(1).

    Example:
        >>> round(null_kappa(256, 1024), 1)
        2.9
    """
    return exp(null_log_kappa(m, n))


def null_entropy_deficit(m: int, n: int) -> float:
    """Which entropy deficit has a matrix of this shape whose entries are independent?

    Exactly, for Gaussian entries, whatever their variance: with k the smaller side and N the other,
    ``(k/2) (psi(k N / 2) - log(k / 2)) - (1/2) sum_(i < k) (psi((N - i) / 2) + log 2)``, psi the
    digamma function: W W^T is Wishart.

    Args:
        m: Rows.
        n: Columns.

    Returns:
        Nats, at least 0.

    Device: the host.
    Cost: O(min(m, n)).
    Source: the log-determinant of a Wishart matrix (Goodman, 1963; Bartlett's decomposition).

    Example:
        >>> round(null_entropy_deficit(256, 1024), 2)
        17.6
    """
    k, longer = min(m, n), max(m, n)
    freedom = (longer - torch.arange(k, dtype=torch.float64)) / 2
    total = torch.special.digamma(torch.tensor(k * longer / 2, dtype=torch.float64)) - log(k / 2)
    found = k * total - (torch.special.digamma(freedom) + log(2)).sum()
    return max(float(found) / 2, 0.0)


def effective_shape(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """How many rows and columns of a matrix are not all zero?

    What is left when dead units and inputs that are never there are taken out: the singular values
    above 0 are the same.

    Args:
        matrix: ``[m, n]``, any floating dtype.

    Returns:
        Rows and columns, each ``[]`` int64.

    Device: the input's; no host synchronisation.
    Cost: O(m n).

    Example:
        >>> effective_shape(torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]]))
        (tensor(1), tensor(2))
    """
    matrix = matrix.detach()
    rows, columns = ((matrix.amax(side) != 0) | (matrix.amin(side) != 0) for side in (1, 0))
    return rows.sum(), columns.sum()


def marchenko_pastur(
    singular: Tensor, shape: Shape, stored: torch.dtype = torch.float32
) -> MarchenkoPastur:
    """Does a matrix look like independent noise, and what stands out of it?

    Eigenvalues ``lambda = sigma^2 / N`` (N the longer side) against the law of independent entries.
    The variance is the mean of the lambdas that are no outliers, found again and again from all of
    them down; an outlier is above Tracy and Widom's 99 % point ``mu + 2.02 s`` of the largest.

    Only singular values above the norm that rounding has as a matrix of its own,
    ``nu (sqrt(m) + sqrt(n))``, are counted, and the law is that of as many rows: zeros would take
    the variance to 0. nu is that of `rounding_floor`, or 32 times what it is for float32 where that
    is more (float64 for what is stored so), since entries that are sums have more.

    Args:
        singular: ``[k]``, any order, k the smaller side.
        shape: ``(m, n)``; of a matrix with rows or columns of zeros its `effective_shape`.
        stored: Precision of its entries.

    Returns:
        Variance of an entry, the distance ``sup |F - F_MP|`` of the eigenvalues, the outliers; all
        NaN where fewer than 8 eigenvalues, or than half of the smaller side, are counted.

    Device: the input's; no host synchronisation.
    Cost: O(k log k).
    Source: Marchenko and Pastur (1967); Johnstone (2001).

    Example:
        >>> noise = torch.randn(100, 300, generator=torch.Generator().manual_seed(1))
        >>> found = marchenko_pastur(singular_values(noise), (100, 300))
        >>> round(found.variance.item(), 1), found.outliers.item()
        (1.0, 0.0)
    """
    ordered = singular.sort().values
    rows, columns = (ordered.new_ones(()) * side for side in shape)
    shorter, longer = torch.minimum(rows, columns), torch.maximum(rows, columns)
    noise = _largest_noise(ordered.flip(0), (rows, columns), stored)
    is_counted = ordered > noise * (rows.sqrt() + columns.sqrt())
    count = is_counted.sum().to(ordered.dtype)
    is_enough = (count >= _FEWEST) & (2 * count >= shorter)
    eigenvalues = ordered.square() / longer
    edge = _edge(count, longer)
    variance = eigenvalues.sum() / count
    for _ in range(_PASSES):
        kept = is_counted & (eigenvalues <= edge * variance)
        variance = torch.where(kept, eigenvalues, 0.0).sum() / kept.sum()
    law = _law(eigenvalues / variance, count / longer)
    steps = (torch.arange(len(ordered), device=singular.device) - len(ordered) + count) / count
    far = torch.where(is_counted, torch.maximum(law - steps, steps + 1 / count - law), 0.0)
    outliers = (eigenvalues > edge * variance).sum().to(singular.dtype)
    return MarchenkoPastur(
        *(torch.where(is_enough, found, torch.nan) for found in (variance, far.amax(), outliers))
    )


def _largest_noise(singular: Tensor, shape: Shape, stored: torch.dtype) -> Tensor:
    """Standard deviation of what storage, or the sum that an entry is, adds to it."""
    summed = torch.float64 if stored == torch.float64 else torch.float32
    return torch.maximum(_noise(singular, shape, stored), _SUMMED * _noise(singular, shape, summed))


def _edge(shorter: Tensor, longer: Tensor) -> Tensor:
    """Tracy and Widom's 99 % point of the largest eigenvalue for unit variance."""
    others = (longer - 1).clamp(min=1)
    root = (longer - 1).sqrt() + shorter.sqrt()
    width = root * (others.rsqrt() + shorter.rsqrt()) ** (1 / 3)
    return (root.square() + _TRACY_WIDOM_99 * width) / longer


def _law(eigenvalues: Tensor, q: float | Tensor) -> Tensor:
    """Marchenko and Pastur's distribution function for unit variance and ``q <= 1``."""
    low, high = (1 - q**0.5) ** 2, (1 + q**0.5) ** 2
    inside = eigenvalues.clamp(low, high)
    above, below = high - inside, inside - low
    root = (above * below).sqrt()
    first = torch.atan2(above - below, 2 * root)
    second = torch.atan2(low * above - high * below, 2 * (1 - q) * root)
    return 0.5 + (root - (1 + q) * first + (1 - q) * second) / (2 * torch.pi * q)


def permuted(matrix: Tensor, seed: int) -> Tensor:
    """What would the matrix be if its entries stood anywhere?

    The null that keeps the entries themselves, heavy tails included, and no structure.

    Args:
        matrix: ``[m, n]``.
        seed: Of a generator of our own, on the host.

    Returns:
        ``[m, n]``, the same entries in random places.

    Device: the input's.
    Cost: O(m n) time and memory, 8 bytes an entry for the order.

    Example:
        >>> permuted(torch.arange(4.0).reshape(2, 2), 0).flatten().sort().values
        tensor([0., 1., 2., 3.])
    """
    order = torch.randperm(matrix.numel(), generator=torch.Generator().manual_seed(seed))
    return matrix.flatten()[order.to(matrix.device)].reshape(matrix.shape)
