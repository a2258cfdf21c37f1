"""Numbers that all processes of a training must agree on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_sharded", "joint_norm", "local", "ranks", "stacked"]


def ranks() -> int:
    """Processes that train together."""
    distributed = torch.distributed
    is_there = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if is_there else 1


def is_sharded(tensors: Sequence[Tensor]) -> bool:
    """Whether this rank has but a part of one of them."""
    return any(hasattr(tensor, "placements") for tensor in tensors)


def joint_norm(own: float | None, are_parts: bool, device: torch.device) -> float | None:
    """The norm that all ranks are to use; every one of them must come here.

    Args:
        own: Of this rank's tensors; None where it could not be told.
        are_parts: Each rank has a part of the tensors, not all of them.
        device: Where the ranks meet.

    Returns:
        None where any rank could not tell its own.
    """
    if ranks() == 1:
        return own
    told = [1.0, 0.0] if own is None else [0.0, own * own]
    joined = torch.tensor(told, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(joined)
    unknown, square = joined.tolist()
    return None if unknown else float((square if are_parts else square / ranks()) ** 0.5)


def stacked(numbers: Sequence[Tensor]) -> Tensor:
    """``[n]``, on the first one's device: a model may lie on several."""
    try:
        return torch.stack([*numbers])
    except RuntimeError:
        return torch.stack([one.to(numbers[0].device) for one in numbers])


def local(tensor: Any) -> Tensor:
    """This rank's part of a sharded tensor, or the tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
