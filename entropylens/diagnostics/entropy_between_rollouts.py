"""By how much does the policy's entropy differ from one rollout to the next?"""

from collections.abc import Mapping
from typing import Any, Final

import torch

from entropylens.diagnostics._summaries import weighted_mean
from entropylens.registry import Block, Diagnostic, Metric, PolicyReading, diagnostic

__all__ = ["EntropyBetweenRollouts"]

METRICS: Final[Mapping[str, Metric]] = {
    "entropy/change/rollouts": Metric(
        question="By how much does the policy's entropy differ from the last measured step's?",
        formula="mean token entropy of this step less that of the last measured one",
        unit="nats",
        estimator="exact, or of a uniform sample of each micro-batch, as entropy/token/mean; over "
        "different completions of different prompts, visited by different policies: most of it is "
        "chance, where entropy/change/measured is of the same states",
        high="these prompts leave the policy less sure than the last ones",
        low="these prompts leave it more sure",
        cost="nothing beyond the entropies",
        source="Definition",
    )
}


@diagnostic(
    reads="policy",
    every={"fast": 10, "balanced": 1, "full": 1},
    floor={"fast": 200, "balanced": 50, "full": 20},
    metrics=METRICS,
)
class EntropyBetweenRollouts(Diagnostic):
    """The change of the mean token entropy since the last measured step; absent in the first."""

    def measure(self, reading: PolicyReading, state: Any) -> tuple[list[Block], Any]:
        """Compare the mean entropy of one step's tokens with the one before."""
        tokens = reading.tokens
        mean, weight = weighted_mean(tokens.entropy, tokens.weight), tokens.weight.sum()
        before = torch.full_like(mean, torch.nan) if state is None else state.to(mean)
        change = mean - before
        measured = torch.where(change.isnan(), 0.0, weight)
        block = Block.metrics(list(METRICS), change[None], weight=measured)
        return [block], torch.where(mean.isnan(), before, mean)
