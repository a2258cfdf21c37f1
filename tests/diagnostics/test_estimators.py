from dataclasses import replace

import numpy as np
import pytest
import torch
from readings import policy

from entropylens.diagnostics._estimators import ESTIMATORS, TokenParts
from entropylens.diagnostics._policy import pull
from entropylens.diagnostics.entropy_discriminator import EntropyDiscriminator
from entropylens.diagnostics.steer import Steer


def parts() -> TokenParts:
    example = policy()
    return TokenParts(
        logprob=example.tokens.logprob,
        entropy=example.tokens.entropy,
        advantage=example.advantage,
        pull=pull(example),
        old_logprob=example.old_logprob,
        expected_discriminator=example.tokens.expected_discriminator,
        weight=example.tokens.weight,
    )


def test_every_estimate_equals_its_formula() -> None:
    given = parts()
    assert given.old_logprob is not None
    assert given.expected_discriminator is not None
    lp, h, a, q, old, n = (
        column.double().numpy()
        for column in (
            given.logprob,
            given.entropy,
            given.advantage,
            given.pull,
            given.old_logprob,
            given.expected_discriminator,
        )
    )
    p = np.exp(lp)
    s = p * (lp + h)
    expected = {
        "discriminator": q * (n - s),
        "steer": q * (p - 1) * s,
        "natural_gradient": -a * (lp + h),
        "clip_b": -q * s,
        "steer_released": -a / np.minimum(np.exp(old), 1) * (1 - p) * s,
        "token_covariance": -(lp - lp.mean()) * (a - a.mean()),
    }
    assert list(ESTIMATORS) == list(expected)
    for name, estimate in ESTIMATORS.items():
        assert estimate(given).numpy() == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


def test_their_means_are_what_the_diagnostics_write() -> None:
    found: dict[str, float] = {}
    for each in (EntropyDiscriminator(), Steer()):
        for block in each.measure(policy(), None)[0]:
            found.update(zip(block.columns["name"], block.columns["value"].tolist(), strict=True))
    for name in ("discriminator", "steer", "steer_released"):
        mean = ESTIMATORS[name](parts()).double().mean().item()
        assert found[f"entropy/change/estimate/{name}"] == pytest.approx(mean, abs=1e-6)


def test_what_is_not_known_is_not_a_number_and_no_old_policy_is_this_one() -> None:
    unknown = replace(parts(), expected_discriminator=None)
    assert ESTIMATORS["discriminator"](unknown).isnan().all()
    assert ESTIMATORS["steer"](unknown).isfinite().all()
    same = replace(parts(), old_logprob=parts().logprob)
    found = ESTIMATORS["steer_released"](replace(same, old_logprob=None))
    assert torch.equal(found, ESTIMATORS["steer_released"](same))


def test_every_estimate_is_linear_in_the_advantages() -> None:
    given = parts()
    twice = replace(given, advantage=2 * given.advantage, pull=2 * given.pull)
    for name, estimate in ESTIMATORS.items():
        assert torch.allclose(estimate(twice), 2 * estimate(given), rtol=1e-4, atol=1e-5), name
