"""How evenly does each weight matrix treat the directions that pass through it?"""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from entropylens.diagnostics._spectra import (
    effective_shape,
    marchenko_pastur,
    null_entropy_deficit,
    null_kappa,
    singular_values,
    summarise,
)
from entropylens.registry import Block, Diagnostic, Lists, Metric, WeightReading, diagnostic

__all__ = ["WeightSpectrum", "chosen_ranks"]

_LISTED: Final = 256
"""Singular values of one matrix that are written to the log."""
_EXACT: Final = (
    "exact singular values, to 1e-6 of the smallest, in float64; module is the matrix, shown in "
    "its turn; absent where an entry is NaN or infinite"
)
_ROUNDED: Final = (
    _EXACT + ", and where rounding of the stored entries may have moved sigma_min by more than 10 %"
)
_VOLUME: Final = (
    _EXACT + ", and where rounding of the stored entries may have moved it by more than 0.01 nats "
    "for each direction, as for a matrix of lower rank"
)
_BULK: Final = (
    _EXACT + ", and where fewer than 8 singular values are left, or than half of the smaller side"
)
_COST: Final = "O(m n min(m, n)) for the matrix shown: 22 ms for 576 x 1536 on one core"
_KAPPA: Final = "Golub and Van Loan; Ludwig (2025), KappaTune, arXiv 2506.16289"
_LAW: Final = "Marchenko and Pastur (1967); Johnstone (2001)"


def _metric(question: str, formula: str, high: str, low: str, **other: str) -> Metric:
    fixed = {"unit": "1", "estimator": _EXACT, "cost": _COST, "source": _KAPPA}
    return Metric(question=question, formula=formula, high=high, low=low, **{**fixed, **other})


_UNEVEN: Final = "some directions are almost lost; a shape near square has it so from the start"
_EVEN: Final = "all directions pass alike; 1 for an orthogonal matrix"
METRICS: Final[Mapping[str, Metric]] = {
    "conditioning/kappa": _metric(
        "How unevenly does a matrix stretch its directions, at worst?",
        "kappa = sigma_max / sigma_min of the min(m, n) singular values",
        _UNEVEN,
        _EVEN,
        estimator=_ROUNDED + ": then conditioning/kappa_floor is there",
    ),
    "conditioning/kappa_floor": _metric(
        "What is the condition number at least, where storage hides it?",
        "sigma_max / (sigma_min + two standard deviations of what rounding moves it by)",
        "the smallest direction is below what the stored precision can tell from 0",
        "rounding hides even a modest condition number: a coarse dtype",
        estimator=_EXACT
        + "; only where conditioning/kappa is not known; the rounding is estimated from the "
        "stored dtype, the size of the entries and the lowest singular values",
    ),
    "conditioning/kappa_to_null": _metric(
        "How much worse conditioned is a matrix than random ones of its shape?",
        "kappa / exp(E log kappa of a Gaussian matrix of that shape)",
        "training made it uneven, whatever its shape",
        "more even than chance: an orthogonal start, or one that training evened out",
        estimator=_ROUNDED + "; a square random matrix is itself off by a factor of e or so",
        source=f"{_KAPPA}; Edelman (1988)",
    ),
    "conditioning/kappa_floor_to_null": _metric(
        "How much worse conditioned than random is a matrix at least, where storage hides it?",
        "conditioning/kappa_floor / exp(E log kappa of a Gaussian matrix of that shape)",
        "far worse conditioned than by chance: a direction is lost in the stored precision",
        "1 or less: as far as can be told, no worse than chance",
        estimator=_EXACT + "; only where conditioning/kappa_to_null is not known for rounding",
        source=f"{_KAPPA}; Edelman (1988)",
    ),
    "conditioning/sigma_max": _metric(
        "By how much does a matrix stretch at most?",
        "largest singular value",
        "activations and gradients can grow: spectral growth before an instability",
        "a weak layer, or strong weight decay",
        unit="that of the weights",
    ),
    "conditioning/sigma_min": _metric(
        "By how much does a matrix stretch at least?",
        "smallest of the min(m, n) singular values",
        "no direction is lost",
        "a direction is nearly lost",
        unit="that of the weights",
        estimator=_ROUNDED,
    ),
    "conditioning/stable_rank": _metric(
        "Over how many directions does a matrix spread its energy?",
        "||W||_F^2 / sigma_max^2, 1 .. min(m, n)",
        "no direction dominates",
        "a few directions dominate: a strong signal, or spikes",
        source="Rudelson and Vershynin (2007)",
    ),
    "conditioning/effective_rank": _metric(
        "How many directions does a matrix effectively have?",
        "exp(-sum_i p_i ln p_i), p_i = sigma_i / sum_j sigma_j, 1 .. min(m, n)",
        "close to min(m, n): all directions count",
        "effectively of low rank: collapse, or compression",
        source="Roy and Vetterli (2007), The effective rank",
    ),
    "conditioning/log_volume": _metric(
        "How much entropy does a Gaussian input gain in a matrix?",
        "sum_i ln sigma_i = h(W x) - h(x) in the directions that are kept",
        "expands volumes",
        "contracts volumes: small weights, or lost directions",
        unit="nats",
        estimator=_VOLUME,
    ),
    "conditioning/entropy_deficit": _metric(
        "How much entropy does a matrix lose by treating directions unevenly?",
        "(k/2) ln(||W||_F^2 / k) - sum_i ln sigma_i, k = min(m, n); at least "
        "ln((kappa + 1/kappa) / 2)",
        "uneven over the whole spectrum, not at its ends alone",
        "even; 0 where all singular values are equal",
        unit="nats",
        estimator=_VOLUME,
        source="derived from the claim of KappaTune, arXiv 2506.16289",
    ),
    "conditioning/entropy_deficit_to_null": _metric(
        "How much more entropy does a matrix lose than random ones of its shape?",
        "entropy deficit - its exact expectation for a Gaussian matrix of that shape",
        "training made the spectrum uneven",
        "0: as a fresh Gaussian; below, more even than one",
        unit="nats",
        estimator=_VOLUME,
        source="derived from arXiv 2506.16289; expectation of a Wishart log-determinant",
    ),
    "conditioning/outliers": _metric(
        "How many directions stand out of the noise?",
        "eigenvalues sigma^2 / max(m, n) above mu + 2.02 s, the 99 % point of Tracy and Widom's "
        "law for independent entries of the variance that the others have; rows and columns of "
        "zeros and singular values that rounding alone makes are left out",
        "directions that were learned, or entries with heavy tails: compare permuted entries",
        "0: spectrally as at a random start",
        estimator=_BULK,
        source=_LAW,
    ),
    "conditioning/marchenko_pastur_distance": _metric(
        "How far is a matrix's spectrum from that of independent entries?",
        "sup |F - F_MP| over the eigenvalues of conditioning/outliers, F_MP with the variance that "
        "they have without outliers, 0 .. 1",
        "structure all over the spectrum: training, or another start than a random one",
        "as independent entries; chance makes about 2 / min(m, n)",
        estimator=_BULK,
        source=_LAW,
    ),
    "conditioning/kappa_max": _metric(
        "How badly conditioned is the worst matrix of the model?",
        "largest kappa, or its floor where it is not known, over matrices as each was last seen",
        _UNEVEN,
        "every matrix is well conditioned",
        estimator=_EXACT + "; from the first time that all have been seen; values are up to one "
        "turn old, and that of a matrix which the model "
        "no longer has stays until the run ends; module is empty",
        ranks="max",
    ),
}
_ALWAYS: Final = (
    "conditioning/sigma_max",
    "conditioning/stable_rank",
    "conditioning/effective_rank",
    "conditioning/outliers",
    "conditioning/marchenko_pastur_distance",
)


_LAW_OF_CHANCE: Final = ("conditioning/outliers", "conditioning/marchenko_pastur_distance")


def chosen_ranks(count: int, device: torch.device | str) -> Tensor:
    """Which singular values are written to the log?

    All, or 256 at evenly spaced ranks that include both ends.

    Args:
        count: How many there are.
        device: Where the ranks are made.

    Returns:
        ``[min(count, 256)]`` long, rising from 0 to ``count - 1``.

    Device: as asked; no host synchronisation.
    Cost: O(1).

    Example:
        >>> chosen_ranks(1000, "cpu")[[0, 1, -1]]
        tensor([  0,   4, 999])
    """
    kept = min(count, _LISTED)
    ranks = torch.arange(kept, device=device)
    return ranks if kept == count else (2 * ranks * (count - 1) + kept - 1) // (2 * (kept - 1))


@diagnostic(
    reads="weight",
    every={"fast": 0, "balanced": 20, "full": 5},
    floor=200,
    metrics=METRICS,
)
class WeightSpectrum(Diagnostic):
    """Singular values of the matrix that is shown, and what they would be by chance."""

    def initial_state(self) -> dict[str, Tensor]:
        """No matrix was seen yet."""
        return {}

    def measure(
        self, reading: WeightReading, state: dict[str, Tensor]
    ) -> tuple[list[Block], dict[str, Tensor]]:
        """Measure one matrix; the state is the kappa of each as it was last seen."""
        rows, columns = reading.matrix.shape
        shape = (rows, columns)
        singular = singular_values(reading.matrix)
        rank = _rank_below(reading.rank, min(shape))
        found = summarise(singular, shape, reading.stored, rank=rank)
        law = marchenko_pastur(singular, effective_shape(reading.matrix), reading.stored)
        is_finite = singular[0].isfinite()
        is_known, is_volume_known = found.is_kappa_known, found.is_volume_known
        worst = torch.where(is_known, found.kappa, found.kappa_floor)
        # A product of thin factors is of low rank from the start: chance says nothing of it, and
        # the worst matrix is one that the model multiplies with.
        is_whole = torch.full_like(is_known, rank is None)
        if rank is None:
            state = {**state, reading.name: worst}
        by_chance = null_kappa(*shape)
        measured: dict[str, tuple[Tensor, Tensor]] = {
            "conditioning/kappa": (found.kappa, is_known),
            "conditioning/kappa_floor": (found.kappa_floor, ~is_known),
            "conditioning/kappa_to_null": (found.kappa / by_chance, is_known & is_whole),
            "conditioning/kappa_floor_to_null": (
                found.kappa_floor / by_chance,
                ~is_known & is_whole,
            ),
            "conditioning/sigma_min": (found.sigma_min, is_known),
            "conditioning/log_volume": (found.log_volume, is_volume_known),
            "conditioning/entropy_deficit": (found.entropy_deficit, is_volume_known),
            "conditioning/entropy_deficit_to_null": (
                found.entropy_deficit - null_entropy_deficit(*shape),
                is_volume_known & is_whole,
            ),
        }
        always = (
            found.sigma_max,
            found.stable_rank,
            found.effective_rank,
            law.outliers,
            law.distance,
        )
        measured |= {name: (value, is_finite) for name, value in zip(_ALWAYS, always, strict=True)}
        for name in _LAW_OF_CHANCE:
            measured[name] = (measured[name][0], is_finite & is_whole)
        values, weights = (torch.stack(part) for part in zip(*measured.values(), strict=True))
        listed = singular[chosen_ranks(len(singular), singular.device)].float()[None]
        return [
            Block.metrics(
                list(measured),
                values,
                weight=(weights & is_finite & values.isfinite()).float(),
                modules=reading.name,
            ),
            *([_largest(state, singular.device)] if len(state) >= max(reading.matrices, 1) else []),
            Block(
                "spectra",
                {
                    "module": reading.name,
                    "kind": "singular_values",
                    "values": Lists(listed, torch.ones_like(listed, dtype=torch.bool)),
                    "present": is_finite[None],
                },
            ),
        ], state


def _rank_below(rank: int | None, full: int) -> int | None:
    """None where the shape allows no more: then it is a matrix as any other."""
    return None if rank is None or rank >= full else rank


def _largest(kappas: Mapping[str, Tensor], device: torch.device) -> Block:
    known = torch.stack([kappa.to(device) for kappa in kappas.values()]).nan_to_num(nan=0.0)
    largest = known.amax(0, keepdim=True)
    return Block.metrics(["conditioning/kappa_max"], largest, weight=(largest > 0).float())
