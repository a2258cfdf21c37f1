"""Which samples did it? The highest-loss and the longest samples of a step, by name."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.registry import Block, Diagnostic, Lookup, Metric, TokenReading, diagnostic

__all__ = ["HIGHEST_LOSS", "LONGEST", "SampleTable", "mean_by_sequence"]

HIGHEST_LOSS: Final = 4
LONGEST: Final = 2

METRICS: Final[Mapping[str, Metric]] = {}


def mean_by_sequence(
    values: Tensor, present: Tensor, sequence: Tensor, sequences: int
) -> tuple[Tensor, Tensor]:
    """What is the mean over the measured tokens of each sequence?

    Args:
        values: ``[n]``.
        present: ``[n]`` bool; what is not present is ignored, NaN included.
        sequence: ``[n]`` integers in 0..sequences-1.
        sequences: Number of sequences.

    Returns:
        Means ``[sequences]``, NaN where no token was measured, and how many were ``[sequences]``.

    Device: the input's; no host synchronisation.
    Cost: O(n).

    Example:
        >>> mean_by_sequence(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]),
        ...                  torch.tensor([1, 1, 0]), 2)
        (tensor([nan, 2.]), tensor([0., 2.]))
    """
    zero = torch.zeros(sequences, device=values.device)
    sums = zero.index_add(0, sequence, torch.where(present, values.float(), 0.0))
    counts = zero.index_add(0, sequence, present.float())
    return sums / counts, counts


@diagnostic(
    reads="tokens",
    every={"fast": 50, "balanced": 10, "full": 1},
    floor={"fast": 1000, "balanced": 200, "full": 200},
    metrics=METRICS,
)
class SampleTable(Diagnostic):
    """Rows of the samples table: the highest mean loss and the most scored tokens of a step.

    Under row sampling a sample's loss is the mean over its measured tokens, whose number stands
    beside it: an estimate that scatters by sd / sqrt(measured_tokens).
    """

    def measure(self, reading: TokenReading, state: Any) -> tuple[list[Block], Any]:
        """Name the samples of one step."""
        tokens = reading.sequence_tokens
        sequences = tokens.shape[0]
        grouped = (reading.present, reading.sequence, sequences)
        loss, measured = mean_by_sequence(-reading.logprob, *grouped)
        entropy, _ = mean_by_sequence(reading.entropy, *grouped)
        rank = torch.where(loss.isnan(), torch.inf, loss)
        worst = torch.where(measured > 0, rank, -torch.inf).topk(min(HIGHEST_LOSS, sequences))
        longest = tokens.topk(min(LONGEST, sequences))
        index = torch.cat([worst.indices, longest.indices])
        columns: dict[str, Any] = {
            "present": measured[index] > 0,
            "sequence": index,
            "tokens": tokens[index],
            "measured_tokens": measured[index].long(),
            "loss": loss[index],
            "entropy": entropy[index],
            "selection": ["highest_loss"] * len(worst.indices) + ["longest"] * len(longest.indices),
        }
        if reading.sample_ids is not None:
            columns["sample_id"] = Lookup(reading.sample_ids, index)
        return [Block("samples", columns)], state
