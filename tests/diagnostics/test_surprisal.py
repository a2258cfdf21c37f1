import pytest
import torch

from entropylens.diagnostics.surprisal import Surprisal
from entropylens.registry import TokenReading


def measured(reading: TokenReading) -> dict[str, float]:
    blocks, _ = Surprisal().measure(reading, None)
    pairs = [zip(b.columns["name"], b.columns["value"].tolist(), strict=True) for b in blocks]
    return {name: value for block in pairs for name, value in block}


def test_surprisal_and_gap_equal_their_definitions_and_the_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(200, 30, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 30, (200,), generator=generator)
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    picked = logp.gather(1, targets[:, None])[:, 0]
    n = len(targets)
    reading = TokenReading(
        logprob=picked.float(),
        entropy=entropy.float(),
        varentropy=(logp.exp() * (logp + entropy[:, None]) ** 2).sum(-1).float(),
        max_probability=logp.exp().amax(-1).float(),
        present=torch.ones(n, dtype=torch.bool),
        weight=torch.ones(n),
        position=torch.zeros(n, dtype=torch.long),
        sequence=torch.zeros(n, dtype=torch.long),
        token_id=targets,
        key=torch.linspace(0, 1, n),
        sequence_tokens=torch.tensor([n]),
        vocabulary=30,
    )
    found = measured(reading)
    loss = torch.nn.functional.cross_entropy(logits, targets).item()
    gap = -picked - entropy
    assert found["surprisal/token/mean"] == pytest.approx(loss, rel=1e-6)
    assert found["surprisal/token/max"] == pytest.approx((-picked).max().item(), rel=1e-6)
    assert found["surprisal_gap/mean"] == pytest.approx(gap.mean().item(), abs=1e-6)
    assert found["surprisal_gap/std"] == pytest.approx(gap.std(correction=0).item(), rel=1e-5)
    assert found["probability/max/mean"] == pytest.approx(logp.exp().amax(-1).mean().item())


def test_the_gap_of_tokens_drawn_from_the_model_is_zero_and_scatters_as_varentropy_says() -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(40_000, 12, generator=generator, dtype=torch.float64) * 2
    logp = logits.log_softmax(-1)
    drawn = torch.multinomial(logp.exp(), 1, generator=generator)
    entropy = -(logp.exp() * logp).sum(-1)
    varentropy = (logp.exp() * (logp + entropy[:, None]) ** 2).sum(-1)
    gap = -logp.gather(1, drawn)[:, 0] - entropy
    error = (varentropy.mean() / len(gap)).sqrt().item()
    assert abs(gap.mean().item()) < 4 * error
    assert gap.var().item() == pytest.approx(varentropy.mean().item(), rel=0.05)


def test_what_the_reading_does_not_hold_is_not_written() -> None:
    n = 3
    reading = TokenReading(
        logprob=-torch.ones(n),
        entropy=torch.ones(n),
        present=torch.ones(n, dtype=torch.bool),
        weight=torch.ones(n),
        position=torch.zeros(n, dtype=torch.long),
        sequence=torch.zeros(n, dtype=torch.long),
        token_id=torch.zeros(n, dtype=torch.long),
        key=torch.zeros(n),
        sequence_tokens=torch.tensor([n]),
        vocabulary=5,
    )
    found = measured(reading)
    assert "varentropy/token/mean" not in found
    assert "probability/max/mean" not in found


def test_what_only_a_sample_was_looked_at_for_is_weighted_by_that_sample() -> None:
    n = 4
    reading = TokenReading(
        logprob=-torch.arange(n).float(),
        entropy=torch.zeros(n),
        varentropy=torch.tensor([torch.nan, 2.0, torch.nan, 5.0]),
        max_probability=torch.tensor([torch.nan, 0.5, torch.nan, 0.25]),
        present=torch.ones(n, dtype=torch.bool),
        weight=torch.ones(n),
        distribution_weight=torch.tensor([0.0, 1.0, 0.0, 3.0]),
        position=torch.zeros(n, dtype=torch.long),
        sequence=torch.zeros(n, dtype=torch.long),
        token_id=torch.zeros(n, dtype=torch.long),
        key=torch.zeros(n),
        sequence_tokens=torch.tensor([n]),
        vocabulary=5,
    )
    found = measured(reading)
    assert found["varentropy/token/mean"] == (2.0 + 3 * 5.0) / 4
    assert found["probability/max/mean"] == (0.5 + 3 * 0.25) / 4
    assert found["surprisal/token/mean"] == 1.5
