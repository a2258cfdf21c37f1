"""What one update of the weights does to the distributions at a few states of the step's batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import torch
from torch import Tensor, nn

from entropylens.capture.asking import ELEMENTS, Asked, Asking, Places, class_axis, wide
from entropylens.capture.call import Call
from entropylens.capture.policy import PolicyBatch
from entropylens.capture.tokens import Grid, TokenSource, choose, places
from entropylens.registry import ProbeReading

__all__ = ["Batch", "FewStates", "UpdateProbe", "few_states"]

SEQUENCES: Final = 16
TOKENS: Final = 4096
"""Positions of all kept sequences together; one sequence is always kept."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One training forward: the call, and the classes that it is scored on."""

    call: Call
    grid: Grid
    has_targets: bool = True
    """Whether the grid's targets are known, or stand there for its shape alone."""
    classes: int = 0
    """V; 0 where it is not known."""

    @classmethod
    def unscored(cls, call: Call, logits: Tensor) -> Batch:
        """A forward whose targets are not known: every position of its logits counts."""
        rows, *places, classes = logits.movedim(class_axis(logits.ndim), -1).shape
        targets = torch.zeros(rows, prod(places), dtype=torch.long, device=logits.device)
        grid = Grid(targets=targets, present=torch.ones_like(targets, dtype=torch.bool))
        return cls(call=call, grid=grid, has_targets=False, classes=classes)

    @classmethod
    def of_rows(cls, call: Call) -> Batch | None:
        """A forward of whose output nothing is known: every row of what the model is given counts.

        Returns:
            None where that is no tensor.
        """
        given = next(iter(call.tensors()), None)
        if given is None or not given.ndim:
            return None
        return cls.unscored(call, given.new_empty(given.shape[0], 0))


@dataclass(frozen=True, kw_only=True)
class FewStates:
    """A few rows of a training forward, and places in their logits."""

    call: Call
    places: Places
    chosen: Tensor
    """``[rows]`` which rows they are."""
    row: Tensor
    """``[m]`` index into ``chosen`` of each state."""
    column: Tensor
    """``[m]`` of the grid."""
    weight: Tensor
    """``[m]`` scored tokens that each state stands for."""
    part: Grid
    """Of the chosen rows."""


def few_states(
    model: Asked, batch: Batch, generator: torch.Generator, limit: int | None = None
) -> FewStates | None:
    """Cut a few rows out of a training forward, chosen without looking at them.

    Up to 16 sequences with up to 4,096 positions together, or up to ``limit`` rows of one position
    each; up to so many of their scored positions, by default as many as the model can be asked
    about.

    Returns:
        None where they cannot be cut out.
    """
    grid, call = batch.grid, model.fitting(batch.call)
    if call is None:
        return None
    rows, width = grid.shape
    limit = model.limit if limit is None else limit
    most = limit if width == 1 else min(SEQUENCES, max(TOKENS // (width + 1), 1))
    if batch.classes and model.makes_all_logits:
        most = min(most, max(ELEMENTS // (width * batch.classes), 1))
    size = min(most, rows)
    device = grid.present.device
    keys = torch.rand(rows, generator=generator, device=device)
    # Sequences without a scored token would be states of nothing.
    keys = torch.where(grid.present.any(1), keys, 2.0)
    chosen = keys.topk(size, largest=False).indices.sort().values
    cut = call.cut(chosen, rows)
    offset = -1 if cut is None else model.offset(cut, width)
    if cut is None or offset < 0:
        return None
    part = Grid(targets=grid.targets[chosen], present=grid.present[chosen])
    states = choose(part, limit, generator)
    row, column = states.places
    return FewStates(
        call=cut,
        places=Places(row=row, column=column + offset, columns=width),
        chosen=chosen,
        row=row,
        column=column,
        weight=states.weight,
        part=part,
    )


class UpdateProbe:
    """Asks a model about the same states before and after an optimiser step.

    In a step that is due, a few states of the first micro-batch are kept (`few_states`), chosen by
    a generator of our own. After the update the model is asked about them (`Asked`): once with the
    old weights, together with the derivative along the update, and once with the new ones.

    Args:
        model: As the trainer holds it, without an obstacle
            (`entropylens.capture.asking.obstacle`).
    """

    def __init__(self, model: nn.Module) -> None:
        self._asking = Asking(model)
        self._kept: tuple[Asked, FewStates, Mapping[str, Any]] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is kept for the step in progress."""
        return self._kept is None

    def clear(self) -> None:
        """Forget what was kept."""
        self._kept = None

    def keep(
        self,
        batch: Batch,
        source: TokenSource | None,
        policy: PolicyBatch | None,
        sample_ids: Sequence[str] | None,
        generator: torch.Generator,
    ) -> bool:
        """Keep a few states of a training forward.

        Returns:
            False where they cannot be cut out of its arguments, and nothing was kept.
        """
        model = self._asking.of(batch.call.module)
        states = few_states(model, batch, generator)
        if states is None:
            return False
        depth, _, _ = places(states.part)
        index = states.row * states.part.shape[1] + states.column
        sequence = states.chosen[states.row]
        columns: dict[str, Any] = {
            "weight": states.weight,
            "position": depth.flatten()[index],
            "sequence": sequence,
            "sample_ids": sample_ids,
        }
        if batch.has_targets:
            columns["token_id"] = states.part.targets.flatten()[index].clamp(min=0)
        if policy is not None and source is not None:
            pull = policy.pull_columns(source)
            columns |= {name: value[sequence, states.column] for name, value in pull.items()}
            columns["clip"] = policy.clip
        self._kept = model, states, columns
        return True

    def reading(
        self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], temperature: float
    ) -> ProbeReading:
        """What the update did at the states that were kept; there must be some.

        Args:
            before: Trained parameters before the step, by the model's names for them.
            after: The same after it.
            temperature: Of the loss.

        Raises:
            ValueError: They are not the model's own parameters, or somebody's hooks are on it.
        """
        kept, self._kept = self._kept, None
        assert kept is not None
        model, states, columns = kept
        names = self._names(before, model)
        old, new = (
            {inner: wide(weights[name].detach()) for name, inner in names.items()}
            for weights in (before, after)
        )
        direction = {name: new[name] - old[name] for name in old}
        with model.as_trained():
            first, change = model.derivative(old, direction, states.call, states.places)
            last = model.logits(new, states.call, states.places)
        return ProbeReading(
            before=first / temperature,
            after=last / temperature,
            direction=change / temperature,
            is_exact=model.is_exact,
            **columns,
        )

    def _names(self, trained: Mapping[str, Tensor], model: Asked) -> dict[str, str]:
        """What the model that is asked calls those of these parameters that it has."""
        own, known = dict(self._asking.whole.model.named_parameters()), model.names()
        for name, value in trained.items():
            if name not in own or own[name].shape != value.shape:
                raise ValueError(
                    f"entropylens: expected the optimiser to hold the model's own parameters, "
                    f"got {name} {tuple(value.shape)}, which the model does not have"
                )
        found = {name: known.get(id(own[name])) for name in trained}
        return {name: inner for name, inner in found.items() if inner is not None}
