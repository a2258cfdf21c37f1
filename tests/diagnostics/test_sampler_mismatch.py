from dataclasses import replace
from math import log

import numpy as np
import pytest
import torch
from readings import policy

from entropylens.diagnostics.sampler_mismatch import SamplerMismatch
from entropylens.registry import PolicyReading

ROWS, COLUMNS = 6, 20


def measured(reading: PolicyReading) -> dict[str, float]:
    blocks, _ = SamplerMismatch().measure(reading, None)
    return {
        name: value
        for block in blocks
        if float(block.columns["weight"]) > 0
        for name, value in zip(block.columns["name"], block.columns["value"].tolist(), strict=True)
    }


def mismatched() -> tuple[PolicyReading, torch.Tensor]:
    """Padding that would spoil any sum, and two tokens that the sampler did not tell."""
    generator = torch.Generator().manual_seed(11)
    given = policy(rows=ROWS, columns=COLUMNS)
    n = ROWS * COLUMNS
    present = torch.arange(n) % COLUMNS < 13
    old = -4 * torch.rand(n, generator=generator)
    sampler = old + 0.5 * torch.randn(n, generator=generator)
    told = present.clone()
    told[[1, 5]] = False
    tokens = replace(
        given.tokens,
        logprob=torch.full((n,), torch.nan),
        present=present,
        weight=present.float(),
        sequence_tokens=torch.full((ROWS,), 13),
    )
    reading = replace(
        given,
        tokens=tokens,
        old_logprob=old.masked_fill(~present, torch.inf),
        sampler_logprob=sampler.masked_fill(present & ~told, torch.nan),
    )
    return reading, told


def exact(p: torch.Tensor, q: torch.Tensor) -> dict[str, float]:
    """Every token of the sampler's distribution q, weighted by its probability."""
    given = policy(rows=1, columns=len(p))
    tokens = replace(given.tokens, logprob=p.log(), weight=q)
    return measured(replace(given, tokens=tokens, old_logprob=None, sampler_logprob=q.log()))


def test_every_number_equals_numpys_on_the_tokens_that_both_know() -> None:
    reading, told = mismatched()
    assert reading.old_logprob is not None
    assert reading.sampler_logprob is not None
    trainer = reading.old_logprob[told].double().numpy()
    sampler = reading.sampler_logprob[told].double().numpy()
    d = trainer - sampler
    w = np.exp(d)
    found = measured(reading)
    difference = (reading.old_logprob - reading.sampler_logprob).view(ROWS, COLUMNS).double()
    products = np.exp(difference[1:, :13].sum(1).numpy())
    expected = {
        "mismatch/log_ratio/mean": d.mean(),
        "mismatch/log_ratio/std": d.std(),
        "mismatch/log_ratio/absolute/mean": np.abs(d).mean(),
        "mismatch/log_ratio/p01": np.quantile(d, 0.01, method="hazen"),
        "mismatch/log_ratio/p99": np.quantile(d, 0.99, method="hazen"),
        "mismatch/log_ratio/largest": np.abs(d).max(),
        "mismatch/kl": (w - 1 - d).mean(),
        "mismatch/chi2": (w**2).mean() - 1,
        "mismatch/ratio/tail/share": ((w > 2) | (w < 0.5)).mean(),
        "mismatch/effective_sample_size/share": w.sum() ** 2 / (len(w) * (w**2).sum()),
        "mismatch/sequence/effective_sample_size/share": products.sum() ** 2
        / (len(products) * (products**2).sum()),
        "mismatch/probability/correlation": np.corrcoef(np.exp(trainer), np.exp(sampler))[0, 1],
    }
    assert found == pytest.approx(expected, rel=2e-5)
    assert set(found) == set(SamplerMismatch.metrics)
    assert 0 < found["mismatch/ratio/tail/share"] < 1


def test_divergences_are_exact_when_every_token_of_the_sampler_is_there() -> None:
    q = torch.tensor([0.5, 0.25, 0.15, 0.1])
    p = torch.tensor([0.4, 0.2, 0.1, 0.3])
    found = exact(p, q)
    chi2 = (p.square() / q).sum().item() - 1
    assert found["mismatch/kl"] == pytest.approx((q * (q / p).log()).sum().item(), rel=1e-5)
    assert found["mismatch/log_ratio/mean"] == pytest.approx(-found["mismatch/kl"], rel=1e-5)
    assert found["mismatch/chi2"] == pytest.approx(chi2, rel=1e-5)
    share = found["mismatch/effective_sample_size/share"]
    assert share == pytest.approx(1 / (1 + chi2), rel=1e-5)
    assert found["mismatch/ratio/tail/share"] == pytest.approx(0.1)


def test_a_sampler_at_another_temperature_is_likelier_than_the_trainer_on_average() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(3)) * 2
    right = exact(logits.softmax(-1), logits.softmax(-1))
    assert right["mismatch/kl"] == pytest.approx(0, abs=1e-12)
    for temperature in (0.7, 1.4):
        wrong = exact(logits.softmax(-1), (logits / temperature).softmax(-1))
        assert wrong["mismatch/log_ratio/mean"] < -0.02
        assert wrong["mismatch/kl"] > 0.02


def test_the_trainer_is_the_policy_at_generation_where_that_is_known() -> None:
    given = policy()
    assert given.sampler_logprob is not None
    agreeing = replace(given, old_logprob=given.sampler_logprob.clone())
    found = measured(agreeing)
    assert found["mismatch/log_ratio/largest"] == 0.0
    assert found["mismatch/sequence/effective_sample_size/share"] == pytest.approx(1.0)
    current = measured(replace(given, old_logprob=None))
    expected = (given.tokens.logprob - given.sampler_logprob).abs().max().item()
    assert current["mismatch/log_ratio/largest"] == pytest.approx(expected, rel=1e-5)


def test_a_factor_of_two_is_the_border_of_the_tail() -> None:
    given = policy(rows=1, columns=4)
    off = torch.tensor([log(2) + 1e-4, log(2) - 1e-4, -log(2) - 1e-4, -log(2) + 1e-4])
    tokens = replace(given.tokens, logprob=torch.full((4,), -1.0))
    reading = replace(given, tokens=tokens, old_logprob=None, sampler_logprob=-1.0 - off)
    assert measured(reading)["mismatch/ratio/tail/share"] == 0.5


def test_a_small_mismatch_is_not_lost_in_rounding() -> None:
    step = 2.0**-13
    given = policy(rows=1, columns=1)
    tokens = replace(given.tokens, logprob=torch.tensor([-1.0]))
    found = measured(
        replace(given, tokens=tokens, old_logprob=None, sampler_logprob=torch.tensor([-1.0 - step]))
    )
    assert found["mismatch/kl"] == pytest.approx(step**2 / 2 + step**3 / 6, rel=1e-6)
    assert found["mismatch/chi2"] == pytest.approx(2 * step + 2 * step**2, rel=1e-6)


def test_a_disagreement_that_no_float_holds_leaves_one_completion() -> None:
    given = policy(rows=4, columns=1000)
    off = torch.zeros(4000)
    off[:1000] = 2.0
    reading = replace(given, old_logprob=off - 3, sampler_logprob=torch.full((4000,), -3.0))
    share = measured(reading)["mismatch/sequence/effective_sample_size/share"]
    assert share == pytest.approx(0.25)


def test_equal_probabilities_have_no_correlation_to_write() -> None:
    given = policy()
    n = len(given.advantage)
    flat = torch.full((n,), -1.2)
    assert "mismatch/probability/correlation" not in measured(replace(given, old_logprob=flat))
    rounded = flat - 1e-7 * (torch.arange(n) % 3)
    assert 0 < (rounded.exp() - flat.exp()).abs().max() < 2e-7
    assert "mismatch/probability/correlation" not in measured(replace(given, old_logprob=rounded))


def test_nothing_is_written_where_the_sampler_told_nothing() -> None:
    given = policy()
    assert SamplerMismatch().measure(replace(given, sampler_logprob=None), None) == ([], None)
    silent = torch.full_like(given.advantage, torch.nan)
    assert measured(replace(given, sampler_logprob=silent)) == {}
