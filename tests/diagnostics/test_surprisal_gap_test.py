import io
from math import log
from typing import Any

import numpy as np
import pytest
import torch

from entropylens.diagnostics.surprisal_gap_test import (
    BLOCK_ELEMENTS,
    EXPONENTS,
    SurprisalGapTest,
    evidence_path,
    surprisal_cumulants,
)
from entropylens.registry import Block, SampledReading

VOCABULARY = 40


def logits_of(count: int, seed: int, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, VOCABULARY, generator=generator)


def drawn(probabilities: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def top_p(probabilities: torch.Tensor, mass: float) -> torch.Tensor:
    ordered, order = probabilities.sort(descending=True)
    kept = ordered.cumsum(-1) - ordered < mass
    return torch.zeros_like(probabilities).scatter(1, order, ordered * kept)


def reading(logits: torch.Tensor, token: torch.Tensor) -> SampledReading:
    entropy, varentropy, cumulant = surprisal_cumulants(logits, EXPONENTS)
    logprob = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
    return SampledReading(
        surprisal_gap=-logprob - entropy,
        varentropy=varentropy,
        cumulant=cumulant,
        exponents=EXPONENTS,
        present=torch.ones(len(token), dtype=torch.bool),
    )


def part(found: SampledReading, rows: slice) -> SampledReading:
    return SampledReading(
        surprisal_gap=found.surprisal_gap[rows],
        varentropy=found.varentropy[rows],
        cumulant=found.cumulant[:, rows],
        exponents=found.exponents,
        present=found.present[rows],
    )


def values_of(blocks: list[Block]) -> dict[str, float]:
    return {
        name.removeprefix("gap_test/"): value
        for block in blocks
        for name, value, weight in zip(
            block.columns["name"],
            block.columns["value"].tolist(),
            block.columns["weight"].tolist(),
            strict=True,
        )
        if weight
    }


def measured(found: SampledReading) -> dict[str, float]:
    return values_of(SurprisalGapTest().measure(found, None)[0])


# -- cumulants -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_cumulants_equal_expectations_summed_over_the_vocabulary(temperature: float) -> None:
    logits = logits_of(50, 0).view(5, 10, VOCABULARY)
    logits[0, 0, 3:] = -torch.inf
    logits[0, 1] = 0.0
    logits[0, 2, 5] = 60.0
    entropy, varentropy, psi = surprisal_cumulants(logits, EXPONENTS, temperature)
    assert entropy.shape == varentropy.shape == (5, 10)
    assert psi.shape == (len(EXPONENTS), 5, 10)
    z = logits.double().numpy() / temperature
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    surprisal = -np.log(np.where(p > 0, p, 1.0))
    mean = (p * surprisal).sum(-1)
    gap = surprisal - mean[..., None]
    assert entropy.numpy() == pytest.approx(mean, rel=1e-5, abs=1e-7)
    assert varentropy.numpy() == pytest.approx((p * gap**2).sum(-1), rel=1e-5, abs=1e-7)
    for lam, found in zip(EXPONENTS, psi, strict=True):
        expected = np.log((p * np.exp(lam * gap)).sum(-1))
        assert found.numpy() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_two_choices_have_the_cumulant_of_the_closed_form() -> None:
    p, lam = 0.9, 0.25
    logits = torch.tensor([[log(p), log(1 - p), -torch.inf]])
    entropy, varentropy, psi = surprisal_cumulants(logits, (lam,))
    expected = -p * log(p) - (1 - p) * log(1 - p)
    assert entropy.item() == pytest.approx(expected, rel=1e-6)
    assert varentropy.item() == pytest.approx(p * (1 - p) * log(p / (1 - p)) ** 2, rel=1e-5)
    renyi = log(p ** (1 - lam) + (1 - p) ** (1 - lam)) / lam
    assert psi.item() == pytest.approx(lam * (renyi - expected), rel=1e-5)


def test_certain_and_even_distributions_have_no_scatter_and_bad_rows_are_not_numbers() -> None:
    bad = [
        [0.0, torch.nan, 0.0],
        [0.0, torch.inf, 0.0],
        [-torch.inf] * 3,
    ]
    logits = torch.tensor([[1.0, 1.0, 1.0], [500.0, 0.0, -torch.inf], *bad])
    found = torch.cat([column.reshape(-1, 5) for column in surprisal_cumulants(logits, EXPONENTS)])
    assert found[0, :2].tolist() == pytest.approx([log(3), 0.0])
    assert found[1:, :2].abs().max() < 1e-6
    assert found[:, 2:].isnan().all()


def test_adding_a_constant_or_cutting_into_blocks_changes_nothing() -> None:
    rows = BLOCK_ELEMENTS // 2**18 * 2 + 3
    logits = torch.randn(rows, 2**18, generator=torch.Generator().manual_seed(1))
    whole = torch.stack([*surprisal_cumulants(logits, (0.1,))[:2]])
    alone = torch.cat([torch.stack([*surprisal_cumulants(z[None], (0.1,))[:2]]) for z in logits], 1)
    assert torch.allclose(whole, alone, rtol=1e-6, atol=0)
    small = logits_of(20, 2)
    for found, moved in zip(
        surprisal_cumulants(small, EXPONENTS),
        surprisal_cumulants(small + 8.0, EXPONENTS),
        strict=True,
    ):
        assert torch.allclose(found, moved, atol=1e-5)


def test_exponents_and_temperatures_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="expected exponents below 1, got"):
        surprisal_cumulants(torch.zeros(1, 3), (0.5, 1.0))
    with pytest.raises(ValueError, match="expected temperature > 0, got 0"):
        surprisal_cumulants(torch.zeros(1, 3), (0.5,), 0.0)


# -- the martingale --------------------------------------------------------------------------------


def runs(seed: int, count: int, tokens: int) -> SampledReading:
    logits = logits_of(count * tokens, seed)
    return reading(logits, drawn(logits.softmax(-1), seed + 1))


def test_evidence_of_twenty_comes_in_at_most_one_run_in_twenty() -> None:
    count, tokens = 1000, 60
    found = runs(10, count, tokens)
    crossed, crossed_alone = 0, np.zeros(len(EXPONENTS))
    for run in range(count):
        one = part(found, slice(run * tokens, (run + 1) * tokens))
        path, _ = evidence_path(one.surprisal_gap, one.cumulant, EXPONENTS)
        crossed += bool(path.max() > log(20))
        for number, lam in enumerate(EXPONENTS):
            alone = (lam * one.surprisal_gap - one.cumulant[number]).cumsum(0).max()
            crossed_alone[number] += bool(alone > log(20))
    assert crossed / count <= 0.05
    assert (crossed_alone / count <= 0.05).all()


@pytest.mark.parametrize("lam", [-0.1, 0.1])
def test_the_martingale_has_mean_one_where_the_policy_drew(lam: float) -> None:
    count, tokens = 4000, 20
    found = runs(20, count, tokens)
    number = EXPONENTS.index(lam)
    steps = (lam * found.surprisal_gap - found.cumulant[number]).view(count, tokens)
    final = steps.sum(1).double().exp()
    error = final.std().item() / count**0.5
    assert error < 0.02
    assert final.mean().item() == pytest.approx(1.0, abs=4 * error)


def test_z_has_mean_zero_and_variance_one_where_the_policy_drew() -> None:
    count, tokens = 1000, 40
    found = runs(30, count, tokens)
    z = np.array(
        [measured(part(found, slice(i * tokens, (i + 1) * tokens)))["z"] for i in range(count)]
    )
    assert z.mean() == pytest.approx(0.0, abs=4 / count**0.5)
    assert z.var() == pytest.approx(1.0, abs=4 * (2 / count) ** 0.5)


def test_the_path_equals_a_loop_over_the_definition() -> None:
    found = runs(40, 1, 30)
    path, sums = evidence_path(found.surprisal_gap, found.cumulant, EXPONENTS)
    gap, psi = found.surprisal_gap.double().numpy(), found.cumulant.double().numpy()
    for n in range(1, 31):
        terms = [np.exp(lam * gap[:n].sum() - psi[k, :n].sum()) for k, lam in enumerate(EXPONENTS)]
        assert path[n - 1].item() == pytest.approx(np.log(np.mean(terms)), abs=1e-6)
    first = part(found, slice(0, 12))
    rest = part(found, slice(12, 30))
    _, before = evidence_path(first.surprisal_gap, first.cumulant, EXPONENTS)
    after, total = evidence_path(rest.surprisal_gap, rest.cumulant, EXPONENTS, sums=before)
    assert torch.allclose(after, path[12:])
    assert torch.allclose(total, sums)


# -- the test --------------------------------------------------------------------------------------


def test_right_draws_pass_and_every_other_sampler_is_rejected() -> None:
    logits = logits_of(3000, 50)
    right = measured(reading(logits, drawn(logits.softmax(-1), 51)))
    assert right["anytime_p"] > 0.05
    assert abs(right["z"]) < 3
    cut = measured(reading(logits, drawn(top_p(logits.softmax(-1), 0.9), 52)))
    assert cut["gap/mean"] < -0.05
    assert cut["z"] < -5
    assert cut["anytime_p"] < 1e-6
    assert cut["log_evidence"] > log(20)
    for temperature, sign in ((0.8, -1), (1.25, 1)):
        off = measured(reading(logits, drawn((logits / temperature).softmax(-1), 53)))
        assert sign * off["gap/mean"] > 0.05
        assert sign * off["z"] > 5
        assert off["anytime_p"] < 1e-6
        again = measured(
            reading(logits / temperature, drawn((logits / temperature).softmax(-1), 53))
        )
        assert again["anytime_p"] > 0.05


def test_a_temperature_that_is_off_by_one_percent_is_rejected_within_300_000_tokens() -> None:
    states, draws = 300, 1000
    logits = logits_of(states, 54)
    entropy, varentropy, cumulant = surprisal_cumulants(logits, EXPONENTS)
    logp = logits.log_softmax(-1)
    for temperature, sign in ((0.99, -1), (1.0, 0), (1.01, 1)):
        token = torch.multinomial(
            (logits / temperature).softmax(-1),
            draws,
            replacement=True,
            generator=torch.Generator().manual_seed(55),
        )
        found = SampledReading(
            surprisal_gap=(-logp.gather(1, token) - entropy[:, None]).T.flatten(),
            varentropy=varentropy.repeat(draws),
            cumulant=cumulant.repeat(1, draws),
            exponents=EXPONENTS,
            present=torch.ones(states * draws, dtype=torch.bool),
        )
        values = measured(found)
        if sign:
            assert values["anytime_p"] < 1e-3
            assert values["log_evidence"] > log(20)
            assert sign * values["run_z"] > 5
        else:
            assert values["anytime_p"] > 0.05
            assert abs(values["run_z"]) < 3


def test_the_z_of_the_run_adds_up_steps_that_say_little_alone() -> None:
    logits = logits_of(2000, 56)
    found = reading(logits, drawn((logits / 0.88).softmax(-1), 57))
    state: Any = None
    alone, together = [], []
    for start in range(0, 2000, 100):
        blocks, state = SurprisalGapTest().measure(part(found, slice(start, start + 100)), state)
        values = values_of(blocks)
        alone.append(values["z"])
        together.append(values["run_z"])
    gap, varentropy = found.surprisal_gap.double().numpy(), found.varentropy.double().numpy()
    for n, value in zip(range(100, 2001, 100), together, strict=True):
        assert value == pytest.approx(gap[:n].sum() / np.sqrt(varentropy[:n].sum()), rel=1e-5)
    assert together[0] == alone[0]
    assert np.median(alone) > -2
    assert together[-1] < -4


def test_steps_make_the_same_as_one_reading_and_the_p_value_never_forgets() -> None:
    bad, good = logits_of(400, 60), logits_of(400, 61)
    tokens = torch.cat([drawn((bad / 0.7).softmax(-1), 62), drawn((good / 1.4).softmax(-1), 63)])
    found = reading(torch.cat([bad, good]), tokens)
    at_once, state_at_once = SurprisalGapTest().measure(found, None)
    state: Any = None
    values: dict[str, float] = {}
    for start in range(0, 800, 100):
        blocks, state = SurprisalGapTest().measure(part(found, slice(start, start + 100)), state)
        stored = io.BytesIO()
        torch.save(state, stored)
        stored.seek(0)
        state = torch.load(stored, weights_only=True)
        before, values = values, values_of(blocks)
        assert values["anytime_p"] <= before.get("anytime_p", 1.0)
    assert state is not None
    assert values["anytime_p"] == pytest.approx(values_of(at_once)["anytime_p"])
    assert values["log_evidence"] == pytest.approx(values_of(at_once)["log_evidence"])
    assert state["sums"].tolist() == pytest.approx(state_at_once["sums"].tolist())
    path, _ = evidence_path(found.surprisal_gap, found.cumulant, EXPONENTS)
    assert path[-1] < path.max()
    assert values["anytime_p"] == pytest.approx((-path.max()).exp().item())


def test_rows_without_a_token_or_a_number_leave_no_trace() -> None:
    found = runs(70, 1, 50)
    whole = measured(found)
    padded = {
        "surprisal_gap": torch.cat([torch.tensor([torch.inf]), found.surprisal_gap]),
        "varentropy": torch.cat([torch.tensor([torch.nan]), found.varentropy]),
        "cumulant": torch.cat([torch.full((len(EXPONENTS), 1), torch.inf), found.cumulant], 1),
    }
    for present in (False, True):
        mixed = SampledReading(
            **padded,
            exponents=EXPONENTS,
            present=torch.cat([torch.tensor([present]), found.present]),
        )
        assert measured(mixed) == pytest.approx(whole)
    assert whole["tokens"] == 50


def test_an_impossible_token_is_all_the_evidence_there_can_be() -> None:
    found = runs(80, 1, 20)
    gap = found.surprisal_gap.clone()
    gap[4] = torch.inf
    impossible = SampledReading(**{**vars(found), "surprisal_gap": gap})
    blocks, state = SurprisalGapTest().measure(impossible, None)
    assert values_of(blocks)["anytime_p"] == 0.0
    assert values_of(SurprisalGapTest().measure(found, state)[0])["anytime_p"] == 0.0


def test_evidence_for_the_policy_is_a_p_value_of_one_and_counts_in_what_follows() -> None:
    quiet = SampledReading(
        surprisal_gap=torch.zeros(4),
        varentropy=torch.ones(4),
        cumulant=torch.full((len(EXPONENTS), 4), 0.1),
        exponents=EXPONENTS,
        present=torch.ones(4, dtype=torch.bool),
    )
    blocks, state = SurprisalGapTest().measure(quiet, None)
    values = values_of(blocks)
    assert values["anytime_p"] == 1.0
    assert values["log_evidence"] == pytest.approx(-0.4)
    assert values["z"] == 0.0
    blocks, _ = SurprisalGapTest().measure(quiet, state)
    assert values_of(blocks)["log_evidence"] == pytest.approx(-0.8)


def test_nothing_drawn_is_absent_and_certain_tokens_have_no_z() -> None:
    found = runs(90, 1, 5)
    nothing = SampledReading(**{**vars(found), "present": torch.zeros(5, dtype=torch.bool)})
    blocks, state = SurprisalGapTest().measure(nothing, None)
    assert values_of(blocks) == {}
    assert state["sums"].tolist() == [0.0] * len(EXPONENTS)
    certain = reading(torch.tensor([[50.0, -torch.inf]] * 3), torch.zeros(3, dtype=torch.long))
    values = measured(certain)
    assert "z" not in values
    assert "run_z" not in values
    assert values["anytime_p"] == 1.0
    assert values["gap/mean"] == 0.0
    assert SurprisalGapTest().measure(part(found, slice(0, 0)), None) == ([], None)


def test_other_exponents_start_a_new_test() -> None:
    found = runs(95, 1, 30)
    _, state = SurprisalGapTest().measure(found, None)
    other = SampledReading(
        **{**vars(found), "cumulant": found.cumulant[:2], "exponents": EXPONENTS[:2]}
    )
    again = values_of(SurprisalGapTest().measure(other, state)[0])
    assert again == measured(other)
