"""Measured tokens of a micro-batch: which rows, their statistics, and whose they are."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from entropylens.capture.head import Head
from entropylens.diagnostics.token_statistics import (
    TokenStatistics,
    token_statistics,
    token_statistics_from_hidden,
)
from entropylens.registry import TokenReading

__all__ = [
    "Chosen",
    "FusedTokens",
    "Grid",
    "HiddenTokens",
    "LogitTokens",
    "TokenSlice",
    "TokenSource",
    "choose",
    "join_slices",
    "places",
]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Targets of one micro-batch and which of them are scored."""

    targets: Tensor
    """``[B, T]``"""
    present: Tensor
    """``[B, T]`` bool."""
    documents: Tensor | None = None
    """``[B, T]`` number of each target's document among those of the micro-batch, in order, where
    rows are packed with several; None is one a row."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.targets.shape[0], self.targets.shape[1]


@dataclass(frozen=True, kw_only=True)
class TokenSlice:
    """The measured tokens of one micro-batch, as `entropylens.readings.TokenReading` has them."""

    logprob: Tensor
    entropy: Tensor
    varentropy: Tensor
    max_probability: Tensor
    sum_squared_probabilities: Tensor
    expected_discriminator: Tensor
    present: Tensor
    weight: Tensor
    distribution_weight: Tensor | None = None
    position: Tensor
    sequence: Tensor
    token_id: Tensor
    key: Tensor
    sequence_tokens: Tensor
    vocabulary: int
    index: Tensor
    """``[n]`` places in the flattened grid."""
    grid: tuple[int, int] | None


class TokenSource(Protocol):
    """What a forward shows of its tokens."""

    @property
    def grid(self) -> Grid:
        """The targets, and which of them are scored."""

    def measure(
        self, rows: int | None, generator: torch.Generator, temperature: float
    ) -> TokenSlice:
        """Measure the scored tokens, or a uniform sample of them without replacement.

        Args:
            rows: So many at most; None is all.
            generator: On the tensors' device; the training's own generators are never touched.
            temperature: The loss's temperature.

        Returns:
            The slice, on the tensors' device; nothing waits for the host.
        """

    def logits_at(self, index: Tensor) -> Tensor | None:
        """Logits of places in the flattened grid, ``[k, V]``; None where they cannot be had."""


@dataclass(frozen=True, kw_only=True)
class LogitTokens:
    """Tokens of a forward that returned logits."""

    logits: Tensor
    """``[B, T, V]``, position t scored on target t."""
    grid: Grid

    @classmethod
    def of(
        cls,
        logits: Tensor,
        targets: Tensor,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> "LogitTokens":
        """From logits ``[..., V]`` and targets ``[...]`` as a loop has them.

        One-dimensional targets (classification) become one column; more than two axes are folded
        into the second. A target that is negative, as in `torch.nn.functional.cross_entropy`, or
        not below V is masked.

        Raises:
            ValueError: ``logits`` has no vocabulary axis, or targets or mask another shape.
        """
        if logits.ndim < 2:
            raise ValueError(
                f"Lens.observe: expected logits [..., vocabulary] with at least one axis before "
                f"the vocabulary, got shape {tuple(logits.shape)}"
            )
        if targets.shape != logits.shape[:-1]:
            raise ValueError(
                f"Lens.observe: expected targets of shape {tuple(logits.shape[:-1])} for logits of "
                f"shape {tuple(logits.shape)}, got {tuple(targets.shape)}; shift the logits first, "
                f"or pass shift=True"
            )
        if mask is not None and mask.shape != targets.shape:
            raise ValueError(
                f"Lens.observe: expected a mask of the targets' shape {tuple(targets.shape)}, "
                f"got {tuple(mask.shape)}"
            )
        present = (targets >= 0) & (targets < logits.shape[-1])
        if mask is not None:
            present = present & mask.bool()
        shape = targets.shape[0], prod(targets.shape[1:])
        return cls(
            logits=logits.reshape(*shape, logits.shape[-1]),
            grid=Grid(
                targets=targets.reshape(shape),
                present=present.reshape(shape),
                documents=documents,
            ),
        )

    def measure(
        self, rows: int | None, generator: torch.Generator, temperature: float
    ) -> TokenSlice:
        """Measure from the logits of the chosen rows; as `TokenSource` says."""
        grid, logits = self.grid, self.logits
        chosen = choose(grid, rows, generator)
        if chosen.is_all:
            found = token_statistics(
                logits, grid.targets, mask=grid.present, temperature=temperature
            )
        else:
            row, column = chosen.places
            found = token_statistics(
                logits[row, column],
                grid.targets[row, column],
                mask=grid.present[row, column],
                temperature=temperature,
            )
        return _slice(grid, chosen, found, logits.shape[-1])

    def logits_at(self, index: Tensor) -> Tensor | None:
        """As `TokenSource` says."""
        return self.logits.flatten(0, 1)[index]


@dataclass(frozen=True, kw_only=True)
class HiddenTokens:
    """Tokens of a forward that built no logits: those of chosen rows are made afterwards."""

    hidden: Tensor
    """``[B, T, d]``, position t scored on target t."""
    head: Head
    grid: Grid

    def measure(
        self, rows: int | None, generator: torch.Generator, temperature: float
    ) -> TokenSlice:
        """Project the chosen rows, in blocks; as `TokenSource` says."""
        chosen = choose(self.grid, rows, generator)
        found = _project(self.hidden, self.head, self.grid, chosen, temperature)
        return _slice(self.grid, chosen, found, self.head.weight.shape[0])

    def logits_at(self, index: Tensor) -> Tensor | None:
        """Project the rows; as `TokenSource` says."""
        return self.head.logits(self.hidden.flatten(0, 1)[index])


@dataclass(frozen=True, kw_only=True)
class FusedTokens:
    """Tokens whose log-probability and entropy a fused head computed, of every scored one."""

    logprob: Tensor
    """``[B, T]`` at the loss's temperature."""
    entropy: Tensor
    """``[B, T]`` at the loss's temperature."""
    grid: Grid
    hidden: Tensor | None
    """``[B, T, d]``; None where the backbone was not seen."""
    head: Head | None
    vocabulary: int

    def measure(
        self, rows: int | None, generator: torch.Generator, temperature: float
    ) -> TokenSlice:
        """Take what is there of all tokens, and project a sample for the rest.

        ``rows`` limits the sample; as `TokenSource` says otherwise.
        """
        everything = choose(self.grid, None, generator)
        blank = torch.full_like(self.entropy, torch.nan, dtype=torch.float32)
        known = TokenStatistics(
            logprob=torch.where(self.grid.present, self.logprob.float(), torch.nan),
            entropy=torch.where(self.grid.present, self.entropy.float(), torch.nan),
            **dict.fromkeys(_DISTRIBUTION, blank),
        )
        whole = _slice(self.grid, everything, known, self.vocabulary)
        nothing = torch.zeros_like(whole.weight)
        if self.hidden is None or self.head is None:
            return replace(whole, distribution_weight=nothing)
        chosen = choose(self.grid, rows, generator)
        found = _project(self.hidden, self.head, self.grid, chosen, temperature)
        filled: dict[str, Any] = {
            name: getattr(whole, name).index_copy(0, chosen.index, getattr(found, name).flatten())
            for name in _OF_ROWS
        }
        return replace(
            whole,
            **filled,
            distribution_weight=nothing.index_copy(0, chosen.index, chosen.weight),
        )

    def logits_at(self, index: Tensor) -> Tensor | None:
        """Project the rows, where the hidden states were seen; as `TokenSource` says."""
        if self.hidden is None or self.head is None:
            return None
        return self.head.logits(self.hidden.flatten(0, 1)[index])


_OF_ROWS = (
    "varentropy",
    "max_probability",
    "sum_squared_probabilities",
    "expected_discriminator",
)
_DISTRIBUTION = (*_OF_ROWS, "log_sum_exp")
"""Statistics that need a token's whole distribution."""


def join_slices(
    slices: Sequence[TokenSlice], sample_ids: Sequence[Sequence[str] | None]
) -> TokenReading:
    """Join the micro-batches of one step; sequences are numbered on.

    Args:
        slices: At least one.
        sample_ids: Identifiers of each slice's sequences, or None where they are not known.
    """
    sequences = [part.sequence_tokens.shape[0] for part in slices]
    offsets = [sum(sequences[:i]) for i in range(len(slices))]
    several = len(slices) > 1

    def joined(name: str) -> Tensor:
        parts = [getattr(part, name) for part in slices]
        return torch.cat(parts) if several else parts[0]

    weights = [part.distribution_weight for part in slices]
    whole = [part.weight if w is None else w for part, w in zip(slices, weights, strict=True)]
    ids = [name for part in sample_ids if part is not None for name in part]
    grids = [part.grid for part in slices if part.grid is not None]
    return TokenReading(
        logprob=joined("logprob"),
        entropy=joined("entropy"),
        **{name: joined(name) for name in _OF_ROWS},
        present=joined("present"),
        weight=joined("weight"),
        distribution_weight=torch.cat(whole) if any(w is not None for w in weights) else None,
        position=joined("position"),
        sequence=torch.cat([p.sequence + o for p, o in zip(slices, offsets, strict=True)]),
        token_id=joined("token_id"),
        key=joined("key"),
        sequence_tokens=joined("sequence_tokens"),
        sample_ids=ids if len(ids) == sum(sequences) else None,
        vocabulary=max(part.vocabulary for part in slices),
        grids=grids if len(grids) == len(slices) else None,
    )


# -- which rows, and where they stand --------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """Rows of a grid: their flat index, the scored tokens that each stands for, a random key."""

    index: Tensor
    weight: Tensor
    key: Tensor
    columns: int
    is_all: bool

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """Row and column of each."""
        return self.index // self.columns, self.index % self.columns


def choose(grid: Grid, rows: int | None, generator: torch.Generator) -> Chosen:
    """All places of a grid, or a uniform sample of its scored ones without replacement."""
    present = grid.present.flatten()
    device, slots = present.device, present.numel()
    key = torch.rand(slots, generator=generator, device=device)
    columns = grid.shape[1]
    if rows is None or slots <= rows:
        return Chosen(torch.arange(slots, device=device), present.float(), key, columns, True)
    index = torch.where(present, key, key + 1.0).topk(rows, largest=False).indices
    scored = present.sum()
    weight = present[index] * (scored / scored.clamp(min=1, max=rows))
    # The keys that chose the rows are the smallest ones: not uniform any more.
    again = torch.rand(rows, generator=generator, device=device)
    return Chosen(index, weight, again, columns, False)


def _project(
    hidden: Tensor, head: Head, grid: Grid, chosen: Chosen, temperature: float
) -> TokenStatistics:
    row, column = chosen.places
    return token_statistics_from_hidden(
        hidden[row, column],
        head.weight,
        grid.targets[row, column],
        bias=head.bias,
        soft_cap=head.soft_cap,
        logit_scale=head.logit_scale,
        mask=grid.present[row, column],
        temperature=temperature,
    )


def _slice(grid: Grid, chosen: Chosen, found: TokenStatistics, vocabulary: int) -> TokenSlice:
    depth, sequence, sequence_tokens = places(grid)
    index = chosen.index

    def picked(values: Tensor) -> Tensor:
        return values.flatten() if chosen.is_all else values.flatten()[index]

    return TokenSlice(
        logprob=found.logprob.flatten(),
        entropy=found.entropy.flatten(),
        **{name: getattr(found, name).flatten() for name in _OF_ROWS},
        present=picked(grid.present),
        weight=chosen.weight,
        position=picked(depth),
        sequence=index // chosen.columns if sequence is None else picked(sequence),
        token_id=picked(grid.targets),
        key=chosen.key,
        sequence_tokens=sequence_tokens,
        vocabulary=vocabulary,
        index=index,
        grid=grid.shape if chosen.is_all else None,
    )


def places(grid: Grid) -> tuple[Tensor, Tensor | None, Tensor]:
    """Where targets stand in their sequences, and how long those are.

    Returns:
        Each target's index among the scored ones of its sequence, the number of its sequence (None
        is its row), and the scored tokens of every sequence.

    How many documents packed rows hold is not known without waiting for the device: there is a
    place for as many as there are targets.
    """
    present, documents = grid.present, grid.documents
    if documents is None:
        return (present.cumsum(1) - 1).clamp(min=0), None, present.sum(1)
    flat, sequence = present.flatten().long(), documents.flatten()
    tokens = flat.new_zeros(flat.numel()).index_add(0, sequence, flat)
    before = tokens.cumsum(0) - tokens
    depth = (flat.cumsum(0) - 1 - before[sequence]).clamp(min=0)
    return depth.view(present.shape), documents, tokens
