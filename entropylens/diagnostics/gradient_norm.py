"""How large is the gradient that the optimiser is about to use?"""

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.registry import Block, Diagnostic, GradientReading, Metric, diagnostic

__all__ = ["GradientNorm", "total_norm"]

_LARGE: Final = 65_536
_BLOCK: Final = 4_096
_HELD: Final = 1 << 26
"""Elements whose norms are taken together; more would hold another copy of the model."""


def is_sharded(tensors: Mapping[str, Tensor]) -> bool:
    """Whether some of these are parts that this rank holds of larger tensors (FSDP2's DTensor)."""
    return any(hasattr(tensor, "placements") for tensor in tensors.values())


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """What is the Euclidean norm of all these tensors taken as one vector?

    ``sqrt(sum_k ||x_k||_2^2)`` in float32. On a CPU a large tensor is summed in blocks of 4,096:
    torch's own sum runs on, and is off by 6e-5 on 10^7 float32 elements and 2e-4 on bf16 ones.

    Of sharded tensors each rank counts its own part, and of whole ones beside them its share, so
    that the root of the sum of squares over ranks is the norm of all; nothing is communicated.

    Args:
        tensors: Real tensors of any shape and floating dtype on one device, at least one; some or
            all may be DTensors of one mesh, sharded or replicated.

    Returns:
        ``[]``, float32; NaN or infinity if an element is.

    Raises:
        ValueError: A DTensor that holds partial sums, whose norm no rank knows alone.

    Device: the input's; no host synchronisation.
    Cost: one read of every element.

    Example:
        >>> total_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        tensor(5.)
    """
    ranks, whole, sharded = 1, _Norms(), _Norms()
    for tensor in tensors:
        if not hasattr(tensor, "placements"):
            whole.add(tensor)
            continue
        local, copies, ranks = _own_part(tensor)
        sharded.add(local if copies == 1 else local / copies**0.5)
    parts = [norms / ranks**0.5 for norms in whole.found()] if ranks > 1 else whole.found()
    parts = parts + sharded.found()
    return torch.linalg.vector_norm(torch.cat(parts))


def _own_part(tensor: Any) -> tuple[Tensor, int, int]:
    """What this rank holds of a DTensor, how many ranks hold the same, and how many there are."""
    placements, mesh = tensor.placements, tensor.device_mesh
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"total_norm: expected sharded or replicated tensors, got placements {placements}; "
            f"reduce them first"
        )
    kept = [mesh.size(axis) for axis, p in enumerate(placements) if p.is_replicate()]
    return tensor.to_local(), prod(kept), mesh.size()


class _Norms:
    """Norms of tensors that come one at a time; holds few of them at once."""

    def __init__(self) -> None:
        self._held: list[Tensor] = []
        self._elements = 0
        self._found: list[Tensor] = []

    def add(self, tensor: Tensor) -> None:
        if tensor.device.type == "cpu" and tensor.numel() >= _LARGE and tensor.is_contiguous():
            even = tensor.numel() // _BLOCK * _BLOCK
            flat = tensor.view(-1)
            blocks = flat[:even].view(-1, _BLOCK)
            self._found.append(torch.linalg.vector_norm(blocks, dim=1, dtype=torch.float32))
            # A view of the rest would keep the whole alive.
            tensor = flat[even:].clone()
        self._held.append(tensor)
        self._elements += tensor.numel()
        if self._elements > _HELD:
            self._measure()

    def found(self) -> list[Tensor]:
        """One-dimensional tensors of norms, all together of everything that was added."""
        self._measure()
        return self._found

    def _measure(self) -> None:
        if self._held:
            norms = torch._foreach_norm(self._held, 2, dtype=torch.float32)
            self._found.append(torch.stack(norms))
        self._held, self._elements = [], 0


def _metric(question: str, formula: str, estimator: str, **other: str) -> Metric:
    fixed = {
        "unit": "1",
        "high": "at the clipping threshold: clipping acts on every step",
        "low": "a flat region, a vanishing signal, or frozen parameters",
        "cost": "one read of all gradients",
        "source": "torch.nn.utils.clip_grad_norm_ with norm_type 2",
    }
    return Metric(question=question, formula=formula, estimator=estimator, **{**fixed, **other})


_SHARD: Final = (
    "exact for this rank's shards of the parameters (FSDP2): root of the sum of squares "
)
_SHARDED: Final = (
    "sqrt(sum of squares) over this rank's parts of the trainable parameters that have a gradient"
)


@diagnostic(
    reads="gradients",
    every={"fast": 50, "balanced": 10, "full": 1},
    floor={"fast": 1000, "balanced": 200, "full": 200},
    metrics={
        "gradient/norm/after_clip": _metric(
            "How large is the gradient that the optimiser uses?",
            "sqrt(sum of squares) over all trainable parameters that have a gradient",
            "exact, after unscaling and clipping; this rank's gradients as they are when the "
            "optimiser steps; module is the optimiser where there are several",
        ),
        "gradient/shard_norm/after_clip": _metric(
            "How large is this rank's part of the gradient that the optimiser uses?",
            _SHARDED,
            _SHARD + "over ranks is the norm of all",
            ranks="root_sum_square",
        ),
        "gradient/shard_norm/before_clip": _metric(
            "How large is this rank's part of the gradient that came out of backward?",
            _SHARDED,
            _SHARD + "over ranks is the norm of all",
            high="a bad batch or instability; clipping hides it from the optimiser, not from here",
            ranks="root_sum_square",
        ),
    },
)
class GradientNorm(Diagnostic):
    """Norm of the gradient after clipping, and before where the trainer shows it so."""

    def measure(self, reading: GradientReading, state: Any) -> tuple[list[Block], Any]:
        """Take the norm over all parameters of one optimiser in one step."""
        kind = "shard_norm" if is_sharded(reading.gradients) else "norm"
        name = f"gradient/{kind}/{'after' if reading.clipped else 'before'}_clip"
        return [Block.metrics([name], reading.norm[None], modules=reading.optimizer)], state
