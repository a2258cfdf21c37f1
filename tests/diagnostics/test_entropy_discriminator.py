from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from readings import policy

from entropylens.diagnostics._cells import CELLS
from entropylens.diagnostics._policy import pull
from entropylens.diagnostics.entropy_discriminator import (
    EntropyDiscriminator,
    discriminator,
    entropy_change_term,
    sign_cells,
)
from entropylens.diagnostics.token_statistics import token_statistics
from entropylens.registry import PolicyReading


def measured(reading: PolicyReading) -> dict[str, tuple[float, float]]:
    blocks, _ = EntropyDiscriminator().measure(reading, None)
    return {
        name: (value, float(block.columns["weight"]))
        for block in blocks
        for name, value in zip(block.columns["name"], block.columns["value"].tolist(), strict=True)
    }


def entropy_of(logits: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Categorical(logits=logits).entropy()


def state(seed: int, size: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, log-probabilities and entropy of one state, float64."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(size, generator=generator, dtype=torch.float64)
    return logits, logits.log_softmax(0), entropy_of(logits)


def test_it_is_minus_the_entropys_gradient_by_autograd_and_adds_up_to_nothing() -> None:
    for seed in range(3):
        logits, logp, entropy = state(seed)
        value = logits.clone().requires_grad_()
        entropy_of(value).backward()
        assert value.grad is not None
        found = discriminator(logp, entropy)
        assert torch.allclose(found, -value.grad, rtol=0, atol=1e-15)
        assert abs(found.sum().item()) < 1e-15


def test_moving_one_logit_alone_lowers_the_entropy_by_it() -> None:
    logits, logp, entropy = state(4)
    for token in range(len(logits)):
        moved = logits.clone()
        moved[token] += 1e-6
        change = (entropy_of(moved) - entropy) / 1e-6
        found = discriminator(logp[token], entropy).item()
        assert change.item() == pytest.approx(-found, abs=1e-6)


@given(st.floats(-60, 0), st.floats(0, 12))
def test_it_is_never_below_its_bound_and_reaches_it(logprob: float, entropy: float) -> None:
    h = torch.tensor(entropy, dtype=torch.float64)
    bound = -torch.exp(-1 - h)
    assert discriminator(torch.tensor(logprob, dtype=torch.float64), h) >= bound - 1e-15
    assert discriminator(-1 - h, h).item() == pytest.approx(bound.item(), rel=1e-12)


def test_it_vanishes_where_the_probability_is_nothing_or_all() -> None:
    logprob = torch.tensor([-torch.inf, -200.0, -1e-7, 0.0])
    assert discriminator(logprob, torch.tensor([3.0, 3.0, 1e-6, 0.0])).abs().max() < 1e-6
    assert discriminator(torch.tensor([torch.nan]), torch.ones(1)).isnan().all()


def test_what_the_token_statistics_call_expected_is_its_mean_under_the_policy() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(40, 25, generator=generator)
    found = token_statistics(logits, torch.zeros(40, dtype=torch.long)).expected_discriminator
    logp = logits.double().log_softmax(1)
    p = logp.exp()
    for row in range(40):
        entropy = entropy_of(logits[row].double())
        by_sum = (p[row] * discriminator(logp[row], entropy)).sum()
        closed = entropy * p[row].square().sum() + (p[row].square() * logp[row]).sum()
        assert by_sum.item() == pytest.approx(closed.item(), abs=1e-15)
        assert found[row].item() == pytest.approx(by_sum.item(), abs=2e-6)
        covariance = np.cov(p[row], logp[row], aweights=p[row].numpy(), ddof=0)[0, 1]
        assert by_sum.item() == pytest.approx(covariance, abs=1e-14)
        assert covariance >= 0


@pytest.mark.parametrize("step", [1e-2, 1e-4])
def test_one_sampled_tokens_step_changes_the_entropy_as_predicted(step: float) -> None:
    for seed in range(3):
        logits, logp, entropy = state(seed)
        p = logp.exp()
        expected = (p * discriminator(logp, entropy)).sum()
        for token, advantage in product(range(len(p)), (1.0, -1.0)):
            push = -p.clone()
            push[token] += 1
            true = entropy_of(logits + step * advantage * push) - entropy
            term = entropy_change_term(logp[token], entropy, expected, torch.tensor(advantage))
            assert true.item() == pytest.approx(-step * term.item(), rel=0, abs=0.5 * step**2)


def test_under_the_policy_its_mean_is_the_expected_gradient_steps_for_any_baseline() -> None:
    logits, logp, entropy = state(1)
    p = logp.exp()
    expected = (p * discriminator(logp, entropy)).sum()
    advantage = torch.linspace(-1, 2, len(p), dtype=torch.float64)
    value = logits.clone().requires_grad_()
    (value.softmax(0) * advantage).sum().backward()
    assert value.grad is not None
    along = 1e-5 * value.grad
    true = (entropy_of(logits + along) - entropy_of(logits - along)) / 2e-5
    for baseline in (0.0, 5.0):
        term = entropy_change_term(logp, entropy, expected, advantage - baseline)
        assert -(p * term).sum().item() == pytest.approx(true.item(), rel=1e-6)


def test_metrics_equal_a_float64_loop_over_the_tokens_that_count() -> None:
    example = policy()
    tokens = example.tokens
    assert example.old_logprob is not None
    assert tokens.expected_discriminator is not None
    whole = (torch.arange(320) % 3).float()
    weight = torch.where(torch.arange(320) % 5 == 0, 0.0, 1.0)
    spoilt = replace(
        example,
        tokens=replace(
            tokens,
            weight=weight,
            logprob=torch.where(weight + whole == 0, torch.nan, tokens.logprob),
            distribution_weight=whole,
            expected_discriminator=torch.where(
                whole == 0, torch.nan, tokens.expected_discriminator
            ),
        ),
    )
    sampled, excess, expected, change, mass = [], [], [], [], []
    cells: dict[str, list[float]] = {cell: [0.0, 0.0] for cell in CELLS}
    for i in range(320):
        lp, h = tokens.logprob[i].item(), tokens.entropy[i].item()
        s = np.exp(lp) * (lp + h)
        if weight[i]:
            sampled.append(s)
        if whole[i]:
            a, n = example.advantage[i].item(), tokens.expected_discriminator[i].item()
            ratio = np.exp(lp - example.old_logprob[i].item())
            clipped = (a > 0 and ratio > 1.28) or (a < 0 and ratio < 0.8)
            effect = 0.0 if clipped else -ratio * a * (s - n)
            share = whole[i].item()
            mass.append(share)
            excess.append(s - n)
            expected.append(n)
            change.append(effect)
            cell = f"{'positive' if a > 0 else 'negative'}_{'above' if s > n else 'below'}"
            cells[cell][0] += share
            cells[cell][1] += share * effect
    total = sum(mass)
    mean = np.average(excess, weights=mass)
    deviation = np.sqrt(np.average((np.array(excess) - mean) ** 2, weights=mass))
    wanted = {
        "discriminator/mean": (np.mean(sampled), len(sampled)),
        "discriminator/std": (np.std(sampled), len(sampled)),
        "discriminator/excess/mean": (mean, total),
        "discriminator/excess/std": (deviation, total),
        "discriminator/expected/mean": (np.average(expected, weights=mass), total),
        "entropy/change/estimate/discriminator": (np.average(change, weights=mass), total),
    }
    for cell, (share, effect) in cells.items():
        assert share > 0
        wanted[f"discriminator/cell/{cell}/share"] = share / total, total
        wanted[f"discriminator/cell/{cell}/change"] = effect / total, total
    found = measured(spoilt)
    assert found.keys() == wanted.keys()
    for name, pair in wanted.items():
        assert found[name] == pytest.approx(pair, rel=1e-5, abs=1e-7), name


def test_the_four_cells_add_up_to_the_estimate_and_to_all_tokens() -> None:
    found = measured(policy())
    changes = [found[f"discriminator/cell/{cell}/change"][0] for cell in CELLS]
    assert sum(changes) == pytest.approx(
        found["entropy/change/estimate/discriminator"][0], abs=1e-6
    )
    assert sum(found[f"discriminator/cell/{cell}/share"][0] for cell in CELLS) == pytest.approx(1)
    for (_, effect), change in zip(CELLS.values(), changes, strict=True):
        assert (change > 0) == (effect == "raises")


def test_tokens_without_an_advantage_or_an_excess_are_in_no_cell() -> None:
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0, 1.0, torch.nan, 1.0])
    excess = torch.tensor([0.2, -0.2, 0.2, -0.2, 0.2, 0.0, 0.2, torch.nan])
    found = sign_cells(advantage, excess)
    assert found.nonzero().tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]


def test_on_its_own_draws_the_mean_excess_is_nothing_and_so_is_the_forecast() -> None:
    generator = torch.Generator().manual_seed(6)
    logits = 2 * torch.randn(320, 30, generator=generator)
    logits = logits.repeat_interleave(125, 0)
    drawn = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    statistics = token_statistics(logits, drawn)
    example = policy(rows=1000)
    found = measured(
        replace(
            example,
            tokens=replace(
                example.tokens,
                logprob=statistics.logprob,
                entropy=statistics.entropy,
                expected_discriminator=statistics.expected_discriminator,
            ),
            advantage=torch.ones(40_000),
            old_logprob=None,
        )
    )
    error = found["discriminator/excess/std"][0] / 200
    assert abs(found["discriminator/excess/mean"][0]) < 4 * error
    forecast = found["entropy/change/estimate/discriminator"][0]
    assert forecast == pytest.approx(-found["discriminator/excess/mean"][0], abs=1e-6)


def test_what_needs_whole_distributions_is_absent_without_them() -> None:
    example = policy()
    unknown = replace(example, tokens=replace(example.tokens, expected_discriminator=None))
    assert set(measured(unknown)) == {"discriminator/mean", "discriminator/std"}
    unseen = replace(example.tokens, distribution_weight=torch.zeros(320))
    found = measured(replace(example, tokens=unseen))
    assert {name for name, (_, weight) in found.items() if weight} == {
        "discriminator/mean",
        "discriminator/std",
    }


def test_a_clipped_token_counts_in_its_cell_and_changes_nothing() -> None:
    example = policy()
    ratio = torch.where(example.advantage > 0, 2.0, 0.5)
    far = replace(example, old_logprob=example.tokens.logprob - ratio.log())
    assert not pull(far).any()
    found = measured(far)
    plain = measured(example)
    assert found["entropy/change/estimate/discriminator"][0] == 0.0
    for cell in CELLS:
        name = f"discriminator/cell/{cell}/share"
        assert found[name] == plain[name]
