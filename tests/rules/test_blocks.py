import numpy as np
import pytest
from numpy.typing import NDArray

from entropylens.rules.blocks import block_length, fit_line, memory

Floats = NDArray[np.float64]


def remembering(generator: np.random.Generator, count: int, rho: float) -> Floats:
    """Noise of variance 1 whose autocorrelation at lag k is rho^k."""
    noise = np.empty(count)
    noise[0] = generator.standard_normal()
    for at in range(1, count):
        noise[at] = rho * noise[at - 1] + np.sqrt(1 - rho**2) * generator.standard_normal()
    return noise


def test_a_line_is_that_of_the_normal_equations() -> None:
    generator = np.random.default_rng(0)
    x = 50 + generator.standard_normal(80).cumsum()
    y = 3 - 0.7 * x + remembering(generator, 80, 0.5)
    design = np.column_stack([np.ones(80), x])
    intercept, slope = np.linalg.solve(design.T @ design, design.T @ y)
    line = fit_line(x, y)
    assert line.slope == pytest.approx(slope, rel=1e-9)
    assert line.intercept == pytest.approx(intercept, rel=1e-9)
    np.testing.assert_allclose(line.residuals, y - design @ [intercept, slope], atol=1e-9)


@pytest.mark.parametrize("parameters", [2, 13])
def test_draws_are_refits_of_the_line_with_noise_drawn_in_blocks(parameters: int) -> None:
    generator = np.random.default_rng(1)
    x = np.linspace(0, 1, 40)
    y = 1 + 2 * x + remembering(generator, 40, 0.6)
    line = fit_line(x, y, block=5, repetitions=7, seed=3, parameters=parameters)
    rho = line.memory
    assert rho == memory(line.residuals, parameters)
    innovations = line.residuals[1:] - rho * line.residuals[:-1]
    innovations = (innovations - innovations.mean()) * np.sqrt(40 / (39 - parameters))
    starts = np.random.default_rng(3).integers(0, 35, (7, 8))
    for row, drawn in zip(starts, line.draws, strict=True):
        shocks = np.concatenate([innovations[s : s + 5] for s in row])
        noise = [shocks[0] / np.sqrt(1 - rho**2)]
        for shock in shocks[1:]:
            noise.append(rho * noise[-1] + shock)
        refit = np.polyfit(x, line.intercept + line.slope * x + np.array(noise), 1)
        reflected = 2 * np.array([line.intercept, line.slope]) - refit[::-1]
        np.testing.assert_allclose(drawn, reflected, atol=1e-9)


def test_intervals_cover_the_truth_where_those_for_independent_noise_do_not() -> None:
    generator = np.random.default_rng(2)
    x = np.exp(-np.linspace(0, 4, 120))
    ours, plain, runs = 0, 0, 150
    for seed in range(runs):
        y = 0.6 - 0.2 * x + 0.03 * remembering(generator, 120, 0.8)
        line = fit_line(x, y, repetitions=100, seed=seed)
        low, high = np.quantile(line.draws[:, 1], [0.025, 0.975])
        ours += low <= -0.2 <= high
        variance = line.residuals @ line.residuals / 118 / ((x - x.mean()) ** 2).sum()
        plain += abs(line.slope + 0.2) < 1.98 * np.sqrt(variance)
    assert 0.87 <= ours / runs <= 0.99
    assert plain / runs < 0.65


def test_the_memory_of_noise_is_found_without_the_bias_of_short_series() -> None:
    generator = np.random.default_rng(3)
    x = np.linspace(0, 1, 60)
    found = [memory(fit_line(x, remembering(generator, 60, 0.7)).residuals) for _ in range(300)]
    assert np.mean(found) == pytest.approx(0.7, abs=0.03)
    assert memory(np.zeros(10)) == 0
    waves = [np.cos(np.pi * j * np.arange(200) / 199) for j in range(10)]
    basis, _ = np.linalg.qr(np.column_stack(waves))
    for rho in (0.0, 0.6):
        found = []
        for _ in range(200):
            noise = remembering(generator, 200, rho)
            found.append(memory(noise - basis @ (basis.T @ noise), 10))
        assert np.mean(found) == pytest.approx(rho, abs=0.03)


def test_blocks_grow_with_memory_and_with_the_cube_root_of_the_length() -> None:
    white = np.tile([1.0, 1.0, -1.0, -1.0], 250)
    assert block_length(white) == 10
    assert block_length(np.tile([1.0, 1.0, -1.0, -1.0], 16)) == 4
    assert block_length(np.repeat([1.0, -1.0] * 25, 20)) > 40
    assert block_length(np.ones(3)) == 1


def test_no_global_random_state_is_touched() -> None:
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
    fit_line(np.arange(30.0), np.arange(30.0) ** 2)
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]  # noqa: NPY002
