"""How far did this step move the parameters?"""

from typing import Any, Final

import torch

from entropylens.diagnostics.gradient_norm import is_sharded, total_norm
from entropylens.registry import Block, Diagnostic, Metric, UpdateReading, diagnostic

__all__ = ["UpdateNorm"]

_COST: Final = "a copy of the trainable parameters during the step and two reads of them"
_RULE: Final = (
    "Definition; the ratio as in Karpathy's and Cockpit's update-size rule of thumb (1e-3)"
)


def _metric(question: str, formula: str, high: str, low: str, **other: str) -> Metric:
    fixed = {
        "unit": "1",
        "estimator": "exact, of the parameters before and after the optimiser's step; module is "
        "the optimiser where there are several",
        "cost": _COST,
        "source": "Definition",
    }
    return Metric(question=question, formula=formula, high=high, low=low, **{**fixed, **other})


_UPDATE: Final = (
    "learning rate too large, or a step at stale second moments",
    "learning rate spent, or a step that was skipped (exactly 0)",
)
_WEIGHTS: Final = (
    "growing weights: too little weight decay, or drift",
    "shrinking weights: weight decay wins",
)
_SHARD: Final = (
    "exact for this rank's shards of the parameters (FSDP2): root of the sum of squares over ranks "
    "is the norm of all"
)


@diagnostic(
    reads="update",
    every={"fast": 0, "balanced": 100, "full": 10},
    floor=1000,
    metrics={
        "update/norm": _metric(
            "How far did this step move the parameters?",
            "||theta_after - theta_before||_2 over all trainable parameters",
            *_UPDATE,
        ),
        "update/relative_norm": _metric(
            "By which share of its own size did this step move the model?",
            "||theta_after - theta_before||_2 / ||theta_before||_2",
            "above about 1e-2: unusually bold",
            "below about 1e-4: hardly learning",
            source=_RULE,
        ),
        "parameter/norm": _metric(
            "How large are the weights?",
            "||theta_before||_2 over all trainable parameters",
            *_WEIGHTS,
        ),
        "update/shard_norm": _metric(
            "How far did this step move this rank's part of the parameters?",
            "||theta_after - theta_before||_2 over this rank's parts of the trainable parameters",
            *_UPDATE,
            estimator=_SHARD,
            ranks="root_sum_square",
        ),
        "parameter/shard_norm": _metric(
            "How large is this rank's part of the weights?",
            "||theta_before||_2 over this rank's parts of the trainable parameters",
            *_WEIGHTS,
            estimator=_SHARD,
            ranks="root_sum_square",
        ),
    },
)
class UpdateNorm(Diagnostic):
    """Norm of the update, absolute and against the parameters."""

    def measure(self, reading: UpdateReading, state: Any) -> tuple[list[Block], Any]:
        """Compare the parameters of one optimiser before and after one step."""
        before = reading.before
        size = total_norm(before.values())
        update = total_norm(reading.after[name] - old for name, old in before.items())
        if is_sharded(before):
            names, values = ["update/shard_norm", "parameter/shard_norm"], [update, size]
        else:
            names = ["update/norm", "update/relative_norm", "parameter/norm"]
            values = [update, update / size, size]
        return [Block.metrics(names, torch.stack(values), modules=reading.optimizer)], state
