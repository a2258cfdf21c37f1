"""Which tokens does the policy learn most from, and which way do they push its entropy?"""

from collections.abc import Mapping
from typing import Any, Final

import torch

from entropylens.diagnostics.covariance import natural_gradient_term
from entropylens.diagnostics.token_table import select_tokens
from entropylens.registry import Block, Diagnostic, Lookup, Metric, PolicyReading, diagnostic

__all__ = ["ROWS", "PolicyTokens"]

ROWS: Final = 64
"""Tokens written a measured step: half those of largest covariance, half a uniform sample."""

METRICS: Final[Mapping[str, Metric]] = {}


@diagnostic(
    reads="policy", every={"fast": 200, "balanced": 20, "full": 5}, floor=1000, metrics=METRICS
)
class PolicyTokens(Diagnostic):
    """Rows of the tokens table with the advantage A and the covariance term (log p + H) A.

    Half of them are the tokens of largest absolute covariance (selection ``covariance``), half a
    uniform sample of the tokens that the loss counts (selection ``policy``).
    """

    def measure(self, reading: PolicyReading, state: Any) -> tuple[list[Block], Any]:
        """Select the rows of one step."""
        tokens = reading.tokens
        covariance = natural_gradient_term(tokens.logprob, tokens.entropy, reading.advantage)
        # Rows that stand for more tokens come first in proportion (Efraimidis and Spirakis, 2006).
        key = -torch.expm1(torch.log1p(-tokens.key) / tokens.weight.clamp(min=1))
        largest, uniform = select_tokens(covariance, tokens.present, key, ROWS)
        index = torch.cat([largest, uniform])
        columns: dict[str, Any] = {
            "present": tokens.present[index],
            "sequence": tokens.sequence[index],
            "position": tokens.position[index],
            "token_id": tokens.token_id[index],
            "logprob": tokens.logprob[index],
            "entropy": tokens.entropy[index],
            "advantage": reading.advantage[index].float(),
            "covariance": covariance[index].float(),
            "selection": ["covariance"] * len(largest) + ["policy"] * len(uniform),
        }
        if tokens.sample_ids is not None:
            columns["sample_id"] = Lookup(tokens.sample_ids, columns["sequence"])
        return [Block("tokens", columns)], state
