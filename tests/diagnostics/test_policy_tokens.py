from dataclasses import replace

import torch
from readings import policy

from entropylens.diagnostics.policy_tokens import ROWS, PolicyTokens


def test_half_are_the_tokens_of_largest_covariance_and_half_a_uniform_sample() -> None:
    reading = policy()
    tokens = replace(reading.tokens, present=reading.tokens.position % 3 > 0)
    blocks, _ = PolicyTokens().measure(replace(reading, tokens=tokens), None)
    columns = blocks[0].columns
    covariance = ((tokens.logprob + tokens.entropy) * reading.advantage).masked_fill(
        ~tokens.present, 0.0
    )
    half = ROWS // 2
    assert columns["selection"] == ["covariance"] * half + ["policy"] * half
    expected = covariance.abs().sort(descending=True).values[:half]
    assert torch.equal(columns["covariance"][:half].abs(), expected)
    assert bool(columns["present"].all())
    places = columns["sequence"] * 40 + columns["position"]
    assert torch.equal(columns["advantage"], reading.advantage[places])
    assert torch.equal(columns["token_id"], tokens.token_id[places])
    smallest = torch.where(tokens.present, tokens.key, 2.0).sort().indices[:half]
    assert set(places[half:].tolist()) == set(smallest.tolist())


def test_a_row_that_stands_for_many_tokens_is_drawn_that_much_more_readily() -> None:
    """Its smallest of so many keys decides: 1 - (1 - u)^(1/w)."""
    reading = policy(rows=100)
    heavy = torch.arange(4000) % 10 == 0
    tokens = replace(reading.tokens, weight=torch.where(heavy, 9.0, 1.0))
    blocks, _ = PolicyTokens().measure(replace(reading, tokens=tokens), None)
    columns = blocks[0].columns
    half = ROWS // 2
    places = columns["sequence"][half:] * 40 + columns["position"][half:]
    key = torch.where(heavy, 1 - (1 - tokens.key.double()) ** (1 / 9), tokens.key.double())
    assert set(places.tolist()) == set(key.sort().indices[:half].tolist())
    assert 8 <= int(heavy[places].sum()) <= 24
