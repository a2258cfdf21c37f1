from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from readings import policy

from entropylens.diagnostics.covariance import (
    Covariance,
    natural_gradient_term,
    policy_gradient_term,
    token_covariance,
)
from entropylens.registry import PolicyReading, TokenReading


def measured(reading: PolicyReading) -> dict[str, float]:
    ((block,), _) = Covariance().measure(reading, None)
    return dict(zip(block.columns["name"], block.columns["value"].tolist(), strict=True))


def reading(
    logprob: torch.Tensor, entropy: torch.Tensor, advantage: torch.Tensor, weight: torch.Tensor
) -> PolicyReading:
    n = len(logprob)
    return PolicyReading(
        tokens=TokenReading(
            logprob=logprob,
            entropy=entropy,
            present=weight > 0,
            weight=weight,
            position=torch.zeros(n, dtype=torch.long),
            sequence=torch.zeros(n, dtype=torch.long),
            token_id=torch.zeros(n, dtype=torch.long),
            key=torch.linspace(0, 1, n),
            sequence_tokens=torch.tensor([n]),
            vocabulary=10,
        ),
        advantage=advantage,
    )


def entropy_of(logits: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Categorical(logits=logits).entropy()


def one_state(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, log-probabilities and advantages of one state, float64."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(9, generator=generator, dtype=torch.float64)
    advantage = torch.randn(9, generator=generator, dtype=torch.float64)
    return logits, logits.log_softmax(0), advantage


def tree() -> dict[str, np.ndarray]:
    """Every trajectory of two choices among three: one row a token, its weight its probability."""
    rng = np.random.default_rng(5)
    policies = {state: rng.dirichlet(np.ones(3)) for state in ("root", 0, 1, 2)}
    rewards = rng.normal(size=(3, 3))
    chance = {(a, b): policies["root"][a] * policies[a][b] for a, b in product(range(3), repeat=2)}
    value = sum(q * rewards[pair] for pair, q in chance.items())
    rows = []
    for (a, b), q in chance.items():
        for state, action in (("root", a), (a, b)):
            p = policies[state]
            rows.append(
                (np.log(p[action]), -(p * np.log(p)).sum(), rewards[a, b] - value, q, state)
            )
    logprob, entropy, advantage, weight, states = zip(*rows, strict=True)
    return {
        "logprob": np.array(logprob),
        "entropy": np.array(entropy),
        "advantage": np.array(advantage),
        "weight": np.array(weight),
        "state": np.array([str(state) for state in states]),
    }


def covariance(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> float:
    return float(np.cov(x, y, aweights=weight, ddof=0)[0, 1])


def test_total_covariance_is_within_plus_between_states_by_exact_enumeration() -> None:
    rows = tree()
    share = {s: rows["weight"][rows["state"] == s].sum() / 2 for s in np.unique(rows["state"])}
    within, means = 0.0, []
    for state, mass in share.items():
        here = rows["state"] == state
        picked = [rows[name][here] for name in ("logprob", "advantage", "weight")]
        within += mass * covariance(*picked)
        expected = np.average(picked[1], weights=picked[2])
        means.append((-rows["entropy"][here][0], expected, mass))
    between = covariance(*(np.array(column) for column in zip(*means, strict=True)))
    total = covariance(rows["logprob"], rows["advantage"], rows["weight"])
    assert total == pytest.approx(within + between, abs=1e-15)
    assert abs(between) > 0.01
    names = ("logprob", "entropy", "advantage", "weight")
    found = measured(reading(*(torch.from_numpy(rows[name]).float() for name in names)))
    assert found["covariance/total/mean"] == pytest.approx(total, abs=1e-6)
    assert found["covariance/within/mean"] == pytest.approx(within, abs=1e-6)
    assert found["covariance/between/mean"] == pytest.approx(between, abs=1e-6)


@pytest.mark.parametrize("baseline", [0.0, -3.0, 17.5])
def test_one_token_is_unbiased_for_the_covariance_within_its_state(baseline: float) -> None:
    for seed in range(3):
        logits, logp, advantage = one_state(seed)
        p = logp.exp()
        terms = natural_gradient_term(logp, entropy_of(logits), advantage + baseline)
        expected = covariance(logp.numpy(), advantage.numpy(), p.numpy())
        assert (p * terms).sum().item() == pytest.approx(expected, abs=1e-14)


def test_one_token_is_unbiased_for_the_covariance_with_the_gradients_step() -> None:
    for seed in range(3):
        logits, logp, advantage = one_state(seed)
        p = logp.exp()
        terms = policy_gradient_term(logp, entropy_of(logits), advantage)
        expected = covariance(logp.numpy(), (p * advantage).numpy(), p.numpy())
        assert (p * terms).sum().item() == pytest.approx(expected, abs=1e-14)


def difference(logits: torch.Tensor, direction: torch.Tensor) -> float:
    """dH along a logit change, per unit, by central difference."""
    step = 1e-5 * direction
    return float((entropy_of(logits + step) - entropy_of(logits - step)) / 2e-5)


def test_any_logit_change_lowers_the_entropy_by_its_covariance_with_the_log_probability() -> None:
    for seed in range(3):
        logits, logp, change = one_state(seed)
        terms = natural_gradient_term(logp, entropy_of(logits), change)
        found = -(logp.exp() * terms).sum().item()
        assert found == pytest.approx(difference(logits, change), rel=1e-7)


def test_the_natural_gradient_step_changes_the_entropy_by_its_term() -> None:
    for seed in range(3):
        logits, logp, advantage = one_state(seed)
        p = logp.exp()
        fisher = torch.diag(p) - torch.outer(p, p)
        gradient = p * (advantage - (p * advantage).sum())
        step = torch.linalg.pinv(fisher) @ gradient
        found = -(p * natural_gradient_term(logp, entropy_of(logits), advantage)).sum().item()
        assert found == pytest.approx(difference(logits, step), rel=1e-6)


def test_the_expected_gradient_step_changes_the_entropy_by_its_term() -> None:
    for seed in range(3):
        logits, logp, advantage = one_state(seed)
        p = logp.exp()
        advantage = advantage - (p * advantage).sum()
        value = logits.clone().requires_grad_()
        (value.softmax(0) * advantage).sum().backward()
        assert value.grad is not None
        found = -(p * policy_gradient_term(logp, entropy_of(logits), advantage)).sum().item()
        assert found == pytest.approx(difference(logits, value.grad), rel=1e-6)


def test_the_three_covariances_of_any_batch_differ_by_the_product_of_means() -> None:
    example = policy()
    found = measured(example)
    gap = (example.tokens.logprob + example.tokens.entropy).double().mean()
    rest = found["covariance/total/mean"] - found["covariance/within/mean"]
    rest -= found["covariance/between/mean"]
    assert abs(gap) > 0.1
    assert rest == pytest.approx(-float(gap * example.advantage.double().mean()), abs=1e-6)


def test_metrics_equal_a_float64_loop_over_the_tokens_that_count() -> None:
    generator = torch.Generator().manual_seed(8)
    n = 60
    logprob, entropy = (-5 * torch.rand(2, n, generator=generator)).unbind()
    advantage = torch.randn(n, generator=generator) + 1
    weight = torch.randint(0, 4, (n,), generator=generator).float()
    columns = [part.double().numpy() for part in (logprob, -entropy, advantage, weight)]
    lp, h, a, w = (np.repeat(part, columns[3].astype(int)) for part in columns)
    terms = [(x + y) * z for x, y, z in zip(lp, h, a, strict=True)]
    plain = [np.exp(x) * (x + y) * z for x, y, z in zip(lp, h, a, strict=True)]
    for part in (logprob, entropy, advantage):
        part[weight == 0] = torch.nan
    found = measured(reading(logprob, -entropy, advantage, weight))
    assert found == {
        "covariance/total/mean": pytest.approx(np.cov(lp, a, ddof=0)[0, 1], abs=2e-6),
        "covariance/between/mean": pytest.approx(np.cov(-h, a, ddof=0)[0, 1], abs=2e-6),
        "covariance/policy_gradient/mean": pytest.approx(np.mean(plain), abs=2e-6),
        "covariance/within/mean": pytest.approx(np.mean(terms), abs=2e-6),
        "covariance/within/std": pytest.approx(np.std(terms), rel=1e-5),
    }
    assert w.sum() > len(w)


@given(st.floats(-20, 20), st.floats(-20, 20))
def test_a_shift_of_either_side_leaves_the_token_covariance(first: float, second: float) -> None:
    _, logp, advantage = one_state(0)
    weight = torch.ones(9)
    plain = token_covariance(logp, advantage, weight)
    moved = token_covariance(logp + first, advantage + second, weight)
    assert torch.allclose(plain, moved, atol=1e-4)


def test_equal_advantages_have_no_covariance_and_one_token_has_none_either() -> None:
    same = measured(reading(-torch.rand(7), torch.rand(7), torch.full((7,), 0.3), torch.ones(7)))
    assert same["covariance/total/mean"] == same["covariance/between/mean"] == 0.0
    alone = (torch.tensor([-2.0]), torch.tensor([1.5]), torch.tensor([2.0]), torch.ones(1))
    found = measured(reading(*alone))
    assert found["covariance/total/mean"] == found["covariance/within/std"] == 0.0
    assert found["covariance/within/mean"] == -1.0
    assert found["covariance/policy_gradient/mean"] == pytest.approx(-np.exp(-2.0))


def test_without_a_scored_token_nothing_is_written() -> None:
    nothing = torch.full((3,), torch.nan)
    ((block,), _) = Covariance().measure(reading(nothing, nothing, nothing, torch.zeros(3)), None)
    assert float(block.columns["weight"]) == 0.0
    ((block,), _) = Covariance().measure(policy(), None)
    assert float(block.columns["weight"]) == 320.0
