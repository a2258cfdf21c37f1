"""What an update does to a model's logits: the evidence on which a step is bounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan, pi
from typing import Final

import torch
from torch import Tensor, nn

from entropylens.capture.asking import Asking
from entropylens.capture.probe import Batch, few_states
from entropylens.control.ranks import ranks
from entropylens.control.signals import SCALES

__all__ = ["Look", "Looker", "agree"]

_BLOCK: Final = 1 << 22
"""Logits in float32 at a time, at each scale of the update."""


@dataclass(frozen=True)
class Look:
    """What was seen; None is not known."""

    ratio: float | None
    """r, the largest spread of the logits' change over any rank's states, divided by pi."""
    losses: tuple[float, ...] | None
    """Linearised cross-entropy at `SCALES`, the mean over ranks."""


class Looker:
    """Asks a model what an update does to its logits at a few states of a batch.

    Args:
        model: Without an obstacle (`entropylens.capture.asking.obstacle`).
        temperature: At which the loss reads the logits.
        seed: Of the choice of states.
    """

    def __init__(self, model: nn.Module, temperature: float, seed: int) -> None:
        self._asking = Asking(model)
        self._temperature, self._seed = temperature, seed

    def look(
        self,
        parameters: Sequence[Tensor],
        before: Sequence[Tensor],
        update: Sequence[Tensor],
        batch: Batch,
        step: int,
    ) -> Tensor | None:
        """``[1 + len(SCALES)]``: r, and the losses, NaN where targets are not known.

        Args:
            parameters: Those that are trained, to know them by.
            before: What they were.
            update: What was added to them.
            batch: Where to look.
            step: Of the run: states are chosen anew in each.

        Returns:
            None where no states can be cut out of the batch.
        """
        generator = torch.Generator(batch.grid.present.device)
        generator.manual_seed(self._seed + step)
        model = self._asking.of(batch.call.module)
        states = few_states(model, batch, generator)
        if states is None:
            return None
        known = model.names()
        names = [known.get(id(parameter), "") for parameter in parameters]
        start, along = (dict(zip(names, some, strict=True)) for some in (before, update))
        for weights in (start, along):
            # Those beside a model within, which its logits do not depend on.
            weights.pop("", None)
        with model.as_trained():
            logits, change = model.derivative(start, along, states.call, states.places)
        logits, change = logits / self._temperature, change / self._temperature
        # A class that is masked moves nowhere, whatever its derivative is said to be.
        is_masked = logits == -torch.inf
        largest = change.masked_fill(is_masked, -torch.inf).amax(-1)
        spread = largest - change.masked_fill(is_masked, torch.inf).amin(-1)
        ratio = torch.where(states.weight > 0, spread, 0.0).amax() / pi
        losses = ratio.new_full((len(SCALES),), torch.nan)
        if batch.has_targets:
            targets = states.part.targets[states.row, states.column].clamp(min=0)
            change = change.masked_fill(is_masked, 0.0)
            losses = _losses(logits, change, targets, states.weight)
        return torch.cat([ratio.reshape(1), losses.to(ratio)])


def agree(found: Tensor | None, device: torch.device) -> Look:
    """What all ranks have seen together; every one of them must come here."""
    known = torch.full((1 + len(SCALES),), torch.nan, device=device)
    known = known if found is None else found.to(known)
    if ranks() > 1:
        is_unknown = known[:1].isnan().to(known)
        most = torch.cat([known[:1].where(is_unknown == 0, 0.0), is_unknown])
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        torch.distributed.all_reduce(known)
        known = torch.cat([most[:1].where(most[1] == 0, torch.nan), known[1:] / ranks()])
    ratio, *losses = known.tolist()
    return Look(
        ratio=None if isnan(ratio) else ratio, losses=None if isnan(losses[-1]) else tuple(losses)
    )


def _losses(logits: Tensor, change: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """``[len(SCALES)]``: the weighted mean, with logits that move by their first-order change."""
    total = weight.sum().clamp(min=1e-9)
    sums = [logits.new_zeros(()) for _ in SCALES]
    rows = max(_BLOCK // logits.shape[1], 1)
    blocks = zip(*(x.split(rows) for x in (logits, change, targets, weight)), strict=True)
    for old, moved, target, share in blocks:
        for at, scale in enumerate(SCALES):
            new = old + scale * moved
            loss = new.logsumexp(-1) - new.gather(1, target[:, None])[:, 0]
            sums[at] = sums[at] + torch.where(share > 0, loss * share, 0.0).sum()
    return torch.stack(sums) / total
