"""Which tokens did it? A bounded table of single tokens."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.registry import Block, Diagnostic, Lookup, Metric, TokenReading, diagnostic

__all__ = ["ROWS", "TokenTable", "select_tokens"]

ROWS: Final = 64
"""Tokens written a measured step: half the most surprising, half a uniform sample."""

METRICS: Final[Mapping[str, Metric]] = {}


def select_tokens(
    contribution: Tensor, present: Tensor, key: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    """Which tokens carry most of a sum, and which stand for all of them?

    Half are the present tokens of largest absolute ``contribution``, half a uniform sample without
    replacement of the present ones. A token may be in both halves.

    Args:
        contribution: ``[n]``; NaN counts as the largest.
        present: ``[n]`` bool.
        key: ``[n]`` independent uniform numbers; the smallest keys are the uniform sample.
        rows: How many in all; at most ``n`` come back in either half.

    Returns:
        Indices of the largest and of the uniform sample, ``[min(rows // 2, n)]`` each. Where fewer
        tokens are present than that, the rest point at tokens that are not.

    Device: the input's; no host synchronisation.
    Cost: O(n log rows).

    Example:
        >>> present = torch.tensor([True, True, False])
        >>> keys = torch.tensor([0.9, 0.1, 0.0])
        >>> select_tokens(torch.tensor([1.0, -3.0, 9.0]), present, keys, 2)
        (tensor([1]), tensor([1]))
    """
    half = min(rows // 2, contribution.shape[0])
    size = torch.where(contribution.isnan(), torch.inf, contribution.abs())
    largest = torch.where(present, size, -1.0).topk(half).indices
    uniform = torch.where(present, key, 2.0).topk(half, largest=False).indices
    return largest, uniform


@diagnostic(
    reads="tokens", every={"fast": 200, "balanced": 50, "full": 5}, floor=1000, metrics=METRICS
)
class TokenTable(Diagnostic):
    """Rows of the tokens table: half the most surprising tokens, half a uniform sample."""

    def measure(self, reading: TokenReading, state: Any) -> tuple[list[Block], Any]:
        """Select the rows of one step."""
        # Rows that stand for more tokens come first in proportion (Efraimidis and Spirakis, 2006).
        key = -torch.expm1(torch.log1p(-reading.key) / reading.weight.clamp(min=1))
        largest, uniform = select_tokens(-reading.logprob, reading.present, key, ROWS)
        index = torch.cat([largest, uniform])
        columns: dict[str, Any] = {
            "present": reading.present[index],
            "sequence": reading.sequence[index],
            "position": reading.position[index],
            "token_id": reading.token_id[index],
            "logprob": reading.logprob[index],
            "entropy": reading.entropy[index],
            "selection": ["largest"] * len(largest) + ["uniform"] * len(uniform),
        }
        if reading.varentropy is not None and reading.distribution_weight is None:
            columns["varentropy"] = reading.varentropy[index]
        if reading.sample_ids is not None:
            columns["sample_id"] = Lookup(reading.sample_ids, columns["sequence"])
        return [Block("tokens", columns)], state
