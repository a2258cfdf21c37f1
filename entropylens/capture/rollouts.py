"""Completions of several generations as those of one step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from entropylens.registry import RolloutReading

__all__ = ["join_rollouts"]

_OF_COMPLETIONS = ("group", "reward", "correct", "answer", "truncated")


def join_rollouts(parts: Sequence[RolloutReading]) -> RolloutReading:
    """One reading of all; what one of them does not know is not known.

    Args:
        parts: At least one, each with group numbers of its own.

    Example:
        >>> one = RolloutReading(reward=torch.tensor([1.0, 0.0]), group_size=2)
        >>> join_rollouts([one, one]).reward.tolist()
        [1.0, 0.0, 1.0, 0.0]
    """
    if len(parts) == 1:
        return parts[0]
    sizes = {part.group_size for part in parts}
    joined = {name: _joined([getattr(part, name) for part in parts]) for name in _OF_COMPLETIONS}
    names = set.intersection(*(set(part.rewards) for part in parts))
    seconds = [part.seconds for part in parts if part.seconds is not None]
    return RolloutReading(
        group_size=sizes.pop() if len(sizes) == 1 else None,
        rewards={
            n: torch.cat([p.rewards[n] for p in parts]) for n in parts[0].rewards if n in names
        },
        token_id=_padded([part.token_id for part in parts]),
        mask=_padded([part.mask for part in parts]),
        seconds=sum(seconds) if len(seconds) == len(parts) else None,
        **joined,
    )


def _joined(columns: Sequence[Tensor | None]) -> Tensor | None:
    known = [column for column in columns if column is not None]
    return torch.cat(known) if len(known) == len(columns) else None


def _padded(grids: Sequence[Tensor | None]) -> Tensor | None:
    known = [grid for grid in grids if grid is not None]
    if len(known) < len(grids):
        return None
    width = max(grid.shape[1] for grid in known)
    pads = (torch.nn.functional.pad(grid, (0, width - grid.shape[1])) for grid in known)
    return torch.cat(list(pads))
