"""Everything that one pass over the logits can tell about each token."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from math import prod
from types import FunctionType
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["TokenStatistics", "token_statistics", "token_statistics_from_hidden"]

log = logging.getLogger("entropylens")

TILE: Final = 4096
"""Classes summed in float32 before float64 takes over; what a core's first caches hold."""
EAGER_ELEMENTS: Final = 1 << 20
"""Logits in each of three buffers where nothing is compiled: 12 MiB that stay in the cache."""
BLOCK_ELEMENTS: Final = 1 << 26
"""Logits between two joins in float64."""
HIDDEN_ROWS: Final = 256
COMPILE_ELEMENTS: Final = 1 << 26
"""Logits from which compiling, some ten seconds once, is worth its while."""

_LOWEST: Final = -87.0
"""exp of it is the least normal float32; what lies below counts as probability 0."""
_FLAT: Final = 4.0
"""Nats between maximum and mean below which a tile counts as flat."""
_LOG2_E: Final = 1.4426950408889634
# 2^f on [-0.5, 0.5], exactly 1 at 0, fitted to the least relative error: 1e-7.
_EXP2: Final = (
    1.0,
    0.6931470036506653,
    0.24022242426872253,
    0.05550733581185341,
    0.009671512991189957,
    0.001326472614891827,
)


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


@dataclass(frozen=True)
class _Sums:
    """Of one tile of logits, each ``[rows, tiles]``.

    With ``x = (z - maximum) / T``: ``e`` sums exp(x); the others sum over all classes but the
    maxima, with ``w = exp(x)`` and ``y = x - centre``.
    """

    maximum: Tensor
    centre: Tensor
    e: Tensor
    w: Tensor
    wy: Tensor
    wyy: Tensor
    ww: Tensor
    wwy: Tensor


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
        compiled: Use `torch.compile`, about 3 plain reads of the logits against 30; None does so
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
    use_compiler = _choose(compiled, logits.device, logits.numel())
    block = max(BLOCK_ELEMENTS // vocabulary, 1)
    with torch.no_grad():
        results = []
        for rows, wanted in _row_blocks(logits, targets.flatten(), block):
            sums = [_tile_sums(part, temperature, use_compiler) for part in _tiles(rows)]
            at = wanted.clamp(0, vocabulary - 1)[:, None]
            results.append(_join(sums, rows.gather(1, at).squeeze(1).float(), temperature))
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
    use_compiler = _choose(compiled, hidden.device, targets.numel() * vocabulary)
    with torch.no_grad():
        results = []
        for rows, wanted in _row_blocks(hidden, targets.flatten(), HIDDEN_ROWS):
            sums, picked = [], rows.new_zeros(rows.shape[0], dtype=torch.float32)
            for start in range(0, vocabulary, TILE):
                part = rows @ weight[start : start + TILE].mT
                part = part if bias is None else part + bias[start : start + TILE]
                part = part.float() if logit_scale == 1.0 else part.float() * logit_scale
                part = part if soft_cap is None else torch.tanh(part / soft_cap) * soft_cap
                inside = (wanted >= start) & (wanted < start + TILE)
                at = (wanted - start).clamp(0, part.shape[1] - 1)[:, None]
                picked = torch.where(inside, part.gather(1, at).squeeze(1), picked)
                sums.append(_tile_sums(part[:, None], temperature, use_compiler))
            results.append(_join(sums, picked, temperature))
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
    results: list[dict[str, Tensor]], targets: Tensor, mask: Tensor | None, vocabulary: int
) -> TokenStatistics:
    kept = (targets >= 0) & (targets < vocabulary)
    if mask is not None:
        kept = kept & mask.bool()
    columns = {}
    for name in (field.name for field in fields(TokenStatistics)):
        parts = [result[name] for result in results]
        joined = torch.cat(parts) if parts else kept.new_zeros(0, dtype=torch.float32)
        columns[name] = torch.where(kept, joined.view(targets.shape), torch.nan)
    return TokenStatistics(**columns)


# -- one tile --------------------------------------------------------------------------------------


def _tile_sums(tiles: Tensor, temperature: float, use_compiler: bool) -> _Sums:
    if use_compiler and tiles.shape[0] > 1:
        found = _run_compiled(tiles, temperature)
        if found is not None:
            return _Sums(*found)
    blocks = tiles.split(max(EAGER_ELEMENTS // prod(tiles.shape[1:]), 1))
    scratch = torch.empty(3, blocks[0].numel(), device=tiles.device)
    sums = [_eager_sums(block, temperature, scratch[:, : block.numel()]) for block in blocks]
    return _Sums(*map(torch.cat, zip(*sums, strict=True)))


def _centre(maximum: Tensor, mean: Tensor, inverse_temperature: Tensor | float) -> Tensor:
    """Where moments of ``x`` are taken about: the mean of a flat tile, else the maximum.

    The closer to the mean under p, the fewer digits cancel; the plain mean is close where the tile
    is nearly flat, the maximum where it stands out.
    """
    gap = (mean - maximum) * inverse_temperature
    return torch.where(gap > -_FLAT, gap, 0.0)


def _eager_sums(tiles: Tensor, temperature: float, scratch: Tensor) -> tuple[Tensor, ...]:
    """`_fused_sums` in separate operations on three buffers that stay in the cache."""
    y, w, wy = (buffer.view(tiles.shape) for buffer in scratch)
    inverse = 1.0 / temperature
    y.copy_(tiles)
    maximum = y.amax(-1)
    centre = _centre(maximum, y.mean(-1), inverse)
    y.sub_(maximum.clamp(min=torch.finfo(torch.float32).min)[..., None])
    if inverse != 1.0:
        y.mul_(inverse)
    torch.exp(y.clamp_(min=_LOWEST), out=w)
    e = w.sum(-1)
    w.masked_fill_(y >= 0, 0.0)
    torch.mul(w, y.sub_(centre[..., None]), out=wy)
    sums = w.sum(-1), wy.sum(-1), y.mul_(wy).sum(-1)
    return maximum, centre, e, *sums, torch.mul(w, w, out=y).sum(-1), w.mul_(wy).sum(-1)


def _fused_sums(tiles: Tensor, inverse_temperature: Tensor) -> tuple[Tensor, ...]:
    """The sums of `_Sums`; compiled, two loops over a tile that the cache holds."""
    tiles = tiles.float()
    maximum = tiles.amax(-1)
    centre = _centre(maximum, tiles.mean(-1), inverse_temperature)
    x = tiles - maximum.clamp(min=torch.finfo(torch.float32).min)[..., None]
    x = (x * inverse_temperature).clamp(min=_LOWEST)
    e = _exp(x)
    w = torch.where(x < 0, e, 0.0)
    y = x - centre[..., None]
    wy = w * y
    return (
        maximum,
        centre,
        e.sum(-1),
        w.sum(-1),
        wy.sum(-1),
        (wy * y).sum(-1),
        (w * w).sum(-1),
        (wy * w).sum(-1),
    )


def _exp(x: Tensor) -> Tensor:
    """The exponential for x in -87..0: written out, it is compiled into the loop that it stands in.

    Called, a library's exp spills every running sum and makes the loop five times slower.
    """
    t = x * _LOG2_E
    whole = torch.round(t)
    rest = t - whole
    power = torch.full_like(rest, _EXP2[-1])
    for coefficient in reversed(_EXP2[:-1]):
        power = power * rest + coefficient
    return power * ((whole.to(torch.int32) + 127) << 23).view(torch.float32)


# -- from tiles to tokens --------------------------------------------------------------------------


def _join(parts: list[_Sums], picked: Tensor, temperature: float) -> dict[str, Tensor]:
    """Statistics of each row from its tiles, in float64 where the device has it."""
    wide = torch.float32 if picked.device.type == "mps" else torch.float64
    inverse = 1.0 / temperature

    def column(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts], 1).to(wide)

    maximum, centre, w = column("maximum"), column("centre"), column("w")
    largest = maximum.amax(1, keepdim=True)
    offset = ((maximum - largest) * inverse).clamp(min=-1e4)
    scale = offset.exp()
    ties = (column("e") - w).round()
    # Mass relative to the row's largest term, with that one term left out.
    rest = (scale * w + torch.where(offset < 0, scale * ties, 0.0)).sum(1)
    rest = rest + (torch.where(offset < 0, 0.0, ties).sum(1) - 1)
    total = 1 + rest
    mass, squares = w + ties, column("ww") + ties
    # Moments about the centre, the maxima, which lie at -centre from it, taken in.
    first = column("wy") - ties * centre
    second = column("wyy") + ties * centre**2
    pull = column("wwy") - ties * centre
    place = offset + centre
    mean = (scale * (mass * place + first)).sum(1) / total
    spread = (second - first**2 / mass).clamp(min=0)
    gap = place + first / mass - mean[:, None]
    variance = (scale * (spread + mass * gap**2)).sum(1) / total
    pull = pull + squares * (place - mean[:, None])
    log_rest = torch.log1p(rest)
    top = largest.squeeze(1)
    found = {
        "logprob": (picked.to(wide) - top) * inverse - log_rest,
        "entropy": log_rest - mean,
        "varentropy": variance,
        "sum_squared_probabilities": (scale**2 * squares).sum(1) / total**2,
        "expected_discriminator": (scale**2 * pull).sum(1) / total**2,
        "max_probability": 1 / total,
        "log_sum_exp": top * inverse + log_rest,
    }
    usable = top.isfinite()
    return {name: torch.where(usable, v, torch.nan).float() for name, v in found.items()}


# -- compiling -------------------------------------------------------------------------------------


@cache
def _has_compiler(device_type: str) -> bool:
    if os.environ.get("TORCHDYNAMO_DISABLE", "0") != "0":
        return False
    if device_type == "cpu":
        return any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))
    return device_type == "cuda" and torch.cuda.get_device_capability()[0] >= 7


def _choose(compiled: bool | None, device: torch.device, elements: int) -> bool:
    if device.type == "meta" or device.type in _broken:
        return False
    if compiled is None:
        return elements >= COMPILE_ELEMENTS and _has_compiler(device.type)
    return compiled


@cache
def _compiled(dtype: torch.dtype, tiles: int, width: int) -> Callable[..., Any]:
    """One compiled function for each shape of tiles: a single one may be compiled but 8 times."""
    own = FunctionType(_fused_sums.__code__.replace(), _fused_sums.__globals__)
    return torch.compile(own, fullgraph=True)


_broken: set[str] = set()


def _run_compiled(tiles: Tensor, temperature: float) -> tuple[Tensor, ...] | None:
    try:
        # Only the number of rows may vary: the inner loops are fast with widths known.
        tiles = tiles.detach()
        torch._dynamo.maybe_mark_dynamic(tiles, 0)
        run = _compiled(tiles.dtype, *tiles.shape[1:])
        return run(tiles, torch.tensor(1.0 / temperature))
    except Exception as error:
        _broken.add(tiles.device.type)
        log.warning(
            "entropylens: token_statistics could not be compiled on %s (%s: %s); the uncompiled "
            "sums are used instead, about ten times slower",
            tiles.device.type,
            type(error).__name__,
            " ".join(str(error).split())[:300],
        )
        return None


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
