from dataclasses import replace

import numpy as np
import pytest
import torch
from readings import policy

from entropylens.diagnostics.importance_ratio import (
    ImportanceRatio,
    clip_shares,
    effective_sample_size_share,
    sequence_sums,
)
from entropylens.registry import PolicyReading

CLIP = (0.2, 0.28)
ROWS, COLUMNS = 6, 15
MASK = torch.arange(COLUMNS) < torch.tensor([15, 1, 4, 9, 15, 2])[:, None]


def measured(reading: PolicyReading) -> dict[str, float]:
    blocks, _ = ImportanceRatio().measure(reading, None)
    return {
        name: value
        for block in blocks
        if float(block.columns["weight"]) > 0
        for name, value in zip(block.columns["name"], block.columns["value"].tolist(), strict=True)
    }


def padded(level: str = "token", scale: float = 0.3) -> PolicyReading:
    """Sequences of different lengths; what stands in the padding would spoil any sum."""
    generator = torch.Generator().manual_seed(7)
    given = policy(rows=ROWS, columns=COLUMNS)
    present = MASK.flatten()
    change = scale * torch.randn(len(present), generator=generator)
    old = (given.tokens.logprob + change).masked_fill(~present, torch.nan)
    tokens = replace(
        given.tokens,
        logprob=given.tokens.logprob.masked_fill(~present, -torch.inf),
        present=present,
        weight=present.float(),
        sequence_tokens=MASK.sum(1),
    )
    return replace(
        given,
        tokens=tokens,
        old_logprob=old,
        advantage=given.advantage.masked_fill(~present, torch.nan),
        clip=CLIP,
        ratio_level=level,
    )


def log_ratios(reading: PolicyReading) -> list[list[float]]:
    assert reading.old_logprob is not None
    change = (reading.tokens.logprob.double() - reading.old_logprob.double()).view(ROWS, COLUMNS)
    return [row[mask].tolist() for row, mask in zip(change, MASK, strict=True)]


def advantages(reading: PolicyReading) -> list[float]:
    return reading.advantage.view(ROWS, COLUMNS)[:, 0].tolist()


def clipped(ratio: float, advantage: float) -> tuple[bool, bool]:
    low, high = CLIP
    return ratio < 1 - low and advantage < 0, ratio > 1 + high and advantage > 0


def test_token_ratios_and_clip_shares_are_those_of_grpo() -> None:
    given = padded()
    found = measured(given)
    ratios, low, high = [], [], []
    for row, advantage in zip(log_ratios(given), advantages(given), strict=True):
        for change in row:
            ratios.append(np.exp(change))
            is_low, is_high = clipped(np.exp(change), advantage)
            low.append(is_low)
            high.append(is_high)
    assert found["ratio/mean"] == pytest.approx(np.mean(ratios), rel=1e-6)
    assert found["ratio/std"] == pytest.approx(np.std(ratios), rel=1e-5)
    assert found["ratio/min"] == pytest.approx(min(ratios), rel=1e-6)
    assert found["ratio/max"] == pytest.approx(max(ratios), rel=1e-6)
    for name, level in (("p05", 0.05), ("p95", 0.95)):
        expected = np.quantile(ratios, level, method="hazen")
        assert found[f"ratio/{name}"] == pytest.approx(expected, rel=1e-6)
    assert 0 < sum(low) < len(low)
    assert 0 < sum(high) < len(high)
    assert found["clip/low/share"] == pytest.approx(np.mean(low))
    assert found["clip/high/share"] == pytest.approx(np.mean(high))
    assert found["clip/region/share"] == pytest.approx(np.mean(low) + np.mean(high))


def test_sequence_ratios_and_clip_shares_are_those_of_grpo_at_sequence_level() -> None:
    given = padded("sequence", scale=0.9)
    found = measured(given)
    ratios = [np.exp(np.mean(row)) for row in log_ratios(given)]
    cases = [clipped(r, a) for r, a in zip(ratios, advantages(given), strict=True)]
    assert {True, False} == {low or high for low, high in cases}
    assert found["clip/low/share"] == pytest.approx(np.mean([low for low, _ in cases]))
    assert found["clip/high/share"] == pytest.approx(np.mean([high for _, high in cases]))
    assert found["clip/region/share"] == pytest.approx(np.mean([any(case) for case in cases]))
    assert found["ratio/mean"] == pytest.approx(np.mean(ratios), rel=1e-6)
    assert found["ratio/std"] == pytest.approx(np.std(ratios), rel=1e-5)
    assert found["ratio/max"] == pytest.approx(max(ratios), rel=1e-6)
    expected = np.quantile(ratios, 0.95, method="hazen")
    assert found["ratio/p95"] == pytest.approx(expected, rel=1e-6)


def test_clip_shares_of_whole_sequences_are_those_of_rloo() -> None:
    """RLOO's ratio is the product over a completion's tokens, and its shares count completions."""
    given = padded()
    sums, complete = sequence_sums(
        given.tokens.logprob - (given.old_logprob if given.old_logprob is not None else 0),
        given.tokens.present,
        given.tokens.sequence,
        given.tokens.sequence_tokens,
    )
    assert complete.all()
    advantage = torch.tensor(advantages(given))
    found = clip_shares(sums.exp(), advantage, torch.ones(ROWS), CLIP).tolist()
    cases = [
        clipped(np.exp(sum(row)), a)
        for row, a in zip(log_ratios(given), advantage.tolist(), strict=True)
    ]
    low, high = (np.mean(case) for case in zip(*cases, strict=True))
    assert low + high > 0
    assert found == pytest.approx([low, high, low + high])


def test_a_ratio_at_the_bound_or_without_advantage_is_not_clipped() -> None:
    ratio = torch.tensor([0.5, 1.5, 0.0, 9.0, 0.25, 2.0])
    advantage = torch.tensor([-1.0, 1.0, 0.0, 0.0, 1.0, -1.0])
    assert clip_shares(ratio, advantage, torch.ones(6), (0.5, 0.5)).tolist() == [0.0, 0.0, 0.0]


def test_divergence_and_mean_ratio_are_exact_under_the_old_policy() -> None:
    old = torch.tensor([0.5, 0.25, 0.15, 0.1])
    new = torch.tensor([0.2, 0.3, 0.1, 0.4])
    given = policy(rows=1, columns=4)
    tokens = replace(given.tokens, logprob=new.log(), weight=old, sequence_tokens=torch.tensor([4]))
    found = measured(replace(given, tokens=tokens, old_logprob=old.log()))
    divergence = (old * (old / new).log()).sum().item()
    assert found["ratio/mean"] == pytest.approx(1.0, rel=1e-6)
    assert found["ratio/kl"] == pytest.approx(divergence, rel=1e-5)
    assert found["ratio/log/mean"] == pytest.approx(-divergence, rel=1e-5)
    second_moment = (new.square() / old).sum().item()
    share = found["ratio/effective_sample_size/share"]
    assert share == pytest.approx(1 / second_moment, rel=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_what_is_said_by_token_does_not_depend_on_the_level_of_the_loss(level: str) -> None:
    given = padded(level)
    found = measured(given)
    changes = np.concatenate(log_ratios(given))
    ratios = np.exp(changes)
    assert found["ratio/log/mean"] == pytest.approx(changes.mean(), rel=1e-5)
    assert found["ratio/kl"] == pytest.approx((ratios - 1 - changes).mean(), rel=1e-5)
    share = ratios.sum() ** 2 / (len(ratios) * (ratios**2).sum())
    assert found["ratio/effective_sample_size/share"] == pytest.approx(share, rel=1e-5)
    products = np.array([np.exp(sum(row)) for row in log_ratios(given)])
    share = products.sum() ** 2 / (ROWS * (products**2).sum())
    found_share = found["ratio/sequence/effective_sample_size/share"]
    assert found_share == pytest.approx(share, rel=1e-5)


def test_the_extremes_are_asked_for_by_name_and_are_those_of_all_ranks() -> None:
    for name, which in (("min", "smallest"), ("max", "largest")):
        metric = ImportanceRatio.metrics[f"ratio/{name}"]
        assert metric.question == f"What is the {which} importance ratio?"
        assert metric.ranks == name
    assert ImportanceRatio.metrics["ratio/p95"].ranks == "mean"


def test_the_effective_sample_size_of_equal_and_of_hopeless_weights() -> None:
    equal = effective_sample_size_share(torch.full((7,), 900.0), torch.ones(7))
    assert equal.item() == pytest.approx(1.0)
    steep = effective_sample_size_share(torch.tensor([0.0, 5000.0, -5000.0, 1.0]), torch.ones(4))
    assert steep.item() == pytest.approx(0.25)
    pair = effective_sample_size_share(torch.tensor([0.0, np.log(3.0)]), torch.ones(2))
    assert pair.item() == pytest.approx(4**2 / (2 * 10))
    shifted = effective_sample_size_share(torch.tensor([700.0, 700 + np.log(3.0)]), torch.ones(2))
    assert shifted.item() == pytest.approx(pair.item(), rel=1e-4)
    assert effective_sample_size_share(torch.ones(3), torch.zeros(3)).isnan()


def test_a_row_counts_like_the_tokens_it_stands_for() -> None:
    weight = torch.tensor([2.0, 0.0, 3.0])
    log_weight = torch.tensor([0.3, torch.nan, -0.8])
    repeated = torch.tensor([0.3, 0.3, -0.8, -0.8, -0.8])
    assert effective_sample_size_share(log_weight, weight).item() == pytest.approx(
        effective_sample_size_share(repeated, torch.ones(5)).item()
    )


def test_sequences_that_were_measured_in_part_have_no_product() -> None:
    given = padded()
    present = given.tokens.present.clone()
    present[0] = False
    part = replace(given.tokens, present=present, weight=present.float())
    found = measured(replace(given, tokens=part))
    products = np.array([np.exp(sum(row)) for row in log_ratios(given)[1:]])
    share = products.sum() ** 2 / (len(products) * (products**2).sum())
    found_share = found["ratio/sequence/effective_sample_size/share"]
    assert found_share == pytest.approx(share, rel=1e-5)
    every_other = present & (torch.arange(len(present)) % 2 == 0)
    sampled = replace(given.tokens, present=every_other, weight=2 * every_other.float())
    sampled = replace(sampled, sequence_tokens=torch.full((ROWS,), COLUMNS))
    found = measured(replace(given, tokens=sampled))
    assert "ratio/sequence/effective_sample_size/share" not in found
    assert "ratio/mean" in found


def test_a_sequence_without_a_scored_token_is_no_sample() -> None:
    sums, complete = sequence_sums(
        torch.tensor([1.0, 2.0, torch.nan]),
        torch.tensor([True, True, False]),
        torch.tensor([0, 0, 2]),
        torch.tensor([2, 0, 0]),
    )
    assert sums.tolist() == [3.0, 0.0, 0.0]
    assert complete.tolist() == [True, False, False]


def test_an_on_policy_step_says_only_that_it_is_one() -> None:
    assert measured(replace(padded(), old_logprob=None)) == {"ratio/on_policy/share": 1.0}


def test_the_on_policy_share_counts_tokens_whose_ratio_is_exactly_one() -> None:
    given = policy(rows=1, columns=4)
    nudge = torch.tensor([0.0, 1e-6, 0.0, 0.5])
    tokens = replace(given.tokens, logprob=torch.full((4,), -0.125))
    found = measured(replace(given, tokens=tokens, old_logprob=tokens.logprob + nudge))
    assert found["ratio/on_policy/share"] == 0.5


def test_without_a_clip_range_nothing_is_said_of_clipping() -> None:
    found = measured(replace(padded(), clip=None))
    assert not [name for name in found if name.startswith("clip/")]
    assert "ratio/mean" in found


def test_nothing_measured_writes_nothing() -> None:
    given = padded()
    nothing = torch.zeros_like(given.tokens.present)
    tokens = replace(given.tokens, present=nothing, weight=nothing.float())
    for level in ("token", "sequence"):
        assert measured(replace(given, tokens=tokens, ratio_level=level)) == {}
