"""Along how many directions do the hidden states of a layer spread, and what do they tell?"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.diagnostics._diffusion import (
    RELEASED_BANDWIDTH,
    affinity_health,
    affinity_information,
    median_bandwidth,
    renyi_diffusion_entropy,
    spectral_entropy,
    squared_distances,
    symmetric_diffusion,
)
from entropylens.diagnostics._diffusion_estimate import estimated_diffusion_entropy
from entropylens.registry import Block, Diagnostic, Metric, RepresentationReading, diagnostic

__all__ = ["DiffusionEntropy"]

_FEWEST: Final = 3
"""Rows below which no pair of points has a scale to be compared with."""
_MOST: Final = 4000
"""Rows above which not all eigenvalues are found, and that many make the bandwidth."""
_ROWS: Final = (
    "module is the layer. Absent where a state is not finite or there are fewer than 3 rows"
)
_GROWS: Final = (
    "It grows with N (by about .1 bits for twice as many), so compare runs of the same N only; "
    "another draw of 512 rows moves it by .003 (Gaussian) to .024 bits (features of a network)"
)
_ALL: Final = "exact in float64 for the N rows of the probe set, all eigenvalues; "
_EXACT: Final = f"{_ALL}absent where N is above 4,000; {_ROWS}. {_GROWS}"
_ESTIMATED: Final = (
    f"{_ALL}where N is above 4,000 estimated by stochastic Lanczos quadrature, within "
    f"representation/dse_standard_error; {_ROWS}. {_GROWS}"
)
_MEDIAN: Final = (
    "s = median distance between two rows that differ, so that the scale of activations does not "
    "matter and rows that are one point do not make it 0"
)
_SPREAD: Final = (
    "p_i = lambda_i / sum lambda, lambda the eigenvalues of D^-1 G, G_ij = exp(-|x_i - x_j|^2 / "
    "(2 s^2)), D its row sums"
)
_COST: Final = (
    "O(N^2 D + N^3) for each layer and variant; for N = 512, D = 256 about .3 s of processor time "
    "for 4 layers: 11 ms an eigenvalue problem, of which each layer has 2 and the last one 4, and "
    "15 ms for each mutual information; where N is above 4,000, O(40 N^2 (D + 24)) for each layer"
)
_LIAO: Final = "Liao et al. (2023), arXiv 2312.04823"
_RICH: Final = "states spread over many directions; near log2 N see dse_is_saturated"
_POOR: Final = "states lie along few directions or in few tight clusters; 0 is a collapse"


def _metric(question: str, formula: str, high: str, low: str, **other: str) -> Metric:
    fixed = {"unit": "bits", "estimator": _EXACT, "cost": _COST, "source": _LIAO}
    return Metric(question=question, formula=formula, high=high, low=low, **{**fixed, **other})


def _corrected(power: str) -> Metric:
    return _metric(
        "Along how many directions do a layer's states spread, whatever their density?",
        f"as representation/dse, with G divided by (D_i D_j)^a first, a = {power}",
        _RICH,
        _POOR,
        estimator=f"{_EXACT}. Of the last layer only",
        source=f"{_LIAO}; Coifman and Lafon (2006). The paper says a = 1/2; its released code has "
        "a = 0, as representation/dse",
    )


def _information(about: str, high: str, low: str) -> Metric:
    return _metric(
        f"How many bits do a layer's states hold of {about}?",
        "sum_c (n_c / N) (mean DSE of random subsets of n_c rows - DSE of class c), s of the whole",
        high,
        low,
        estimator="5 subsets for each class, the same ones at every measurement; classes that tell "
        "nothing give 0 +- .015 (N = 400, 2 to 10 classes), sometimes below 0. Absent where they "
        "are not known, where there is one class alone, where one of them has a single row, as "
        "tokens have, where N is above 4,000 and where a state is not finite",
    )


def _saturated(name: str) -> Metric:
    return _metric(
        f"Is representation/{name} stuck at its end, log2 N?",
        "1 where the median of G_ii / sum_j G_ij is above 1/2, else 0",
        f"do not believe representation/{name}: each row sees only itself, and the number is log2 "
        "of the rows",
        "it follows the states",
        unit="1",
        source="Biroli and Mezard (2024), arXiv 2408.05807: regimes of a kernel in many dimensions",
    )


METRICS: Final[Mapping[str, Metric]] = {
    "representation/dse": _metric(
        "Along how many directions, in bits, do a layer's states spread?",
        f"DSE = -sum_i p_i log2 p_i, {_SPREAD}; {_MEDIAN}",
        _RICH,
        _POOR,
        estimator=f"{_ESTIMATED}. Without a module it is the mean of the layers",
    ),
    "representation/dse_standard_error": _metric(
        "By how much may an estimated representation/dse be wrong?",
        "standard error of representation/dse over 24 random probes",
        "compare only changes well above it",
        "representation/dse is nearly exact",
        estimator=f"only where N is above 4,000; {_ROWS}. The bandwidth's own error is not in it: "
        "representation/bandwidth is then of a sample of the rows, the same ones at every "
        "measurement",
        cost="comes with representation/dse",
        source="Ubaru, Chen and Saad (2017)",
    ),
    "representation/dse_half": _corrected("1/2"),
    "representation/dse_one": _corrected("1"),
    "representation/dse_released": _metric(
        "What would the released code of the paper say of a layer's spread?",
        f"-sum_i p_i log2 p_i, {_SPREAD}; s = 10",
        "activations are large against 10, or spread: the number cannot tell which",
        "activations are small against 10, or collapsed",
        estimator=f"{_EXACT}. Follows the norm of the activations: to compare with the paper's "
        "figures, nothing else",
    ),
    "representation/dse_renyi2": _metric(
        "Along how many directions do a layer's states spread, by their largest alone?",
        f"-log2 sum_i p_i^2, {_SPREAD}; {_MEDIAN}",
        _RICH,
        _POOR,
        source=f"{_LIAO}; Renyi (1961)",
        cost="O(N^2 D), no eigenvalues",
    ),
    "representation/dsmi_labels": _information(
        "the labels",
        "the layer tells classes apart: rises while training generalises",
        "the layer does not, or stopped learning to",
    ),
    "representation/dsmi_input": _information(
        "which cluster of inputs a row is from",
        "the layer keeps what the inputs look like",
        "the layer has forgotten it",
    ),
    "representation/bandwidth": _metric(
        "How far apart are two of a layer's states?",
        "s = median over pairs that differ of |x_i - x_j|, which are those where it is above 1e-6 "
        "of the root mean square of |x|; that, where none is",
        "activations grow; representation/dse does not see it, representation/dse_released does",
        "activations shrink or collapse onto each other",
        unit="activation",
        estimator=f"exact in float64; where N is above 4,000, of that many rows evenly spaced; "
        f"{_ROWS}",
        cost="O(N^2 D)",
        source="Definition",
    ),
    "representation/neighbours": _metric(
        "How many rows does a row compare itself with?",
        "median over i of (sum_{j!=i} G_ij)^2 / sum_{j!=i} G_ij^2, s the median distance",
        "the spectrum rests on many pairs",
        "below about 5 it rests on few: do not believe representation/dse",
        unit="rows",
        cost="O(N^2 D)",
        source="Biroli and Mezard (2024), arXiv 2408.05807",
    ),
    "representation/self_share": _metric(
        "How much of a row's neighbourhood is the row itself?",
        "median over i of G_ii / sum_j G_ij, s the median distance",
        "above 1/2 representation/dse is stuck near log2 N",
        "neighbours make the spectrum",
        unit="1",
        cost="O(N^2 D)",
        source="Biroli and Mezard (2024), arXiv 2408.05807",
    ),
    "representation/dse_is_saturated": _saturated("dse"),
    "representation/dse_released_is_saturated": _saturated("dse_released"),
    "representation/dse_is_condensed": _metric(
        "Does representation/dse rest on too few neighbours?",
        "1 where representation/neighbours is below 5, else 0",
        "do not believe representation/dse: it is made by single pairs of rows",
        "the spectrum rests on many pairs",
        unit="1",
        cost="O(N^2 D)",
        source="Biroli and Mezard (2024), arXiv 2408.05807",
    ),
    "representation/dse_released_is_too_wide": _metric(
        "Is representation/dse_released stuck near 0?",
        "1 where min_ij G_ij is above 1/2, s = 10, else 0",
        "do not believe representation/dse_released: all rows look like one, since they lie within "
        "11.8 of each other",
        "some rows are told apart",
        unit="1",
        cost="O(N^2 D)",
        source="Definition",
    ),
}


@diagnostic(
    reads="representation",
    every={"fast": 0, "balanced": 20, "full": 5},
    floor=200,
    metrics=METRICS,
)
class DiffusionEntropy(Diagnostic):
    """Diffusion spectral entropy of each layer, and what its states tell of labels and inputs."""

    def measure(self, reading: RepresentationReading, state: Any) -> tuple[list[Block], Any]:
        """Measure the layers one by one, the last of them with its density divided out too."""
        layers = {name: x for name, x in reading.states.items() if len(x) >= _FEWEST}
        last = next(reversed(layers), None)
        blocks = [
            _estimated(name, states)
            if len(states) > _MOST
            else _layer(name, states, reading, is_last=name == last)
            for name, states in layers.items()
        ]
        return [*blocks, *([_mean_of(blocks)] if blocks else [])], state


def _mean_of(layers: Sequence[Block]) -> Block:
    values, weights = (
        torch.stack([layer.columns[name].flatten()[0] for layer in layers])
        for name in ("value", "weight")
    )
    return Block.metrics(["representation/dse"], values.mean()[None], weight=weights.amin())


def _layer(name: str, states: Tensor, reading: RepresentationReading, *, is_last: bool) -> Block:
    is_finite = states.isfinite().all()
    states = torch.where(is_finite, states, 0.0)
    squared = squared_distances(states)
    bandwidth = median_bandwidth(states, squared)
    affinity = (squared * (-0.5 / bandwidth**2)).exp_()
    health = affinity_health(affinity)
    values = {
        "representation/dse": spectral_entropy(affinity),
        "representation/dse_renyi2": renyi_diffusion_entropy(symmetric_diffusion(affinity)),
        "representation/bandwidth": bandwidth,
        "representation/neighbours": health.neighbours,
        "representation/self_share": health.self_share,
        "representation/dse_is_saturated": health.is_saturated,
        "representation/dse_is_condensed": health.is_condensed,
    }
    if is_last:
        values["representation/dse_half"] = spectral_entropy(affinity, alpha=0.5)
        values["representation/dse_one"] = spectral_entropy(affinity, alpha=1.0)
    known = {"dsmi_labels": reading.labels, "dsmi_input": reading.input_clusters}
    for metric, classes in known.items():
        if classes is not None and _has_classes(classes):
            values[f"representation/{metric}"] = affinity_information(
                affinity, classes, generator=torch.Generator().manual_seed(0)
            )
    released = squared.mul_(-0.5 / RELEASED_BANDWIDTH**2).exp_()
    values["representation/dse_released"] = spectral_entropy(released)
    wide = affinity_health(released)
    values["representation/dse_released_is_saturated"] = wide.is_saturated
    values["representation/dse_released_is_too_wide"] = wide.is_too_wide
    return _block(name, values, is_finite, len(states))


def _estimated(name: str, states: Tensor) -> Block:
    is_finite = states.isfinite().all()
    some = states[torch.arange(_MOST, device=states.device) * len(states) // _MOST]
    bandwidth = median_bandwidth(some, squared_distances(some))
    estimate, error = estimated_diffusion_entropy(
        states, bandwidth=bandwidth, generator=torch.Generator().manual_seed(0)
    )
    values = {
        "representation/dse": estimate,
        "representation/dse_standard_error": error,
        "representation/bandwidth": bandwidth,
    }
    return _block(name, values, is_finite, len(states))


def _block(name: str, values: Mapping[str, Tensor], is_finite: Tensor, rows: int) -> Block:
    return Block.metrics(
        list(values),
        torch.stack(list(values.values())).float(),
        weight=is_finite * float(rows),
        modules=name,
    )


def _has_classes(labels: Sequence[int]) -> bool:
    """Whether there are classes to tell apart, each with rows to compare."""
    sizes = Counter(labels).values()
    return len(sizes) > 1 and min(sizes) > 1
