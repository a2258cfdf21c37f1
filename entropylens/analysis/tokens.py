"""Which tokens changed, and which samples stood out?"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

__all__ = ["TokenChange", "changed_tokens", "worst_samples"]


@dataclass(frozen=True)
class TokenChange:
    """How a token's mean surprisal differs between two stretches of steps."""

    token_id: int
    text: str | None
    before: float
    """Mean of -log p before, nats."""
    after: float
    """Mean of -log p after, nats."""
    counts: tuple[int, int]
    """Observations behind each."""
    error: float
    """Standard error of the difference."""

    @property
    def change(self) -> float:
        """After less before."""
        return self.after - self.before


def changed_tokens(
    rows: pd.DataFrame,
    before: tuple[int, int],
    after: tuple[int, int],
    *,
    least: int = 5,
    most: int = 12,
) -> list[TokenChange]:
    """Which tokens did the model come to find more, or less, surprising?

    Means of ``-log p`` over the uniform sample of the tokens table (rows selected for being extreme
    would answer another question), by token, in two ranges of steps; the standard error is Welch's.

    Args:
        rows: The tokens table.
        before: First and last step.
        after: First and last step.
        least: Observations on either side below which a token is left out.
        most: Tokens returned.

    Returns:
        Tokens by size of their change, the largest first; those within two standard errors of no
        change are left out.
    """
    uniform = rows[(rows["selection"] == "uniform") & (rows["phase"] == "train")]
    uniform = uniform.assign(surprisal=-uniform["logprob"].astype("float64"))
    uniform = uniform[np.isfinite(uniform["surprisal"])]
    one, other = (_by_token(uniform, steps) for steps in (before, after))
    joined = one.add_suffix("_before").join(other.add_suffix("_after"), how="inner")
    kept = joined[(joined["count_before"] >= least) & (joined["count_after"] >= least)]
    texts = uniform.dropna(subset="text").drop_duplicates("token_id").set_index("token_id")["text"]
    found = [_change(int(str(token)), row, texts) for token, row in kept.iterrows()]
    found = [change for change in found if abs(change.change) > 2 * change.error]
    return sorted(found, key=lambda change: -abs(change.change))[:most]


def worst_samples(
    rows: pd.DataFrame, steps: tuple[int, int], most: int = 8
) -> list[dict[str, Any]]:
    """Which samples had the highest loss in a range of steps?

    Args:
        rows: The samples table.
        steps: First and last step.
        most: Samples returned.

    Returns:
        Rows of the table selected as highest-loss, the highest first.
    """
    inside = rows[rows["step"].between(*steps) & (rows["selection"] == "highest_loss")]
    inside = inside.assign(order=inside["loss"].astype("float64").fillna(np.inf))
    columns = ["step", "sample_id", "sequence", "loss", "entropy", "tokens", "measured_tokens"]
    found = inside.nlargest(most, "order")[columns].to_dict("records")
    for row in found:
        # pandas has NaN, which is true, for a name that is not there.
        row["sample_id"] = row["sample_id"] if isinstance(row["sample_id"], str) else None
    return [{str(name): value for name, value in row.items()} for row in found]


def _by_token(rows: pd.DataFrame, steps: tuple[int, int]) -> pd.DataFrame:
    inside = rows[rows["step"].between(*steps)]
    return inside.groupby("token_id")["surprisal"].agg(["mean", "var", "count"])


def _change(token: int, row: "pd.Series[float]", texts: "pd.Series[str]") -> TokenChange:
    counts = int(row["count_before"]), int(row["count_after"])
    error = np.sqrt(row["var_before"] / counts[0] + row["var_after"] / counts[1])
    return TokenChange(
        token, texts.get(token), row["mean_before"], row["mean_after"], counts, float(error)
    )
