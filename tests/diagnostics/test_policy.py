from dataclasses import replace

import pytest
import torch
from readings import policy

from entropylens.diagnostics._policy import log_ratio, pull, token_pull
from entropylens.registry import PolicyReading

CLIP = (0.2, 0.28)


def sampled(level: str) -> PolicyReading:
    """Two sequences of which rows stand for one, for three and for no token."""
    weight = torch.tensor([1.0, 3.0, 0.0, 3.0, 3.0, 1.0])
    found = policy(rows=2, columns=3)
    tokens = replace(
        found.tokens,
        logprob=torch.tensor([-1.0, -2.0, torch.nan, -0.5, -1.5, -3.0]),
        weight=weight,
        present=weight > 0,
        sequence_tokens=torch.tensor([4, 7]),
    )
    old = torch.tensor([-1.5, -1.75, 0.0, -0.25, -2.0, -3.5])
    return replace(found, tokens=tokens, old_logprob=old, ratio_level=level)


@pytest.mark.parametrize("level", ["sequence", "product"])
def test_the_ratio_of_a_sequence_weighs_rows_by_the_tokens_they_stand_for(level: str) -> None:
    sums = [0.5 - 3 * 0.25, -3 * 0.25 + 3 * 0.5 + 0.5]
    expected = [s / n for s, n in zip(sums, (4, 7), strict=True)] if level == "sequence" else sums
    found = log_ratio(sampled(level)).view(2, 3)
    assert found.tolist() == [pytest.approx([value] * 3) for value in expected]


def test_the_ratio_of_a_token_is_its_own() -> None:
    assert log_ratio(sampled("token")).tolist() == [0.5, -0.25, 0.0, -0.25, 0.5, 0.5]
    assert not log_ratio(replace(sampled("token"), old_logprob=None)).any()


def test_pulls_are_ratio_times_advantage_and_nothing_where_clipped() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.25, 0.75])
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0, -2.0])
    found = token_pull(ratio.log(), advantage, CLIP)
    assert found.tolist() == pytest.approx([0.0, -3.0, 1.0, 0.0, 2.5, 0.0])


def test_nothing_is_pulled_without_an_advantage_however_large_the_ratio() -> None:
    ratio = torch.tensor([90.0, 100.0, torch.inf])
    for clip in (None, CLIP):
        assert token_pull(ratio, torch.zeros(3), clip).tolist() == [0.0] * 3
    assert token_pull(ratio, -torch.ones(3), CLIP)[2] == -torch.inf


def test_a_token_that_the_loss_leaves_out_is_not_pulled_however_large_the_ratio() -> None:
    given = policy(rows=1, columns=4)
    old = given.tokens.logprob - torch.tensor([0.0, 0.0, 200.0, 200.0])
    loss_weight = torch.tensor([0.5, 0.0, 0.0, 0.5])
    reading = replace(
        given, old_logprob=old, clip=None, loss_weight=loss_weight, advantage=torch.ones(4)
    )
    assert pull(reading).tolist() == [0.5, 0.0, 0.0, torch.inf]
