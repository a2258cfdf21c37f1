"""How many directions do a layer's states use, how evenly, and how large are they?"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.diagnostics._state_ranks import (
    FEWEST,
    FIRST,
    LAST,
    alpha_req,
    effective_rank,
    mean_cosine,
    numerical_rank,
    participation_ratio,
    rankme,
    singular_values,
    stable_rank,
    state_norm,
)
from entropylens.diagnostics._summaries import ROUNDING, wide_dtype
from entropylens.registry import Block, Diagnostic, Metric, RepresentationReading, diagnostic

__all__ = ["RepresentationRank"]

_COARSE: Final = 1e-3
_FLOAT32: Final = torch.finfo(torch.float32).eps

_PROBE = (
    "exact for the N rows of the probe set, which stay the same all run: between probe sets of "
    "different N it does not compare. Module is the layer. Singular values from the Gram matrix "
    "of the smaller side in float64, 0 where they are below rounding, about 1e-7 of the root sum "
    "of squares. Absent where a state is not finite"
)
_CENTRED = f"{_PROBE}, or where rows differ by less than 1e-6 of their size"
_COST = "two products of N x D by its transpose and three eigenvalue problems of size min(N, D)"


def _metric(question: str, formula: str, high: str, low: str, **other: str) -> Metric:
    fixed = {"unit": "1", "estimator": _CENTRED, "cost": _COST}
    return Metric(question=question, formula=formula, high=high, low=low, **{**fixed, **other})


_MANY: Final = "states spread evenly over many directions; noise does so too"
_FEW: Final = "few directions carry the states: collapse, or a layer that has sorted its classes"
METRICS: Final[Mapping[str, Metric]] = {
    "representation/rankme": _metric(
        "Over how many directions, their mean among them, do a layer's states spread?",
        "exp(-sum_k p_k log p_k), p_k = s_k / sum s + 1e-7, s = singular values of the states as "
        "they are, not centred",
        _MANY,
        f"{_FEW}; or a mean that is large beside what differs between rows",
        estimator=_PROBE,
        source="Garrido et al. (2023), RankMe, arXiv 2210.02885, Eq. 1. The rankme of the package "
        "reptrix takes eigenvalues of the covariance for the singular values, which is not it",
    ),
    "representation/effective_rank": _metric(
        "Over how many directions do a layer's states differ from each other?",
        "exp(-sum_k p_k log p_k), p = s / sum s, s = singular values of the states less their mean",
        _MANY,
        _FEW,
        source="Roy and Vetterli (2007), The effective rank; here of the centred states",
    ),
    "representation/participation_ratio": _metric(
        "How many directions share most of the variance of a layer's states?",
        "(sum l)^2 / sum l^2, l = eigenvalues of the covariance of the states",
        _MANY,
        _FEW,
        source="Gao et al. (2017), A theory of multineuronal dimensionality, bioRxiv 214262",
    ),
    "representation/stable_rank": _metric(
        "How many directions as large as the largest would hold all of the variance?",
        "sum l / max l, l = eigenvalues of the covariance of the states",
        _MANY,
        "one direction dominates, an outlier dimension for instance",
        source="Rudelson and Vershynin (2007), of the centred states",
    ),
    "representation/alpha_req": _metric(
        "How fast does the spectrum of a layer's states decay?",
        "-slope of log l_n on log n by least squares with weights 1/n, l_n = n-th largest "
        f"eigenvalue of the covariance, over ranks n = {FIRST}..{LAST} that are above rounding",
        "a steep spectrum: few directions; above 1 states vary smoothly with the inputs",
        "a flat spectrum: noise, or fine detail kept; about 1 went with good transfer in the paper",
        estimator=f"{_CENTRED}, or where fewer than {FEWEST} ranks are left. The rounding of a "
        "bfloat16 model, 4e-3 of each number, flattens the tail",
        source="Agrawal et al. (2022), alpha-ReQ; ranks and weights as in Stringer et al. (2019) "
        "and the package reptrix, whose default ranks move up by one at every call: it adds 1 in "
        "place to its default argument",
    ),
    "representation/numerical_rank": _metric(
        "How many dimensions can an affine map of a layer's states tell from rounding?",
        "#{k: s_k > t s_1}, t = max(N, D) * 1.2e-7, s = singular values of [A, c 1]: the states "
        "and a constant column as large as their root mean square",
        "every direction is in use, by however little",
        "the layer is degenerate: rows or units repeat, or depend on each other linearly",
        estimator=_PROBE,
        source="Numerical rank, as the dimension that NSdim (Liu et al. 2024, arXiv 2409.16697) "
        "asks for; the paper's own definition was not available",
    ),
    "representation/numerical_rank_coarse": _metric(
        "How many dimensions of a layer's states are above a thousandth of the largest?",
        "#{k: s_k > 1e-3 s_1}, s as in representation/numerical_rank",
        "many directions are in use beyond doubt",
        "the layer lives in few dimensions, whatever its width",
        estimator=_PROBE,
        source="As representation/numerical_rank, with a tolerance of 1e-3",
    ),
    "representation/norm": _metric(
        "How large are a layer's states?",
        "sqrt(mean over rows of ||x||_2^2)",
        "states grow: measures with a fixed bandwidth, diffusion spectral entropy as released "
        "among them, rise by that alone",
        "states shrink, or die",
        unit="units of the states",
        estimator="exact for the rows of the probe set; module is the layer",
        cost="one read of the states",
        source="Definition",
    ),
    "representation/mean_cosine": _metric(
        "Do all of a layer's states point the same way?",
        "mean cosine of two different rows = (||sum_i u_i||^2 - m) / (m (m - 1)), u_i = x_i / "
        "||x_i||, m rows that are not 0",
        "near 1, one common direction drowns what differs between rows (anisotropy)",
        "near 0, directions are balanced; below 0, rows oppose each other",
        estimator="exact over all pairs of rows of the probe set; module is the layer; absent "
        "where a state is not finite or fewer than two rows are not 0",
        cost="one read of the states",
        source="Ethayarajh (2019), arXiv 1909.00512, over all pairs",
    ),
}


@diagnostic(
    reads="representation",
    every={"fast": 0, "balanced": 20, "full": 5},
    floor=200,
    metrics=METRICS,
)
class RepresentationRank(Diagnostic):
    """Ranks, spectral decay, size and anisotropy of each layer's states."""

    def measure(self, reading: RepresentationReading, state: Any) -> tuple[list[Block], Any]:
        """Measure the states of one probe, layer by layer."""
        return [_layer(name, states) for name, states in reading.states.items()], state


def _layer(name: str, states: Tensor) -> Block:
    wide = states.to(wide_dtype(states))
    squares = wide.square().sum()
    constant = (squares / wide.numel()).sqrt().expand(len(wide), 1)
    centred = wide - wide.mean(0)
    varies = centred.square().sum() > ROUNDING**2 * squares
    spread = torch.where(varies, singular_values(centred, squares), torch.nan)
    affine = singular_values(torch.cat([wide, constant], 1))
    values = {
        "representation/rankme": rankme(singular_values(wide)),
        "representation/effective_rank": effective_rank(spread),
        "representation/participation_ratio": participation_ratio(spread),
        "representation/stable_rank": stable_rank(spread),
        "representation/alpha_req": alpha_req(spread),
        "representation/numerical_rank": numerical_rank(affine, max(states.shape) * _FLOAT32),
        "representation/numerical_rank_coarse": numerical_rank(affine, _COARSE),
        "representation/norm": state_norm(wide),
        "representation/mean_cosine": mean_cosine(wide),
    }
    found = torch.stack(list(values.values())).float()
    weight = torch.where(found.isfinite(), float(len(states)), 0.0)
    return Block.metrics(list(values), found, weight=weight, modules=name)
