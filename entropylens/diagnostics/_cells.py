"""Names of the sign cells of advantage and entropy discriminator, known without torch."""

from collections.abc import Mapping
from typing import Final

__all__ = ["CELLS"]

CELLS: Final[Mapping[str, tuple[str, str]]] = {
    "positive_above": ("A > 0 and S > N", "lowers"),
    "positive_below": ("A > 0 and S < N", "raises"),
    "negative_above": ("A < 0 and S > N", "raises"),
    "negative_below": ("A < 0 and S < N", "lowers"),
}
"""Where a token falls, and what learning from it does to the entropy, in the order of
`entropy_discriminator.sign_cells`."""
