"""One example of each thing that a diagnostic may read, on any device."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from entropylens.diagnostics.gradient_norm import total_norm
from entropylens.registry import (
    AttentionReading,
    AttentionRows,
    ControlReading,
    GradientReading,
    MatricesReading,
    OptimizerReading,
    PolicyReading,
    PreferenceReading,
    ProbeReading,
    RepresentationReading,
    RolloutReading,
    RouterReading,
    SampledReading,
    StepReading,
    TokenReading,
    UpdateReading,
    WeightReading,
)


def tokens(device: str = "cpu", *, rows: int = 3, columns: int = 40) -> TokenReading:
    """A complete grid of tokens with random, valid values."""
    n = rows * columns
    generator = torch.Generator().manual_seed(0)

    def uniform() -> torch.Tensor:
        return torch.rand(n, generator=generator)

    sequence = torch.arange(n) // columns
    values: dict[str, torch.Tensor] = {
        "logprob": -5 * uniform(),
        "entropy": 4 * uniform(),
        "varentropy": uniform(),
        "max_probability": uniform(),
        "sum_squared_probabilities": uniform(),
        "expected_discriminator": 0.1 * (uniform() - 0.5),
        "present": torch.ones(n, dtype=torch.bool),
        "weight": torch.ones(n),
        "position": torch.arange(n) % columns,
        "sequence": sequence,
        "token_id": (uniform() * 50).long(),
        "key": uniform(),
        "sequence_tokens": torch.full((rows,), columns),
    }
    return TokenReading(
        **{name: value.to(device) for name, value in values.items()},
        sample_ids=[f"sample {i}" for i in range(rows)],
        vocabulary=50,
        grids=[(rows, columns)],
    )


def policy(device: str = "cpu", *, rows: int = 8, columns: int = 40) -> PolicyReading:
    """Two groups of four completions with everything that may be known of them."""
    generator = torch.Generator().manual_seed(1)
    n = rows * columns

    def normal(size: int = n, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(size, generator=generator)).to(device)

    found = tokens(device, rows=rows, columns=columns)
    place = torch.arange(n) % columns
    correct = (torch.arange(rows) % 2).float()
    return PolicyReading(
        tokens=found,
        advantage=normal(rows).repeat_interleave(columns),
        old_logprob=found.logprob + normal(scale=0.1),
        sampler_logprob=found.logprob + normal(scale=0.01),
        reference_logprob=found.logprob + normal(scale=0.2),
        reverse_kl=normal().abs(),
        forward_kl=normal().abs(),
        clip=(0.2, 0.28),
        thoughts=(place < 30).to(device),
        answers=(place > 30).to(device),
        reward=correct.to(device),
        correct=correct.to(device),
        pass_rate=torch.linspace(0, 1, rows).to(device),
        group=(torch.arange(rows) // 4).to(device),
        prompts=[f"prompt {i // 4}" for i in range(rows)],
        completions=[f"completion {i}" for i in range(rows)],
    )


def rollout(device: str = "cpu", *, groups: int = 3, size: int = 4) -> RolloutReading:
    """Three groups: mixed, all right, all wrong."""
    n = groups * size
    generator = torch.Generator().manual_seed(2)
    correct = torch.tensor([0.0, 1.0, 0.0, 1.0, *[1.0] * size, *[0.0] * size][:n])
    length = torch.arange(n) % 7 + 3
    places = torch.arange(9)
    return RolloutReading(
        group=(torch.arange(n) // size).to(device),
        group_size=size,
        reward=correct.to(device),
        rewards={
            "verifier": correct.to(device),
            "format": torch.rand(n, generator=generator).to(device),
        },
        correct=correct.to(device),
        answer=(torch.arange(n) % 3).to(device),
        token_id=torch.randint(0, 5, (n, 9), generator=generator).to(device),
        mask=(places < length[:, None]).to(device),
        truncated=(length == 9).to(device),
        seconds=1.5,
    )


def preference(device: str = "cpu", *, pairs: int = 6) -> PreferenceReading:
    """Pairs with everything that may be known of them; no trainer knows rewards as well."""
    generator = torch.Generator().manual_seed(6)
    n = 2 * pairs
    logprob, shift, reward = torch.randn(3, n, generator=generator)
    return PreferenceReading(
        chosen=(torch.arange(n) < pairs).to(device),
        paired=True,
        logprob=(logprob - 20).to(device),
        reference_logprob=(logprob - 20 + shift).to(device),
        entropy=torch.rand(n, generator=generator).mul(30).to(device),
        tokens=(torch.arange(n) % 5 + 8).to(device),
        reward=reward.to(device),
    )


def sampled(device: str = "cpu", *, rows: int = 60) -> SampledReading:
    """Tokens drawn from random distributions, with their cumulants."""
    generator = torch.Generator().manual_seed(3)
    logp = torch.randn(rows, 20, generator=generator).double().log_softmax(-1)
    p = logp.exp()
    token = torch.multinomial(p, 1, generator=generator)
    entropy = -(p * logp).sum(-1)
    exponents = (-0.25, -0.1, -0.05, 0.05, 0.1, 0.25)
    lam = torch.tensor(exponents).double()[:, None, None]
    cumulant = ((1 - lam) * logp).logsumexp(-1) - lam[..., 0] * entropy
    return SampledReading(
        surprisal_gap=(-logp.gather(1, token)[:, 0] - entropy).float().to(device),
        varentropy=(p * (logp + entropy[:, None]).square()).sum(-1).float().to(device),
        cumulant=cumulant.float().to(device),
        exponents=exponents,
        present=torch.ones(rows, dtype=torch.bool).to(device),
    )


def probe(device: str = "cpu", *, rows: int = 24, vocabulary: int = 30) -> ProbeReading:
    """Logits before and after a small change, with what a policy's step knows of the states."""
    generator = torch.Generator().manual_seed(4)
    before = torch.randn(rows, vocabulary, generator=generator)
    direction = 0.01 * torch.randn(rows, vocabulary, generator=generator)
    return ProbeReading(
        before=before.to(device),
        after=(before + direction).to(device),
        direction=direction.to(device),
        weight=torch.ones(rows).to(device),
        token_id=torch.zeros(rows, dtype=torch.long).to(device),
        position=(torch.arange(rows) % 6).to(device),
        sequence=(torch.arange(rows) // 6).to(device),
        sample_ids=[f"sample {i}" for i in range(4)],
        advantage=torch.randn(rows, generator=generator).to(device),
        log_ratio=(0.1 * torch.randn(rows, generator=generator)).to(device),
        clip=(0.2, 0.2),
    )


def router(device: str = "cpu", *, rows: int = 50, experts: int = 8) -> RouterReading:
    """Two layers."""
    generator = torch.Generator().manual_seed(5)
    layers = {f"layers.{i}": torch.randn(rows, experts, generator=generator) for i in range(2)}
    return RouterReading(
        logits={name: layer.to(device) for name, layer in layers.items()},
        present=(torch.arange(rows) < 40).to(device),
        experts_per_token=2,
    )


def gradients(device: str = "cpu") -> GradientReading:
    """Gradients of a weight and a bias."""
    found = _parameters(device)
    return GradientReading(gradients=found, norm=total_norm(found.values()))


def update(device: str = "cpu") -> UpdateReading:
    """A weight and a bias before and after a step."""
    before = _parameters(device)
    return UpdateReading(
        before=before,
        after={n: 0.9 * p for n, p in before.items()},
        gradients={n: 0.1 * p for n, p in before.items()},
        second_moments={n: 0.02 * p.float().square() for n, p in before.items()},
        bias_corrections={n: torch.tensor(0.5, device=device) for n in before},
    )


def weight(device: str = "cpu", *, out: int = 24, width: int = 40) -> WeightReading:
    """A Gaussian matrix, stored in bfloat16."""
    generator = torch.Generator().manual_seed(7)
    matrix = torch.randn(out, width, generator=generator).to(device, torch.bfloat16)
    return WeightReading(name="layers.0.weight", matrix=matrix, stored=torch.bfloat16)


def matrices(device: str = "cpu") -> MatricesReading:
    """A wide and a tall one, of different dtypes."""
    wide, tall = weight(device).matrix, weight(device, out=30, width=12).matrix.float()
    return MatricesReading(matrices={"layers.0.weight": wide, "layers.1.weight": tall})


def representation(device: str = "cpu", *, rows: int = 60) -> RepresentationReading:
    """Two layers, in which three classes part more and more."""
    generator = torch.Generator().manual_seed(8)
    labels = [i % 3 for i in range(rows)]
    noise = torch.randn(rows, 10, generator=generator)
    centres = torch.randn(3, 10, generator=generator)[labels]
    states = {f"layers.{i}": (noise + 2 * i * centres).to(device) for i in range(2)}
    return RepresentationReading(
        states=states,
        labels=labels,
        input_clusters=[i % 4 for i in range(rows)],
    )


def attention(device: str = "cpu", *, rows: int = 30, heads: int = 4) -> AttentionReading:
    """Two layers of causal attention."""
    generator = torch.Generator().manual_seed(9)
    reach = torch.arange(rows) + 1
    visible = torch.arange(rows)[None] < reach[:, None]

    def layer() -> AttentionRows:
        logits = torch.randn(rows, heads, rows, generator=generator)
        logits = logits.masked_fill(~visible[:, None], -torch.inf)
        return AttentionRows(
            entropy=torch.special.entr(logits.softmax(-1)).sum(-1).to(device),
            reach=reach.to(device),
            largest_logit=logits.amax(-1).to(device),
            log_partition=logits.logsumexp(-1).to(device),
        )

    return AttentionReading(layers={f"layers.{i}.attention": layer() for i in range(2)})


def step(device: str = "cpu") -> StepReading:
    """Everything that may be known at the end of a step."""
    return StepReading(
        loss=torch.tensor(2.5, device=device),
        optimizers=[
            OptimizerReading(
                learning_rates=[1e-3, 1e-4],
                gradient_norm_before_clip=torch.tensor(1.5, device=device),
                gradient_norm_after_clip=torch.tensor(1.0, device=device),
                skipped=0.0,
            )
        ],
        tokens=torch.tensor(100, device=device),
        tokens_seen=torch.tensor(1000, device=device),
        seconds=0.5,
        device_memory=2**30,
        resident_memory=2**31,
        overhead=0.01,
        rows=256,
        widening=2,
    )


def control(device: str = "cpu") -> ControlReading:
    """A step that was bounded; all numbers are the host's."""
    return ControlReading(step_scale=0.25, looks=7, interventions=2)


def _parameters(device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, generator=generator).to(device, torch.bfloat16)
    return {"weight": weight, "bias": torch.randn(4, generator=generator).to(device)}


READINGS: Mapping[str, Callable[..., Any]] = {
    "tokens": tokens,
    "policy": policy,
    "rollout": rollout,
    "preference": preference,
    "sampled": sampled,
    "probe": probe,
    "router": router,
    "gradients": gradients,
    "update": update,
    "weight": weight,
    "matrices": matrices,
    "representation": representation,
    "attention": attention,
    "step": step,
    "control": control,
}
