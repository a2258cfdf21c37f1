"""How much will this update change the entropy, how much did it, and which tokens are to blame?"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.diagnostics._estimators import ESTIMATORS, TokenParts
from entropylens.diagnostics._policy import pull
from entropylens.diagnostics._summaries import wide_dtype
from entropylens.registry import Block, Diagnostic, Lookup, Metric, ProbeReading, diagnostic

__all__ = ["EntropyChange", "entropy_change", "entropy_of"]

EXACT: Final = "exact"
CELLS: Final = ("positive_above", "positive_below", "negative_above", "negative_below")
MEMORY: Final = 0.98
"""Weight of what was known before, at each measurement: some fifty of them count."""
LEAST: Final = 8.0
"""Measurements that a slope needs."""
ROWS: Final = 16
"""States written to the tokens table, those that the update changes most."""
_BLOCK: Final = 1 << 22
"""Logits in float64 at a time: 32 MiB in each of a few buffers."""

_STATES = (
    "exact at up to 256 states: tokens of up to 16 sequences of the step's first micro-batch, "
    "chosen without looking at them; weights as the optimiser had them before and after its step, "
    "in float32 at least, model in evaluation mode (no dropout), loss's temperature"
)
_COST = (
    "one forward with its derivative (about two) and one plain forward of up to 16 sequences, and "
    "a copy of the trained parameters while the step lasts"
)
_SOURCE = "first order: arXiv 2505.22617, Lemma 1; the estimators: see entropy/estimate/*"


def _metric(question: str, formula: str, high: str, low: str, **other: str) -> Metric:
    fixed = {"unit": "nats", "estimator": _STATES, "cost": _COST, "source": _SOURCE}
    return Metric(question=question, formula=formula, high=high, low=low, **{**fixed, **other})


_ACROSS = (
    "over measured steps, the older ones fading by 2 % a measurement; module is the estimator: "
    "exact, or one of those that know no more than each token's own numbers; absent below 8 "
    "measurements"
)
METRICS: Final[Mapping[str, Metric]] = {
    "entropy/change/predicted": _metric(
        "By how much should this update change the entropy, to first order?",
        "mean over states of -sum_i S_i dz_i, S_i = p_i (log p_i + H), dz the derivative of the "
        "logits along the optimiser's actual update",
        "the update opens the policy up",
        "the update closes the policy down; summed over steps, the coming collapse",
    ),
    "entropy/change/measured": _metric(
        "By how much did this update change the entropy?",
        "mean over the same states of H(after) - H(before)",
        "the policy became less sure where it was asked",
        "the policy became more sure where it was asked",
    ),
    "entropy/change/extrapolated": _metric(
        "By how much would the entropy change if the logits moved by their first-order change?",
        "mean over states of H(z + dz) - H(z), dz as for predicted: first order in the network, "
        "exact in the softmax",
        "as predicted; where it is nearer to measured than predicted is, the softmax bends and not "
        "the network",
        "as predicted; it cannot take more entropy from a state than there is",
    ),
    "entropy/change/exact/share": _metric(
        "Was the derivative along the update differentiated, or a finite difference?",
        "1 forward-mode differentiation, 0 central difference of half the update to either side",
        "differentiated",
        "the model has an operation without a forward derivative",
        unit="1",
    ),
    "entropy/change/state/correlation": _metric(
        "Does an estimate say at which states the entropy changes?",
        "Pearson correlation over this step's states of the estimated and the measured change of "
        "H; module is the estimator",
        "near 1: the estimate knows the states",
        "near 0: other tokens, through shared weights, decide what happens here",
        unit="1",
    ),
    "entropy/change/fit/slope": _metric(
        "How many nats is one unit of an estimate worth in this run?",
        "least squares with intercept of the step's measured change on the step's mean estimate; "
        "for exact it should be 1",
        "large logit steps; of exact: above 1 the update is beyond first order",
        "small logit steps; below 0 the estimate has the wrong sign",
        unit="nats per unit of the estimate",
        estimator=_ACROSS,
    ),
    "entropy/change/fit/correlation": _metric(
        "Does an estimate say in which steps the entropy changes?",
        "Pearson correlation over steps of the step's mean estimate and the measured change",
        "near 1: what the estimate sees is what moves the entropy",
        "near 0: what moves it lies elsewhere",
        unit="1",
        estimator=_ACROSS,
    ),
    **{
        f"entropy/change/cell/{cell}": _metric(
            f"What part of the predicted change comes from states of the cell {cell}?",
            "sum over the states whose own token has that sign of advantage and of S_a - N, of the "
            "predicted change, divided by all states' weight: the four, and states of advantage 0, "
            "add up to entropy/change/predicted",
            "this cell opens the policy up",
            "this cell closes it down",
        )
        for cell in CELLS
    },
}


def entropy_of(logits: Tensor) -> tuple[Tensor, Tensor]:
    """How uncertain is each distribution, and how does each logit bear on that?

    ``H = -sum_i p_i log p_i`` and ``S_i = p_i (log p_i + H) = -dH/dz_i``.

    Args:
        logits: ``[m, V]``, any floating dtype; -inf is probability 0.

    Returns:
        H ``[m]`` and S ``[m, V]`` in the logits' dtype.

    Unit: nats.
    Device: the logits'; no host synchronisation.
    Cost: O(m V), a few buffers of the logits' size.

    Example:
        >>> entropy_of(torch.zeros(1, 2))[1].abs().max() < 1e-7
        tensor(True)
    """
    logp = logits.log_softmax(-1)
    p = logp.exp()
    logp = torch.where(p > 0, logp, 0.0)
    entropy = -(p * logp).sum(-1)
    return entropy, p * (logp + entropy[:, None])


def entropy_change(before: Tensor, after: Tensor, direction: Tensor) -> tuple[Tensor, ...]:
    """By how much does each distribution's entropy change, to first order and in truth?

    ``-sum_i S_i dz_i``, ``H(after) - H(before)`` and ``H(before + dz) - H(before)``, in float64
    where the device has it.

    Args:
        before: ``[m, V]`` logits.
        after: ``[m, V]`` logits.
        direction: ``[m, V]`` first-order change of the logits, dz.

    Returns:
        Predicted, measured and extrapolated change, ``[m]`` each, nats.

    Device: the logits'; no host synchronisation.
    Cost: O(m V); at most some 150 MiB beyond the logits.
    Source: Cui et al., arXiv 2505.22617, Lemma 1: dH = -Cov_p(log p, dz).

    Example:
        >>> z, dz = torch.tensor([[2.0, 0.0]]), torch.tensor([[1e-3, 0.0]])
        >>> predicted, measured, _ = entropy_change(z, z + dz, dz)
        >>> bool((predicted / measured - 1).abs() < 1e-3), bool(predicted < 0)
        (True, True)
    """
    rows = max(_BLOCK // before.shape[1], 1)
    kind = wide_dtype(before)
    changes = []
    parts = (tensor.split(rows) for tensor in (before, after, direction))
    for old, new, change in zip(*parts, strict=True):
        entropy, discriminator = entropy_of(old.to(kind))
        # A class that is masked moves nowhere, whatever its derivative is said to be.
        moved = torch.where(old == -torch.inf, 0.0, change.to(kind))
        found = [entropy_of(logits.to(kind))[0] - entropy for logits in (new, old + moved)]
        changes.append(torch.stack([-(discriminator * moved).sum(-1), *found]))
    return tuple(torch.cat(changes, 1))


@diagnostic(
    reads="probe",
    every={"balanced": 20, "full": 1},
    floor={"fast": 1000, "balanced": 200, "full": 50},
    metrics=METRICS,
)
class EntropyChange(Diagnostic):
    """Predicted against measured change of the entropy in one update, and what it came from."""

    def measure(self, reading: ProbeReading, state: Any) -> tuple[list[Block], Any]:
        """Compare the states of one step before and after its update."""
        predicted, measured, extrapolated = entropy_change(
            reading.before, reading.after, reading.direction
        )
        weight = reading.weight.to(predicted.dtype)
        total = weight.sum()
        means = torch.stack([_mean(c, weight) for c in (predicted, measured, extrapolated)])
        exact = torch.full_like(means[:1], float(reading.is_exact))
        kinds = ("predicted", "measured", "extrapolated", "exact/share")
        names = [f"entropy/change/{name}" for name in kinds]
        blocks = [Block.metrics(names, torch.cat([means, exact]).float(), weight=total)]
        estimates = {EXACT: predicted}
        if reading.advantage is not None:
            parts = _parts(reading)
            estimates |= {name: find(parts).to(weight.dtype) for name, find in ESTIMATORS.items()}
            blocks.append(_cells(parts, predicted, weight))
        blocks.append(_token_rows(reading, predicted))
        modules, columns = list(estimates), torch.stack([*estimates.values()]).to(weight.dtype)
        correlations, _ = _line(columns, measured.expand_as(columns), weight.expand_as(columns))
        blocks.append(
            Block.metrics(
                ["entropy/change/state/correlation"] * len(modules),
                correlations.float(),
                weight=torch.where(correlations.isnan(), 0.0, total),
                modules=modules,
            )
        )
        state = _remember(state, _mean(columns, weight), means[1])
        return blocks + _fit_blocks(state, modules), state


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    return torch.where(weight > 0, values * weight, 0.0).sum(-1) / weight.sum()


def _parts(reading: ProbeReading) -> TokenParts:
    logp = reading.before.to(wide_dtype(reading.before)).log_softmax(-1)
    picked = logp.gather(1, reading.token_id[:, None])[:, 0]
    entropy, discriminator = entropy_of(logp)
    assert reading.advantage is not None
    return TokenParts(
        logprob=picked,
        entropy=entropy,
        advantage=reading.advantage.to(picked.dtype),
        pull=pull(reading).to(picked.dtype),
        old_logprob=None if reading.log_ratio is None else picked - reading.log_ratio,
        expected_discriminator=(logp.exp() * discriminator).sum(-1),
        weight=reading.weight.to(picked.dtype),
    )


def _cells(parts: TokenParts, predicted: Tensor, weight: Tensor) -> Block:
    assert parts.expected_discriminator is not None
    excess = parts.logprob.exp() * (parts.logprob + parts.entropy) - parts.expected_discriminator
    signs = (parts.advantage > 0, parts.advantage < 0)
    masks = torch.stack([sign & side for sign in signs for side in (excess > 0, excess <= 0)])
    return Block.metrics(
        [f"entropy/change/cell/{cell}" for cell in CELLS],
        _mean(torch.where(masks, predicted, 0.0), weight).float(),
        weight=weight.sum(),
    )


def _token_rows(reading: ProbeReading, predicted: Tensor) -> Block:
    size = torch.where(reading.weight > 0, predicted.abs(), -1.0)
    index = size.topk(min(ROWS, size.shape[0])).indices
    logp = reading.before[index].float().log_softmax(-1)
    columns: dict[str, Any] = {
        "present": reading.weight[index] > 0,
        "sequence": reading.sequence[index],
        "position": reading.position[index],
        "token_id": reading.token_id[index],
        "logprob": logp.gather(1, reading.token_id[index][:, None])[:, 0],
        "entropy": entropy_of(logp)[0],
        "predicted_entropy_change": predicted[index].float(),
        "selection": ["change"] * len(index),
    }
    if reading.advantage is not None:
        columns["advantage"] = reading.advantage[index].float()
    if reading.sample_ids is not None:
        columns["sample_id"] = Lookup(reading.sample_ids, columns["sequence"])
    return Block("tokens", columns)


def _line(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Correlation and slope of y on x along the last axis; NaN where one of them is constant."""
    centred_x, centred_y = (
        torch.where(weight > 0, value, 0.0) - _mean(value, weight[0])[:, None] for value in (x, y)
    )
    xx, yy, xy = (
        (weight * product).sum(-1)
        for product in (centred_x**2, centred_y**2, centred_x * centred_y)
    )
    return xy / (xx * yy).sqrt(), xy / xx


def _remember(state: Any, estimates: Tensor, measured: Tensor) -> Tensor:
    """``[6, estimates]``: fading sums of 1, x, y, x^2, x y, y^2."""
    y = measured.expand_as(estimates)
    now = torch.stack([torch.ones_like(y), estimates, y, estimates**2, estimates * y, y**2])
    is_known = now.isfinite().all(0)
    known = state is not None and state.shape == now.shape
    earlier = state.to(now) if known else torch.zeros_like(now)
    return torch.where(is_known, MEMORY * earlier + now, earlier)


def _fit_blocks(state: Tensor, modules: list[str]) -> list[Block]:
    count, x, y, xx, xy, yy = state
    covariance = xy / count - x * y / count**2
    spread_x, spread_y = (
        (square / count - (mean / count) ** 2).clamp(min=0) for square, mean in ((xx, x), (yy, y))
    )
    found = {
        "entropy/change/fit/slope": covariance / spread_x,
        "entropy/change/fit/correlation": covariance / (spread_x * spread_y).sqrt(),
    }
    return [
        Block.metrics(
            [name] * len(modules),
            values.float(),
            weight=torch.where((count >= LEAST) & values.isfinite(), count, 0.0),
            modules=modules,
        )
        for name, values in found.items()
    ]
