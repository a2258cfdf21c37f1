"""What one optimiser step gathers from its micro-batches before it ends."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.capture.policy import PolicyBatch, join_policies
from entropylens.capture.rollouts import join_rollouts
from entropylens.capture.tokens import Grid, TokenSlice, TokenSource, choose, join_slices
from entropylens.diagnostics.surprisal_gap_test import EXPONENTS, surprisal_cumulants
from entropylens.registry import (
    PolicyReading,
    PreferenceReading,
    RolloutReading,
    SampledReading,
    TokenReading,
)

__all__ = ["MicroBatches", "identifiers"]

_OF_SEQUENCES: Final = ("logprob", "reference_logprob", "entropy", "tokens", "reward")


@dataclass
class MicroBatches:
    """Losses, token counts and measured tokens of the step in progress."""

    tokens: Tensor | None = None
    slots: int = 0
    """Positions, scored or not: known from shapes, without asking the device."""
    losses: dict[str, list[Tensor]] = field(default_factory=dict)
    """By optimiser; under the empty name those that the whole step follows."""
    preferences: list[PreferenceReading] = field(default_factory=list)
    """Of each micro-batch, where a trainer learns preferences."""
    is_routed: bool = False
    """What routers of a mixture of experts decided was measured."""
    rollouts: list[RolloutReading] = field(default_factory=list)
    """Completions generated since the last step, a reading for each generation."""
    _summed: set[str] = field(default_factory=set)
    _slices: list[TokenSlice] = field(default_factory=list)
    _sample_ids: list[Sequence[str] | None] = field(default_factory=list)
    _policies: list[PolicyBatch | None] = field(default_factory=list)
    _shapes: list[tuple[int, int]] = field(default_factory=list)
    _sampled: list[tuple[Tensor, ...]] = field(default_factory=list)
    _reading: TokenReading | None = None

    def add_loss(self, loss: Tensor, *, is_sum: bool, optimizer: str = "") -> None:
        """Keep a copy of a micro-batch's loss, which trainers go on to scale in place."""
        self.losses.setdefault(optimizer, []).append(loss.detach().clone())
        if is_sum:
            self._summed.add(optimizer)

    def count(self, source: TokenSource) -> None:
        """Count a micro-batch's scored tokens."""
        scored = source.grid.present.sum()
        self.tokens = scored if self.tokens is None else self.tokens + scored
        self.slots += source.grid.targets.numel()

    def measure(
        self,
        source: TokenSource,
        sample_ids: Sequence[str] | None,
        *,
        rows: int | None,
        generator: torch.Generator,
        temperature: float,
        policy: PolicyBatch | None = None,
    ) -> None:
        """Measure a micro-batch's tokens, or a sample of them."""
        self._slices.append(source.measure(rows, generator, temperature))
        self._policies.append(policy)
        self._shapes.append(source.grid.shape)
        known = sample_ids is not None and len(sample_ids) == source.grid.shape[0]
        self._sample_ids.append(sample_ids if known else None)

    def sample(
        self, source: TokenSource, *, rows: int, generator: torch.Generator, temperature: float
    ) -> None:
        """Measure how surprising tokens are that the policy drew itself, in the order of time."""
        grid: Grid = source.grid
        chosen = choose(grid, rows, generator).index.sort().values
        logits = source.logits_at(chosen)
        if logits is None:
            return
        present = grid.present.flatten()[chosen]
        token = grid.targets.flatten()[chosen].clamp(0, logits.shape[1] - 1)
        entropy, varentropy, cumulant = surprisal_cumulants(logits, EXPONENTS, temperature)
        scaled = logits.float() / temperature
        logprob = scaled.gather(1, token[:, None])[:, 0] - scaled.logsumexp(1)
        self._sampled.append((-logprob - entropy, varentropy, cumulant, present))

    def rollout_reading(self) -> RolloutReading:
        """All completions that were generated for the step; there must be some."""
        return join_rollouts(self.rollouts)

    def name_last(self, sample_ids: Sequence[str] | None) -> None:
        """Name the samples of the micro-batch measured last, unless it has names."""
        if sample_ids is None or not self._slices or self._sample_ids[-1] is not None:
            return
        if len(sample_ids) == len(self._slices[-1].sequence_tokens):
            self._sample_ids[-1] = sample_ids

    def drop_tokens(self) -> None:
        """Forget tokens that a hook read before the loop began to show its own."""
        self.tokens, self.slots = None, 0
        self._slices, self._sample_ids = [], []
        self._policies, self._shapes, self._sampled = [], [], []

    @property
    def measured(self) -> int:
        """Micro-batches whose tokens were measured."""
        return len(self._slices)

    def reading(self) -> TokenReading:
        """All measured tokens of the step; there must be a measured micro-batch."""
        if self._reading is None:
            self._reading = join_slices(self._slices, self._sample_ids)
        return self._reading

    @property
    def is_policy(self) -> bool:
        """Whether it is known of every micro-batch what a policy learns from its tokens."""
        return bool(self._policies) and all(policy is not None for policy in self._policies)

    def policy_reading(self) -> PolicyReading:
        """The measured tokens with what a policy learns from them; `is_policy` must hold."""
        batches = [
            (policy, part, shape)
            for policy, part, shape in zip(self._policies, self._slices, self._shapes, strict=True)
            if policy is not None
        ]
        return join_policies(self.reading(), batches)

    @property
    def has_samples(self) -> bool:
        """Whether `sample` measured any."""
        return bool(self._sampled)

    def sampled_reading(self) -> SampledReading:
        """What `sample` measured, one micro-batch after the other."""
        gap, varentropy, cumulant, present = (
            torch.cat(parts, -1) for parts in zip(*self._sampled, strict=True)
        )
        return SampledReading(
            surprisal_gap=gap,
            varentropy=varentropy,
            cumulant=cumulant,
            exponents=EXPONENTS,
            present=present,
        )

    def preference_reading(self) -> PreferenceReading:
        """All sequences whose preferences the step learns; there must be `preferences`."""
        return _join_preferences(self.preferences)

    def loss(self, optimizer: str = "") -> Tensor | None:
        """The step's loss: the sum of shares, or the mean of means.

        A micro-batch's loss of several elements, one a replica of `DataParallel`, is their mean.
        """
        losses = self.losses.get(optimizer)
        if not losses:
            return None
        if len(losses) == 1:
            return losses[0].float().mean()
        stacked = torch.stack([loss.float().mean() for loss in losses])
        return stacked.sum() if optimizer in self._summed else stacked.mean()


def _join_preferences(parts: Sequence[PreferenceReading]) -> PreferenceReading:
    """One reading of several; pairs stay halves, all chosen rows before all rejected ones."""
    paired = all(part.paired for part in parts)

    def joined(name: str, halves: int) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        if any(value is None for value in values):
            return None
        return torch.cat([value.chunk(halves)[at] for at in range(halves) for value in values])

    halves = 2 if paired else 1
    chosen = joined("chosen", halves)
    assert chosen is not None
    return PreferenceReading(
        chosen=chosen,
        paired=paired,
        **{name: joined(name, halves) for name in _OF_SEQUENCES},
    )


def identifiers(sample_id: Sequence[Any] | Tensor | None) -> list[str] | None:
    """Sample identifiers as text.

    Raises:
        TypeError: They are on an accelerator, where reading them would wait for it.
    """
    if sample_id is None:
        return None
    if isinstance(sample_id, Tensor):
        if sample_id.device.type != "cpu":
            raise TypeError(
                f"Lens.observe: expected sample_id on the host (a list, or a CPU tensor), got a "
                f"tensor on {sample_id.device}; pass the loader's own"
            )
        sample_id = sample_id.tolist()
    return [str(value) for value in sample_id]
