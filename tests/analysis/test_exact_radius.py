from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from entropylens.analysis import exact_radius as module
from entropylens.analysis.exact_radius import exact_radius

Floats = NDArray[np.float64]


def of_one(logits: Any, direction: Any) -> float:
    return float(exact_radius(np.atleast_2d(logits), np.atleast_2d(direction))[0])


def by_roots(logits: Floats, slopes: NDArray[np.int64]) -> float:
    """With whole slopes the sum is a polynomial in w = e^t, and t = log w."""
    coefficients = np.zeros(slopes.max() + 1)
    np.add.at(coefficients, slopes, np.exp(logits))
    return float(np.abs(np.log(np.roots(coefficients[::-1]).astype(complex))).min())


def whole_slopes(generator: np.random.Generator, classes: int) -> NDArray[np.int64]:
    slopes = generator.integers(0, 15, classes)
    slopes[0], slopes[1] = 0, generator.integers(1, 15)
    return slopes


def bound(logits: Floats, direction: Floats) -> tuple[float, float]:
    """Without and with the likeliest class, as a loop."""
    spread = max(direction) - min(direction)
    p = np.exp(logits - np.logaddexp.reduce(logits))
    k = int(np.argmax(p))
    odds = logits[k] - np.logaddexp.reduce(np.delete(logits, k))
    farthest = max(abs(a - direction[k]) for a in direction)
    return np.pi / spread, float(np.hypot(np.pi / spread, max(0.0, odds) / farthest))


def test_two_classes_have_the_closed_form() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(60, 2)) * generator.choice([0.1, 1, 10, 100], (60, 1))
    direction = generator.normal(size=(60, 2)) * 10 ** generator.uniform(-4, 4, (60, 1))
    gap, speed = (values[:, 0] - values[:, 1] for values in (logits, direction))
    assert np.allclose(exact_radius(logits, direction), np.hypot(gap, np.pi) / abs(speed), 1e-12, 0)


def test_whole_slopes_have_the_roots_of_a_polynomial_and_no_bound_exceeds_them() -> None:
    generator = np.random.default_rng(1)
    for case in range(264):
        classes, scale = 2 + case % 11, (0.3, 1.0, 3.0, 8.0)[case % 4]
        logits = scale * generator.normal(size=classes)
        slopes = whole_slopes(generator, classes)
        found, direction = of_one(logits, slopes), slopes.astype(float)
        assert found == pytest.approx(by_roots(logits, slopes), rel=1e-6)
        plain, margin = bound(logits, direction)
        assert plain <= margin <= found * (1 + 1e-9)


@pytest.mark.soak
def test_ten_thousand_polynomials() -> None:
    generator = np.random.default_rng(2)
    for case in range(10_000):
        classes, scale = 2 + case % 11, 10 ** generator.uniform(-1, 0.9)
        logits = scale * generator.normal(size=classes)
        slopes = whole_slopes(generator, classes)
        found = of_one(logits, slopes)
        assert found == pytest.approx(by_roots(logits, slopes), rel=1e-5)
        assert bound(logits, slopes.astype(float))[1] <= found * (1 + 1e-9)


def test_slopes_that_are_not_whole_leave_the_sum_at_zero_there_and_nowhere_nearer() -> None:
    """Coefficients of log F, by dividing series, grow as the power of the inverse radius."""
    generator = np.random.default_rng(3)
    for _ in range(5):
        logits, direction = generator.normal(size=(2, 4))
        found = of_one(logits, direction)
        weights, slopes = np.exp(logits) / np.exp(logits).sum(), direction * found
        series = [weights.sum()]
        terms = weights
        for n in range(1, 300):
            terms = terms * slopes / n
            series.append(terms.sum())
        loss = [0.0]
        for n in range(1, 300):
            known = sum(j * loss[j] * series[n - j] for j in range(1, n))
            loss.append(series[n] - known / n)
        # Two conjugate zeros on the unit circle: |n l_n| = 2 |cos(n phase)|, at most 2.
        largest = max(abs(n * loss[n]) for n in range(250, 300))
        assert 1.5 < largest < 2.01


def test_scale_shift_and_order_of_the_classes() -> None:
    generator = np.random.default_rng(4)
    logits, direction = 2 * generator.normal(size=(2, 5, 7))
    found = exact_radius(logits, direction)
    assert np.allclose(exact_radius(logits + 9, 3 - 4 * direction), found / 4, 1e-9)
    order = generator.permutation(7)
    assert np.allclose(exact_radius(logits[:, order], direction[:, order]), found, 1e-9)


def test_a_double_zero_is_found() -> None:
    assert of_one(np.log([1, 2, 1]), [0, 1, 2]) == pytest.approx(np.pi, rel=1e-6)


def test_a_thousand_classes_are_all_kept() -> None:
    generator = np.random.default_rng(5)
    logits, direction = generator.normal(size=(2, 1000))
    found = of_one(logits, direction)
    assert bound(logits, direction)[1] <= found
    unlikely = np.append(logits, -20.0), np.append(direction, 100.0)
    assert bound(*unlikely)[0] < of_one(*unlikely) < found


def test_a_masked_class_is_left_out_and_equal_slopes_have_no_zero() -> None:
    found = of_one([1.0, -np.inf, 0.0], [2.0, np.nan, -1.0])
    assert found == pytest.approx(np.hypot(1, np.pi) / 3)
    assert of_one([1.0, 0.0], [3.0, 3.0]) == np.inf
    assert of_one([0.0, -np.inf], [3.0, 5.0]) == np.inf


@pytest.mark.parametrize(
    ("logits", "direction"),
    [
        ([np.nan, 0.0], [1.0, 0.0]),
        ([0.0, 0.0], [1.0, np.inf]),
        ([-np.inf, -np.inf], [1.0, 0.0]),
        ([0.0, -1e30], [1.0, 0.0]),
    ],
)
def test_what_cannot_be_known_is_not_a_number(logits: list[float], direction: list[float]) -> None:
    assert np.isnan(of_one(logits, direction))
    both = exact_radius(np.array([logits, [0.0, 0.0]]), np.array([direction, [1.0, 0.0]]))
    assert both[1] == pytest.approx(np.pi)


def test_a_farther_zero_is_refused_and_looked_for_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, direction = np.array([[1.0, 0.0]]), np.array([[1.0, 0.0]])
    honest, attempts = module._zeros_near, []

    def second(total: Any, low: float, high: float) -> Any:
        attempts.append(high - low)
        return np.array([1 + 3j * np.pi])

    monkeypatch.setattr(module, "_zeros_near", second)
    assert np.isnan(exact_radius(logits, direction)[0])
    assert len(attempts) == module._ATTEMPTS
    assert attempts[-1] < attempts[0] / 1000

    def late(total: Any, low: float, high: float) -> Any:
        return honest(total, low, high) if high - low < 0.01 else second(total, low, high)

    monkeypatch.setattr(module, "_zeros_near", late)
    assert exact_radius(logits, direction)[0] == pytest.approx(np.hypot(1, np.pi))


def test_a_count_that_rounding_hides_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NOISE", 2.0)
    assert np.isnan(of_one([1.0, 0.0], [1.0, 0.0]))


def test_zeros_are_counted_as_the_roots_of_the_polynomial_lie() -> None:
    generator = np.random.default_rng(6)
    for classes in (2, 3, 5, 9):
        logits, slopes = 2 * generator.normal(size=classes), whole_slopes(generator, classes)
        most = int(slopes.max())
        coefficients = np.zeros(most + 1)
        np.add.at(coefficients, slopes, np.exp(logits))
        roots = np.log(np.roots(coefficients[::-1]).astype(complex))
        turns = 2j * np.pi * np.arange(-20, 21)
        zeros = most * (roots[:, None] + turns).ravel()
        total = module._ExponentialSum(logits, slopes / most)
        for radius in (3.0, 10.0, 25.0, 70.0):
            expected = int(((np.abs(zeros) < radius) & (zeros.imag > 0)).sum())
            assert module._zeros_within(total, radius) == expected


def test_blocks_of_points_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, direction = np.random.default_rng(7).normal(size=(2, 6))
    whole = of_one(logits, direction)
    monkeypatch.setattr(module, "_BLOCK", 100)
    assert of_one(logits, direction) == whole


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\) and \(2, 4\)"):
        exact_radius(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"\[states, classes\]"):
        exact_radius(np.zeros(3), np.zeros(3))
