"""What does the policy write, and where in it is it unsure?"""

from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor

from entropylens.diagnostics._summaries import weighted_mean
from entropylens.registry import (
    Block,
    Diagnostic,
    Lists,
    Lookup,
    Metric,
    PolicyReading,
    diagnostic,
)

__all__ = ["COMPLETIONS", "Completions"]

COMPLETIONS: Final = 2
"""Whole completions written a measured step."""

METRICS: Final[Mapping[str, Metric]] = {}


class _Numbers:
    """The text of each number."""

    def __getitem__(self, number: int) -> str:
        return str(number)


@diagnostic(
    reads="policy",
    every={"fast": 10, "balanced": 1, "full": 1},
    floor={"fast": 200, "balanced": 50, "full": 20},
    metrics=METRICS,
)
class Completions(Diagnostic):
    """Rows of the completions table: two whole completions a step, chosen without looking at them.

    Nothing is written unless the run keeps text, and where a step's tokens were sampled.
    """

    def measure(self, reading: PolicyReading, state: Any) -> tuple[list[Block], Any]:
        """Choose the completions of one step, from its first micro-batch."""
        tokens = reading.tokens
        if reading.prompts is None or reading.completions is None or not tokens.grids:
            return [], state
        rows, width = tokens.grids[0]

        def grid(values: Tensor) -> Tensor:
            return values[: rows * width].view(rows, width)

        index = grid(tokens.key)[:, 0].topk(min(COMPLETIONS, rows), largest=False).indices
        entropy, present = grid(tokens.entropy)[index], grid(tokens.present)[index]
        gaps = -grid(tokens.logprob)[index] - entropy
        advantage = weighted_mean(grid(reading.advantage)[index], present.float())
        columns: dict[str, Any] = {
            "prompt": Lookup(reading.prompts, index),
            "text": Lookup(reading.completions, index),
            "token_entropies": Lists(entropy.float(), present),
            "surprisal_gaps": Lists(gaps.float(), present),
            "advantage": advantage,
        }
        if reading.reward is not None:
            columns["reward"] = reading.reward[index].float()
        if reading.group is not None:
            columns["group"] = Lookup(_Numbers(), reading.group[index])  # type: ignore[arg-type]
        if tokens.sample_ids is not None:
            columns["sample_id"] = Lookup(tokens.sample_ids, index)
        return [Block("completions", columns)], state
