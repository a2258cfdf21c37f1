"""How far apart does a layer hold the classes, against how wide each of them is?"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.diagnostics._summaries import ROUNDING, wide_dtype
from entropylens.registry import Block, Diagnostic, Metric, RepresentationReading, diagnostic

__all__ = [
    "ClassSeparation",
    "nearest_class_mean_accuracy",
    "within_between_ratio",
    "within_between_trace_ratio",
]

_PROBE: Final = (
    "exact for the rows of the probe set, which stay the same all run; module is the layer. "
    "Classes with one member are left out, since they have neither a width nor a mean without it. "
    "Absent where labels are not known, rows are positions of sequences, fewer than two classes "
    "are left, or a state is not finite"
)
_SCATTER: Final = (
    f"{_PROBE}, or class means do not differ. Classes count by their members, so that within and "
    "between add up to the whole scatter; a mean of few members carries noise of its own, which "
    "passes for distance between classes, so that probe sets of different sizes do not compare"
)
_COLLAPSED: Final = "each class has shrunk to a point, as far as its distance from others goes"
_OVERLAP: Final = "classes overlap: the layer has not told them apart, or labels are random"


def _metric(question: str, formula: str, high: str, low: str, **other: str) -> Metric:
    fixed = {"unit": "1", "estimator": _SCATTER}
    return Metric(question=question, formula=formula, high=high, low=low, **{**fixed, **other})


METRICS: Final[Mapping[str, Metric]] = {
    "representation/within_between_ratio": _metric(
        "How wide are classes in the directions that tell them apart?",
        "tr(S_W pinv(S_B)) / C, S_W = mean_i (x_i - m_c(i))(x_i - m_c(i))^T, "
        "S_B = sum_c n_c/N (m_c - m)(m_c - m)^T, m_c = class means, m = mean of all, C classes",
        _OVERLAP,
        f"{_COLLAPSED} (neural collapse, NC1)",
        cost="O(N C D + C^2 D + C^3)",
        source="Papyan, Han and Donoho (2020), arXiv 2008.08186, Fig. 6. Their released code does "
        "not divide by C, and inverts C - 1 singular values also where D is less or means depend "
        "on each other; here those below rounding are left out",
    ),
    "representation/within_between_trace_ratio": _metric(
        "How much do rows scatter within classes, against between them?",
        "tr S_W / tr S_B; its inverse is Fisher's ratio of the traces, its x / (1 + x) the share "
        "of the scatter that classes do not explain",
        _OVERLAP,
        _COLLAPSED,
        cost="O(N D)",
        source="Fisher (1936), of traces",
    ),
    "representation/nearest_class_mean_accuracy": _metric(
        "How often is a state nearest to the mean of its own class?",
        "share of rows i whose own class has the least ||x_i - m_k||^2 - v / n_k of all classes k, "
        "m_k and n_k of the own class without x_i, v = sum_i ||x_i - m_c(i)||^2 / (N - C); a tie "
        "of t classes counts 1/t",
        "a layer that sorts classes by distance alone",
        "near the share that guessing finds, 1/C: classes are not told apart by their means",
        estimator=f"{_PROBE}. A row's own mean is taken without it, or random labels would look "
        "sorted where classes have few members; v / n_k is what the noise of a mean adds to a "
        "squared distance, without which the own class, one member short, would look too far. "
        "Random labels then come out at 1/C or little above (0.102 for 51 members in 768 "
        "dimensions, 0.019 instead of 0.01 for 5)",
        cost="O(N C D)",
        source="Nearest class centre, NC4 of Papyan, Han and Donoho (2020), of labels instead of "
        "the network's decisions, leave-one-out and less the noise of the means",
    ),
}


def within_between_ratio(states: Tensor, labels: Tensor, classes: int) -> Tensor:
    """How wide are classes in the directions that tell them apart?

    ``tr(S_W pinv(S_B)) / C``, ``S_B = M^T M`` with a row ``sqrt(n_c/N) (m_c - m)`` for each class.
    With ``M M^T = U L U^T`` this is ``sum_k ||R M^T u_k||^2 / (C N l_k^2)``, R the rows less their
    class means: no matrix of D x D, and no inverse of what is 0. At most min(C - 1, D) of the l
    can be above 0; those below ``max(C 2^-52, 2^-46)`` of the squares of the class means are
    rounding and left out.

    Args:
        states: ``[N, D]``, any floating dtype.
        labels: ``[N]`` long, 0..classes - 1.
        classes: C, at least 2, each with a member.

    Returns:
        ``[]``, at least 0, in float64 where the device has it; NaN where the class means do not
        differ or a state is not finite.

    Unit: 1.
    Device: the states'; an accelerator's eigensolver waits for the host.
    Cost: O(N C D + C^2 D + C^3).
    Source: Papyan, Han and Donoho (2020), arXiv 2008.08186.

    Example:
        >>> states = torch.tensor([[2.0, 1.0], [2.0, -1.0], [-1.0, 0.0], [-3.0, 0.0]])
        >>> within_between_ratio(states, torch.tensor([0, 0, 1, 1]), 2)
        tensor(0.0625, dtype=torch.float64)
    """
    finite = states.isfinite().all()
    residuals, means, squares = _scatter(torch.where(finite, states, 0.0), labels, classes)
    lengths, directions = torch.linalg.eigh(means @ means.mT)
    share = max(classes * torch.finfo(means.dtype).eps, torch.finfo(torch.float32).eps ** 2)
    kept = lengths > share * squares
    along = residuals @ (means.mT @ directions)
    ratios = along.square().sum(0) / torch.where(kept, lengths, 1.0).square()
    ratio = torch.where(kept, ratios, 0.0).sum() / (classes * len(states))
    return torch.where(finite & kept.any(), ratio, torch.nan)


def within_between_trace_ratio(states: Tensor, labels: Tensor, classes: int) -> Tensor:
    """How much do rows scatter within classes, against between them?

    ``tr S_W / tr S_B``, classes weighted by their members: ``tr S_W + tr S_B`` is all scatter.

    Args:
        states: ``[N, D]``, any floating dtype.
        labels: ``[N]`` long, 0..classes - 1.
        classes: C, at least 2, each with a member.

    Returns:
        ``[]``, at least 0, in float64 where the device has it; NaN where the class means differ by
        less than 1e-6 of their size, or a state is not finite.

    Unit: 1.
    Device: the states'; no host synchronisation.
    Cost: O(N D).
    Source: Fisher (1936), of traces.

    Example:
        >>> states = torch.tensor([[2.0, 1.0], [2.0, -1.0], [-1.0, 0.0], [-3.0, 0.0]])
        >>> within_between_trace_ratio(states, torch.tensor([0, 0, 1, 1]), 2)
        tensor(0.2500, dtype=torch.float64)
    """
    residuals, means, squares = _scatter(states, labels, classes)
    between = means.square().sum()
    ratio = residuals.square().sum() / len(states) / between
    return torch.where(between > ROUNDING**2 * squares, ratio, torch.nan)


def nearest_class_mean_accuracy(states: Tensor, labels: Tensor, classes: int) -> Tensor:
    """How often is a state nearest to the mean of its own class, itself left out of it?

    Least of ``||x - m_k||^2 - v / n_k``, the own class without x: ``n/(n-1)`` times as far from x
    as the whole mean, of n - 1 members. v is the pooled variance within classes, so that v / n_k
    is what the noise of a mean of n_k adds; without it, the own class loses for being one member
    short, and random labels are found less often than by guessing. A tie of t classes, the own
    one among them, counts 1/t.

    Args:
        states: ``[N, D]``, any floating dtype.
        labels: ``[N]`` long, 0..classes - 1.
        classes: C, at least 2, each with two members or more.

    Returns:
        ``[]`` in 0..1, in float64 where the device has it; NaN where a state is not finite.

    Unit: 1.
    Device: the states'; no host synchronisation.
    Cost: O(N C D).
    Source: Papyan, Han and Donoho (2020), NC4, leave-one-out and less the noise of the means.

    Example:
        >>> states = torch.tensor([[0.0], [1.0], [5.0], [2.0]])
        >>> nearest_class_mean_accuracy(states, torch.tensor([0, 0, 1, 1]), 2)
        tensor(0.7500, dtype=torch.float64)
    """
    wide = states.to(wide_dtype(states))
    wide = wide - wide.mean(0)
    means, members = _means(wide, labels, classes)
    # Through products a distance loses half its digits, and ties with them.
    distances = torch.cdist(wide, means, compute_mode="donot_use_mm_for_euclid_dist").square()
    own = torch.arange(classes, device=states.device) == labels[:, None]
    variance = torch.where(own, distances, 0.0).sum() / (len(states) - classes)
    without = distances * (members / (members - 1)).square() - variance / (members - 1)
    distances = torch.where(own, without, distances - variance / members)
    nearest = distances == distances.amin(1, keepdim=True)
    accuracy = ((nearest & own).sum(1) / nearest.sum(1)).to(wide.dtype).mean()
    return torch.where(wide.isfinite().all(), accuracy, torch.nan)


def _means(states: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Mean and number of members of each class."""
    members = states.new_zeros(classes).index_add(0, labels, states.new_ones(len(states)))
    sums = states.new_zeros(classes, states.shape[1]).index_add(0, labels, states)
    return sums / members[:, None], members


def _scatter(states: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows less their class means, weighted class means less the mean, mean square of a row."""
    wide = states.to(wide_dtype(states))
    squares = wide.square().sum() / len(states)
    wide = wide - wide.mean(0)
    means, members = _means(wide, labels, classes)
    return wide - means[labels], means * (members / len(states)).sqrt()[:, None], squares


@diagnostic(
    reads="representation",
    every={"fast": 0, "balanced": 20, "full": 5},
    floor=200,
    metrics=METRICS,
)
class ClassSeparation(Diagnostic):
    """How each layer's states separate the classes of the probe set."""

    def measure(self, reading: RepresentationReading, state: Any) -> tuple[list[Block], Any]:
        """Measure the states of one probe, layer by layer."""
        if reading.labels is None or reading.are_tokens:
            return [], state
        rows, labels, classes = _repeated(reading.labels)
        if classes < 2:
            return [], state
        return [
            _layer(name, states, rows, labels, classes) for name, states in reading.states.items()
        ], state


def _repeated(labels: Sequence[int]) -> tuple[list[int], list[int], int]:
    """Rows whose class has another member, those classes numbered from 0, and how many they are."""
    numbers = [label for label, count in Counter(labels).items() if count > 1]
    number = {label: at for at, label in enumerate(numbers)}
    rows = [row for row, label in enumerate(labels) if label in number]
    return rows, [number[labels[row]] for row in rows], len(number)


def _layer(name: str, states: Tensor, rows: list[int], labels: list[int], classes: int) -> Block:
    states = states[torch.tensor(rows, device=states.device)]
    found = torch.tensor(labels, device=states.device)
    measures = (within_between_ratio, within_between_trace_ratio, nearest_class_mean_accuracy)
    values = torch.stack([measure(states, found, classes) for measure in measures]).float()
    weight = torch.where(values.isfinite(), float(len(rows)), 0.0)
    return Block.metrics(list(METRICS), values, weight=weight, modules=name)
