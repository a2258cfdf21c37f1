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
