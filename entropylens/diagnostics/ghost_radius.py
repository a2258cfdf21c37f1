"""How much of the loss's radius of convergence does this update use, and at which tokens?"""

from collections.abc import Mapping
from functools import cached_property
from math import pi
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.diagnostics._summaries import (
    weighted_mean,
    weighted_quantiles,
    wide_dtype,
)
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


class _States:
    """Logits and their change relative to the likeliest class, which is at 0 and stays there.

    A masked class stays with it, whatever its derivative is said to be. Of a distribution without
    a class, or with one that is not a number, all is NaN.
    """

    def __init__(self, logits: Tensor, direction: Tensor) -> None:
        found = logits.to(wide_dtype(logits))
        self.likeliest = found.argmax(-1, keepdim=True)
        height = found.gather(-1, self.likeliest)
        change = direction.gather(-1, self.likeliest).to(found.dtype)
        self.logits = found - height
        self.direction = torch.where(
            self.logits == -torch.inf,
            0.0,
            direction.to(found.dtype) - torch.where(height.isfinite(), change, torch.nan),
        )

    @cached_property
    def spread(self) -> Tensor:
        return self.direction.amax(-1) - self.direction.amin(-1)

    @property
    def others(self) -> Tensor:
        """Logits without the likeliest class."""
        return self.logits.scatter(-1, self.likeliest, -torch.inf)

    @cached_property
    def log_odds(self) -> Tensor:
        """``log(p / (1 - p))`` of the likeliest class."""
        return -self.others.logsumexp(-1)

    @cached_property
    def log_normaliser(self) -> Tensor:
        return torch.nn.functional.softplus(-self.log_odds)

    @cached_property
    def probabilities(self) -> Tensor:
        return (self.logits - self.log_normaliser[..., None]).exp()

    @property
    def entropy(self) -> Tensor:
        p = self.probabilities
        return self.log_normaliser - torch.where(p > 0, p * self.logits, 0.0).sum(-1)

    @cached_property
    def mean_direction(self) -> Tensor:
        return (self.probabilities * self.direction).sum(-1)

    @property
    def margin_radius(self) -> Tensor:
        farthest = self.direction.abs().amax(-1)
        push = torch.where(farthest > 0, self.log_odds.clamp(min=0) / farthest, 0.0)
        return torch.hypot(pi / self.spread, push)

    @property
    def weighted_ratio(self) -> Tensor:
        deviation = self.direction - self.mean_direction[..., None]
        return (self.probabilities * deviation.square()).sum(-1).sqrt() * (2 / pi)

    @property
    def may_flip(self) -> Tensor:
        return _is_positive(self.spread + self.others.amax(-1))

    def logprob(self, token_id: Tensor) -> Tensor:
        return self.logits.gather(-1, token_id[..., None])[..., 0] - self.log_normaliser

    def loss_change(self, token_id: Tensor) -> Tensor:
        """To first order."""
        return self.mean_direction - self.direction.gather(-1, token_id[..., None])[..., 0]


def spread(logits: Tensor, direction: Tensor) -> Tensor:
    """How far apart does the update move two logits of one distribution, at most?

    ``max_k dz_k - min_k dz_k`` over the classes whose logit is not -inf: a class without
    probability is in no sum. One that is masked with a finite number counts.

    Args:
        logits: ``[..., V]``, divided by the loss's temperature, -inf where a class is masked.
        direction: ``[..., V]`` their first-order change by the whole update, dz.

    Returns:
        ``[...]``; 0 where all classes move alike. NaN where no class is left, and where a logit or
        the direction of a class that is left is NaN; not finite where that direction is not.

    Device: the logits'; no host synchronisation. In float64 where the device has it.
    Cost: O(m V), two copies.
    Source: Sao, arXiv 2603.13552, Definition 4.4.

    Example:
        >>> spread(torch.tensor([0.0, 1.0, -torch.inf]), torch.tensor([1.0, 3.0, 99.0])).item()
        2.0
    """
    return _States(logits, direction).spread


def ratio(logits: Tensor, direction: Tensor) -> Tensor:
    """How many times the radius that is guaranteed is the step?

    ``r = spread / pi``. Along the line that the step goes, the loss of one state with linear logits
    is ``-t dz_y + log F(t)``, ``F(t) = sum_k exp(z_k + t dz_k)``. Its Taylor series converges up to
    the nearest complex zero of F, and no zero is nearer than ``pi / spread``: for ``r < 1`` the
    step stays inside. This says nothing of descent. r grows in proportion to the step, and at
    temperature T it is ``Delta / (pi T)``, Delta the spread of the undivided logits.

    The released archgrid code takes the radius along the raw gradient but steps with Adam, which
    bounds nothing, and its RhoScaledAdam takes the spread of the logits for that of their change.

    Args:
        logits: ``[..., V]``, as in `spread`.
        direction: ``[..., V]``, as in `spread`.

    Returns:
        ``[...]``; NaN as in `spread`.

    Device: the logits'; no host synchronisation. In float64 where the device has it.
    Cost: O(m V), two copies.
    Source: Sao, arXiv 2603.13552, Theorem 4.6 and Definition 5.1.
    """
    return spread(logits, direction) / pi


def radius(logits: Tensor, direction: Tensor) -> Tensor:
    """How many such steps may surely be made for the loss's Taylor series to converge?

    ``rho_a = pi / spread = 1 / r``, never above the exact radius, which is two to three times as
    large in random cases with ten classes. `entropylens.analysis.exact_radius` finds it.

    Args:
        logits: ``[..., V]``, as in `spread`.
        direction: ``[..., V]``, as in `spread`.

    Returns:
        ``[...]``; inf where all classes move alike, NaN as in `spread`.

    Device: the logits'; no host synchronisation. In float64 where the device has it.
    Cost: O(m V), two copies.
    Source: Sao, arXiv 2603.13552, Theorem 4.6.
    """
    return pi / spread(logits, direction)


def binary_radius(logits: Tensor, direction: Tensor) -> Tensor:
    """How far does the loss's Taylor series converge along a step, exactly, for two classes?

    ``sqrt((z_1 - z_2)^2 + pi^2) / |dz_1 - dz_2|``.

    Args:
        logits: ``[..., 2]``, as in `spread`.
        direction: ``[..., 2]``, as in `spread`.

    Returns:
        ``[...]``; inf where both move alike, or one is masked.

    Raises:
        ValueError: There are not two classes.

    Device: the logits'; no host synchronisation. In float64 where the device has it.
    Cost: O(m).
    Source: Sao, arXiv 2603.13552, Theorem 4.3. For more classes the same with the target and the
        runner-up (Eq. 13) is neither exact nor a bound.

    Example:
        >>> found = binary_radius(torch.tensor([4.0, 0.0]), torch.tensor([1.0, 0.0]))
        >>> round(found.item() ** 2 - pi**2, 9)
        16.0
    """
    if logits.shape[-1] != 2:
        raise ValueError(
            f"binary_radius: expected logits [..., 2], got {list(logits.shape)}; "
            "margin_radius is a bound for any number of classes"
        )
    states = _States(logits, direction)
    return torch.hypot(states.log_odds, torch.full_like(states.spread, pi)) / states.spread


def margin_radius(logits: Tensor, direction: Tensor) -> Tensor:
    """How many such steps may surely be made, given how sure of its likeliest class the model is?

    ``sqrt((pi / D)^2 + (max(0, m) / D_k)^2)`` with D the spread, k the likeliest class,
    ``m = log(p_k / (1 - p_k))`` and ``D_k = max_j |dz_j - dz_k|``: at a zero ``u + i y`` of F the
    other classes have to outweigh k, so that ``|u| >= m / D_k``, besides ``|y| >= pi / D``. Never
    below `radius`, never above the exact radius, and equal to it for two classes.

    Args:
        logits: ``[..., V]``, as in `spread`.
        direction: ``[..., V]``, as in `spread`.

    Returns:
        ``[...]``; inf where all classes move alike, NaN as in `spread`.

    Device: the logits'; no host synchronisation. In float64 where the device has it.
    Cost: O(m V), four copies.
    Source: derived here; arXiv 2603.13552 has the first term.

    Example:
        >>> found = margin_radius(torch.tensor([4.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 0.0]))
        >>> torch.tensor(found.item() ** 2 - pi**2).sqrt() + torch.tensor(2.0).log()
        tensor(4.)
    """
    return _States(logits, direction).margin_radius


def weighted_ratio(logits: Tensor, direction: Tensor) -> Tensor:
    """How many times the radius is the step, if classes count by their probability?

    ``2 sqrt(Var_p(dz)) / pi``, at most r (Popoviciu), and far below it where only classes without
    probability move. It is the step's size in Kullback-Leibler divergence: with linear logits
    ``KL(p || p') = Var_p(dz) / 2`` within ``spread^3 / (36 sqrt 3)``, since no third central moment
    exceeds ``spread^3 / (6 sqrt 3)``. The paper's Eq. 26 has ``KL(p' || p)`` and 18 for 36: another
    statement, of the other divergence, for which 36 would be wrong.

    Args:
        logits: ``[..., V]``, as in `spread`.
        direction: ``[..., V]``, as in `spread`.

    Returns:
        ``[...]``; NaN as in `spread`.

    Device: the logits'; no host synchronisation. In float64 where the device has it.
    Cost: O(m V), four copies.
    """
    return _States(logits, direction).weighted_ratio


def flips(before: Tensor, after: Tensor) -> Tensor:
    """Is another class likelier now than the one that was the likeliest?

    ``max_k after_k > after_j``, j the likeliest class of ``before`` (of several, one).

    Args:
        before: ``[..., V]`` logits.
        after: ``[..., V]`` logits; ``before + dz`` for what should happen to first order.

    Returns:
        ``[...]`` 1 or 0, NaN where a logit is NaN.

    Device: the logits'; no host synchronisation.
    Cost: O(m V).

    Example:
        >>> z = torch.tensor([2.0, 1.0])
        >>> flips(z, z + torch.tensor([0.0, 1.5])), flips(z, z + torch.tensor([0.0, 0.5]))
        (tensor(1.), tensor(0.))
    """
    old, likeliest = before.max(-1, keepdim=True)
    excess = after.amax(-1) - after.gather(-1, likeliest)[..., 0]
    return _is_positive(torch.where(old[..., 0].isnan(), torch.nan, excess))


def _is_positive(values: Tensor) -> Tensor:
    """1 or 0, NaN where the value is."""
    return torch.where(values.isnan(), torch.nan, (values > 0).to(values.dtype))


def may_flip(logits: Tensor, direction: Tensor) -> Tensor:
    """Could a step that moves logits this far apart change the likeliest class?

    ``z_(1) - z_(2) < spread = pi r``. Where it is not so the likeliest class stays, for any step of
    that spread and linear logits.

    Args:
        logits: ``[..., V]``, as in `spread`.
        direction: ``[..., V]``, as in `spread`.

    Returns:
        ``[...]`` 1 or 0, NaN as in `spread`.

    Device: the logits'; no host synchronisation.
    Cost: O(m V), three copies.

    Example:
        >>> may_flip(torch.tensor([[2.0, 1.0]]), torch.tensor([[0.6, -0.6]]))[0].item()
        1.0
    """
    return _States(logits, direction).may_flip


def loss_change(
    before: Tensor, after: Tensor, direction: Tensor, token_id: Tensor
) -> tuple[Tensor, Tensor]:
    """By how much does the update change each target's cross-entropy, to first order and in truth?

    ``-dz_y + sum_k p_k dz_k`` and ``log p(y) - log p'(y)``, p' after the update.

    Args:
        before: ``[..., V]`` logits, divided by the loss's temperature, -inf where masked.
        after: ``[..., V]`` logits after the update.
        direction: ``[..., V]`` first-order change of the logits by the whole update, dz.
        token_id: ``[...]`` targets y.

    Returns:
        Predicted and measured change, ``[...]`` each; NaN for a target that is masked.

    Unit: nats.
    Device: the logits'; no host synchronisation. In float64 where the device has it.
    Cost: O(m V), four copies.

    Example:
        >>> z, dz = torch.tensor([1.0, 0.0]), torch.tensor([1e-3, 0.0])
        >>> predicted, measured = loss_change(z, z + dz, dz, torch.tensor(0))
        >>> bool((predicted / measured - 1).abs() < 1e-3), bool(measured < 0)
        (True, True)
    """
    states = _States(before, direction)
    old, new = states.logprob(token_id), _logprob(after, token_id)
    known = old != -torch.inf
    changes = (states.loss_change(token_id), old - new)
    predicted, measured = (torch.where(known, change, torch.nan) for change in changes)
    return predicted, measured


def _logprob(logits: Tensor, token_id: Tensor) -> Tensor:
    found = logits.to(wide_dtype(logits))
    return found.gather(-1, token_id[..., None])[..., 0] - found.logsumexp(-1)


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
    states = _States(old, change)
    found = {
        "ratio": states.spread / pi,
        "above_one": _is_positive(states.spread - pi),
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
            "loss_change/measured": logprob - _logprob(new, token_id),
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
