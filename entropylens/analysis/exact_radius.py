"""How far along an update does the Taylor series of the softmax loss converge, exactly?"""

from dataclasses import dataclass
from math import ceil, inf, nan, pi
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["exact_radius"]

Floats = NDArray[np.float64]
Complexes = NDArray[np.complex128]

SHARE: Final = 0.999
"""Share of the found radius inside which no other zero may lie."""
_WIDTH: Final = 0.25
"""Of the ring in which Newton's method starts; neighbouring zeros are some 2 pi apart."""
_ATTEMPTS: Final = 12
"""Rings, each a quarter as wide as the one before."""
_STARTS: Final = 16
_STEPS: Final = 60
_FARTHEST: Final = 2.0
"""Longest step of Newton's method."""
_ROUNDS: Final = 40
_LEAST_POINTS: Final = 256
_LARGEST: Final = 1e4
"""Radius times spread beyond which nothing is looked for: log-odds of thousands of nats."""
_NOISE: Final = 1e-13
"""Size of the sum, as a share of the sum of its terms' sizes, that rounding alone may make."""
_BLOCK: Final = 1 << 20


@dataclass(frozen=True)
class _ExponentialSum:
    """``G(u) = sum_k exp(log_weights_k + slopes_k u)`` with slopes from 0 to 1."""

    log_weights: Floats
    slopes: Floats

    def __call__(self, points: Complexes) -> tuple[Complexes, Complexes, Floats]:
        """G, its derivative and the sum of its terms' sizes, all divided by the largest term."""
        parts = np.array_split(points, 1 + points.size * self.slopes.size // _BLOCK)
        found = [self._part(part) for part in parts]
        value, derivative, size = (np.concatenate(columns) for columns in zip(*found, strict=True))
        return value, derivative, size

    def _part(self, points: Complexes) -> tuple[Complexes, Complexes, Floats]:
        exponents = self.log_weights + np.multiply.outer(points, self.slopes)
        terms = np.exp(exponents - exponents.real.max(1, keepdims=True))
        return terms.sum(1), terms @ self.slopes, np.abs(terms).sum(1)


def exact_radius(logits: Floats, direction: Floats) -> Floats:
    """How long may an update be for the loss's Taylor series along it to converge, exactly?

    ``min |t|`` over the complex zeros of ``F(t) = sum_k exp(z_k + a_k t)``, in multiples of the
    update that ``direction`` belongs to. With slopes scaled to 0..1 the zeros in growing half discs
    are counted by the turns of F's phase along the edge (the argument principle) until the nearest
    lies in a narrow ring; Newton's method finds it there, and the phase has to say that none is
    nearer than 0.999 of it. Where Newton's method missed it, the ring is narrowed and it starts
    anew. All classes are kept: leaving any out changes F, and can only raise ``pi / spread``.

    Args:
        logits: ``[m, V]``, divided by the loss's temperature; -inf is probability 0 and leaves the
            class out.
        direction: ``[m, V]`` first-order change of the logits, a.

    Returns:
        ``[m]``; inf where all classes move alike. NaN where an input is not finite, and where the
        count cannot be trusted (terms that cancel to 13 digits), the zero was not found, or is
        further than log-odds of 10^4 nats put it: never an unchecked number.

    Raises:
        ValueError: The two are not matrices of one shape.

    Device: the host's, float64.
    Cost: some 3 ms a state for ten classes, 1 s for some thousands; O(V) memory in blocks.
    Source: Sao, Ghosts of Softmax, arXiv 2603.13552, Proposition 4.2; the count is ours.

    Example:
        >>> exact_radius(np.array([[3.0, 0.0]]), np.array([[2.0, 0.0]])) * 2 - np.hypot(3, np.pi)
        array([0.])
    """
    logits, direction = (np.asarray(values, dtype=np.float64) for values in (logits, direction))
    if logits.ndim != 2 or logits.shape != direction.shape:
        raise ValueError(
            "exact_radius: expected logits and direction [states, classes] of one shape, got "
            f"{logits.shape} and {direction.shape}"
        )
    return np.array([_of_state(z, a) for z, a in zip(logits, direction, strict=True)])


def _of_state(logits: Floats, direction: Floats) -> float:
    kept = logits != -inf
    logits, direction = logits[kept], direction[kept]
    if not (kept.any() and np.isfinite(logits).all() and np.isfinite(direction).all()):
        return nan
    slopes = direction - direction.min()
    spread = slopes.max()
    if spread == 0:
        return inf
    total = _ExponentialSum(logits - logits.max(), slopes / spread)
    return _nearest_zero(total) / float(spread)


def _nearest_zero(total: _ExponentialSum) -> float:
    """Smallest ``|u|`` of the zeros of a sum; NaN where it was not found, or not surely."""
    # Below pi the terms' phases lie in half a plane.
    low, high = pi, 1.25 * pi
    while (count := _zeros_within(total, high)) == 0:
        low, high = high, 1.25 * high
        if high > _LARGEST:
            return nan
    width = _WIDTH
    for _ in range(_ATTEMPTS):
        while count is not None and high - low > width:
            middle = (low + high) / 2
            count = _zeros_within(total, middle)
            low, high = (middle, high) if count == 0 else (low, middle)
        found = np.abs(_zeros_near(total, low, high))
        if found.size and _zeros_within(total, SHARE * float(found.min())) == 0:
            return float(found.min())
        width /= 4
    return nan


def _zeros_within(total: _ExponentialSum, radius: float) -> int | None:
    """Zeros with ``|u| < radius`` in the upper half plane; None where rounding hides them.

    On the real axis the sum is positive, so its phase turns on the arc alone. Wherever it may turn
    by a radian between two points another is put between them.
    """
    angle = np.linspace(0, pi, max(_LEAST_POINTS, ceil(2 * pi * radius)))
    phase, rate = _phase(total, radius * np.exp(1j * angle))
    for _ in range(_ROUNDS):
        if np.isinf(rate).any():
            return None
        is_far = np.diff(angle) * radius * np.maximum(rate[1:], rate[:-1]) > 1
        if not is_far.any():
            turns = (np.diff(phase) + pi) % (2 * pi) - pi
            return round(float(turns.sum()) / (2 * pi))
        between = (angle[1:][is_far] + angle[:-1][is_far]) / 2
        place = np.flatnonzero(is_far) + 1
        found = (between, *_phase(total, radius * np.exp(1j * between)))
        angle, phase, rate = (
            np.insert(old, place, new) for old, new in zip((angle, phase, rate), found, strict=True)
        )
    return None


def _phase(total: _ExponentialSum, points: Complexes) -> tuple[Floats, Floats]:
    """Phase of the sum, and how fast it may turn: ``|G' / G|``, infinite where G is rounding."""
    value, derivative, size = total(points)
    is_noise = np.abs(value) <= _NOISE * size
    rate = np.abs(derivative) / np.where(is_noise, 1, np.abs(value))
    return np.angle(value), np.where(is_noise, inf, rate)


def _zeros_near(total: _ExponentialSum, low: float, high: float) -> Complexes:
    """Zeros to which Newton's method leads from a ring, those in it."""
    angle = np.linspace(0, pi, max(_LEAST_POINTS, ceil(2 * pi * high)))
    ring = (low + high) / 2 * np.exp(1j * angle)
    _, rate = _phase(total, ring)
    points = ring[np.argsort(-rate)[:_STARTS]]
    step = np.full_like(points, inf)
    for _ in range(_STEPS):
        value, derivative, _ = total(points)
        with np.errstate(divide="ignore", invalid="ignore"):
            step = value / derivative
            step *= np.minimum(1, _FARTHEST / np.abs(step))
        points, step = points[np.isfinite(step)], step[np.isfinite(step)]
        points = points - step
        if not (np.abs(step) > 1e-15 * np.abs(points)).any():
            break
    size = np.abs(points)
    is_zero = (np.abs(step) < 1e-7 * size) & (np.abs(points.imag) >= pi * (1 - 1e-9))
    return points[is_zero & (size >= low * (1 - 1e-7)) & (size <= high * (1 + 1e-7))]
