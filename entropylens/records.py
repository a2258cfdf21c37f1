"""Row types of the log: table names, Arrow schemas, the format version, metric names.

Every room above reads the log's shape from here. Nothing in this file knows torch.
"""

import re
from enum import StrEnum
from typing import Final

import pyarrow as pa

__all__ = [
    "FORMAT_VERSION",
    "SCHEMAS",
    "Phase",
    "check_metric_name",
]

FORMAT_VERSION: Final = 1
"""Major version of the run directory. A reader refuses a larger one; additions do not raise it."""


class Phase(StrEnum):
    """Which forward pass a row was measured on."""

    TRAIN = "train"
    EVAL = "eval"
    ROLLOUT = "rollout"


_ORIGIN = [
    ("rank", pa.int32()),
    ("attempt", pa.int32()),
    ("phase", pa.string()),
    ("step", pa.int64()),
    ("time", pa.timestamp("us", tz="UTC")),
]
"""Columns that every table opens with: who wrote the row, and when."""


def _schema(*columns: tuple[str, pa.DataType]) -> pa.Schema:
    return pa.schema([*_ORIGIN, *columns])


SCHEMAS: Final[dict[str, pa.Schema]] = {
    "metrics": _schema(
        ("name", pa.string()),
        ("module", pa.string()),
        ("value", pa.float64()),
        ("weight", pa.float64()),
    ),
    "tokens": _schema(
        ("sample_id", pa.string()),
        ("sequence", pa.int32()),
        ("position", pa.int32()),
        ("token_id", pa.int64()),
        ("text", pa.string()),
        ("logprob", pa.float32()),
        ("entropy", pa.float32()),
        ("varentropy", pa.float32()),
        ("advantage", pa.float32()),
        ("covariance", pa.float32()),
        ("predicted_entropy_change", pa.float32()),
        ("selection", pa.string()),
        ("ghost_ratio", pa.float32()),
    ),
    "samples": _schema(
        ("sample_id", pa.string()),
        ("sequence", pa.int32()),
        ("tokens", pa.int64()),
        ("measured_tokens", pa.int64()),
        ("loss", pa.float32()),
        ("entropy", pa.float32()),
        ("selection", pa.string()),
    ),
    "completions": _schema(
        ("sample_id", pa.string()),
        ("group", pa.string()),
        ("prompt", pa.string()),
        ("text", pa.string()),
        ("token_entropies", pa.list_(pa.float32())),
        ("surprisal_gaps", pa.list_(pa.float32())),
        ("advantage", pa.float32()),
        ("reward", pa.float32()),
    ),
    "spectra": _schema(
        ("module", pa.string()),
        ("kind", pa.string()),
        ("values", pa.list_(pa.float32())),
    ),
    "events": _schema(
        ("kind", pa.string()),
        ("rule", pa.string()),
        ("severity", pa.string()),
        ("message", pa.string()),
        ("evidence", pa.string()),
        ("before", pa.float64()),
        ("after", pa.float64()),
        ("mode", pa.string()),
    ),
}
"""Arrow schema of each table. A column is only ever added, nullable, at the end."""

_NAME = re.compile(r"[a-z0-9_]+(/[a-z0-9_]+)+|[a-z0-9_]+")


def check_metric_name(who: str, name: str) -> str:
    """Return ``name`` if it may be written to the log.

    Names are lower snake case, slash-separated, statistic last: ``entropy/token/mean``.

    Args:
        who: What was given the name, for the message.
        name: The candidate.

    Returns:
        ``name``, unchanged.

    Raises:
        ValueError: ``name`` has another form.

    Example:
        >>> check_metric_name("log", "entropy/token/mean")
        'entropy/token/mean'
    """
    if _NAME.fullmatch(name) is None:
        raise ValueError(
            f"{who}: expected a metric name in lower snake case separated by slashes, such as "
            f"'entropy/token/mean', got {name!r}"
        )
    return name
