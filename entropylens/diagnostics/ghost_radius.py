"""How much of the loss's radius of convergence does this update use, and at which tokens?"""

from collections.abc import Mapping
from math import pi
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.diagnostics._ghosts import (
    States,
    binary_radius,
    flips,
    is_positive,
    logprob_of,
    loss_change,
    margin_radius,
    may_flip,
    radius,
    ratio,
    spread,
    weighted_ratio,
)
from entropylens.diagnostics._summaries import weighted_mean, weighted_quantiles
from entropylens.registry import Block, Diagnostic, Lookup, Metric, ProbeReading, diagnostic

__all__ = [
    "GhostRadius",
    "binary_radius",
    "flips",
    "loss_change",
    "margin_radius",
    "may_flip",
    "radius",
    "ratio",
    "spread",
    "weighted_ratio",
]

ROWS: Final = 16
"""States written to the tokens table, those where the step uses most of the radius."""
_BLOCK: Final = 1 << 22
"""Logits in float64 at a time: 32 MiB in each of a few buffers."""

_STATES = (
    "up to 256 states: tokens of up to 16 sequences of the step's first micro-batch, chosen "
    "without looking at them; logits at the loss's temperature, dz the derivative along the "
    "update that the optimiser made, learning rate included; model in evaluation mode (no "
    "dropout)"
)
_EXTREME = (
    f"{_STATES}. The states looked at are some of the batch: the whole batch's radius is at most "
    "what is shown. Were m states drawn independently, the largest r shown would lie above the "
    "batch's q-quantile with probability 1 - q^m; tokens of one sequence are alike, so that it is "
    "less"
)
_EVIDENCE = (
    "Evidence and never an alarm by itself: healthy runs at their best learning rate cross 1, "
    "networks with normalisation or attention under SGD run near 2 all the time, and a large "
    "vocabulary raises it"
)
_SURE = (
    "the step stays where the Taylor series along it converges; accuracy can fall there all the "
    "same in an undertrained model"
)
_COST = (
    "the probe of entropy/change/predicted; beyond it some twenty passes over the logits of the "
    "states"
)
_SOURCE = (
    "Sao, Ghosts of Softmax, arXiv 2603.13552, Theorem 4.6 and Definition 5.1; along the update "
    "that was made, where the released archgrid code takes the raw gradient and steps with Adam"
)


def _metric(question: str, formula: str, high: str, low: str, **other: str) -> Metric:
    fixed = {"unit": "1", "estimator": _STATES, "cost": _COST, "source": _SOURCE}
    return Metric(question=question, formula=formula, high=high, low=low, **{**fixed, **other})


_RATIO = "r = (max_k dz_k - min_k dz_k) / pi over the classes of a state"
_MARGIN = (
    "1 / rho, rho^2 = (pi / D)^2 + (max(0, log(p_k / (1 - p_k))) / D_k)^2, k the likeliest class, "
    "D the spread of dz, D_k = max_j |dz_j - dz_k|"
)
_DERIVED = "derived here, tighter than arXiv 2603.13552 and exact for two classes"
_FIRST_ORDER = "derived here: the first-order companions of arXiv 2603.13552"
_TARGETS = (
    f"mean over {_STATES}; a target that is masked or unknown is left out. Where the step is a "
    "policy's, the target is the sampled token and this is not the policy's loss"
)
METRICS: Final[Mapping[str, Metric]] = {
    "ghost/ratio/max": _metric(
        "How many times the guaranteed Taylor radius is this step, at its tightest token?",
        f"max over states of {_RATIO}",
        f"above 1 the loss's Taylor series along the step may diverge. {_EVIDENCE}",
        _SURE,
        estimator=_EXTREME,
        ranks="max",
    ),
    **{
        f"ghost/ratio/p{level:.0f}": _metric(
            f"How many times the guaranteed Taylor radius is this step, {where}?",
            f"quantile {level / 100:g} over states of {_RATIO}, Hazen interpolation",
            f"the step is large at {many} tokens and not at an outlier. {_EVIDENCE}",
            _SURE,
        )
        for level, where, many in (
            (50, "at the middle token", "most"),
            (95, "exceeded at one token in twenty", "many"),
        )
    },
    "ghost/radius/min": _metric(
        "How many such steps would fit into the guaranteed Taylor radius?",
        "1 / max r: pi / (max_k dz_k - min_k dz_k) at the tightest state",
        _SURE,
        f"below 1 the step is longer than the radius. {_EVIDENCE}",
        unit="multiples of the step taken",
        estimator=f"{_EXTREME}. Absent where the update moves no logit",
        ranks="min",
    ),
    "ghost/above_one/share": _metric(
        "At how many tokens is this step longer than the guaranteed Taylor radius?",
        f"share of the states' weight with r > 1, {_RATIO}",
        f"most of the batch is beyond its radius. {_EVIDENCE}",
        "no token, or an outlier",
    ),
    "ghost/margin_ratio/max": _metric(
        "How many times the radius that knows the likeliest class is this step, at its tightest?",
        f"max over states of {_MARGIN}",
        f"the series may diverge, also where being decided is allowed for. {_EVIDENCE}",
        _SURE,
        estimator=_EXTREME,
        source=_DERIVED,
        ranks="max",
    ),
    "ghost/margin_ratio/p95": _metric(
        "How many times the radius that knows the likeliest class is this step, at one in twenty?",
        f"quantile 0.95 over states of {_MARGIN}; Hazen interpolation",
        f"the step is large at many tokens, mostly undecided ones. {_EVIDENCE}",
        _SURE,
        source=_DERIVED,
    ),
    "ghost/weighted_ratio/p95": _metric(
        "How large is the step at one token in twenty, if classes count by their probability?",
        "quantile 0.95 over states of 2 sqrt(Var_p(dz)) / pi, Hazen interpolation; never above r",
        f"likely classes move: the distribution itself changes. {_EVIDENCE}",
        "where r is high all the same, only classes without probability move",
        source="derived here: Popoviciu's inequality, sqrt(Var) <= spread / 2",
    ),
    "ghost/flip/predicted/share": _metric(
        "At how many tokens should this step change the likeliest class, to first order?",
        "share of the states' weight where argmax(z + dz) differs from argmax z",
        "the step changes what the model would say; common early in training",
        "the model would say the same",
        source=_FIRST_ORDER,
    ),
    "ghost/flip/measured/share": _metric(
        "At how many tokens did this step change the likeliest class?",
        "share of the states' weight where argmax z' differs from argmax z, z' after the update",
        "the step changed what the model would say; common early in training",
        "the model would say the same",
        source=_FIRST_ORDER,
    ),
    "ghost/flip/possible/share": _metric(
        "At how many tokens could a step of this spread change the likeliest class at all?",
        "share of the states' weight with z_(1) - z_(2) < pi r, the margin of the two likeliest",
        "margins are small beside the step",
        "at the other tokens no step of this spread can, to first order",
        source=_FIRST_ORDER,
    ),
    "ghost/loss_change/predicted": _metric(
        "By how much should this step change the loss of these tokens, to first order?",
        "mean of -dz_y + sum_k p_k dz_k, y the target",
        "above 0 the step goes uphill here: momentum, weight decay, or other data",
        "the step lowers the loss here",
        unit="nats",
        estimator=_TARGETS,
        source=_FIRST_ORDER,
    ),
    "ghost/loss_change/measured": _metric(
        "By how much did this step change the loss of these tokens?",
        "mean of log p(y) - log p'(y), y the target, p' after the update",
        "well above predicted: the step is too long for first order; above 0 it did harm here",
        "near predicted: first order describes the step",
        unit="nats",
        estimator=_TARGETS,
        source=_FIRST_ORDER,
    ),
    "ghost/states": _metric(
        "At how many tokens was the step looked at?",
        "number of states with weight",
        "a maximum near the whole batch's",
        "a maximum that may be far below the whole batch's",
        unit="tokens",
        ranks="sum",
    ),
}


_MAX: Final = {"p95": 0.95, "max": 1.0}
_LEVELS: Final = {
    "ratio": {"p50": 0.5, **_MAX},
    "margin_ratio": _MAX,
    "weighted_ratio": {"p95": 0.95},
}
_SHARES: Final = ("above_one", "flip/predicted", "flip/measured", "flip/possible")
_CHANGES: Final = ("loss_change/predicted", "loss_change/measured")


def _of_states(reading: ProbeReading) -> dict[str, Tensor]:
    """``[m]`` each; those of the targets only where they are known."""
    rows = max(_BLOCK // reading.before.shape[1], 1)
    everything = (reading.before, reading.after, reading.direction, reading.token_id)
    parts = [part for part in everything if part is not None]
    found = [_of_block(*block) for block in zip(*(part.split(rows) for part in parts), strict=True)]
    return {name: torch.cat([block[name] for block in found]) for name in found[0]}


def _of_block(
    old: Tensor, new: Tensor, change: Tensor, token_id: Tensor | None = None
) -> dict[str, Tensor]:
    states = States(old, change)
    found = {
        "ratio": states.spread / pi,
        "above_one": is_positive(states.spread - pi),
        "margin_ratio": 1 / states.margin_radius,
        "weighted_ratio": states.weighted_ratio,
        "entropy": states.entropy,
        "flip/predicted": flips(states.logits, states.logits + states.direction),
        "flip/measured": flips(old, new),
        "flip/possible": states.may_flip,
    }
    if token_id is not None:
        logprob = states.logprob(token_id)
        found |= {
            "logprob": logprob,
            "loss_change/predicted": states.loss_change(token_id),
            "loss_change/measured": logprob - logprob_of(new, token_id),
        }
    return found


@diagnostic(
    reads="probe",
    every={"balanced": 20, "full": 1},
    floor={"fast": 1000, "balanced": 200, "full": 50},
    metrics=METRICS,
)
class GhostRadius(Diagnostic):
    """Share of the loss's Taylor radius that an update uses, and what it does to first order."""

    def measure(self, reading: ProbeReading, state: Any) -> tuple[list[Block], Any]:
        """Hold the update of one step against the radius at each state."""
        found, weight = _of_states(reading), reading.weight
        quantiles = {
            f"ghost/{name}/{level}": value
            for name, levels in _LEVELS.items()
            for level, value in zip(
                levels,
                weighted_quantiles(found[name], weight, tuple(levels.values())).unbind(),
                strict=True,
            )
        }
        values = {
            **quantiles,
            **{f"ghost/{name}/share": weighted_mean(found[name], weight) for name in _SHARES},
            "ghost/states": (weight > 0).sum().float(),
        }
        total, largest = weight.sum(), quantiles["ghost/ratio/max"]
        blocks = [
            Block.metrics(list(values), torch.stack([*values.values()]), weight=total),
            Block.metrics(
                ["ghost/radius/min"],
                1 / largest[None],
                weight=torch.where(largest > 0, total, 0.0),
            ),
            _token_rows(reading, found),
        ]
        if "logprob" in found:
            known = torch.where(found["logprob"] == -torch.inf, 0.0, weight)
            means = weighted_mean(torch.stack([found[name] for name in _CHANGES]), known)
            names = [f"ghost/{name}" for name in _CHANGES]
            blocks.append(Block.metrics(names, means, weight=known.sum()))
        return blocks, state


def _token_rows(reading: ProbeReading, found: Mapping[str, Tensor]) -> Block:
    size = torch.where(reading.weight > 0, found["ratio"], -1.0)
    index = size.topk(min(ROWS, size.shape[0])).indices
    columns: dict[str, Any] = {
        "present": reading.weight[index] > 0,
        "sequence": reading.sequence[index],
        "position": reading.position[index],
        "entropy": found["entropy"][index].float(),
        "ghost_ratio": found["ratio"][index].float(),
        "selection": ["radius"] * len(index),
    }
    if reading.token_id is not None:
        columns["token_id"] = reading.token_id[index]
        columns["logprob"] = found["logprob"][index].float()
    if reading.sample_ids is not None:
        columns["sample_id"] = Lookup(reading.sample_ids, columns["sequence"])
    return Block("tokens", columns)
