"""Sums over tiles of logits, compiled or not, and the statistics of a row from its tiles."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from types import FunctionType
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["TILE", "TileSums", "join_tiles", "may_compile", "tile_sums"]

log = logging.getLogger("entropylens")

TILE: Final = 4096
"""Classes summed in float32 before float64 takes over; what a core's first caches hold."""
EAGER_ELEMENTS: Final = 1 << 20
"""Logits in each of three buffers where nothing is compiled: 12 MiB that stay in the cache."""
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
class TileSums:
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


def tile_sums(tiles: Tensor, temperature: float, use_compiler: bool) -> TileSums:
    """Sums of ``[rows, tiles, width]`` logits; where compiling fails, the same uncompiled."""
    if use_compiler and tiles.shape[0] > 1:
        found = _run_compiled(tiles, temperature)
        if found is not None:
            return TileSums(*found)
    blocks = tiles.split(max(EAGER_ELEMENTS // prod(tiles.shape[1:]), 1))
    scratch = torch.empty(3, blocks[0].numel(), device=tiles.device)
    sums = [_eager_sums(block, temperature, scratch[:, : block.numel()]) for block in blocks]
    return TileSums(*(map(torch.cat, zip(*sums, strict=True)) if len(sums) > 1 else sums[0]))


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
    """The sums of `TileSums`; compiled, two loops over a tile that the cache holds."""
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

    With a call to a library's exp within, the loop was measured five times slower.
    """
    t = x * _LOG2_E
    whole = torch.round(t)
    rest = t - whole
    power = torch.full_like(rest, _EXP2[-1])
    for coefficient in reversed(_EXP2[:-1]):
        power = power * rest + coefficient
    return power * ((whole.to(torch.int32) + 127) << 23).view(torch.float32)


# -- from tiles to tokens --------------------------------------------------------------------------


def join_tiles(parts: list[TileSums], picked: Tensor, temperature: float) -> Tensor:
    """Statistics of each row from its tiles, in float64 where the device has it.

    Returns:
        ``[7, rows]``, float32, in the order of `token_statistics.TokenStatistics`.
    """
    wide = torch.float32 if picked.device.type == "mps" else torch.float64
    inverse = 1.0 / temperature

    columns = [torch.stack([*vars(part).values()]) for part in parts]
    joined = (torch.cat(columns, 2) if len(parts) > 1 else columns[0]).to(wide)
    sums = TileSums(*joined)
    maximum, centre, w = sums.maximum, sums.centre, sums.w
    largest = maximum.amax(1, keepdim=True)
    offset = ((maximum - largest) * inverse).clamp(min=-1e4)
    scale = offset.exp()
    ties = (sums.e - w).round()
    # Mass relative to the row's largest term, with that one term left out.
    rest = (scale * w + torch.where(offset < 0, scale * ties, 0.0)).sum(1)
    rest = rest + (torch.where(offset < 0, 0.0, ties).sum(1) - 1)
    total = 1 + rest
    mass, squares = w + ties, sums.ww + ties
    # Moments about the centre, the maxima, which lie at -centre from it, taken in.
    first = sums.wy - ties * centre
    second = sums.wyy + ties * centre**2
    pull = sums.wwy - ties * centre
    place = offset + centre
    mean = (scale * (mass * place + first)).sum(1) / total
    spread = (second - first**2 / mass).clamp(min=0)
    gap = place + first / mass - mean[:, None]
    variance = (scale * (spread + mass * gap**2)).sum(1) / total
    pull = pull + squares * (place - mean[:, None])
    log_rest = torch.log1p(rest)
    top = largest.squeeze(1)
    found = torch.stack(
        [
            (picked.to(wide) - top) * inverse - log_rest,
            log_rest - mean,
            variance,
            (scale**2 * squares).sum(1) / total**2,
            (scale**2 * pull).sum(1) / total**2,
            1 / total,
            top * inverse + log_rest,
        ]
    )
    return torch.where(top.isfinite(), found, torch.nan).float()


# -- compiling -------------------------------------------------------------------------------------


@cache
def _has_compiler(device_type: str) -> bool:
    if os.environ.get("TORCHDYNAMO_DISABLE", "0") != "0":
        return False
    if device_type == "cpu":
        return any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))
    return device_type == "cuda" and torch.cuda.get_device_capability()[0] >= 7


def may_compile(compiled: bool | None, device: torch.device, elements: int) -> bool:
    """Whether to compile: as asked, else where it pays and a compiler is there."""
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
            "sums are used instead, about five times slower",
            tiles.device.type,
            type(error).__name__,
            " ".join(str(error).split())[:300],
        )
        return None
