"""How far may this step go? Policies that judge an update by a run's own past and by its logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite
from typing import Final

from entropylens.control.history import History
from entropylens.control.memory import LEAST, OF_BATCHES, Memory
from entropylens.control.policies import POLICIES
from entropylens.control.signals import Admission, Decision, GradientSignals, UpdateSignals
from entropylens.errors import unknown_name

__all__ = ["MODES", "StepBound", "admit", "decide"]

MODES: Final = ("off", "shadow", "enforce")


@dataclass(frozen=True, kw_only=True)
class StepBound:
    """How a run's steps are bounded.

    Triggers say *when* to look at a step: a gradient norm or a loss beyond their own robust past,
    a learning rate beyond any before, changed optimiser settings, anything non-finite. What the
    update does to the logits, and its size against the run's own, says *how far* it may go.

    Args:
        policy: A name of `POLICIES`.
        mode: ``shadow`` decides and logs, and changes nothing; ``enforce`` acts; ``off``.
        level: Share of the radius pi / Delta that ``radius`` allows, and ``radius_relative`` at
            least.
        factor: Updates up to so many times the typical one are ordinary, and so are ratios for
            ``radius_relative``.
        gradient_factor: Gradient norms up to so many times their median are ordinary, and so are
            moves of batch norm's running variances.
        loss_factor: Losses up to so many times their median are ordinary.
        deviations: And so is, of either, what lies within so many robust standard deviations of the
            logarithm.
        rate_factor: Learning rates up to so many times the highest before are ordinary.
        window: Steps that are remembered.
        every: Interval of steps at which the update's size is measured where nothing is suspicious.
        warmup: First steps, in which only what is not finite is suspicious.
        settle: Steps whose updates are measured after a change of settings, or after the last that
            was too large.
        patience: Steps in a row with a suspicious gradient or loss, or with too large an update
            though nobody set anything, after which that is the new normal.
        ring: Copies of the training's state that are kept in host memory for `StepGuard.rewind`.
        ring_every: Interval of steps at which one is taken, unless the step is suspicious.

    Raises:
        ValueError: An unknown policy or mode (with the nearest name), or a number out of range.
    """

    policy: str = "combined"
    mode: str = "shadow"
    level: float = 1.0
    factor: float = 3.0
    gradient_factor: float = 10.0
    loss_factor: float = 1.5
    deviations: float = 6.0
    rate_factor: float = 3.0
    window: int = 64
    every: int = 8
    warmup: int = 20
    settle: int = 50
    patience: int = 8
    ring: int = 0
    ring_every: int = 100

    def __post_init__(self) -> None:
        """Check."""
        if self.policy not in POLICIES:
            raise ValueError(unknown_name("StepBound", "policy", self.policy, POLICIES))
        if self.mode not in MODES:
            raise ValueError(unknown_name("StepBound", "mode", self.mode, MODES))
        for name in ("factor", "gradient_factor", "loss_factor", "rate_factor"):
            if not getattr(self, name) > 1:
                raise ValueError(
                    f"StepBound: expected {name} above 1, got {getattr(self, name)}; it multiplies "
                    f"what is typical"
                )
        for name in ("level", "deviations"):
            if not getattr(self, name) > 0:
                raise ValueError(f"StepBound: expected {name} > 0, got {getattr(self, name)}")
        least = dict.fromkeys(("window", "every", "warmup", "settle", "patience", "ring_every"), 1)
        for name, smallest in {**least, "ring": 0}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < smallest:
                raise ValueError(
                    f"StepBound: expected {name} to be an int of at least {smallest}, got {value!r}"
                )


def admit(bound: StepBound, memory: Memory, seen: GradientSignals) -> Admission:
    """Judge a step before the optimiser makes it.

    Args:
        bound: The configuration.
        memory: What came before; it is not changed.
        seen: The step's gradients, loss and settings.

    Returns:
        What to do.
    """
    policy = POLICIES[bound.policy]
    if not isfinite(seen.norm):
        return Admission(gradient_scale=0.0, cause="gradient not finite", suspicions=("gradient",))
    suspicions = _suspicions(bound, memory, seen)
    is_due = memory.steps % bound.every == 0 or len(memory.updates) < LEAST or bool(suspicions)
    looks = policy.looks_always or (
        policy.looks_when_suspicious and bool({*suspicions} - {"settling"})
    )
    keep = looks or policy.measures_always or (policy.looks_when_suspicious and is_due)
    if policy.drops_bad_batches and len(OF_BATCHES & {*suspicions}) > 1:
        return Admission(gradient_scale=0.0, cause="batch", suspicions=suspicions)
    if "gradient" not in suspicions or policy.gradient_cap is None:
        return Admission(keep=keep, look=looks, suspicions=suspicions)
    scale = min(policy.gradient_cap(bound, memory) / seen.norm, 1.0)
    if scale == 0:
        return Admission(gradient_scale=0.0, cause="gradient", suspicions=suspicions)
    return Admission(
        gradient_scale=scale, cause="gradient", keep=keep, look=looks, suspicions=suspicions
    )


def _suspicions(bound: StepBound, memory: Memory, seen: GradientSignals) -> tuple[str, ...]:
    if memory.steps < bound.warmup:
        return ()

    def exceeds(history: History, value: float, factor: float) -> bool:
        is_known = len(history) >= min(bound.warmup, bound.window)
        return is_known and history.exceeds(value, factor, bound.deviations)

    found = []
    if exceeds(memory.gradients, seen.norm, bound.gradient_factor):
        found.append("gradient")
    if seen.loss is not None and (
        not isfinite(seen.loss) or exceeds(memory.losses, seen.loss, bound.loss_factor)
    ):
        found.append("loss")
    if seen.statistics is not None and exceeds(
        memory.statistics, seen.statistics, bound.gradient_factor
    ):
        found.append("statistics")
    if memory.highest_rate and seen.rate > bound.rate_factor * memory.highest_rate:
        found.append("rate")
    if memory.settings is not None and _have_changed(memory.settings, seen.settings):
        found.append("settings")
    elif memory.settling:
        found.append("settling")
    return tuple(found)


def _have_changed(before: tuple[float, ...], after: tuple[float, ...]) -> bool:
    """Whether a number is twice or half what it was, or as far from 1, as decay rates are.

    Those of a group that has come since stand last, and are no change of the others.
    """
    if before == after:
        return False
    for old, new in zip(before, after, strict=False):
        if old == new:
            continue
        near_one = 0.5 <= old < 1 or 0.5 <= new < 1
        sizes = [(abs(old), abs(new)), (abs(1 - old), abs(1 - new))][: 1 + near_one]
        if any(max(pair) > 2 * min(pair) for pair in sizes):
            return True
    return False


def decide(bound: StepBound, memory: Memory, update: UpdateSignals) -> Decision:
    """Judge an update that the optimiser proposes.

    Args:
        bound: The configuration.
        memory: What came before; it is not changed.
        update: The update's size and what it does to the logits.

    Returns:
        How much of it to keep.
    """
    decision = POLICIES[bound.policy].rule(bound, memory, update)
    if not update.is_finite and not decision.cause:
        # Its non-finite entries are left out: that is a change, too.
        return replace(decision, cause="not finite")
    return decision
