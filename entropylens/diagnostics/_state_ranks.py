"""Ranks, spectral decay, size and likeness of clouds of hidden states."""

from typing import Final

import torch
from torch import Tensor

from entropylens.diagnostics._summaries import wide_dtype

__all__ = [
    "alpha_req",
    "effective_rank",
    "linear_cka",
    "mean_cosine",
    "nsdim",
    "numerical_rank",
    "participation_ratio",
    "rankme",
    "singular_values",
    "stable_rank",
    "state_norm",
]

FIRST, LAST, FEWEST = 6, 100, 10
"""Ranks that the power law is fitted to, and how many of them there have to be."""
_FLOAT32: Final = torch.finfo(torch.float32).eps


def singular_values(matrix: Tensor, total: Tensor | None = None) -> Tensor:
    """What are the singular values of a matrix, as far as they can be told from rounding?

    Roots of the eigenvalues of the Gram matrix of the smaller side, n = min(N, D). Squaring costs
    half the digits: an eigenvalue of less than ``max(n 2^-52, 2^-46)`` of ``total`` is noise of the
    eigensolver or of float32 entries, and 0 here. `nsdim` sees smaller ones.

    Args:
        matrix: ``[N, D]``, any floating dtype.
        total: ``[]`` sum of squares that rounding is a share of: that of the entries before their
            mean was taken off, for instance. The matrix's own where None.

    Returns:
        ``[min(N, D)]``, in descending order, in float64 where the device has it; NaN where an
        entry is not finite.

    Raises:
        ValueError: Not a matrix with rows and columns.

    Device: the input's; an accelerator's eigensolver waits for the host.
    Cost: O(N D n + n^3).

    Example:
        >>> singular_values(torch.tensor([[3.0, 0.0], [0.0, -4.0], [0.0, 0.0]]))
        tensor([4., 3.], dtype=torch.float64)
    """
    _check("singular_values", matrix)
    finite = matrix.isfinite().all()
    wide = torch.where(finite, matrix, 0.0).to(wide_dtype(matrix))
    gram = wide @ wide.mT if matrix.shape[0] <= matrix.shape[1] else wide.mT @ wide
    eigenvalues = torch.linalg.eigvalsh(gram).flip(-1)
    total = wide.square().sum() if total is None else total
    share = max(len(gram) * torch.finfo(wide.dtype).eps, _FLOAT32**2)
    kept = torch.where(eigenvalues > share * total, eigenvalues, 0.0).sqrt()
    return torch.where(finite, kept, torch.nan)


def _check(name: str, matrix: Tensor) -> None:
    if matrix.ndim != 2 or not matrix.numel():
        raise ValueError(
            f"{name}: expected a matrix [rows, columns] with entries, got shape "
            f"{tuple(matrix.shape)}"
        )


def rankme(values: Tensor, epsilon: float = 1e-7) -> Tensor:
    """Over how many directions do embeddings spread, by RankMe?

    ``exp(-sum_k p_k log p_k)``, ``p_k = s_k / sum s + epsilon``: the paper's p, which sum to
    ``1 + n epsilon``.

    Args:
        values: ``[n]`` singular values of the embeddings, not centred.
        epsilon: The paper's, for float32.

    Returns:
        ``[]``, 1..n up to the epsilon; NaN where all are 0.

    Unit: 1, directions.
    Device: the input's; no host synchronisation.
    Cost: O(n).
    Source: Garrido et al. (2023), arXiv 2210.02885, Eq. 1.

    Example:
        >>> rankme(torch.tensor([2.0, 2.0, 2.0]))
        tensor(3.)
    """
    shares = values / values.sum() + epsilon
    return torch.special.entr(shares).sum().exp()


def effective_rank(values: Tensor) -> Tensor:
    """Over how many directions does a matrix spread?

    ``exp(H(p))``, ``p = s / sum s``.

    Args:
        values: ``[n]`` singular values; of centred states for the rank of how they differ.

    Returns:
        ``[]``, 1..n, at most the rank; NaN where all are 0.

    Unit: 1, directions.
    Device: the input's; no host synchronisation.
    Cost: O(n).
    Source: Roy and Vetterli (2007).

    Example:
        >>> effective_rank(torch.tensor([2.0, 2.0, 0.0]))
        tensor(2.)
    """
    return rankme(values, 0.0)


def participation_ratio(values: Tensor) -> Tensor:
    """How many directions share most of the variance?

    ``(sum l)^2 / sum l^2``, ``l = s^2``: the exponential of the Renyi entropy of order 2.

    Args:
        values: ``[n]`` singular values of centred states.

    Returns:
        ``[]``, 1..n; NaN where all are 0.

    Unit: 1, directions.
    Device: the input's; no host synchronisation.
    Cost: O(n).
    Source: Gao et al. (2017).

    Example:
        >>> participation_ratio(torch.tensor([1.0, 1.0, 0.0]))
        tensor(2.)
    """
    squares = values.square()
    return squares.sum().square() / squares.square().sum()


def stable_rank(values: Tensor) -> Tensor:
    """How many directions as large as the largest would hold all of the squares?

    ``||A||_F^2 / ||A||_2^2 = sum s^2 / max s^2``.

    Args:
        values: ``[n]`` singular values.

    Returns:
        ``[]``, 1..n; NaN where all are 0.

    Unit: 1, directions.
    Device: the input's; no host synchronisation.
    Cost: O(n).
    Source: Rudelson and Vershynin (2007).

    Example:
        >>> stable_rank(torch.tensor([2.0, 1.0, 1.0]))
        tensor(1.5000)
    """
    squares = values.square()
    return squares.sum() / squares.amax()


def alpha_req(values: Tensor, first: int = FIRST, last: int = LAST) -> Tensor:
    """How fast does the spectrum of the covariance decay?

    alpha of ``l_n ~ n^-alpha``, ``l = s^2``: minus the slope of log l_n on log n by least squares
    with weights 1/n, which gives every factor in rank the same say.

    Args:
        values: ``[n]`` singular values of centred states, descending; zeros take no part.
        first: First rank of the fit, from 1: leading directions follow no law.
        last: Last rank of the fit.

    Returns:
        ``[]``; NaN where fewer than 10 of these ranks hold a singular value above 0.

    Unit: 1.
    Device: the input's; no host synchronisation.
    Cost: O(n).
    Source: Agrawal et al. (2022); Stringer et al. (2019).

    Example:
        >>> alpha_req(torch.arange(1, 51) ** -0.75)
        tensor(1.5000)
    """
    chosen = values[first - 1 : last]
    ranks = torch.arange(first, first + len(chosen), device=values.device).to(values.dtype)
    usable = chosen > 0
    weight = torch.where(usable, 1 / ranks, 0.0)
    x, y = ranks.log(), 2 * torch.where(usable, chosen, 1.0).log()
    x = x - (weight * x).sum() / weight.sum()
    slope = (weight * x * y).sum() / (weight * x.square()).sum()
    return torch.where(usable.sum() >= FEWEST, -slope, torch.nan)


def numerical_rank(values: Tensor, tolerance: float) -> Tensor:
    """How many singular values are above a share of the largest?

    ``#{k: s_k > tolerance * max s}``.

    Args:
        values: ``[n]`` singular values.
        tolerance: Share of the largest; below about 1e-6 use `nsdim`.

    Returns:
        ``[]`` in the dtype of the values, 0..n; NaN where one is.

    Unit: 1, directions.
    Device: the input's; no host synchronisation.
    Cost: O(n).

    Example:
        >>> numerical_rank(torch.tensor([1.0, 0.1, 0.001]), 0.01)
        tensor(2.)
    """
    count = (values > tolerance * values.amax()).sum().to(values.dtype)
    return torch.where(values.isnan().any(), torch.nan, count)


def nsdim(matrix: Tensor, tolerance: float | None = None) -> Tensor:
    """How many functions span a family of functions, up to a tolerance?

    ``#{k: s_k(A) > tolerance * s_1}`` with ``A_ij = f_j(x_i)``: the least dimension of a space that
    comes that close to the sampled family, a Kolmogorov n-width inverted. More points and more
    members can only raise it; where it stops to grow, it is the family's.

    Args:
        matrix: ``[points, members]`` values of sampled members at sampled points, or a layer's
            states at its inputs; float64 for the default tolerance to mean much.
        tolerance: Share of the largest singular value; ``max(points, members)`` times the
            matrix's machine epsilon where None.

    Returns:
        ``[]``, in float64 where the device has it.

    Raises:
        ValueError: Not a matrix with rows and columns.

    Unit: 1, dimensions.
    Device: the input's; an accelerator's decomposition waits for the host.
    Cost: O(points * members * min(points, members)).
    Source: derived from the abstract of Liu, Yu and Yong (2024), arXiv 2409.16697, whose own
        definition was not available.

    Example:
        >>> x = torch.linspace(-1, 1, 50, dtype=torch.float64)
        >>> nsdim(torch.stack([x, 2 * x + 1, 3 * x - 2, torch.ones_like(x)], 1)).item()
        2.0
    """
    _check("nsdim", matrix)
    if tolerance is None:
        tolerance = max(matrix.shape) * torch.finfo(matrix.dtype).eps
    return numerical_rank(torch.linalg.svdvals(matrix.to(wide_dtype(matrix))), tolerance)


def state_norm(states: Tensor) -> Tensor:
    """How large is a state?

    ``sqrt(mean_i ||x_i||_2^2)``.

    Args:
        states: ``[N, D]``, any floating dtype.

    Returns:
        ``[]``, in float64 where the device has it; NaN or infinity where an entry is.

    Unit: that of the states.
    Device: the input's; no host synchronisation.
    Cost: O(N D).

    Example:
        >>> state_norm(torch.tensor([[3.0, 4.0], [0.0, -5.0]]))
        tensor(5., dtype=torch.float64)
    """
    return states.to(wide_dtype(states)).square().sum(-1).mean().sqrt()


def mean_cosine(states: Tensor) -> Tensor:
    """Do all states point the same way?

    Mean over pairs of different rows of ``cos(x_i, x_j)``, from the sum of the unit vectors:
    ``(||sum_i u_i||^2 - m) / (m (m - 1))`` over the m rows that are not 0.

    Args:
        states: ``[N, D]``, any floating dtype.

    Returns:
        ``[]`` in -1/(m-1)..1, in float64 where the device has it; NaN where an entry is not finite
        or fewer than two rows are not 0.

    Unit: 1.
    Device: the input's; no host synchronisation.
    Cost: O(N D).
    Source: Ethayarajh (2019), arXiv 1909.00512.

    Example:
        >>> mean_cosine(torch.tensor([[1.0, 0.0], [0.0, 7.0], [2.0, 0.0]])) * 3
        tensor(1., dtype=torch.float64)
    """
    wide = states.to(wide_dtype(states))
    norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    units = torch.where(norms == 0, 0.0, wide / norms)
    rows = (norms != 0).sum()
    return (units.sum(0).square().sum() - rows) / (rows * (rows - 1))


def linear_cka(first: Tensor, second: Tensor, *, debiased: bool = False) -> Tensor:
    """Do two representations place the same rows alike, up to rotation and scale?

    ``<K, L> / (||K|| ||L||)`` of the centred Gram matrices ``K = X X^T``, ``L = Y Y^T``, which is
    ``||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F)``.

    Args:
        first: ``[N, D]``, any floating dtype.
        second: ``[N, E]``, the same rows.
        debiased: Whether inner products are the unbiased ones of Song et al. (2012): with few rows
            and many columns, unrelated representations else look alike.

    Returns:
        ``[]`` in 0..1, debiased also below 0; NaN where rows do not differ, in float64 where the
        device has it.

    Raises:
        ValueError: Rows differ in number, or are fewer than 4 where debiased.

    Unit: 1.
    Device: the inputs'; no host synchronisation.
    Cost: O(N^2 (D + E)) time, O(N^2) memory.
    Source: Kornblith et al. (2019), arXiv 1905.00414; Nguyen et al. (2021) for the debiased one.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 5.0], [4.0, 0.0]])
        >>> round(linear_cka(x, 3 * x.flip(1) + 1).item(), 6)
        1.0
    """
    rows = len(first)
    if rows != len(second) or (debiased and rows < 4):
        raise ValueError(
            f"linear_cka: expected the same rows twice, at least 4 where debiased, got {rows} and "
            f"{len(second)}"
        )
    x, y = (states.to(wide_dtype(states)) for states in (first, second))
    k, l = (_gram(states - states.mean(0), debiased) for states in (x, y))  # noqa: E741
    inner = _unbiased_product if debiased else lambda a, b: (a * b).sum()
    return inner(k, l) / (inner(k, k) * inner(l, l)).sqrt()


def _gram(states: Tensor, without_diagonal: bool) -> Tensor:
    gram = states @ states.mT
    return gram - gram.diagonal().diag() if without_diagonal else gram


def _unbiased_product(first: Tensor, second: Tensor) -> Tensor:
    """Unbiased HSIC times n (n - 3), of Gram matrices without their diagonals."""
    rows = len(first)
    sums = first.sum() * second.sum() / ((rows - 1) * (rows - 2))
    return (first * second).sum() + sums - 2 * (first.sum(0) @ second.sum(0)) / (rows - 2)
