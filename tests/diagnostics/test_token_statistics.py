import logging
from collections.abc import Iterator
from dataclasses import fields
from math import inf, log, nan
from typing import Any

import pytest
import torch
from torch import Tensor

from entropylens.diagnostics import _tile_sums as module
from entropylens.diagnostics.token_statistics import (
    TokenStatistics,
    token_statistics,
    token_statistics_from_hidden,
)

NAMES = [field.name for field in fields(TokenStatistics)]
# |error| <= absolute + relative * |value|, as the docstring states.
FLOORS = {
    "logprob": (1e-6, 2e-6),
    "entropy": (1e-6, 2e-6),
    "log_sum_exp": (1e-6, 2e-6),
    "varentropy": (1e-12, 5e-6),
    "sum_squared_probabilities": (0.0, 3e-6),
    "max_probability": (0.0, 3e-6),
}


def reference(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> dict[str, Tensor]:
    """The definitions in float64, each a sum of its own."""
    z = logits.double() / temperature
    logp = z.log_softmax(-1)
    p = logp.exp()
    logp = torch.where(p > 0, logp, 0.0)
    entropy = -(p * logp).sum(-1)
    centred = logp + entropy[..., None]
    return {
        "logprob": z.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1),
        "entropy": entropy,
        "varentropy": (p * centred**2).sum(-1),
        "sum_squared_probabilities": (p**2).sum(-1),
        "expected_discriminator": (p**2 * centred).sum(-1),
        "max_probability": p.amax(-1),
        "log_sum_exp": z.logsumexp(-1),
    }


def check(found: TokenStatistics, expected: dict[str, Tensor]) -> None:
    for name, (absolute, relative) in FLOORS.items():
        value, wanted = getattr(found, name).double(), expected[name]
        error = torch.where(value == wanted, 0.0, (value - wanted).abs())
        assert (error <= absolute + relative * wanted.abs()).all(), (name, error.max())
    pull, wanted = found.expected_discriminator.double(), expected["expected_discriminator"]
    allowed = 1e-6 * expected["sum_squared_probabilities"] + 1e-5 * wanted.abs()
    assert ((pull - wanted).abs() <= allowed).all(), (pull - wanted).abs().max()


def shapes_of_distributions() -> Iterator[tuple[str, Tensor]]:
    vocabulary = 9_001  # two whole tiles and a rest
    noise = torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(0))
    yield "ordinary", 3 * noise
    yield "uniform", torch.full((2, vocabulary), 2.5)
    for scale in (1e-1, 1e-2, 1e-3, 1e-4):
        yield f"nearly uniform, {scale:g}", scale * noise + 5
    for height in (12.0, 16.0, 22.0, 30.0, 80.0):
        peaked = noise.clone()
        peaked[:, 5_000] = height
        yield f"peaked, {height:g}", peaked
    for depth in (0.1, 1.0, 3.0, 8.0, 40.0):
        shelf = torch.full((2, vocabulary), -depth)
        shelf[:, 0] = 0.0
        yield f"shelf, {depth:g}", shelf
    yield "far from zero", noise + 1e4
    yield "steep", 25 * noise
    yield "half masked", torch.where(torch.arange(vocabulary) % 2 == 0, noise, -inf)
    yield "a tile masked", torch.where(torch.arange(vocabulary) < 4_096, -inf, noise)
    yield "two equal maxima", torch.where(torch.arange(vocabulary) % 4_500 == 7, 30.0, noise)


CASES = list(shapes_of_distributions())
every_shape = pytest.mark.parametrize("logits", [z for _, z in CASES], ids=[n for n, _ in CASES])


@every_shape
def test_it_equals_the_definitions_in_float64(logits: Tensor) -> None:
    targets = torch.arange(logits.shape[0]) * 1_001 + 5_000 - 1_001
    check(token_statistics(logits, targets), reference(logits, targets))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(8, 9_001, generator=torch.Generator().manual_seed(1)).to(dtype)
    targets = torch.arange(8)
    check(token_statistics(logits, targets), reference(logits, targets))


def test_an_entropy_of_six_hundredths_of_a_nat_reads_so_from_bfloat16() -> None:
    logits = torch.zeros(1, 50_257, dtype=torch.bfloat16)
    logits[0, 11] = 16.5
    found = token_statistics(logits, torch.tensor([11]))
    expected = reference(logits, torch.tensor([11]))["entropy"].item()
    assert 0.05 < expected < 0.07
    assert found.entropy.item() == pytest.approx(expected, rel=1e-6)
    assert (-torch.softmax(logits, -1) * torch.log_softmax(logits, -1)).sum().item() != (
        pytest.approx(expected, rel=0.02)
    )


@pytest.mark.parametrize("temperature", [0.5, 0.7, 3.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    logits = 2 * torch.randn(5, 5_000, generator=torch.Generator().manual_seed(2))
    targets = torch.arange(5)
    expected = reference(logits, targets, temperature)
    check(token_statistics(logits, targets, temperature=temperature), expected)


def test_a_uniform_distribution_has_its_closed_form() -> None:
    found = token_statistics(torch.full((1, 151_936), -3.0), torch.tensor([0]))
    assert found.entropy.item() == pytest.approx(log(151_936), rel=1e-7)
    assert found.logprob.item() == pytest.approx(-log(151_936), rel=1e-7)
    assert found.varentropy.item() == pytest.approx(0.0, abs=1e-12)
    assert found.sum_squared_probabilities.item() == pytest.approx(1 / 151_936, rel=1e-6)


def test_two_classes_have_their_closed_form() -> None:
    p = 0.9
    found = token_statistics(torch.tensor([[log(p), log(1 - p)]]), torch.tensor([1]))
    entropy = -p * log(p) - (1 - p) * log(1 - p)
    assert found.entropy.item() == pytest.approx(entropy, rel=1e-6)
    assert found.varentropy.item() == pytest.approx(p * (1 - p) * log(p / (1 - p)) ** 2, rel=1e-6)
    assert found.logprob.item() == pytest.approx(log(1 - p), rel=1e-6)


def test_the_entropys_gradient_is_minus_the_discriminator() -> None:
    """I1: dH/dz_k = -S_k, so N = E_p[S] follows from autograd alone."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 300, generator=generator).requires_grad_()
    p = logits.double().softmax(-1)
    entropy = -(p * p.log()).sum()
    (gradient,) = torch.autograd.grad(entropy, logits)
    found = token_statistics(logits, torch.zeros(6, dtype=torch.long))
    expected = -(p * gradient.double()).sum(-1)
    torch.testing.assert_close(found.expected_discriminator.double(), expected, rtol=1e-5, atol=0)


def test_discriminators_of_all_targets_sum_to_zero_and_keep_their_bound() -> None:
    """sum_i S_i = 0, S_i >= -exp(-1 - H) (I2), sum_i p_i S_i = N, from our own outputs."""
    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(4)).expand(200, -1)
    found = token_statistics(logits, torch.arange(200))
    p = found.logprob.double().exp()
    discriminator = p * (found.logprob + found.entropy).double()
    assert p.sum().item() == pytest.approx(1.0, abs=1e-6)
    assert discriminator.sum().item() == pytest.approx(0.0, abs=1e-6)
    assert (discriminator >= -(-1 - found.entropy.double()).exp() - 1e-9).all()
    expected = (p * discriminator).sum().item()
    assert found.expected_discriminator[0].item() == pytest.approx(expected, rel=1e-5)


def test_masked_and_negative_targets_are_absent_and_leave_the_rest() -> None:
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(5))
    targets = torch.tensor([[1, -100, 2], [3, 4, 50]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    found = token_statistics(logits, targets, mask=mask)
    kept = torch.tensor([[True, False, False], [True, True, False]])
    for name in NAMES:
        assert torch.equal(getattr(found, name).isnan(), ~kept), name
    whole = token_statistics(logits, targets.clamp(0, 49))
    assert torch.equal(found.entropy[kept], whole.entropy[kept])


def test_an_all_zero_mask_leaves_nothing() -> None:
    targets = torch.zeros(2, 3, dtype=torch.long)
    found = token_statistics(torch.zeros(2, 3, 5), targets, mask=torch.zeros(2, 3))
    assert all(getattr(found, name).isnan().all() for name in NAMES)


@pytest.mark.parametrize("bad", [nan, inf])
def test_logits_that_are_not_numbers_spoil_their_own_token_only(bad: float) -> None:
    logits = torch.zeros(3, 9_000)
    logits[1, 8_500] = bad
    found = token_statistics(logits, torch.zeros(3, dtype=torch.long))
    for name in NAMES:
        assert getattr(found, name).isnan().tolist() == [False, True, False], name


def test_a_row_of_minus_infinity_has_no_distribution() -> None:
    found = token_statistics(torch.full((1, 5_000), -inf), torch.tensor([0]))
    assert all(getattr(found, name).isnan().all() for name in NAMES)


def test_a_forbidden_target_has_log_probability_minus_infinity() -> None:
    logits = torch.tensor([[0.0, -inf, 0.0]])
    found = token_statistics(logits, torch.tensor([1]))
    assert found.logprob.item() == -inf
    assert found.entropy.item() == pytest.approx(log(2), rel=1e-6)


def test_one_certain_class_has_no_entropy() -> None:
    logits = torch.full((1, 5_000), -inf)
    logits[0, 3] = 2.0
    found = token_statistics(logits, torch.tensor([3]))
    for name in ("entropy", "varentropy", "logprob", "expected_discriminator"):
        assert abs(getattr(found, name).item()) < 1e-30, name
    assert found.max_probability.item() == 1.0


def test_views_are_read_as_they_are() -> None:
    logits = torch.randn(3, 7, 500, generator=torch.Generator().manual_seed(6))
    targets = torch.randint(0, 500, (3, 7), generator=torch.Generator().manual_seed(7))
    shifted = token_statistics(logits[:, :-1], targets[:, 1:])
    copied = token_statistics(logits[:, :-1].contiguous(), targets[:, 1:].contiguous())
    for name in NAMES:
        assert torch.equal(getattr(shifted, name), getattr(copied, name)), name
    turned = token_statistics(logits.transpose(0, 1), targets.T)
    assert torch.equal(turned.entropy.T, token_statistics(logits, targets).entropy)


def test_the_logits_are_not_changed_and_no_random_number_is_drawn() -> None:
    logits = torch.randn(3, 5_000)
    kept, state = logits.clone(), torch.get_rng_state()
    token_statistics(logits, torch.zeros(3, dtype=torch.long))
    assert torch.equal(logits, kept)
    assert torch.equal(torch.get_rng_state(), state)


def test_it_runs_without_data_and_without_tokens() -> None:
    shape = torch.zeros(2, 3, dtype=torch.long, device="meta")
    assert token_statistics(torch.zeros(2, 3, 9_000, device="meta"), shape).entropy.is_meta
    weight = torch.zeros(9_000, 4, device="meta")
    hidden = torch.zeros(2, 3, 4, device="meta")
    assert token_statistics_from_hidden(hidden, weight, shape).entropy.shape == (2, 3)
    nothing = token_statistics(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))
    assert nothing.entropy.shape == (0,)


def test_many_blocks_of_rows_are_put_together_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(37, 100, generator=torch.Generator().manual_seed(8))
    targets = torch.arange(37)
    whole = token_statistics(logits, targets)
    monkeypatch.setattr(module, "EAGER_ELEMENTS", 400)
    assert torch.equal(token_statistics(logits, targets).logprob, whole.logprob)


@pytest.mark.skipif(not module._has_compiler("cpu"), reason="no C++ compiler here")
@pytest.mark.filterwarnings("default")  # the compiler's own
@every_shape
def test_compiled_sums_equal_the_same_definitions(logits: Tensor) -> None:
    targets = torch.arange(logits.shape[0]) * 1_001 + 5_000 - 1_001
    found = token_statistics(logits, targets, compiled=True)
    assert not module._broken
    check(found, reference(logits, targets))


def test_the_written_out_exponential_is_one() -> None:
    x = torch.linspace(-87.0, 0.0, 400_001)
    error = module._exp(x).double() / x.double().exp() - 1
    assert error.abs().max() < 6e-6  # rounding of x * log2(e) at 87
    assert error[x > -10].abs().max() < 7e-7
    assert module._exp(torch.tensor([0.0])).item() == 1.0


def test_a_compiler_that_fails_is_named_once_and_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*shape: Any) -> None:
        raise RuntimeError("no compiler today")

    monkeypatch.setattr(module, "_compiled", broken)
    monkeypatch.setattr(module, "_broken", set())
    logits, targets = torch.randn(2, 30), torch.arange(2)
    with caplog.at_level(logging.WARNING, "entropylens"):
        found = [token_statistics(logits, targets, compiled=True) for _ in range(2)]
    assert sum("no compiler today" in message for message in caplog.messages) == 1
    assert torch.equal(found[0].entropy, token_statistics(logits, targets).entropy)


def test_hidden_states_give_what_their_logits_give() -> None:
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(2, 150, 16, generator=generator)
    weight = torch.randn(9_001, 16, generator=generator)
    bias = torch.randn(9_001, generator=generator)
    targets = torch.randint(0, 9_001, (2, 150), generator=generator)
    logits = 0.5 * (hidden.double() @ weight.double().T + bias.double())
    logits = 5.0 * torch.tanh(logits / 5.0)
    found = token_statistics_from_hidden(
        hidden, weight, targets, bias=bias, soft_cap=5.0, logit_scale=0.5, temperature=0.8
    )
    expected = reference(logits, targets, 0.8)
    for name in NAMES:
        torch.testing.assert_close(
            getattr(found, name).double(), expected[name], rtol=1e-4, atol=1e-5
        )


def test_the_targets_logit_is_the_one_that_the_head_rounds_to() -> None:
    generator = torch.Generator().manual_seed(10)
    hidden = torch.randn(20, 32, generator=generator).bfloat16()
    weight = torch.randn(5_000, 32, generator=generator).bfloat16()
    targets = torch.randint(0, 5_000, (20,), generator=generator)
    direct = token_statistics(hidden @ weight.T, targets)
    found = token_statistics_from_hidden(hidden, weight, targets)
    torch.testing.assert_close(found.logprob, direct.logprob, rtol=0, atol=0.05)
    torch.testing.assert_close(found.entropy, direct.entropy, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("logits", "targets", "options", "message"),
    [
        (torch.zeros(3), torch.tensor(0), {}, r"at least one axis before .* got shape \(3,\)"),
        (torch.zeros(2, 3), torch.zeros(3).long(), {}, r"targets of shape \(2,\), got \(3,\)"),
        (
            torch.zeros(2, 3),
            torch.zeros(2).long(),
            {"mask": torch.ones(3)},
            r"mask of shape \(2,\), got \(3,\)",
        ),
        (torch.zeros(2, 3), torch.zeros(2).long(), {"temperature": 0.0}, "temperature > 0, got 0"),
        (
            torch.zeros(2, 3),
            torch.zeros(2).long(),
            {"temperature": nan},
            "temperature > 0, got nan",
        ),
    ],
)
def test_wrong_arguments_are_named(
    logits: Tensor, targets: Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        token_statistics(logits, targets, **options)


def test_wrong_heads_are_named() -> None:
    hidden, weight, targets = torch.zeros(2, 4), torch.zeros(8, 4), torch.zeros(2).long()
    with pytest.raises(TypeError, match=r"expected floating point, got torch.int64"):
        token_statistics(torch.zeros(2, 3).long(), targets)
    with pytest.raises(ValueError, match=r"hidden \[..., d\] and weight \[V, d\], got shapes"):
        token_statistics_from_hidden(hidden, weight.T, targets)
    with pytest.raises(ValueError, match=r"bias of shape \(8,\), got \(4,\)"):
        token_statistics_from_hidden(hidden, weight, targets, bias=torch.zeros(4))
    with pytest.raises(ValueError, match="soft_cap > 0, got -1"):
        token_statistics_from_hidden(hidden, weight, targets, soft_cap=-1.0)
