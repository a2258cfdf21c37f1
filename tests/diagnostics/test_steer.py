from dataclasses import replace

import numpy as np
import pytest
import torch
from readings import policy

from entropylens.diagnostics.entropy_discriminator import discriminator, entropy_change_term
from entropylens.diagnostics.steer import Steer, steer_released_term, steer_term
from entropylens.registry import PolicyReading


def measured(reading: PolicyReading) -> dict[str, float]:
    ((block,), _) = Steer().measure(reading, None)
    assert float(block.columns["weight"]) == float(reading.tokens.weight.sum())
    return dict(zip(block.columns["name"], block.columns["value"].tolist(), strict=True))


def entropy_of(logits: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Categorical(logits=logits).entropy()


def test_it_is_the_change_when_only_the_sampled_logit_moves() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(10, generator=generator, dtype=torch.float64)
    logp, entropy = logits.log_softmax(0), entropy_of(logits)
    for token in range(10):
        for advantage in (0.7, -1.3):
            moved = logits.clone()
            moved[token] += 1e-5 * advantage * (1 - logp[token].exp())
            change = (entropy_of(moved) - entropy) / 1e-5
            found = steer_term(logp[token], entropy, torch.tensor(advantage))
            assert found.item() == pytest.approx(change.item(), abs=1e-5)


def test_what_it_leaves_out_is_the_push_on_all_other_logits() -> None:
    generator = torch.Generator().manual_seed(2)
    logp = torch.randn(10, generator=generator, dtype=torch.float64).log_softmax(0)
    p, entropy = logp.exp(), entropy_of(logp)
    each = discriminator(logp, entropy)
    pull = torch.tensor(0.7, dtype=torch.float64)
    whole = -entropy_change_term(logp, entropy, (p * each).sum(), pull)
    for token in range(10):
        others = sum(float(p[b] * each[b]) for b in range(10) if b != token)
        left_out = whole[token] - steer_term(logp[token], entropy, pull)
        assert left_out.item() == pytest.approx(0.7 * others, abs=1e-15)


def test_it_is_two_thousand_times_too_small_for_a_rare_token() -> None:
    rare, head = 1.9e-5, 0.545
    p = torch.tensor([rare, head, *[(1 - rare - head) / 16] * 16], dtype=torch.float64)
    logp, entropy = p.log(), entropy_of(p.log())
    push = -1e-3 * p
    push[0] += 1e-3
    true = (entropy_of(logp + push) - entropy).item()
    expected = (p * discriminator(logp, entropy)).sum()
    step = torch.tensor(1e-3, dtype=torch.float64)
    assert true == pytest.approx(3.766e-4, rel=0.01)
    exact = -entropy_change_term(logp[0], entropy, expected, step)
    assert exact.item() == pytest.approx(true, rel=1e-3)
    found = steer_term(logp[0], entropy, step).item()
    assert found == pytest.approx(1.7e-7, rel=0.02)
    assert true / found == pytest.approx(2200, rel=0.05)


def exact_and_estimated(p: torch.Tensor) -> tuple[float, float]:
    """The change from learning the first token, to first order, and what the theorem says."""
    logp, entropy = p.log(), entropy_of(p.log())
    one = torch.ones((), dtype=torch.float64)
    expected = (p * discriminator(logp, entropy)).sum()
    exact = -entropy_change_term(logp[0], entropy, expected, one)
    return exact.item(), steer_term(logp[0], entropy, one).item()


def test_it_is_half_the_change_between_two_tokens_however_certain_one_of_them_is() -> None:
    for first in (0.001, 0.3, 0.9, 0.9999):
        exact, found = exact_and_estimated(torch.tensor([first, 1 - first], dtype=torch.float64))
        assert found == pytest.approx(exact / 2, rel=1e-9)


def test_it_is_nearly_exact_where_the_token_is_likely_and_the_rest_is_spread() -> None:
    p = torch.tensor([0.9, *[0.1 / 1000] * 1000], dtype=torch.float64)
    exact, found = exact_and_estimated(p)
    assert found == pytest.approx(exact, rel=1e-3)


def test_the_release_lacks_one_probability_and_the_clip() -> None:
    logprob = torch.tensor([-0.5, -1.5, -4.0], dtype=torch.float64)
    entropy, advantage = torch.full((3,), 1.2).double(), torch.tensor([1.0, -2.0, 0.5]).double()
    old = logprob + torch.tensor([0.1, -0.2, 0.3])
    pull = (logprob - old).exp() * advantage
    released = steer_released_term(logprob, entropy, advantage, old)
    theorem = steer_term(logprob, entropy, pull)
    assert torch.allclose(released * logprob.exp(), theorem, rtol=1e-12)
    assert (released.sign() == theorem.sign()).all()


def test_the_release_in_absolute_value_equals_its_own_lines() -> None:
    rng = np.random.default_rng(3)
    logprob = np.array([-30.0, -18.0, -2.0, -1e-3, 0.0])
    old, entropy = logprob + rng.normal(size=5) * 0.1, rng.random(5)
    advantage = rng.normal(size=5)
    x = np.clip(np.exp(logprob), 1e-8, 1 - 1e-8)
    expected = np.abs(
        advantage / np.clip(np.exp(old), 1e-8, 1) * (x * (1 - x) * (np.log(x) + entropy))
    )
    columns = (torch.from_numpy(part) for part in (logprob, entropy, advantage, old))
    found = steer_released_term(*columns).abs().numpy()
    assert found == pytest.approx(expected, rel=1e-9)


def test_metrics_equal_a_float64_loop_over_the_tokens_that_count() -> None:
    example = policy()
    tokens = example.tokens
    weight = (torch.arange(320) % 4).float()
    assert example.old_logprob is not None
    theorem = released = 0.0
    for i in range(320):
        lp, h, a, old = (
            column[i].item()
            for column in (tokens.logprob, tokens.entropy, example.advantage, example.old_logprob)
        )
        p, ratio = np.exp(lp), np.exp(lp - old)
        learnt = not ((a > 0 and ratio > 1.28) or (a < 0 and ratio < 0.8))
        theorem -= weight[i].item() * learnt * ratio * a * (1 - p) * p * (lp + h)
        released -= weight[i].item() * a / min(np.exp(old), 1.0) * p * (1 - p) * (lp + h)
    spoilt = replace(
        example,
        tokens=replace(
            tokens,
            weight=weight,
            entropy=torch.where(weight == 0, torch.nan, tokens.entropy),
        ),
        advantage=torch.where(weight == 0, torch.inf, example.advantage),
    )
    total = weight.sum().item()
    assert measured(spoilt) == {
        "entropy/change/estimate/steer": pytest.approx(theorem / total, rel=1e-5),
        "entropy/change/estimate/steer_released": pytest.approx(released / total, rel=1e-5),
    }


def test_on_policy_the_ratio_is_one() -> None:
    example = policy()
    same = replace(example, old_logprob=example.tokens.logprob)
    assert measured(replace(example, old_logprob=None)) == measured(same)


def test_a_probability_of_nothing_or_of_all_gives_numbers() -> None:
    ends = torch.tensor([-torch.inf, -120.0, 0.0])
    entropy, one = torch.tensor([2.0, 2.0, 0.0]), torch.ones(3)
    assert steer_term(ends, entropy, one).abs().tolist() == [0.0, 0.0, 0.0]
    released = steer_released_term(ends, entropy, one, ends)
    assert released.isfinite().all()
    assert released[0].item() == pytest.approx(-np.log(1e-8) - 2, rel=1e-6)
    assert released[2] == 0.0


def test_without_a_scored_token_nothing_is_written() -> None:
    example = policy()
    found = measured(replace(example, tokens=replace(example.tokens, weight=torch.zeros(320))))
    assert all(np.isnan(value) for value in found.values())
