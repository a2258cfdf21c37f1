"""Measured tokens out of logits: which rows, their statistics, and whose they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from entropylens.diagnostics.token_statistics import token_statistics
from entropylens.registry import TokenReading

__all__ = ["TokenSlice", "as_grid", "join_slices", "read_tokens"]


@dataclass(frozen=True, kw_only=True)
class TokenSlice:
    """The measured tokens of one micro-batch."""

    logprob: Tensor
    entropy: Tensor
    varentropy: Tensor
    max_probability: Tensor
    present: Tensor
    weight: Tensor
    position: Tensor
    sequence: Tensor
    token_id: Tensor
    key: Tensor
    sequence_tokens: Tensor
    vocabulary: int
    grid: tuple[int, int] | None


def as_grid(logits: Tensor, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``[B, T, V]``, targets ``[B, T]`` and which targets are scored ``[B, T]``.

    One-dimensional targets (classification) become one column; more than two axes are folded into
    the second. A target that is negative, as in `torch.nn.functional.cross_entropy`, or not below V
    is masked.

    Raises:
        ValueError: ``logits`` has no vocabulary axis, or targets or mask another shape.
    """
    if logits.ndim < 2:
        raise ValueError(
            f"Lens.observe: expected logits [..., vocabulary] with at least one axis before the "
            f"vocabulary, got shape {tuple(logits.shape)}"
        )
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"Lens.observe: expected targets of shape {tuple(logits.shape[:-1])} for logits of "
            f"shape {tuple(logits.shape)}, got {tuple(targets.shape)}; shift the logits first, or "
            f"pass shift=True"
        )
    if mask is not None and mask.shape != targets.shape:
        raise ValueError(
            f"Lens.observe: expected a mask of the targets' shape {tuple(targets.shape)}, "
            f"got {tuple(mask.shape)}"
        )
    vocabulary = logits.shape[-1]
    present = (targets >= 0) & (targets < vocabulary)
    if mask is not None:
        present = present & mask.bool()
    grid = targets.shape[0], prod(targets.shape[1:])
    return logits.reshape(*grid, vocabulary), targets.reshape(grid), present.reshape(grid)


def read_tokens(
    logits: Tensor,
    targets: Tensor,
    present: Tensor,
    *,
    rows: int | None,
    generator: torch.Generator,
    temperature: float = 1.0,
) -> TokenSlice:
    """Measure the tokens of one micro-batch, or a uniform sample of them.

    Args:
        logits: ``[B, T, V]``.
        targets: ``[B, T]``.
        present: ``[B, T]`` bool.
        rows: Measure at most so many tokens; None is all.
        generator: On the logits' device; the training's own generators are never touched.
        temperature: The loss's temperature.

    Returns:
        The slice, on the logits' device; nothing waits for the host.
    """
    batch, length, vocabulary = logits.shape
    scored = present.sum()
    key = torch.rand(batch * length, generator=generator, device=logits.device)
    depth = (present.cumsum(1) - 1).clamp(min=0).flatten()
    if rows is None or batch * length <= rows:
        rows = None
        index = torch.arange(batch * length, device=logits.device)
        weight = present.flatten().float()
        measured = token_statistics(logits, targets, mask=present, temperature=temperature)
    else:
        order = torch.where(present.flatten(), key, key + 1.0)
        index = order.topk(rows, largest=False).indices
        weight = present.flatten()[index] * (scored / scored.clamp(min=1, max=rows))
        row, column = index // length, index % length
        measured = token_statistics(
            logits[row, column],
            targets[row, column],
            mask=present[row, column],
            temperature=temperature,
        )
    kept, token_id = present.flatten()[index], targets.flatten()[index]
    return TokenSlice(
        logprob=measured.logprob.flatten(),
        entropy=measured.entropy.flatten(),
        varentropy=measured.varentropy.flatten(),
        max_probability=measured.max_probability.flatten(),
        present=kept,
        weight=weight,
        position=depth[index],
        sequence=index // length,
        token_id=token_id,
        key=torch.rand(len(index), generator=generator, device=logits.device),
        sequence_tokens=present.sum(1),
        vocabulary=vocabulary,
        grid=(batch, length) if rows is None else None,
    )


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

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in slices])

    ids = [name for part in sample_ids if part is not None for name in part]
    grids = [part.grid for part in slices if part.grid is not None]
    return TokenReading(
        logprob=joined("logprob"),
        entropy=joined("entropy"),
        varentropy=joined("varentropy"),
        max_probability=joined("max_probability"),
        present=joined("present"),
        weight=joined("weight"),
        position=joined("position"),
        sequence=torch.cat([p.sequence + o for p, o in zip(slices, offsets, strict=True)]),
        token_id=joined("token_id"),
        key=joined("key"),
        sequence_tokens=joined("sequence_tokens"),
        sample_ids=ids if len(ids) == sum(sequences) else None,
        vocabulary=max(part.vocabulary for part in slices),
        grids=grids if len(grids) == len(slices) else None,
    )
