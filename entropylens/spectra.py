"""What the singular values of every matrix of a checkpoint say, beside what chance would make."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf, isnan
from typing import Any, Final

from torch import Tensor

from entropylens.capture.matrices import Matrix
from entropylens.checkpoints import Checkpoint
from entropylens.diagnostics._spectra import (
    effective_shape,
    marchenko_pastur,
    null_entropy_deficit,
    null_kappa,
    permuted,
    singular_values,
    summarise,
)
from entropylens.store.filters import split_patterns

__all__ = ["SORTS", "in_brief", "in_order", "spectra_of", "spectrum"]

SORTS: Final[Mapping[str, str]] = {
    "deficit": "entropy_deficit_to_null",
    "kappa-to-null": "kappa_to_null",
    "kappa": "kappa",
    "name": "name",
}
_SEED: Final = 0


def spectra_of(
    checkpoint: Checkpoint,
    only: Sequence[str] = (),
    *,
    with_permuted: bool = False,
    track: Callable[[Sequence[list[str]]], Iterator[list[str]]] = iter,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """What do the singular values of each matrix of a checkpoint say?

    Args:
        checkpoint: From `entropylens.checkpoints.open_checkpoint`.
        only: Names of matrices, or patterns with ``*`` and ``?``; none is all.
        with_permuted: Whether each is measured again with its entries in random places.
        track: Goes over groups of tensors, and may show how far it is.

    Returns:
        A `spectrum` of each matrix, in the checkpoint's order, and why others have none, by name.

    Cost: the singular values of every matrix; one of them is in memory at a time.
    """
    names, patterns = split_patterns(only)
    wanted = re.compile("|".join([*(f"^{re.escape(name)}$" for name in names), *patterns]))
    rows: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    for group in track(checkpoint.groups()):
        found = checkpoint.matrices(group)
        refused |= {name: why for name, why in found.refused.items() if wanted.match(name)}
        for matrix in (one for one in found.matrices if wanted.match(one.name)):
            is_scaled = matrix.rank is None or checkpoint.adapter is not None
            row = spectrum(matrix, is_scaled=is_scaled, with_permuted=with_permuted)
            if row is None:
                refused[matrix.name] = "it holds NaN or infinity, or only zeros"
            else:
                rows.append(row)
    return rows, refused


def spectrum(
    matrix: Matrix, *, is_scaled: bool = True, with_permuted: bool = False
) -> dict[str, Any] | None:
    """What do the singular values of a matrix say, and what would chance make of its shape?

    The quantities of `entropylens.diagnostics.weight_spectrum`, by the names that they have there.

    Args:
        matrix: Of a model or a checkpoint.
        is_scaled: Whether its scale is known; a LoRA product without its adapter's settings has
            none.
        with_permuted: Whether to measure it again with its entries in random places: that null
            keeps the entries themselves, a Gaussian one does not.

    Returns:
        Numbers by name. None is what is not known: ``kappa``, ``kappa_to_null`` and ``sigma_min``
        where rounding of what is stored hides the smallest singular value (``kappa_floor`` is then
        what kappa is at least), volume and deficit where it hides those or one is 0, what compares
        with chance for a product of thin factors, and whatever is not a number. None where an entry
        is not finite or all are 0.
    """
    value = matrix.read()
    singular = singular_values(value)
    if not singular[0] > 0:
        return None
    of = summarise(singular, matrix.shape, matrix.stored, rank=matrix.rank)
    law = marchenko_pastur(singular, effective_shape(value), matrix.stored)
    kappa = _number(of.kappa, of.is_kappa_known)
    deficit = _number(of.entropy_deficit, of.is_volume_known)
    has_null = matrix.rank is None
    chance_kappa = null_kappa(*matrix.shape) if has_null else None
    chance_deficit = null_entropy_deficit(*matrix.shape) if has_null else None
    row = {
        "name": matrix.name,
        "rows": matrix.shape[0],
        "columns": matrix.shape[1],
        "stored": str(matrix.stored).removeprefix("torch."),
        "entropy_deficit_to_null": _less(deficit, chance_deficit),
        "kappa_to_null": kappa / chance_kappa if kappa and chance_kappa else None,
        "kappa": kappa,
        "kappa_floor": _number(of.kappa_floor, ~of.is_kappa_known),
        "null_kappa": chance_kappa,
        "sigma_max": _number(of.sigma_max, is_scaled),
        "sigma_min": _number(of.sigma_min, of.is_kappa_known & is_scaled),
        "stable_rank": _number(of.stable_rank),
        "effective_rank": _number(of.effective_rank),
        "full_rank": matrix.rank or min(matrix.shape),
        "entropy_deficit": deficit,
        "log_volume": _number(of.log_volume, of.is_volume_known & is_scaled),
        "outliers": _count(law.outliers, has_null),
        "marchenko_pastur_distance": _number(law.distance, has_null),
    }
    if with_permuted:
        row |= _by_chance(matrix, value, singular, chance_deficit)
    return row


def _by_chance(
    matrix: Matrix, value: Tensor, singular: Tensor, chance_deficit: float | None
) -> dict[str, Any]:
    """The same of its entries in random places; nothing for a product, which has fewer of them."""
    mixed = singular_values(permuted(value, _SEED))
    of = summarise(mixed, matrix.shape, matrix.stored)
    found = {
        "permuted_deficit_to_null": _less(
            _number(of.entropy_deficit, of.is_volume_known), chance_deficit
        ),
        "permuted_kappa": _number(of.kappa, of.is_kappa_known),
        "permuted_sigma_max": _number(of.sigma_max),
        "above_permuted": int((singular > mixed[0]).sum()),
    }
    return found if matrix.rank is None else dict.fromkeys(found)


def _number(value: Any, is_known: Any = True) -> float | None:
    """None is what is not known, and what is not a number."""
    return float(value) if is_known and not isnan(value) else None


def _count(value: Any, is_known: bool) -> int | None:
    found = _number(value, is_known)
    return None if found is None else int(found)


def _less(value: float | None, chance: float | None) -> float | None:
    return None if value is None or chance is None else value - chance


def in_order(rows: Sequence[Mapping[str, Any]], sort: str) -> list[Mapping[str, Any]]:
    """Rows with the worst first; by ``name``, in the names' order.

    Where a condition number is only known to be above its floor the floor counts, and where the
    deficit is hidden, as in a matrix of lower rank, it is above all that are known. What has no
    such number comes last.

    Args:
        rows: From `spectra_of`.
        sort: A key of `SORTS`.
    """
    if sort == "name":
        return sorted(rows, key=lambda row: str(row["name"]))
    return sorted(rows, key=lambda row: (-_badness(row, SORTS[sort]), row["name"]))


def _badness(row: Mapping[str, Any], column: str) -> float:
    if row[column] is not None:
        return float(row[column])
    has_null = row["null_kappa"] is not None
    if column == "entropy_deficit_to_null":
        return inf if has_null else -inf
    floor = _floor_to_null(row) if column == "kappa_to_null" else row["kappa_floor"]
    return -inf if floor is None else float(floor)


def _floor_to_null(row: Mapping[str, Any]) -> float | None:
    if row["kappa_floor"] is None or row["null_kappa"] is None:
        return None
    return float(row["kappa_floor"] / row["null_kappa"])


def in_brief(row: Mapping[str, Any]) -> dict[str, Any]:
    """The cells of a table for a terminal; ``>`` before what is only known to be more."""
    from entropylens.figures.terminal import short

    cells = {
        "matrix": row["name"],
        "deficit": row["entropy_deficit_to_null"],
        "kappa/null": row["kappa_to_null"],
        "kappa": row["kappa"],
        "sigma max": row["sigma_max"],
        "stable": row["stable_rank"],
        "rank": f"{short(row['effective_rank'])}/{row['full_rank']}",
        "outliers": row["outliers"],
        "shape": f"{row['rows']}x{row['columns']}",
    }
    if row["kappa_floor"] is not None:
        at_least = {"kappa/null": _floor_to_null(row), "kappa": row["kappa_floor"]}
        cells |= {column: f">{short(one)}" for column, one in at_least.items() if one is not None}
    if "permuted_kappa" in row:
        cells["permuted deficit"] = row["permuted_deficit_to_null"]
        cells["permuted kappa"] = row["permuted_kappa"]
        cells["above permuted"] = row["above_permuted"]
    return cells
