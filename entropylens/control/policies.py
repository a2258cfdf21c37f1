"""How far a suspicious step may go: policies by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import TYPE_CHECKING, Final

from entropylens.control.memory import LEAST, Memory
from entropylens.control.signals import SCALES, Decision, UpdateSignals

if TYPE_CHECKING:
    from entropylens.control.step_bound import StepBound

__all__ = ["POLICIES", "Policy"]

_HARM: Final = (2.0, 0.1)
"""A linearised loss above so many times what it was, and by so many nats: it is as good as lost."""
_SPARE: Final = (1.1, 0.02)
"""And up to which it may rise where that is avoided."""
_STRICT: Final = (1.0, 0.02)
"""As both, from the second suspicious batch in a row on."""
_CHANGED: Final = (1.5, 4.0)
"""Times the typical size, and robust standard deviations, of ordinary updates where settings were
changed."""


def _pass(bound: StepBound, memory: Memory, update: UpdateSignals) -> Decision:
    return Decision()


def _capped(bound: StepBound, memory: Memory, update: UpdateSignals) -> Decision:
    """At most ``factor`` times the typical update."""
    typical = memory.typical_update(update.rate)
    if typical is None or update.norm <= bound.factor * typical:
        return Decision()
    return Decision(scale=bound.factor * typical / update.norm, cause="update norm")


def _typical(bound: StepBound, memory: Memory, update: UpdateSignals) -> Decision:
    """The typical update where this one is out of the ordinary.

    Beyond ``factor`` times the typical size where the rate is suspicious, beyond 1.5 times and 4
    deviations where settings were changed, and else as far beyond as gradients may be: updates are
    as heavy-tailed as they.
    """
    typical, factor = memory.typical_update(update.rate), bound.factor
    if typical is None:
        return Decision()
    middle = memory.updates.median() or 1.0
    if memory.has_changed:
        factor = min(memory.updates.limit(*_CHANGED) / middle, factor)
    elif "rate" not in update.suspicions:
        factor = memory.updates.limit(bound.gradient_factor, bound.deviations) / middle
    if update.norm <= factor * typical:
        return Decision()
    return Decision(scale=typical / update.norm, cause="update norm")


def _radius(bound: StepBound, memory: Memory, update: UpdateSignals) -> Decision:
    return _to_ratio(update.ratio, bound.level)


def _radius_relative(bound: StepBound, memory: Memory, update: UpdateSignals) -> Decision:
    typical = memory.ratios.median()
    if typical is None or len(memory.ratios) < LEAST:
        return Decision()
    return _to_ratio(update.ratio, max(bound.level, bound.factor * typical))


def _to_ratio(ratio: float | None, most: float) -> Decision:
    if ratio is None or ratio <= most:
        return Decision()
    return Decision(scale=most / ratio if isfinite(ratio) else 0.0, cause="radius")


def _searched(bound: StepBound, memory: Memory, update: UpdateSignals) -> Decision:
    """Where the linearised loss is least."""
    if update.losses is None:
        return Decision()
    finite = [loss if isfinite(loss) else inf for loss in update.losses]
    scale = SCALES[min(range(len(finite)), key=finite.__getitem__)]
    return Decision() if scale == 1 else Decision(scale=scale, cause="linearised loss")


def _dropped(bound: StepBound, memory: Memory, update: UpdateSignals) -> Decision:
    capped = _capped(bound, memory, update)
    return capped if capped.scale == 1 else replace(capped, scale=0.0)


def _combined(bound: StepBound, memory: Memory, update: UpdateSignals) -> Decision:
    """The typical size, and less where the last ordinary batch would be as good as lost."""
    decision = _typical(bound, memory, update)
    losses = update.losses
    if losses is None:
        return decision
    allowed = (_HARM, _SPARE) if memory.batches_in_a_row < 2 else (_STRICT, _STRICT)
    harm, spare = (max(losses[-1] * times, losses[-1] + nats) for times, nats in allowed)
    # The linearised loss is convex: nowhere before a scale is it above both ends.
    next_above = max(at for at, scale in enumerate(SCALES) if scale >= decision.scale)
    if losses[next_above] <= harm:
        return decision
    scales = zip(SCALES, losses, strict=True)
    fitting = (scale for scale, loss in scales if scale <= decision.scale and loss <= spare)
    return Decision(scale=next(fitting, 0.0), cause="linearised loss")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """When a policy looks at a step, and how far it lets it go."""

    rule: Callable[[StepBound, Memory, UpdateSignals], Decision]
    measures_always: bool = False
    looks_always: bool = False
    looks_when_suspicious: bool = False
    gradient_cap: Callable[[StepBound, Memory], float] | None = None
    """Norm to which gradients with a suspicious one are brought."""
    drops_bad_batches: bool = False
    """Whether steps of batches that are suspicious in two ways are left out."""


def _median_gradient(bound: StepBound, memory: Memory) -> float:
    return memory.gradients.median() or 0.0


def _largest_gradient(bound: StepBound, memory: Memory) -> float:
    return memory.gradients.limit(bound.gradient_factor, bound.deviations)


POLICIES: Final[Mapping[str, Policy]] = {
    "combined": Policy(
        rule=_combined,
        looks_when_suspicious=True,
        gradient_cap=_median_gradient,
        drops_bad_batches=True,
    ),
    "update_norm": Policy(rule=_capped, measures_always=True),
    "gradient_norm": Policy(rule=_pass, gradient_cap=_largest_gradient),
    "radius": Policy(rule=_radius, looks_always=True),
    "radius_relative": Policy(rule=_radius_relative, looks_always=True),
    "linearised_search": Policy(rule=_searched, looks_always=True),
    "skip": Policy(rule=_dropped, looks_when_suspicious=True, gradient_cap=lambda *_: 0.0),
}
"""What a bound may be called: see the docs."""
