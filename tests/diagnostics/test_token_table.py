import torch
from readings import tokens

from entropylens.diagnostics.token_table import ROWS, TokenTable, select_tokens
from entropylens.registry import Lookup


def test_half_are_the_most_surprising_and_half_a_uniform_sample() -> None:
    reading = tokens(rows=10, columns=40)
    (block,), _ = TokenTable().measure(reading, None)
    half = ROWS // 2
    worst = (-reading.logprob).argsort(descending=True)[:half]
    assert block.columns["logprob"][:half].tolist() == reading.logprob[worst].tolist()
    sampled = reading.key.argsort()[:half]
    assert block.columns["logprob"][half:].tolist() == reading.logprob[sampled].tolist()
    assert block.columns["selection"] == ["largest"] * half + ["uniform"] * half


def test_the_uniform_half_takes_every_present_token_equally_often() -> None:
    generator = torch.Generator().manual_seed(0)
    present = torch.ones(20, dtype=torch.bool)
    present[::5] = False
    counts = torch.zeros(20)
    for _ in range(4000):
        key = torch.rand(20, generator=generator)
        counts[select_tokens(torch.zeros(20), present, key, 8)[1]] += 1
    assert (counts[~present] == 0).all()
    expected = 4000 * 4 / 16
    assert ((counts[present] - expected).abs() < 5 * (expected * 0.75) ** 0.5).all()


def test_a_token_whose_log_probability_is_not_a_number_comes_first() -> None:
    contribution = torch.tensor([3.0, torch.nan, 9.0])
    largest, _ = select_tokens(contribution, torch.ones(3, dtype=torch.bool), torch.rand(3), 2)
    assert largest.tolist() == [1]


def test_tokens_that_are_masked_are_marked_and_names_follow_the_sequence() -> None:
    reading = tokens(rows=2, columns=3)
    reading.present[3:] = False
    (block,), _ = TokenTable().measure(reading, None)
    assert block.columns["present"].sum() == 6
    assert isinstance(block.columns["sample_id"], Lookup)
    chosen = block.columns["sample_id"].index[block.columns["present"]]
    assert set(chosen.tolist()) == {0}


def test_the_uniform_half_is_uniform_over_micro_batches_sampled_at_other_rates() -> None:
    generator = torch.Generator().manual_seed(1)
    first, trials = 0, 300
    for _ in range(trials):
        reading = tokens(rows=2, columns=2000)
        reading.weight[:2000], reading.weight[2000:] = 9.0, 1.0
        reading.key[:] = torch.rand(4000, generator=generator)
        (block,), _ = TokenTable().measure(reading, None)
        first += int((block.columns["sequence"][ROWS // 2 :] == 0).sum())
    drawn = trials * ROWS // 2
    assert abs(first / drawn - 0.9) < 5 * (0.9 * 0.1 / drawn) ** 0.5
