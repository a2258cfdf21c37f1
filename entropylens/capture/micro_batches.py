"""What one optimiser step gathers from its micro-batches before it ends."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from entropylens.capture.tokens import TokenSlice, as_grid, join_slices, read_tokens
from entropylens.registry import TokenReading

__all__ = ["MicroBatches", "identifiers"]


@dataclass
class MicroBatches:
    """Losses, token counts, learning rates and measured tokens of the step in progress."""

    losses: list[Tensor] = field(default_factory=list)
    loss_is_sum: bool = False
    learning_rates: Sequence[Tensor | float] = ()
    gradient_norm: Tensor | float | None = None
    tokens: Tensor | None = None
    slots: int = 0
    """Positions, scored or not: known from shapes, without asking the device."""
    _slices: list[TokenSlice] = field(default_factory=list)
    _sample_ids: list[Sequence[str] | None] = field(default_factory=list)

    def add_loss(self, loss: Tensor, *, is_sum: bool) -> None:
        """Keep a copy of a micro-batch's loss, which trainers go on to scale in place."""
        self.losses.append(loss.detach().clone())
        self.loss_is_sum = is_sum

    def add_tokens(
        self,
        logits: Tensor,
        targets: Tensor,
        mask: Tensor | None,
        sample_ids: Sequence[str] | None,
        *,
        measure: bool,
        rows: int | None,
        generator: torch.Generator,
        temperature: float,
    ) -> None:
        """Count a micro-batch's scored tokens and, where due, measure them or a sample."""
        logits, targets, present = as_grid(logits.detach(), targets.detach(), mask)
        scored = present.sum()
        self.tokens = scored if self.tokens is None else self.tokens + scored
        self.slots += targets.numel()
        if measure:
            sampled = read_tokens(
                logits, targets, present, rows=rows, generator=generator, temperature=temperature
            )
            self._slices.append(sampled)
            known = sample_ids is not None and len(sample_ids) == len(targets)
            self._sample_ids.append(sample_ids if known else None)

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

    @property
    def measured(self) -> int:
        """Micro-batches whose tokens were measured."""
        return len(self._slices)

    def reading(self) -> TokenReading:
        """All measured tokens of the step; there must be a measured micro-batch."""
        return join_slices(self._slices, self._sample_ids)

    def loss(self) -> Tensor | None:
        """The step's loss: the sum of shares, or the mean of means.

        A micro-batch's loss of several elements, one a replica of `DataParallel`, is their mean.
        """
        if not self.losses:
            return None
        stacked = torch.stack([loss.float().mean() for loss in self.losses])
        return stacked.sum() if self.loss_is_sum else stacked.mean()


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
