from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from readings import tokens as example_tokens

from entropylens.diagnostics.entropy_by_difficulty import (
    BINS,
    EntropyByDifficulty,
    cluster_moments,
    difficulty_bin,
    mean_and_error,
    u_shape,
)
from entropylens.registry import Block, PolicyReading

NAN = float("nan")
CENTRES = (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
U_NAMES = {f"entropy/difficulty/{name}" for name in ("u_depth", "u_curvature", "is_u")}


def reading(
    entropy: torch.Tensor,
    pass_rate: torch.Tensor,
    *,
    group: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> PolicyReading:
    """Entropies ``[sequences, tokens]`` of a step."""
    rows, columns = entropy.shape
    weight = torch.ones(rows, columns) if weight is None else weight
    tokens = replace(
        example_tokens(rows=rows, columns=columns),
        entropy=entropy.flatten(),
        weight=weight.flatten(),
        present=weight.flatten() > 0,
    )
    advantage = torch.zeros(rows * columns)
    return PolicyReading(tokens=tokens, advantage=advantage, pass_rate=pass_rate, group=group)


def found_in(blocks: list[Block]) -> dict[tuple[str, str], Any]:
    found: dict[tuple[str, str], Any] = {}
    for block in blocks:
        names, modules = block.columns["name"], block.columns["module"]
        modules = [modules] * len(names) if isinstance(modules, str) else modules
        columns = zip(names, modules, block.columns["value"], block.columns["weight"], strict=True)
        found |= {(n, m): (float(v), float(w)) for n, m, v, w in columns if w > 0}
    return found


def measured(one: PolicyReading, state: Any = None) -> dict[tuple[str, str], Any]:
    return found_in(EntropyByDifficulty().measure(one, state)[0])


def errors_at(level: float) -> torch.Tensor:
    return torch.full((BINS,), level, dtype=torch.float64)


def test_every_pass_rate_of_a_group_falls_into_the_bin_of_its_exact_difficulty() -> None:
    for size in range(1, 65):
        right = torch.arange(size + 1)
        expected = [min((size - c) * BINS // size, BINS - 1) for c in right.tolist()]
        assert difficulty_bin(right / size).tolist() == expected
    assert difficulty_bin(torch.tensor([NAN])).tolist() == [-1]


def test_a_bins_mean_is_over_sequences_each_with_the_mean_of_its_measured_tokens() -> None:
    entropy = torch.tensor([[1.0, 3.0, NAN], [4.0, 4.0, 10.0], [0.5, NAN, NAN], [9.0, 9.0, 9.0]])
    weight = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 4.0], [2.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    pass_rate = torch.tensor([0.9, 1.0, 0.25, NAN])
    found = measured(reading(entropy, pass_rate, weight=weight))
    assert found == {
        ("entropy/difficulty/mean", "0.0-0.2"): (5.0, 2.0),
        ("entropy/difficulty/mean", "0.6-0.8"): (0.5, 1.0),
    }


def test_a_sequence_without_measured_tokens_is_in_no_bin() -> None:
    weight = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    found = measured(reading(torch.ones(2, 2), torch.tensor([1.0, 1.0]), weight=weight))
    assert found == {("entropy/difficulty/mean", "0.0-0.2"): (1.0, 1.0)}


@pytest.mark.parametrize("bend", [6.0, -6.0, 0.5])
def test_a_quadratic_is_recovered_with_its_sign_and_depth(bend: float) -> None:
    means = 3 + bend * (CENTRES - 0.5) ** 2 - 0.2 * CENTRES
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(BINS, generator=generator, dtype=torch.float64) + 0.1
    (depth, curvature, is_u), judged = u_shape(means, errors_at(1e-4), weights)
    assert judged
    assert curvature.item() == pytest.approx(bend)
    plain = means.numpy()
    assert depth.item() == pytest.approx((plain[0] - plain.min()) / plain[0], abs=1e-12)
    assert is_u.item() == (bend > 0)


def test_the_curvature_is_numpys_weighted_parabola_over_the_bins_that_hold_data() -> None:
    generator = torch.Generator().manual_seed(2)
    for missing in (None, 1, 2, 3):
        means = torch.randn(BINS, generator=generator, dtype=torch.float64)
        weights = torch.rand(BINS, generator=generator, dtype=torch.float64) + 0.1
        if missing is not None:
            weights[missing], means[missing] = 0.0, NAN
        held = weights.numpy() > 0
        x, y = CENTRES.numpy()[held], means.numpy()[held]
        expected = np.polyfit(x, y, 2, w=np.sqrt(weights.numpy()[held]))[0]
        (depth, curvature, _), _ = u_shape(means, errors_at(0.1), weights)
        assert curvature.item() == pytest.approx(expected, rel=1e-8)
        assert depth.item() == pytest.approx((y[0] - y.min()) / y[0], rel=1e-9)


def test_a_mirror_image_is_as_much_of_a_u() -> None:
    means = torch.tensor([2.0, 1.1, 1.0, 1.4, 1.5], dtype=torch.float64)
    weights = torch.tensor([5.0, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    one, _ = u_shape(means, errors_at(0.1), weights)
    other, _ = u_shape(means.flip(0), errors_at(0.1), weights.flip(0))
    assert one[1:].tolist() == pytest.approx(other[1:].tolist())
    scaled, _ = u_shape(7 * means, 7 * errors_at(0.1), weights)
    assert scaled[0].item() == pytest.approx(one[0].item())
    assert scaled[1].item() == pytest.approx(7 * one[1].item())


def test_an_end_must_exceed_the_minimum_by_two_errors_of_the_difference() -> None:
    weights = torch.ones(BINS, dtype=torch.float64)
    for rise, expected in ((0.27, 0.0), (0.30, 1.0)):
        for end in (0, -1):
            means = torch.tensor([2.0, 1.0, 1.0, 1.0, 2.0], dtype=torch.float64)
            means[end] = 1 + rise
            assert u_shape(means, errors_at(0.1), weights)[0][2] == expected
    hill_with_a_pit = torch.tensor([1.5, 3.0, 1.0, 3.0, 1.5], dtype=torch.float64)
    assert u_shape(hill_with_a_pit, errors_at(1e-6), weights)[0][2] == 0
    straight = torch.linspace(2, 1, BINS).double()
    assert u_shape(straight, errors_at(1e-6), weights)[0][2] == 0


def test_three_bins_with_both_ends_are_needed() -> None:
    means, weights = torch.ones(4, BINS), torch.zeros(4, BINS)
    weights[0, [0, 4]] = 1
    weights[1, [0, 1, 2, 3]] = 1
    weights[2, [1, 2, 3, 4]] = 1
    weights[3, [0, 2, 4]] = 1
    assert u_shape(means, means, weights)[1].tolist() == [False, False, False, True]


@pytest.mark.parametrize("completions", [1, 8])
def test_permuted_bins_are_seldom_called_a_u(completions: int) -> None:
    generator = torch.Generator().manual_seed(20)
    prompts, repeats = 60, 400
    bins = (torch.arange(prompts) % BINS).repeat_interleave(completions)
    group = torch.arange(prompts).repeat_interleave(completions)
    profile = 1 + 4 * (CENTRES - 0.5).square().float()
    values = profile[torch.arange(prompts) % BINS] + 0.3 * torch.randn(prompts, generator=generator)
    called = []
    for at in range(repeats):
        order = torch.randperm(prompts, generator=generator) if at else torch.arange(prompts)
        moments = cluster_moments(values[order].repeat_interleave(completions), bins, group)
        means, errors = mean_and_error(moments)
        called.append(float(u_shape(means, errors, moments[0])[0][2]))
    assert called[0] == 1
    assert sum(called[1:]) / repeats < 0.05


def test_the_error_of_a_mean_of_single_sequences_is_the_textbooks() -> None:
    generator = torch.Generator().manual_seed(4)
    values = torch.randn(50, generator=generator, dtype=torch.float64)
    means, errors = mean_and_error(cluster_moments(values, torch.full((50,), 3), None))
    plain = values.numpy()
    assert means[3].item() == pytest.approx(plain.mean())
    assert errors[3].item() == pytest.approx(plain.std(ddof=1) / np.sqrt(50))
    assert means[:3].isnan().all()


def test_completions_of_one_prompt_that_are_alike_count_as_one_for_the_error() -> None:
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(30, generator=generator, dtype=torch.float64)
    alone = mean_and_error(cluster_moments(values, torch.zeros(30).long(), None))
    order = torch.randperm(240, generator=generator)
    repeated, group = values.repeat(8)[order], (1000 - 7 * torch.arange(30)).repeat(8)[order]
    together = mean_and_error(cluster_moments(repeated, torch.zeros(240).long(), group))
    for one, other in zip(alone, together, strict=True):
        assert one[0].item() == pytest.approx(other[0].item(), rel=1e-9)
    lone = mean_and_error(cluster_moments(values, torch.zeros(30).long(), torch.ones(30).long()))
    assert lone[1][0].isnan()


def three_of_each() -> tuple[torch.Tensor, torch.Tensor]:
    entropy = torch.tensor([2.0, 2.2, 2.4, 1.0, 1.1, 1.2, 2.1, 2.3, 2.5])[:, None]
    return entropy, torch.tensor([1.0, 0.5, 0.0]).repeat_interleave(3)


def test_the_past_is_discounted_by_step_and_forgotten_below_one_sequence() -> None:
    entropy, pass_rate = three_of_each()
    diagnostic = EntropyByDifficulty()
    blocks, state = diagnostic.measure(reading(entropy, pass_rate), None)
    assert {name for name, _ in found_in(blocks)} >= U_NAMES
    easy_only = reading(entropy[:3] + 1, pass_rate[:3])
    blocks, state = diagnostic.measure(easy_only, state)
    values = np.array([2.0, 2.2, 2.4, 3.0, 3.2, 3.4])
    counts = np.array([0.98, 0.98, 0.98, 1.0, 1.0, 1.0])
    easy = np.average(values, weights=counts)
    depth, weight = found_in(blocks)["entropy/difficulty/u_depth", ""]
    assert depth == pytest.approx((easy - 1.1) / easy)
    assert weight == pytest.approx(0.98 * 9 + 3)
    effective = counts.sum() ** 2 / (counts**2).sum()
    residual = (counts * (values - easy)) ** 2
    expected = np.sqrt(residual.sum() * effective / (effective - 1)) / counts.sum()
    assert mean_and_error(state)[1][0].item() == pytest.approx(expected, rel=1e-6)
    last = 1 + int(np.log(3) / -np.log(0.98))
    for step in range(2, last + 2):
        blocks, state = diagnostic.measure(easy_only, state)
        held = 3 * 0.98**step >= 1
        assert ({name for name, _ in found_in(blocks)} >= U_NAMES) == held, step
    assert not held


def test_two_prompts_in_a_bin_are_too_few_for_its_error() -> None:
    entropy, pass_rate = three_of_each()
    assert measured(reading(entropy, pass_rate)).keys() >= {(name, "") for name in U_NAMES}
    assert not {name for name, _ in measured(reading(entropy[1:], pass_rate[1:]))} & U_NAMES
    twice, group = torch.cat([entropy, entropy]), torch.arange(9).repeat(2)
    two = reading(twice[:-1], pass_rate.repeat(2)[:-1], group=group[:-1].clamp(max=7))
    assert not {name for name, _ in measured(two)} & U_NAMES


def test_a_u_in_the_tokens_is_found_and_a_hill_is_not() -> None:
    generator = torch.Generator().manual_seed(6)
    pass_rate = torch.linspace(0, 1, 9).repeat_interleave(16)
    for sign, expected in ((1, 1.0), (-1, 0.0)):
        level = 2 + sign * 4 * (pass_rate - 0.5) ** 2
        entropy = level[:, None] + 0.1 * torch.randn(144, 20, generator=generator)
        found = measured(reading(entropy, pass_rate))
        assert found["entropy/difficulty/is_u", ""][0] == expected
        assert np.sign(found["entropy/difficulty/u_curvature", ""][0]) == sign


def test_one_entropy_that_is_not_a_number_does_not_stay() -> None:
    entropy, pass_rate = three_of_each()
    entropy, pass_rate = (
        torch.cat([entropy, torch.tensor([[NAN]])]),
        torch.cat([pass_rate, torch.ones(1)]),
    )
    found = measured(reading(entropy, pass_rate))
    assert np.isnan(found["entropy/difficulty/mean", "0.0-0.2"][0])
    assert found["entropy/difficulty/u_depth", ""][0] == pytest.approx(1 - 1.1 / 2.2)


def test_without_pass_rates_nothing_is_written_and_the_state_is_kept() -> None:
    one = reading(torch.ones(2, 2), torch.ones(2))
    state = torch.ones(5, BINS)
    blocks, kept = EntropyByDifficulty().measure(replace(one, pass_rate=None), state)
    assert blocks == []
    assert kept is state
    unknown = reading(torch.ones(2, 2), torch.full((2,), NAN))
    assert measured(unknown) == {}
