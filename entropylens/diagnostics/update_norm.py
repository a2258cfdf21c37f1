"""How far did this step move the parameters?"""

from typing import Any

import torch

from entropylens.diagnostics.gradient_norm import total_norm
from entropylens.registry import Block, Diagnostic, Metric, UpdateReading, diagnostic

__all__ = ["UpdateNorm"]

_ESTIMATOR = "exact difference of the parameters before and after the optimiser's step"
_COST = "a copy of the trainable parameters during the step and two reads of them"
_SOURCE = "Definition; the ratio as in Karpathy's and Cockpit's update-size rule of thumb (1e-3)"


@diagnostic(
    reads="update",
    every={"fast": 0, "balanced": 100, "full": 10},
    floor=1000,
    metrics={
        "update/norm": Metric(
            question="How far did this step move the parameters?",
            formula="||theta_after - theta_before||_2 over all trainable parameters",
            unit="1",
            estimator=_ESTIMATOR,
            high="learning rate too large, or a step at stale second moments",
            low="learning rate spent, or a step that was skipped (exactly 0)",
            cost=_COST,
            source=_SOURCE,
        ),
        "update/relative_norm": Metric(
            question="By which share of its own size did this step move the model?",
            formula="||theta_after - theta_before||_2 / ||theta_before||_2",
            unit="1",
            estimator=_ESTIMATOR,
            high="above about 1e-2: unusually bold",
            low="below about 1e-4: hardly learning",
            cost=_COST,
            source=_SOURCE,
        ),
        "parameter/norm": Metric(
            question="How large are the weights?",
            formula="||theta_before||_2 over all trainable parameters",
            unit="1",
            estimator="exact, before the optimiser's step",
            high="growing weights: too little weight decay, or drift",
            low="shrinking weights: weight decay wins",
            cost=_COST,
            source="Definition",
        ),
    },
)
class UpdateNorm(Diagnostic):
    """Norm of the update, absolute and against the parameters."""

    def measure(self, reading: UpdateReading, state: Any) -> tuple[list[Block], Any]:
        """Compare the parameters of one step before and after."""
        before = list(reading.before.values())
        pairs = zip(reading.after.values(), before, strict=True)
        # One difference at a time: together they would be another copy of the model.
        update = total_norm([total_norm([new - old]) for new, old in pairs])
        size = total_norm(before)
        values = torch.stack([update, update / size, size])
        return [Block.metrics(["update/norm", "update/relative_norm", "parameter/norm"], values)], (
            state
        )
