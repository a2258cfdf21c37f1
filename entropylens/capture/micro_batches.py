"""What one optimiser step gathers from its micro-batches before it ends."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from entropylens.capture.tokens import TokenSlice, TokenSource, join_slices
from entropylens.registry import TokenReading

__all__ = ["MicroBatches", "identifiers"]


@dataclass
class MicroBatches:
    """Losses, token counts and measured tokens of the step in progress."""

    tokens: Tensor | None = None
    slots: int = 0
    """Positions, scored or not: known from shapes, without asking the device."""
    losses: dict[str, list[Tensor]] = field(default_factory=dict)
    """By optimiser; under the empty name those that the whole step follows."""
    _summed: set[str] = field(default_factory=set)
    _slices: list[TokenSlice] = field(default_factory=list)
    _sample_ids: list[Sequence[str] | None] = field(default_factory=list)

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
    ) -> None:
        """Measure a micro-batch's tokens, or a sample of them."""
        self._slices.append(source.measure(rows, generator, temperature))
        known = sample_ids is not None and len(sample_ids) == source.grid.shape[0]
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
