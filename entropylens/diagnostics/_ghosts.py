"""How far the Taylor series of the softmax loss reaches along an update, to first order."""

from functools import cached_property
from math import pi

import torch
from torch import Tensor

from entropylens.diagnostics._summaries import wide_dtype

__all__ = [
    "States",
    "binary_radius",
    "flips",
    "is_positive",
    "logprob_of",
    "loss_change",
    "margin_radius",
    "may_flip",
    "radius",
    "ratio",
    "spread",
    "weighted_ratio",
]


class States:
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
        return is_positive(self.spread + self.others.amax(-1))

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
    return States(logits, direction).spread


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
    states = States(logits, direction)
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
    return States(logits, direction).margin_radius


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
    return States(logits, direction).weighted_ratio


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
    return is_positive(torch.where(old[..., 0].isnan(), torch.nan, excess))


def is_positive(values: Tensor) -> Tensor:
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
    return States(logits, direction).may_flip


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
    states = States(before, direction)
    old, new = states.logprob(token_id), logprob_of(after, token_id)
    known = old != -torch.inf
    changes = (states.loss_change(token_id), old - new)
    predicted, measured = (torch.where(known, change, torch.nan) for change in changes)
    return predicted, measured


def logprob_of(logits: Tensor, token_id: Tensor) -> Tensor:
    found = logits.to(wide_dtype(logits))
    return found.gather(-1, token_id[..., None])[..., 0] - found.logsumexp(-1)
