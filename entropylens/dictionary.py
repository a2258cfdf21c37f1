"""The metric dictionary: what each name in the log means, read without torch.

It is generated from the registered diagnostics into ``dictionary.json`` (``make dictionary``).
"""

import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Final

from entropylens.errors import EntropyLensError, unknown_name

__all__ = ["Definition", "Metric", "definition", "definitions"]

_FILE: Final = Path(__file__).with_name("dictionary.json")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """An entry of the metric dictionary: what one name in the log means."""

    question: str
    """What a person asks when looking at it."""
    formula: str
    """How it is computed, in symbols."""
    unit: str
    """nats, tokens, s, GiB, 1 (a pure number), ..."""
    estimator: str
    """Over what it is taken: which tokens, which weights, sampled or complete."""
    high: str
    """What a high value means in training."""
    low: str
    """What a low value means in training."""
    cost: str
    """Time and memory of one measurement."""
    source: str
    """Paper or definition it follows, and where it deviates."""
    ranks: str = "mean"
    """What the values of several ranks make together: ``mean`` (by weight), ``sum``, ``min``,
    ``max`` or ``root_sum_square``."""


@dataclass(frozen=True, kw_only=True)
class Definition(Metric):
    """A definition as the dictionary holds it."""

    name: str
    """As written in the log, or a pattern: ``*`` stands for any text."""
    diagnostic: str
    """Which diagnostic writes it."""


@cache
def definitions() -> dict[str, Definition]:
    """Every definition by name, in the order of names; read once a process.

    Raises:
        EntropyLensError: The dictionary was not generated, or is damaged.
    """
    try:
        stored = json.loads(_FILE.read_text(encoding="utf-8"))["metrics"]
        return {name: Definition(name=name, **entry) for name, entry in stored.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EntropyLensError(
            f"explain: expected the metric dictionary in {_FILE}, got {type(error).__name__}: "
            f"{error}; run `make dictionary`, or install entropylens again"
        ) from None


def definition(name: str) -> Definition:
    """What a metric name means; of several patterns that match, the longest counts.

    Args:
        name: As written in the log.

    Returns:
        Its definition; ``definition(...).name`` is the pattern where a pattern matched.

    Raises:
        EntropyLensError: No diagnostic writes that name.

    Example:
        >>> definition("entropy/token/mean").unit
        'nats'
        >>> definition("user/reward").name
        'user/*'
    """
    known = definitions()
    if name in known:
        return known[name]
    matches = [pattern for pattern in known if fnmatchcase(name, pattern)]
    if not matches:
        raise EntropyLensError(unknown_name("explain", "metric", name, known))
    return known[max(matches, key=len)]
