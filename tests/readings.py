"""One example of each thing that a diagnostic may read, on any device."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from entropylens.registry import (
    GradientReading,
    OptimizerReading,
    StepReading,
    TokenReading,
    UpdateReading,
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


def gradients(device: str = "cpu") -> GradientReading:
    """Gradients of a weight and a bias."""
    return GradientReading(gradients=_parameters(device))


def update(device: str = "cpu") -> UpdateReading:
    """A weight and a bias before and after a step."""
    before = _parameters(device)
    return UpdateReading(before=before, after={n: 0.9 * p for n, p in before.items()})


def step(device: str = "cpu") -> StepReading:
    """Everything that may be known at the end of a step."""
    return StepReading(
        loss=torch.tensor(2.5, device=device),
        optimizers=[
            OptimizerReading(
                learning_rates=[1e-3, 1e-4],
                gradient_norm_before_clip=torch.tensor(1.5, device=device),
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


def _parameters(device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, generator=generator).to(device, torch.bfloat16)
    return {"weight": weight, "bias": torch.randn(4, generator=generator).to(device)}


READINGS: Mapping[str, Callable[..., Any]] = {
    "tokens": tokens,
    "gradients": gradients,
    "update": update,
    "step": step,
}
