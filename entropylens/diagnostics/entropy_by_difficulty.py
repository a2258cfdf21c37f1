"""Is the policy undecided on easy and on hard prompts, and decided in between?"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.diagnostics._summaries import weighted_mean, wide_dtype
from entropylens.diagnostics.length_entropy import sequence_entropy
from entropylens.registry import Block, Diagnostic, Metric, PolicyReading, diagnostic

__all__ = [
    "EntropyByDifficulty",
    "cluster_moments",
    "difficulty_bin",
    "mean_and_error",
    "u_shape",
]

BINS: Final = 5
LABELS: Final = tuple(f"{b / BINS:.1f}-{(b + 1) / BINS:.1f}" for b in range(BINS))
DECAY: Final = 0.98
LEAST_SEQUENCES: Final = 1.0
"""Decayed number of sequences below which a bin's past is forgotten."""
LEAST_PROMPTS: Final = 2
"""Prompts in effect that a bin must exceed: the error of a mean of two is too rough."""
LEAST_BINS: Final = 3
DEVIATIONS: Final = 2.0

_WINDOW = (
    f"sequences with a known pass rate, each measured step's discounted by {DECAY:g} at the next; "
    f"a bin counts while it has at least {LEAST_SEQUENCES:g} discounted sequence, of more than "
    f"{LEAST_PROMPTS} prompts; absent until {LEAST_BINS} bins count, the easiest and the hardest "
    "among them; each rank's own"
)
_SOURCE = (
    "U-shape of DiffAdapt (2025), arXiv 2510.19669, on the model's own difficulty, 1 - pass rate, "
    "instead of the data set's labels"
)


def _metric(question: str, formula: str, high: str, low: str, **other: str) -> Metric:
    fixed = {
        "unit": "1",
        "estimator": _WINDOW,
        "cost": "O(tokens + sequences log sequences)",
        "source": _SOURCE,
    }
    return Metric(question=question, formula=formula, high=high, low=low, **{**fixed, **other})


METRICS: Final[Mapping[str, Metric]] = {
    "entropy/difficulty/mean": _metric(
        "How undecided is the policy on prompts of this difficulty?",
        "mean over sequences of the mean entropy of their tokens; difficulty = 1 - pass rate of "
        "the prompt's group, in the bin that module names (lower bound included, 1 in the last)",
        "undecided on prompts of this difficulty",
        "decided on prompts of this difficulty",
        unit="nats",
        estimator="sequences of this step with a known pass rate; of each its measured tokens, "
        "weighted by the tokens they stand for; weighted by the number of sequences",
    ),
    "entropy/difficulty/u_depth": _metric(
        "How far does entropy fall from easy prompts to those it is lowest on?",
        "(e_easy - min_b e_b) / e_easy, e_b the mean entropy of bin b, e_easy that of the easiest",
        "undecided on easy prompts: exploration where none is needed",
        "0: easy prompts are those the policy is most decided on",
    ),
    "entropy/difficulty/u_curvature": _metric(
        "Does entropy bend upwards at both ends of difficulty?",
        "quadratic coefficient of the least-squares parabola through e_b at the bins' centres, "
        "weighted by sequences",
        "above 0: lowest at medium difficulty",
        "below 0: highest at medium difficulty; near 0: a straight course",
        unit="nats",
    ),
    "entropy/difficulty/is_u": _metric(
        "Is entropy U-shaped in difficulty?",
        f"1 where the curvature is above 0 and both end bins exceed the lowest by more than "
        f"{DEVIATIONS:g} standard errors of the difference, else 0",
        "U: overthinking of easy prompts",
        "no U that the scatter does not explain",
        source=f"{_SOURCE}; standard errors over prompts, whose completions are alike, instead of "
        "a bootstrap",
    ),
}


def difficulty_bin(pass_rate: Tensor) -> Tensor:
    """How hard is each prompt for the policy?

    The bin of ``1 - pass_rate`` among five of equal width; a bound belongs to the bin above it,
    whatever float32 makes of it, and 1 to the last.

    Args:
        pass_rate: ``[...]`` in 0..1; NaN where not known.

    Returns:
        ``[...]`` integers 0 (easy) to 4 (hard), -1 where not known.

    Device: the input's; no host synchronisation.
    Cost: O(1) each.

    Example:
        >>> difficulty_bin(torch.tensor([1.0, 0.8, 0.5, 0.0, torch.nan]))
        tensor([ 0,  1,  2,  4, -1])
    """
    scaled = ((1 - pass_rate.nan_to_num()) * BINS + 1e-4).floor().clamp(0, BINS - 1).long()
    return torch.where(pass_rate.isnan(), -1, scaled)


def cluster_moments(values: Tensor, bins: Tensor, group: Tensor | None) -> Tensor:
    """What has to be kept of each bin for its mean and the error of that mean?

    With ``n`` the sequences and ``t`` the sum of values of each prompt in the bin, the sums over
    prompts of ``n, t, n^2, n t, t^2``. Completions of a prompt are alike, so prompts, not
    completions, are what is independent.

    Args:
        values: ``[sequences]``.
        bins: ``[sequences]`` integers; -1 leaves the sequence out.
        group: ``[sequences]`` integers, equal for one prompt; None takes each sequence as one.

    Returns:
        ``[5, bins]`` (the five sums, in float64 where the device has it).

    Device: the input's; no host synchronisation.
    Cost: O(sequences log sequences) time, O(sequences) memory.

    Example:
        >>> moments = cluster_moments(
        ...     torch.tensor([1.0, 3.0]), torch.tensor([0, 0]), torch.tensor([7, 7])
        ... )
        >>> moments[:, 0].tolist()
        [2.0, 4.0, 4.0, 8.0, 16.0]
    """
    prompt = torch.arange(len(values), device=values.device)
    if group is not None:
        ordered, order = group.sort()
        starts = torch.zeros_like(ordered)
        starts[1:] = ordered[1:] != ordered[:-1]
        prompt = torch.empty_like(order).scatter(0, order, starts.cumsum(0))
    member = bins == torch.arange(BINS, device=bins.device)[:, None]
    wide = values.to(wide_dtype(values))
    counts, totals = (
        torch.zeros_like(wide).expand(BINS, -1).index_add(1, prompt, part)
        for part in (member.to(wide.dtype), torch.where(member, wide, 0.0))
    )
    products = (counts, totals, counts * counts, counts * totals, totals * totals)
    return torch.stack([product.sum(-1) for product in products])


def mean_and_error(moments: Tensor) -> tuple[Tensor, Tensor]:
    """What is the mean of each bin, and how sure is it?

    ``m = sum t / sum n``; its standard error is that of a ratio of sums over prompts,
    ``sqrt(c / (c - 1) sum (t - n m)^2) / sum n`` with ``c = (sum n)^2 / sum n^2``, the prompts in
    effect.

    Args:
        moments: ``[..., 5, bins]``, as from `cluster_moments`. Where they are discounted, the first
            two by d, the last three by d^2.

    Returns:
        Means and standard errors, each ``[..., bins]``; NaN for an empty bin, and an error of NaN
        where one prompt is all there is.

    Device: the input's; no host synchronisation.
    Cost: O(bins).
    Source: Cochran (1977), Sampling Techniques, Section 6.4.
    """
    count, total, count_squared, product, total_squared = moments.unbind(-2)
    mean = total / count
    residual = total_squared - 2 * mean * product + mean.square() * count_squared
    prompts = count.square() / count_squared
    scale = torch.where(prompts > 1 + 1e-9, prompts / (prompts - 1), torch.nan)
    return mean, (scale * residual.clamp(min=0)).sqrt() / count


def u_shape(means: Tensor, errors: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Are both ends of a curve above its middle?

    Depth ``(e_first - min e) / e_first``; the quadratic coefficient of the parabola through the
    bins' centres (0.1, 0.3, ..., 0.9) by weighted least squares; and whether that is above 0 with
    both ends more than two standard errors (of the difference) above the lowest bin.

    Args:
        means: ``[..., bins]``; ignored where the weight is 0.
        errors: ``[..., bins]``, their standard errors.
        weights: ``[..., bins]``, at least 0.

    Returns:
        ``[3, ...]``: depth, curvature and 1 or 0; and ``[...]`` bool: three bins have weight, the
        first and the last among them, without which the values mean nothing.

    Device: the input's; no host synchronisation.
    Cost: O(bins).
    Source: DiffAdapt (2025), arXiv 2510.19669, describes the shape; the test is ours. Of
        permuted bins 3 to 4 % were called a U with three prompts in each, 2 % with twelve (5 to 7 %
        with two), in one look at the data; a run has many looks.

    Example:
        >>> means = torch.tensor([2.0, 1.25, 1.0, 1.25, 2.0])
        >>> found, judged = u_shape(means, torch.full((5,), 0.01), torch.ones(5))
        >>> [round(value, 2) for value in found.tolist()], bool(judged)
        ([0.5, 6.25, 1.0], True)
    """
    held = weights > 0
    judged = held[..., 0] & held[..., -1] & (held.sum(-1) >= LEAST_BINS)
    weights, means = torch.where(held, weights, 0.0), torch.where(held, means, 0.0)
    least, place = torch.where(held, means, torch.inf).min(-1, keepdim=True)
    curvature = _curvature(means, weights)
    variance = torch.where(held, errors, 0.0).square()
    limit = DEVIATIONS * (variance + variance.gather(-1, place)).sqrt()
    above = means - least > limit
    is_u = (curvature > 0) & above[..., 0] & above[..., -1]
    depth = 1 - least[..., 0] / means[..., 0]
    return torch.stack([depth, curvature, is_u.to(depth.dtype)]), judged


def _curvature(means: Tensor, weights: Tensor) -> Tensor:
    """Quadratic coefficient, by orthogonal polynomials: a solver would wait for the host."""
    total = weights.sum(-1, keepdim=True)
    centre = (torch.arange(BINS, device=means.device, dtype=means.dtype) + 0.5) / BINS

    def inner(one: Tensor, other: Tensor) -> Tensor:
        return (weights * one * other).sum(-1, keepdim=True)

    line = centre - inner(centre, torch.ones_like(centre)) / total
    parabola = centre.square() - inner(centre.square(), torch.ones_like(centre)) / total
    parabola = parabola - line * inner(line, parabola) / inner(line, line)
    return (inner(parabola, means) / inner(parabola, parabola))[..., 0]


@diagnostic(
    reads="policy",
    every={"fast": 10, "balanced": 1, "full": 1},
    floor={"fast": 200, "balanced": 50, "full": 20},
    metrics=METRICS,
)
class EntropyByDifficulty(Diagnostic):
    """Entropy by the pass rate of the prompt, and whether it is U-shaped."""

    def measure(self, reading: PolicyReading, state: Any) -> tuple[list[Block], Any]:
        """Compare easy and hard prompts of one step, and of the steps before it."""
        if reading.pass_rate is None:
            return [], state
        tokens, sequences = reading.tokens, len(reading.pass_rate)
        entropy, measured = sequence_entropy(
            tokens.entropy, tokens.weight, tokens.sequence, sequences
        )
        bins = torch.where(measured > 0, difficulty_bin(reading.pass_rate), -1)
        lasting = torch.where(entropy.isfinite(), bins, -1)
        moments = cluster_moments(entropy, lasting, reading.group)
        if state is not None:
            moments = torch.cat([DECAY * state[:2], DECAY**2 * state[2:]]) + moments
        member = (bins == torch.arange(BINS, device=bins.device)[:, None]).float()
        step = Block.metrics(
            ["entropy/difficulty/mean"] * BINS,
            weighted_mean(entropy, member),
            weight=member.sum(-1),
            modules=LABELS,
        )
        return [step, _shape_block(moments)], moments


def _shape_block(moments: Tensor) -> Block:
    means, errors = mean_and_error(moments)
    counts = moments[0]
    prompts = counts.square() / moments[2]
    known = (counts >= LEAST_SEQUENCES) & (prompts > LEAST_PROMPTS + 1e-6)
    values, judged = u_shape(means, errors, torch.where(known, counts, 0.0))
    weight = torch.where(judged, counts.sum(), 0.0).expand(3)
    weight = torch.where(values.isfinite(), weight, 0.0)
    names = [f"entropy/difficulty/{name}" for name in ("u_depth", "u_curvature", "is_u")]
    return Block.metrics(names, values.float(), weight=weight.float())
