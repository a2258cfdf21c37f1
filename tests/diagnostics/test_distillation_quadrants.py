from dataclasses import replace
from math import log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from readings import policy

from entropylens.diagnostics.distillation_quadrants import (
    DistillationQuadrants,
    distribution_divergences,
    overconfidence,
    quadrants,
    relative_position,
    soft_or,
)
from entropylens.registry import PolicyReading

CELLS = ("q1", "q2", "q3", "q4")


def measured(reading: PolicyReading) -> dict[str, float]:
    blocks, _ = DistillationQuadrants().measure(reading, None)
    return {
        name: value
        for block in blocks
        if float(block.columns["weight"]) > 0
        for name, value in zip(block.columns["name"], block.columns["value"].tolist(), strict=True)
    }


def reading(
    entropy: torch.Tensor,
    reverse: torch.Tensor | None,
    forward: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> PolicyReading:
    found = policy(rows=1, columns=len(entropy))
    weight = found.tokens.weight if weight is None else weight
    tokens = replace(found.tokens, entropy=entropy, weight=weight, present=weight > 0)
    return replace(found, tokens=tokens, reverse_kl=reverse, forward_kl=forward)


def columns(seed: int = 0, n: int = 101) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    entropy, reverse, forward = torch.rand(3, n, generator=generator)
    return 3 * entropy, reverse**4, forward**2


def scaled(values: np.ndarray, ceiling: float) -> np.ndarray:
    cut = np.minimum(values, np.quantile(values, ceiling, method="hazen"))
    spread: np.ndarray = (cut - cut.min()) / (cut.max() - cut.min())
    return spread


def test_divergences_equal_torchs_and_sums_over_the_vocabulary() -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = 4 * torch.randn(2, 40, 30, generator=generator)
    found = distribution_divergences(student, teacher, temperature=1.5)
    log_p = (student.double() / 1.5).log_softmax(-1)
    log_q = (teacher.double() / 1.5).log_softmax(-1)

    def torchs(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        kl_div = torch.nn.functional.kl_div
        return kl_div(second, first, log_target=True, reduction="none").sum(-1)

    log_m = ((log_p.exp() + log_q.exp()) / 2).log()
    expected = (
        torchs(log_p, log_q),
        torchs(log_q, log_p),
        (torchs(log_p, log_m) + torchs(log_q, log_m)) / 2,
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-7)
    for row in range(40):
        p, q = log_p[row].exp().numpy(), log_q[row].exp().numpy()
        direct = sum(pi * (np.log(pi) - np.log(qi)) for pi, qi in zip(p, q, strict=True))
        assert found[0][row].item() == pytest.approx(direct, rel=1e-6)


def test_chunks_change_nothing() -> None:
    generator = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, 23, 17, generator=generator)
    whole = distribution_divergences(student, teacher)
    for rows in (1, 5, 23, 100):
        for part, all_at_once in zip(
            distribution_divergences(student, teacher, chunk_rows=rows), whole, strict=True
        ):
            torch.testing.assert_close(part, all_at_once, rtol=1e-6, atol=1e-7)
    assert [part.shape for part in distribution_divergences(student[:0], teacher[:0])] == [(0,)] * 3


def test_missing_classes_are_infinite_one_way_and_bounded_in_jensen_shannon() -> None:
    inf = torch.inf
    student = torch.tensor([[0.0, -inf, -inf], [0.0, 0.0, -inf], [0.0, 0.0, -inf]])
    teacher = torch.tensor([[-inf, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, -inf]])
    reverse, forward, jensen_shannon = distribution_divergences(student, teacher)
    assert reverse.tolist() == pytest.approx([inf, log(3 / 2), 0.0])
    assert forward.tolist() == pytest.approx([inf, inf, 0.0])
    assert jensen_shannon[0].item() == pytest.approx(log(2))
    assert 0 < jensen_shannon[1] < log(2)
    assert jensen_shannon[2] == 0


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(-40, 40), st.floats(-40, 40)), min_size=2, max_size=8))
def test_jensen_shannon_is_symmetric_and_at_most_log_two(pairs: list[tuple[float, float]]) -> None:
    student, teacher = torch.tensor(pairs).float().T[:, None, :]
    reverse, forward, middle = distribution_divergences(student, teacher)
    back_reverse, back_forward, back_middle = distribution_divergences(teacher, student)
    assert -1e-7 <= middle.item() <= log(2) * (1 + 1e-6)
    assert min(reverse.item(), forward.item()) >= -1e-7
    assert middle.item() == pytest.approx(back_middle.item(), abs=1e-7)
    assert reverse.item() == pytest.approx(back_forward.item(), abs=1e-6, rel=1e-6)
    assert forward.item() == pytest.approx(back_reverse.item(), abs=1e-6, rel=1e-6)


def test_a_small_divergence_is_not_lost_in_rounding() -> None:
    teacher = torch.zeros(1, 1000)
    student = teacher.clone()
    student[0, 0] = 1e-3
    exact = student.double().log_softmax(-1)
    expected = (exact.exp() * (exact + log(1000))).sum().item()
    assert expected < 1e-9
    assert distribution_divergences(student, teacher)[0].item() == pytest.approx(expected, rel=1e-5)


def test_shares_and_scores_equal_a_loop_over_the_tokens() -> None:
    entropy, reverse, forward = columns()
    found = measured(reading(entropy, reverse, forward))
    h, delta = entropy.double().numpy(), reverse.double().numpy()
    counts, losses = dict.fromkeys(CELLS, 0), dict.fromkeys(CELLS, 0.0)
    for one_h, one_delta in zip(h, delta, strict=True):
        high, far = one_h > np.median(h), one_delta > np.median(delta)
        cell = {(True, True): "q1", (True, False): "q2", (False, True): "q3"}.get((high, far), "q4")
        counts[cell] += 1
        losses[cell] += one_delta
    for cell in CELLS:
        share = found[f"distillation/quadrant/{cell}/share"]
        loss = found[f"distillation/quadrant/{cell}/kl_share"]
        assert share == pytest.approx(counts[cell] / len(h)), cell
        assert loss == pytest.approx(losses[cell] / delta.sum(), rel=1e-5), cell
    h_hat, d_hat = scaled(h, 0.98), scaled(delta, 1.0)
    score = (1 - (1 - h_hat) * (1 - d_hat)).mean()
    assert found["distillation/soft_or/mean"] == pytest.approx(score, rel=1e-5)
    confident = (forward.double().numpy() * (1 - h_hat)).mean()
    assert found["distillation/overconfident/mean"] == pytest.approx(confident, rel=1e-5)


def test_each_corner_lands_in_its_quadrant() -> None:
    entropy = torch.tensor([2.0, 2.0, 0.1, 0.1])
    divergence = torch.tensor([1.0, 0.0, 1.0, 0.0])
    cells = quadrants(entropy, divergence, torch.ones(4))
    assert torch.equal(cells, torch.eye(4, dtype=torch.bool))


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.floats(0, 10, width=32), st.floats(0, 10, width=32)), min_size=1, max_size=60
    )
)
def test_soft_or_lies_between_its_greater_part_and_one(pairs: list[tuple[float, float]]) -> None:
    entropy, divergence = torch.tensor(pairs).T
    ones = torch.ones(len(pairs))
    h_hat = relative_position(entropy, ones, 0.98)
    d_hat = relative_position(divergence, ones)
    score = soft_or(entropy, divergence, ones)
    assert (score <= 1 + 1e-6).all()
    assert (score >= torch.maximum(h_hat, d_hat) - 1e-6).all()
    assert torch.equal(score == 0, (h_hat == 0) & (d_hat == 0))


def test_the_entropy_part_of_each_score_does_not_know_the_divergence() -> None:
    entropy, reverse, _ = columns(3)
    ones = torch.ones_like(entropy)
    for divergence in (reverse, 100 * reverse.flip(0), torch.zeros_like(reverse)):
        cells = quadrants(entropy, divergence, ones)
        assert torch.equal(cells[0] | cells[1], entropy > entropy.median())
    constant = torch.full_like(entropy, 2.5)
    score = overconfidence(entropy, constant, ones)
    assert torch.allclose(score, 2.5 * (1 - relative_position(entropy, ones, 0.98)))


def test_the_scale_of_the_entropy_changes_nothing() -> None:
    entropy, reverse, forward = columns(4)
    assert measured(reading(entropy, reverse, forward)) == pytest.approx(
        measured(reading(entropy / log(50_000), reverse, forward)), rel=1e-5
    )


def test_one_extreme_entropy_does_not_flatten_the_rest() -> None:
    entropy = torch.linspace(0, 1, 200)
    spoilt = entropy.clone()
    spoilt[-1] = 1000.0
    ones = torch.ones(200)
    found = relative_position(spoilt, ones, 0.98)
    assert torch.allclose(found[:190], relative_position(entropy, ones, 0.98)[:190])
    assert (found[-4:] == 1).all()


def test_an_infinite_divergence_is_the_greatest_and_equal_values_are_all_least() -> None:
    found = relative_position(torch.tensor([0.0, 5.0, torch.inf]), torch.ones(3))
    assert found.tolist() == [0.0, 0.0, 1.0]
    assert relative_position(torch.full((3,), 2.0), torch.ones(3)).tolist() == [0.0, 0.0, 0.0]
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0])
    values = torch.tensor([1.0, torch.nan, 3.0, 2.0])
    assert relative_position(values, weight)[weight > 0].tolist() == [0.0, 1.0, 0.5]


def test_a_row_counts_like_the_tokens_it_stands_for_and_unknown_rows_not_at_all() -> None:
    entropy, reverse, forward = torch.rand(3, 4, generator=torch.Generator().manual_seed(8))
    rows = [0, 0, 2, 3, 3, 3]
    repeated = measured(reading(entropy[rows], reverse[rows], forward[rows]))
    entropy[1] = torch.nan
    reverse[1], forward[1] = torch.nan, torch.nan
    weight = torch.tensor([2.0, 0.0, 1.0, 3.0])
    weighted = measured(reading(entropy, reverse, forward, weight))
    for cell in CELLS:
        for what in ("share", "kl_share"):
            name = f"distillation/quadrant/{cell}/{what}"
            assert weighted[name] == pytest.approx(repeated[name], abs=1e-6), name
    without = torch.tensor([2.0, 9.0, 1.0, 3.0])
    assert measured(reading(entropy, reverse, forward, without)) == pytest.approx(weighted)
    for unknown in ([0], [1, 2]):
        columns = [
            column.masked_fill(column.isnan(), 0.5) for column in (entropy, reverse, forward)
        ]
        for at in unknown:
            columns[at][1] = torch.nan
        one, two, three = columns
        assert measured(reading(one, two, three, without)) == pytest.approx(weighted), unknown


def test_a_student_that_is_its_teacher_has_no_loss_to_share() -> None:
    entropy, reverse, _ = columns(5)
    found = measured(reading(entropy, torch.zeros_like(reverse)))
    assert not [name for name in found if name.endswith("kl_share")]
    assert found["distillation/quadrant/q1/share"] == 0
    assert found["distillation/quadrant/q3/share"] == 0
    assert "distillation/overconfident/mean" not in found


def test_an_infinite_loss_is_not_shared_out() -> None:
    entropy, reverse, forward = columns(7)
    reverse[3] = torch.inf
    found = measured(reading(entropy, reverse, forward))
    assert not [name for name in found if name.endswith("kl_share")]
    assert all(np.isfinite(value) for value in found.values())


def test_divergences_that_the_loss_hands_over_need_no_distribution_of_ours() -> None:
    """A fused head shows log-probabilities and entropies, and no row whole."""
    entropy, reverse, forward = columns(9)
    whole = reading(entropy, reverse, forward)
    unseen = replace(
        whole.tokens,
        distribution_weight=torch.zeros_like(entropy),
        expected_discriminator=None,
        varentropy=None,
    )
    assert measured(replace(whole, tokens=unseen)) == measured(whole)
    assert len(measured(whole)) == 10


def test_nothing_is_written_without_a_teacher_or_without_a_token() -> None:
    entropy, reverse, forward = columns(6)
    assert measured(reading(entropy, None)) == {}
    assert list(measured(reading(entropy, None, forward))) == ["distillation/overconfident/mean"]
    assert measured(reading(entropy, reverse, forward, torch.zeros_like(entropy))) == {}
