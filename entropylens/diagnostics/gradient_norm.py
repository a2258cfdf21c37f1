"""How large is the gradient that the optimiser is about to use?"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from entropylens.registry import Block, Diagnostic, GradientReading, Metric, diagnostic

__all__ = ["GradientNorm", "total_norm"]


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """What is the Euclidean norm of all these tensors taken as one vector?

    ``sqrt(sum_k ||x_k||_2^2)``, each norm accumulated in float32.

    Args:
        tensors: Real tensors of any shape and floating dtype on one device, at least one.

    Returns:
        ``[]``, float32; NaN or infinity if an element is.

    Device: the input's; no host synchronisation.
    Cost: one read of every element.

    Example:
        >>> total_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        tensor(5.)
    """
    norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms))


@diagnostic(
    reads="gradients",
    every={"fast": 50, "balanced": 10, "full": 1},
    floor=200,
    metrics={
        "gradient/norm/after_clip": Metric(
            question="How large is the gradient that the optimiser uses?",
            formula="sqrt(sum of squares) over all trainable parameters that have a gradient",
            unit="1",
            estimator="exact, after unscaling and clipping; this rank's gradients as they are when "
            "the optimiser steps",
            high="at the clipping threshold: clipping acts on every step",
            low="a flat region, a vanishing signal, or frozen parameters",
            cost="one read of all gradients",
            source="torch.nn.utils.clip_grad_norm_ with norm_type 2",
        )
    },
)
class GradientNorm(Diagnostic):
    """Norm of the gradient after clipping."""

    def measure(self, reading: GradientReading, state: Any) -> tuple[list[Block], Any]:
        """Take the norm over all parameters of one step."""
        norm = total_norm(reading.gradients.values())
        return [Block.metrics(["gradient/norm/after_clip"], norm[None])], state
