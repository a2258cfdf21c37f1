"""One metric of a run by step and rank."""

import warnings
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

__all__ = ["TO_DEVIATION", "Flags", "Floats", "Grid", "deviation_of", "median_of"]

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
TO_DEVIATION: Final = 1.4826
"""From a median absolute deviation to the standard deviation of a normal variable."""


@dataclass(frozen=True)
class Grid:
    """One metric by step and rank."""

    steps: NDArray[np.int64]
    ranks: tuple[int, ...]
    values: Floats
    """``[steps, ranks]``, NaN also where a rank did not tell."""
    told: Flags

    @classmethod
    def of(cls, rows: pd.DataFrame) -> "Grid":
        """Of rows of the metrics table."""
        steps, at = np.unique(rows["step"].to_numpy(np.int64), return_inverse=True)
        ranks, of = np.unique(rows["rank"].to_numpy(np.int64), return_inverse=True)
        values = np.full((len(steps), len(ranks)), np.nan)
        told = np.zeros(values.shape, dtype=bool)
        values[at, of], told[at, of] = rows["value"].to_numpy(np.float64), True
        return cls(steps, tuple(int(rank) for rank in ranks), values, told)


def deviation_of(values: Floats) -> float:
    """Median absolute deviation."""
    return float(np.median(np.abs(values - np.median(values)))) if len(values) else 0.0


def median_of(values: Floats, axis: int) -> Floats:
    """Of what is a number; NaN, and no word, where nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(np.nanmedian(values, axis))
