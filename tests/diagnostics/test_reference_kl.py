from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from readings import policy

from entropylens.diagnostics.reference_kl import ReferenceKL, k3
from entropylens.registry import PolicyReading


def measured(reading: PolicyReading) -> dict[str, float]:
    blocks, _ = ReferenceKL().measure(reading, None)
    return {
        name: value
        for block in blocks
        if float(block.columns["weight"]) > 0
        for name, value in zip(block.columns["name"], block.columns["value"].tolist(), strict=True)
    }


def reading(
    logprob: Sequence[float],
    reference: Sequence[float],
    weight: Sequence[float],
    sequence: Sequence[int] | None = None,
) -> PolicyReading:
    n = len(logprob)
    rows = torch.tensor(sequence or [0] * n)
    found = policy(rows=1, columns=n)
    tokens = replace(
        found.tokens,
        logprob=torch.tensor(logprob),
        weight=torch.tensor(weight),
        present=torch.tensor(weight) > 0,
        sequence=rows,
        sequence_tokens=torch.bincount(rows, weights=torch.tensor(weight).double()).round().long(),
    )
    return replace(found, tokens=tokens, reference_logprob=torch.tensor(reference))


def test_both_estimators_average_to_the_divergence_under_the_policy() -> None:
    p = np.array([0.5, 0.25, 0.15, 0.09, 0.01])
    q = np.array([0.1, 0.3, 0.3, 0.1, 0.2])
    found = measured(reading(np.log(p).tolist(), np.log(q).tolist(), p.tolist()))
    divergence = float((p * np.log(p / q)).sum())
    assert found["kl/mean"] == pytest.approx(divergence, rel=1e-6)
    assert found["kl/k1/mean"] == pytest.approx(divergence, rel=1e-6)
    assert found["kl/max"] == pytest.approx((q / p - 1 - np.log(q / p)).max(), rel=1e-6)


def test_the_sequence_mean_averages_to_the_divergence_between_whole_completions() -> None:
    """A policy of two steps whose probabilities are halves and quarters, so copies stand for it."""
    first = np.array([0.5, 0.25, 0.25])
    second = np.array([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]])
    reference_first = np.array([0.2, 0.3, 0.5])
    reference_second = np.array([[0.6, 0.3, 0.1], [0.1, 0.1, 0.8], [0.3, 0.4, 0.3]])
    logprob: list[float] = []
    reference: list[float] = []
    divergence = 0.0
    for a, b in product(range(3), repeat=2):
        probability = first[a] * second[a, b]
        other = reference_first[a] * reference_second[a, b]
        divergence += probability * np.log(probability / other)
        copies = round(16 * probability)
        logprob += [np.log(first[a]), np.log(second[a, b])] * copies
        reference += [np.log(reference_first[a]), np.log(reference_second[a, b])] * copies
    sequence = [i // 2 for i in range(len(logprob))]
    found = measured(reading(logprob, reference, [1.0] * len(logprob), sequence))
    assert found["kl/sequence/mean"] == pytest.approx(divergence, rel=1e-6)
    assert found["kl/k1/mean"] == pytest.approx(divergence / 2, rel=1e-6)


def test_the_mean_is_what_grpo_logs_over_its_mask() -> None:
    given = policy(rows=4, columns=12)
    assert given.reference_logprob is not None
    mask = torch.arange(12) < torch.tensor([12, 3, 7, 1])[:, None]
    present = mask.flatten()
    tokens = replace(given.tokens, present=present, weight=present.float())
    reference = given.reference_logprob.masked_fill(~present, torch.nan)
    tokens = replace(
        tokens,
        logprob=tokens.logprob.masked_fill(~present, torch.inf),
        sequence_tokens=mask.sum(1),
    )
    found = measured(replace(given, tokens=tokens, reference_logprob=reference))
    values = []
    for ours, other, counts in zip(
        given.tokens.logprob.tolist(), given.reference_logprob.tolist(), present, strict=True
    ):
        if counts:
            values.append(np.exp(other - ours) - (other - ours) - 1)
    assert found["kl/mean"] == pytest.approx(np.mean(values), rel=1e-5)
    assert found["kl/p95"] == pytest.approx(np.quantile(values, 0.95, method="hazen"), rel=1e-5)
    assert found["kl/max"] == pytest.approx(max(values), rel=1e-5)
    summed = ((given.tokens.logprob - given.reference_logprob).view(4, 12) * mask).sum(1)
    assert found["kl/sequence/mean"] == pytest.approx(summed.mean().item(), rel=1e-5)


def test_a_row_counts_like_the_tokens_it_stands_for() -> None:
    logprob, reference = [-1.0, -2.0, -0.5], [-1.5, -1.25, -0.375]
    weighted = measured(reading(logprob, reference, [2.0, 1.0, 3.0], [0, 0, 1]))
    repeated = measured(
        reading(
            [-1.0, -1.0, -2.0, -0.5, -0.5, -0.5],
            [-1.5, -1.5, -1.25, -0.375, -0.375, -0.375],
            [1.0] * 6,
            [0, 0, 0, 1, 1, 1],
        )
    )
    for name in ("kl/mean", "kl/k1/mean", "kl/max", "kl/sequence/mean"):
        assert weighted[name] == pytest.approx(repeated[name], rel=1e-6), name
    assert weighted["kl/sequence/mean"] == pytest.approx((2 * 0.5 - 0.75 - 3 * 0.125) / 2)


def test_a_small_divergence_is_not_lost_in_rounding() -> None:
    step = 2.0**-13
    found = measured(reading([-1.0], [-1.0 + step], [1.0]))
    assert found["kl/mean"] == pytest.approx(step**2 / 2 + step**3 / 6, rel=1e-6)


@pytest.mark.parametrize("log_ratio", [-30.0, -1.0, 0.0, 1e-6, 2.0, 30.0])
def test_one_sample_never_says_less_than_zero(log_ratio: float) -> None:
    given = torch.tensor(log_ratio)
    value = k3(given).item()
    assert value >= 0
    assert value == pytest.approx(np.expm1(given.item()) - given.item(), rel=1e-9, abs=0)


def test_a_token_that_one_of_the_two_cannot_write_is_infinitely_far() -> None:
    given = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert k3(given)[:2].tolist() == [torch.inf, torch.inf]
    assert k3(given)[2].isnan()
    found = measured(reading([-torch.inf, -1.0], [-2.0, -1.0], [1.0, 1.0]))
    assert found["kl/max"] == found["kl/mean"] == torch.inf


def test_a_policy_that_is_its_reference_is_at_zero() -> None:
    given = policy()
    found = measured(replace(given, reference_logprob=given.tokens.logprob.clone()))
    assert set(found.values()) == {0.0}
    assert len(found) == 5


def test_nothing_is_written_without_a_reference_or_without_a_token() -> None:
    given = policy()
    assert ReferenceKL().measure(replace(given, reference_logprob=None), None) == ([], None)
    nothing = replace(
        given.tokens,
        present=torch.zeros_like(given.tokens.present),
        weight=torch.zeros_like(given.tokens.weight),
        sequence_tokens=torch.zeros_like(given.tokens.sequence_tokens),
    )
    assert measured(replace(given, tokens=nothing)) == {}
