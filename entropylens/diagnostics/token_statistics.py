"""Everything that one pass over the logits can tell about each token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import prod
from typing import Final

import torch
from torch import Tensor

from entropylens.diagnostics._tile_sums import TILE, join_tiles, may_compile, tile_sums

__all__ = ["TokenStatistics", "token_statistics", "token_statistics_from_hidden"]

BLOCK_ELEMENTS: Final = 1 << 26
"""Logits between two joins in float64."""
HIDDEN_ROWS: Final = 256


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics of each token, in the shape of the targets, float32, NaN where masked."""

    logprob: Tensor
    """log p of the target, nats."""
    entropy: Tensor
    """H = -sum_i p_i log p_i, nats."""
    varentropy: Tensor
    """Variance of log p_i under p, nats squared."""
    sum_squared_probabilities: Tensor
    """sum_i p_i^2: the chance that two draws agree; 1 / it is an effective number of choices."""
    expected_discriminator: Tensor
    """N = E_p[S], S_i = p_i (log p_i + H), nats: what a policy-gradient step does to the entropy
    through the tokens that were not sampled."""
    max_probability: Tensor
    """Largest p_i."""
    log_sum_exp: Tensor
    """log sum_i exp(z_i / T)."""


def token_statistics(
    logits: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    compiled: bool | None = None,
) -> TokenStatistics:
    """How sure is the model of each next token, and of the one that came?

    With ``p = softmax(z / T)``: log p of the target, ``H = -sum p log p``, ``Var_p(log p)``,
    ``sum p^2``, ``N = sum_i p_i^2 (log p_i + H)``, ``max p`` and ``log sum exp(z / T)``.

    Logits are read once from memory, a tile of 4,096 classes at a time. A tile is summed in float32
    relative to its own maximum, without the maximum, so that an entropy near 0 keeps its digits
    (``log1p`` of the rest); tiles are joined in float64 by the rule for centred moments (Chan et
    al.), so that a varentropy near 0 keeps its own. From float32 logits the errors stay below
    ``1e-6 + 2e-6 |value|`` (log p, entropy, log-sum-exp), ``1e-12 + 5e-6 |value|`` (varentropy) and
    ``3e-6 |value|`` (sum p^2, max p); N within ``1e-6 sum p^2`` plus 1e-5 of itself. Rounding
    of the logits themselves, as in bfloat16, is not ours to undo.

    Args:
        logits: ``[..., V]``, any floating dtype; -inf is probability 0.
        targets: ``[...]`` integers; one that is negative or not below V is masked.
        mask: ``[...]``, true where a token is scored; None is all.
        temperature: T > 0.
        compiled: Use `torch.compile`, about 4 plain reads of the logits against 16; None does so
            from 64 M logits on where a compiler is there. Should compiling fail, the same sums run
            uncompiled, and that is logged once.

    Returns:
        Seven tensors of the targets' shape. NaN where masked, and where the logits of a token hold
        NaN or +inf or are all -inf.

    Raises:
        ValueError: No vocabulary axis, targets or mask of another shape, a temperature not above 0.
        TypeError: Logits that are not floating point.

    Unit: nats.
    Device: the logits'; no host synchronisation, no random numbers.
    Cost: O(rows V); at most 32 MiB beyond the logits.
    Source: N and S as in arXiv 2602.03392, Theorem 3.3; its released code loses digits of N.

    Example:
        >>> even = token_statistics(torch.zeros(1, 8), torch.tensor([3]))
        >>> even.entropy, even.varentropy, even.max_probability
        (tensor([2.0794]), tensor([0.]), tensor([0.1250]))
    """
    _check(logits, targets, mask, temperature)
    vocabulary = logits.shape[-1]
    use_compiler = may_compile(compiled, logits.device, logits.numel())
    block = max(BLOCK_ELEMENTS // vocabulary, 1)
    with torch.no_grad():
        results = []
        for rows, wanted in _row_blocks(logits, targets.flatten(), block):
            sums = [tile_sums(part, temperature, use_compiler) for part in _tiles(rows)]
            at = wanted.clamp(0, vocabulary - 1)[:, None]
            results.append(join_tiles(sums, rows.gather(1, at).squeeze(1).float(), temperature))
        return _assemble(results, targets, mask, vocabulary)


def token_statistics_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    compiled: bool | None = None,
) -> TokenStatistics:
    """How sure is the model of each next token, where the logits were never built?

    `token_statistics` of ``z = cap(s (h W^T + b))`` with ``cap(u) = c tanh(u / c)``, one block of
    256 rows and 4,096 classes at a time. The product is taken in the dtype of ``hidden``, as the
    model's own head does, and everything after it in float32.

    Args:
        hidden: ``[..., d]``, input of the head.
        weight: ``[V, d]``, the head's.
        targets: ``[...]`` integers; one that is negative or not below V is masked.
        bias: ``[V]``, the head's.
        soft_cap: c, as in Gemma 2.
        logit_scale: s, as in Cohere (and 1 / ``logits_scaling`` of Granite).
        mask: ``[...]``, true where a token is scored.
        temperature: T > 0, of the loss.
        compiled: As in `token_statistics`.

    Returns:
        Seven tensors of the targets' shape.

    Raises:
        ValueError: Shapes that do not fit; a temperature or soft cap not above 0.
        TypeError: Hidden states that are not floating point.

    Unit: nats.
    Device: the hidden states'; no host synchronisation, no random numbers.
    Cost: the head's product, O(rows V d), which dwarfs the rest; at most 32 MiB.
    Source: as `token_statistics`.

    Example:
        >>> hidden, weight = torch.zeros(2, 4), torch.ones(8, 4)
        >>> token_statistics_from_hidden(hidden, weight, torch.tensor([0, 1])).entropy
        tensor([2.0794, 2.0794])
    """
    _check_hidden(hidden, weight, bias, soft_cap)
    vocabulary = weight.shape[0]
    _check(hidden.expand(*hidden.shape), targets, mask, temperature)
    use_compiler = may_compile(compiled, hidden.device, targets.numel() * vocabulary)
    with torch.no_grad():
        results = []
        for rows, wanted in _row_blocks(hidden, targets.flatten(), HIDDEN_ROWS):
            sums, picked = [], rows.new_zeros(rows.shape[0], dtype=torch.float32)
            for start in range(0, vocabulary, TILE):
                part = rows @ weight[start : start + TILE].to(rows.dtype).mT
                part = part if bias is None else part + bias[start : start + TILE]
                part = part.float() if logit_scale == 1.0 else part.float() * logit_scale
                part = part if soft_cap is None else torch.tanh(part / soft_cap) * soft_cap
                inside = (wanted >= start) & (wanted < start + TILE)
                at = (wanted - start).clamp(0, part.shape[1] - 1)[:, None]
                picked = torch.where(inside, part.gather(1, at).squeeze(1), picked)
                sums.append(tile_sums(part[:, None], temperature, use_compiler))
            results.append(join_tiles(sums, picked, temperature))
        return _assemble(results, targets, mask, vocabulary)


# -- blocks ----------------------------------------------------------------------------------------


def _row_blocks(values: Tensor, targets: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks ``[rows, columns]`` of ``[..., columns]`` and their targets, copying nothing."""
    try:
        flat = values.view(-1, values.shape[-1])
    except RuntimeError:
        size = prod(values.shape[1:-1])
        for number, part in enumerate(values):
            yield from _row_blocks(part, targets[number * size : (number + 1) * size], rows)
        return
    blocks = max(-(-flat.shape[0] // rows), 1)
    yield from zip(flat.tensor_split(blocks), targets.tensor_split(blocks), strict=True)


def _tiles(rows: Tensor) -> Iterator[Tensor]:
    """``[rows, V]`` as ``[rows, tiles, TILE]`` and what is left as ``[rows, 1, rest]``."""
    whole = rows.shape[1] // TILE
    if whole:
        yield rows[:, : whole * TILE].unflatten(1, (whole, TILE))
    if rows.shape[1] > whole * TILE:
        yield rows[:, None, whole * TILE :]


def _assemble(
    results: list[Tensor], targets: Tensor, mask: Tensor | None, vocabulary: int
) -> TokenStatistics:
    kept = (targets >= 0) & (targets < vocabulary)
    if mask is not None:
        kept = kept & mask.bool()
    if not results:
        results = [kept.new_zeros(len(fields(TokenStatistics)), 0, dtype=torch.float32)]
    joined = torch.cat(results, 1) if len(results) > 1 else results[0]
    columns = torch.where(kept, joined.view(len(joined), *targets.shape), torch.nan)
    return TokenStatistics(*columns.unbind())


# -- arguments -------------------------------------------------------------------------------------


def _check(values: Tensor, targets: Tensor, mask: Tensor | None, temperature: float) -> None:
    if values.ndim < 2:
        raise ValueError(
            f"token_statistics: expected at least one axis before the last one, got shape "
            f"{tuple(values.shape)}"
        )
    if not values.is_floating_point():
        raise TypeError(f"token_statistics: expected floating point, got {values.dtype}")
    if targets.shape != values.shape[:-1]:
        raise ValueError(
            f"token_statistics: expected targets of shape {tuple(values.shape[:-1])}, got "
            f"{tuple(targets.shape)}"
        )
    if mask is not None and mask.shape != targets.shape:
        raise ValueError(
            f"token_statistics: expected a mask of shape {tuple(targets.shape)}, got "
            f"{tuple(mask.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"token_statistics: expected temperature > 0, got {temperature}")


def _check_hidden(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, soft_cap: float | None
) -> None:
    if weight.ndim != 2 or hidden.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"token_statistics_from_hidden: expected hidden [..., d] and weight [V, d], got shapes "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"token_statistics_from_hidden: expected bias of shape {tuple(weight.shape[:1])}, got "
            f"{tuple(bias.shape)}"
        )
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"token_statistics_from_hidden: expected soft_cap > 0, got {soft_cap}")
