"""How much will this update change the entropy, how much did it, and which tokens are to blame?"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.diagnostics._cells import CELLS
from entropylens.diagnostics._estimators import ESTIMATORS, TokenParts
from entropylens.diagnostics._policy import pull
from entropylens.diagnostics._summaries import ROUNDING, correlation, wide_dtype
from entropylens.diagnostics.entropy_discriminator import discriminator, sign_cells
from entropylens.registry import Block, Diagnostic, Lookup, Metric, ProbeReading, diagnostic

__all__ = ["EntropyChange", "entropy_change", "entropy_of"]

EXACT: Final = "exact"
MEMORY: Final = 0.98
"""Weight of what was known before, at each measurement: some fifty of them count."""
LEAST: Final = 8
"""Measurements that a slope needs."""
_LEAST_COUNT: Final = (1 - MEMORY ** (LEAST - 0.5)) / (1 - MEMORY)
"""What so many count after fading, less half a measurement for rounding."""
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
_SOURCE = "first order: arXiv 2505.22617, Lemma 1; the estimators: see entropy/change/estimate/*"


def _metric(question: str, formula: str, high: str, low: str, **other: str) -> Metric:
    fixed = {"unit": "nats", "estimator": _STATES, "cost": _COST, "source": _SOURCE}
    return Metric(question=question, formula=formula, high=high, low=low, **{**fixed, **other})


_ACROSS = (
    "over measured steps, the older ones fading by 2 % a measurement; module is the estimator: "
    "exact, or one of those that know no more than each token's own numbers; absent below "
    f"{LEAST} measurements and where one of the two does not vary beyond float32 rounding"
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
        "1 forward-mode differentiation, 0 central finite difference along the update",
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
        estimator=f"{_STATES}; absent below 3 states and where one of the two does not vary beyond "
        "float32 rounding",
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
        f"entropy/change/at/{cell}": _metric(
            f"What part of the predicted change happens AT states whose own token has {where}, "
            "whichever tokens cause it?",
            f"sum of the predicted change over the states whose own token has {where}, divided by "
            "all states' weight: the four, and states with A = 0 or S = N, add up to "
            "entropy/change/predicted",
            "the entropy AT these states rises, whichever tokens caused it; by cause it is in "
            f"discriminator/cell/{cell}/change",
            "the entropy AT these states falls, whichever tokens caused it; by cause it is in "
            f"discriminator/cell/{cell}/change",
        )
        for cell, (where, _) in CELLS.items()
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
    _, entropy, discriminators = _distribution(logits)
    return entropy, discriminators


def _distribution(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, H and S."""
    logp = logits.log_softmax(-1)
    p = logp.exp()
    logp = torch.where(p > 0, logp, 0.0)
    entropy = -(p * logp).sum(-1)
    return p, entropy, p * (logp + entropy[:, None])


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
    Cost: O(m V); at most some 250 MiB beyond the logits.
    Source: Cui et al., arXiv 2505.22617, Lemma 1: dH = -Cov_p(log p, dz).

    Example:
        >>> z, dz = torch.tensor([[2.0, 0.0]]), torch.tensor([[1e-3, 0.0]])
        >>> predicted, measured, _ = entropy_change(z, z + dz, dz)
        >>> bool((predicted / measured - 1).abs() < 1e-3), bool(predicted < 0)
        (True, True)
    """
    predicted, measured, extrapolated, *_ = _of_states(
        before, after, direction, torch.zeros_like(before[:, 0], dtype=torch.long)
    )
    return predicted, measured, extrapolated


def _of_states(before: Tensor, after: Tensor, direction: Tensor, token_id: Tensor) -> Tensor:
    """``[6, m]``: the three of `entropy_change`; before the update log p of the token, H and N."""
    rows = max(_BLOCK // before.shape[1], 1)
    kind = wide_dtype(before)
    found = []
    parts = (tensor.split(rows) for tensor in (before, after, direction, token_id))
    for old, new, change, token in zip(*parts, strict=True):
        wide = old.to(kind)
        logprob = wide.gather(1, token[:, None])[:, 0] - wide.logsumexp(-1)
        p, entropy, discriminators = _distribution(wide)
        del wide
        expected = p.mul_(discriminators).sum(-1)
        del p
        # A class that is masked moves nowhere, whatever its derivative is said to be.
        moved = torch.where(old == -torch.inf, 0.0, change.to(kind))
        predicted = -(discriminators * moved).sum(-1)
        del discriminators
        changes = [entropy_of(logits.to(kind))[0] - entropy for logits in (new, old + moved)]
        found.append(torch.stack([predicted, *changes, logprob, entropy, expected]))
    return torch.cat(found, 1)


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
        token_id = reading.token_id
        if token_id is None:
            token_id = torch.zeros_like(reading.position)
        predicted, measured, extrapolated, logprob, entropy, expected = _of_states(
            reading.before, reading.after, reading.direction, token_id
        )
        weight = reading.weight.to(predicted.dtype)
        total = weight.sum()
        means = torch.stack([_mean(c, weight) for c in (predicted, measured, extrapolated)])
        exact = torch.full_like(means[:1], float(reading.is_exact))
        kinds = ("predicted", "measured", "extrapolated", "exact/share")
        names = [f"entropy/change/{name}" for name in kinds]
        blocks = [Block.metrics(names, torch.cat([means, exact]).float(), weight=total)]
        estimates = {EXACT: predicted, "extrapolated": extrapolated}
        if reading.advantage is not None and reading.token_id is not None:
            parts = _parts(reading, logprob, entropy, expected)
            estimates |= {name: find(parts).to(weight.dtype) for name, find in ESTIMATORS.items()}
            blocks.append(_cells(parts, predicted, weight))
        blocks.append(_token_rows(reading, predicted, logprob, entropy))
        modules, columns = list(estimates), torch.stack([*estimates.values()]).to(weight.dtype)
        correlations = correlation(columns, measured.expand_as(columns), weight.expand_as(columns))
        blocks.append(
            Block.metrics(
                ["entropy/change/state/correlation"] * len(modules),
                correlations,
                weight=torch.where(correlations.isnan(), 0.0, total),
                modules=modules,
            )
        )
        state = _remember(state, _mean(columns, weight), means[1])
        return blocks + _fit_blocks(state, modules), state


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    return torch.where(weight > 0, values * weight, 0.0).sum(-1) / weight.sum()


def _parts(reading: ProbeReading, logprob: Tensor, entropy: Tensor, expected: Tensor) -> TokenParts:
    assert reading.advantage is not None
    kind = logprob.dtype
    return TokenParts(
        logprob=logprob,
        entropy=entropy,
        advantage=reading.advantage.to(kind),
        pull=pull(reading).to(kind),
        old_logprob=None if reading.log_ratio is None else logprob - reading.log_ratio,
        expected_discriminator=expected,
        weight=reading.weight.to(kind),
    )


def _cells(parts: TokenParts, predicted: Tensor, weight: Tensor) -> Block:
    assert parts.expected_discriminator is not None
    excess = discriminator(parts.logprob, parts.entropy) - parts.expected_discriminator
    cells = sign_cells(parts.advantage, excess)
    return Block.metrics(
        [f"entropy/change/at/{cell}" for cell in CELLS],
        _mean(torch.where(cells, predicted, 0.0), weight).float(),
        weight=weight.sum(),
    )


def _token_rows(
    reading: ProbeReading, predicted: Tensor, logprob: Tensor, entropy: Tensor
) -> Block:
    size = torch.where(reading.weight > 0, predicted.abs(), -1.0)
    index = size.topk(min(ROWS, size.shape[0])).indices
    columns: dict[str, Any] = {
        "present": reading.weight[index] > 0,
        "sequence": reading.sequence[index],
        "position": reading.position[index],
        "entropy": entropy[index].float(),
        "predicted_entropy_change": predicted[index].float(),
        "selection": ["change"] * len(index),
    }
    if reading.token_id is not None:
        columns |= {"token_id": reading.token_id[index], "logprob": logprob[index].float()}
    if reading.advantage is not None:
        columns["advantage"] = reading.advantage[index].float()
    if reading.sample_ids is not None:
        columns["sample_id"] = Lookup(reading.sample_ids, columns["sequence"])
    return Block("tokens", columns)


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
    (spread_x, x_varies), (spread_y, y_varies) = (
        _spread(total / count, squares / count) for total, squares in ((x, xx), (y, yy))
    )
    correlations = covariance / (spread_x.sqrt() * spread_y.sqrt())
    found = {
        "entropy/change/fit/slope": torch.where(x_varies, covariance / spread_x, torch.nan),
        "entropy/change/fit/correlation": torch.where(x_varies & y_varies, correlations, torch.nan),
    }
    return [
        Block.metrics(
            [name] * len(modules),
            values.float(),
            weight=torch.where((count > _LEAST_COUNT) & values.isfinite(), count, 0.0),
            modules=modules,
        )
        for name, values in found.items()
    ]


def _spread(mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """Variance, and whether it is more than rounding makes, as in `centred`."""
    variance = (square - mean**2).clamp(min=0)
    return variance, variance > ROUNDING**2 * square
