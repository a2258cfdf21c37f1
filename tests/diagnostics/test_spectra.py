from itertools import pairwise
from math import log, pi, sqrt

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from entropylens.diagnostics import _spectra
from entropylens.diagnostics._power_iteration import power_iteration, start_vector
from entropylens.diagnostics._spectra import (
    Summary,
    effective_shape,
    gram_matrix,
    marchenko_pastur,
    null_entropy_deficit,
    null_kappa,
    null_log_kappa,
    permuted,
    rounding_floor,
    singular_values,
    summarise,
)

SHAPES = [(1, 1), (1, 7), (7, 1), (24, 24), (24, 40), (90, 24), (33, 130)]


def random(seed: int, m: int, n: int) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_values(seed: int, values: torch.Tensor, n: int) -> torch.Tensor:
    """A ``[k, n]`` matrix of these singular values in random directions."""
    k = len(values)
    left, right = (torch.linalg.qr(random(seed + at, rows, k)).Q for at, rows in ((0, k), (1, n)))
    return (left * values) @ right.T


def falling(kind: str, k: int, kappa: float) -> torch.Tensor:
    values = torch.ones(k, dtype=torch.float64)
    if kind == "geometric":
        return torch.logspace(0, -log(kappa, 10), k, dtype=torch.float64)
    values[{"one": k - 1, "half": k // 2}[kind] :] = 1 / kappa
    return values


def summary(matrix: torch.Tensor, stored: torch.dtype = torch.float64) -> Summary:
    m, n = matrix.shape
    return summarise(singular_values(matrix), (m, n), stored)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_singular_values_are_those_of_numpy(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = random(0, *shape).to(dtype)
    expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    found = singular_values(matrix)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("kind", ["geometric", "one", "half"])
@pytest.mark.parametrize("width", [60, 100, 240])
def test_condition_numbers_are_exact_to_1e_6_whatever_they_are(kind: str, width: int) -> None:
    for exponent in range(1, 8):
        matrix = with_values(3, falling(kind, 60, 10.0**exponent), width)
        for shown in (matrix, matrix.T):
            found = singular_values(shown)
            expected = torch.linalg.cond(matrix).item()
            assert (found[0] / found[-1]).item() == pytest.approx(expected, rel=1e-6)


def test_the_fast_route_is_taken_only_where_it_resolves_the_smallest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left: list[float] = []
    exact = _spectra._by_factors

    def counted(matrix: torch.Tensor) -> torch.Tensor:
        left.append(kappa)
        return exact(matrix)

    monkeypatch.setattr(_spectra, "_by_factors", counted)
    for kappa in (10.0, 1e3, 1e4, 1e5, 1e6, 1e9):
        singular_values(with_values(5, falling("one", 60, kappa), 80))
    assert left == [1e5, 1e6, 1e9]


def test_a_matrix_with_an_unknown_entry_has_unknown_singular_values() -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        matrix = random(6, 9, 12).float()
        matrix[3, 4] = value
        assert singular_values(matrix).isnan().all()
        found = summary(matrix)
        assert not found.is_kappa_known
        assert not found.is_volume_known
        assert found.kappa_floor.isnan()


def test_what_is_no_matrix_is_refused() -> None:
    for shape in ((3,), (0, 4), (2, 2, 2)):
        with pytest.raises(ValueError, match="expected a matrix with entries, got shape"):
            singular_values(torch.zeros(shape))


def test_a_matrix_is_widened_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = random(7, 57, 10).bfloat16()
    expected = matrix.double().T @ matrix.double()
    monkeypatch.setattr(_spectra, "_BLOCK", 100)
    for shown in (matrix, matrix.T):
        torch.testing.assert_close(gram_matrix(shown), expected)
    unit = random(8, 10, 1)[:, 0].float()
    size, vector = power_iteration(matrix, unit / unit.norm())
    image = expected @ unit.double()
    torch.testing.assert_close(vector.double(), image / image.norm(), rtol=1e-5, atol=1e-6)
    lengths = torch.linalg.vector_norm(matrix.double() @ unit.double()), image.norm()
    assert size.item() == pytest.approx((lengths[1] / lengths[0]).item(), rel=3e-6)


def test_an_orthogonal_matrix_has_kappa_1_and_loses_nothing() -> None:
    found = summary(torch.linalg.qr(random(9, 50, 50)).Q)
    assert found.kappa.item() == pytest.approx(1)
    assert found.stable_rank.item() == pytest.approx(50)
    assert found.effective_rank.item() == pytest.approx(50)
    assert found.log_volume.item() == pytest.approx(0, abs=1e-12)
    assert found.entropy_deficit.item() == pytest.approx(0, abs=1e-12)


def test_a_diagonal_of_1_to_n_has_kappa_n() -> None:
    n = 40
    found = summary(torch.diag(torch.arange(1.0, n + 1)), torch.float32)
    assert found.kappa.item() == pytest.approx(n)
    assert found.is_kappa_known
    assert found.sigma_max.item() == pytest.approx(n)
    assert found.sigma_min.item() == pytest.approx(1)
    assert found.log_volume.item() == pytest.approx(sum(log(i) for i in range(1, n + 1)))
    square = n * (n + 1) * (2 * n + 1) / 6
    assert found.stable_rank.item() == pytest.approx(square / n**2)
    deficit = n / 2 * log(square / n) - sum(log(i) for i in range(1, n + 1))
    assert found.entropy_deficit.item() == pytest.approx(deficit)
    p = np.arange(1, n + 1) / (n * (n + 1) / 2)
    assert found.effective_rank.item() == pytest.approx(np.exp(-(p * np.log(p)).sum()))


def test_a_scale_changes_the_sizes_and_nothing_else() -> None:
    matrix = random(10, 30, 45)
    one, scaled = summary(matrix), summary(-7 * matrix)
    for name in ("kappa", "stable_rank", "effective_rank", "entropy_deficit", "kappa_floor"):
        assert getattr(scaled, name).item() == pytest.approx(getattr(one, name).item()), name
    assert scaled.log_volume.item() == pytest.approx(one.log_volume.item() + 30 * log(7))
    assert scaled.sigma_max.item() == pytest.approx(7 * one.sigma_max.item())


def test_the_log_volume_is_the_entropy_that_a_gaussian_input_gains() -> None:
    matrix = random(11, 12, 30).numpy()
    _, logdet = np.linalg.slogdet(matrix @ matrix.T)
    assert summary(torch.from_numpy(matrix)).log_volume.item() == pytest.approx(logdet / 2)


def test_the_deficit_is_never_below_what_kappa_alone_takes() -> None:
    generator = np.random.default_rng(0)
    for _ in range(300):
        values = np.sort(np.exp(generator.normal(0, 2, generator.integers(2, 20))))[::-1]
        found = summarise(torch.from_numpy(values.copy()), (len(values),) * 2)
        kappa = values[0] / values[-1]
        assert found.entropy_deficit.item() >= log((kappa + 1 / kappa) / 2) - 1e-12
    for kappa in (1.0, 3.0, 1e3):
        middle = sqrt((kappa**2 + 1) / 2)
        tight = torch.tensor([kappa, *[middle] * 7, 1.0], dtype=torch.float64)
        found = summarise(tight, (9, 9))
        assert found.entropy_deficit.item() == pytest.approx(log((kappa + 1 / kappa) / 2))


def test_a_matrix_of_lower_rank_has_a_floor_and_no_volume() -> None:
    exact = random(12, 60, 4) @ random(13, 4, 40)
    for stored in (torch.float64, torch.float32, torch.bfloat16):
        product = exact if stored == torch.float64 else exact.float()
        found = summary(product, stored)
        assert not found.is_kappa_known
        assert not found.is_volume_known
        assert found.kappa_floor > 10
        known = summarise(singular_values(product), (60, 40), stored, rank=4)
        expected = np.linalg.svd(product.double().numpy(), compute_uv=False)[:4]
        assert known.is_kappa_known
        assert known.is_volume_known
        assert known.kappa.item() == pytest.approx(expected[0] / expected[-1])
        assert known.log_volume.item() == pytest.approx(np.log(expected).sum())
        rms = np.sqrt((expected**2).mean())
        assert known.entropy_deficit.item() == pytest.approx(-np.log(expected / rms).sum())
    assert not summary(with_values(24, falling("one", 60, 1e15), 60)).is_kappa_known
    exactly = summarise(torch.tensor([2.0, 1.0, 0.0]).double(), (3, 3))
    assert exactly.kappa.isinf()
    assert not exactly.is_kappa_known
    assert not exactly.is_volume_known
    assert 1e6 < exactly.kappa_floor < torch.inf


def test_no_deficit_is_zero_and_not_minus_zero() -> None:
    deficit = summary(torch.eye(4)).entropy_deficit
    assert deficit == 0
    assert not deficit.signbit()


def test_of_zeros_no_ratio_is_known() -> None:
    found = summary(torch.zeros(4, 6), torch.float32)
    assert found.sigma_max == 0
    assert not found.is_kappa_known
    assert not found.is_volume_known
    for name in ("kappa", "kappa_floor", "stable_rank", "effective_rank"):
        assert getattr(found, name).isnan(), name


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_a_kappa_that_storage_hides_is_a_floor_and_one_that_it_does_not_is_known(
    stored: torch.dtype,
) -> None:
    missed = falsely = above = cases = 0
    for kind in ("geometric", "one", "half"):
        for width in (60, 240):
            for quarter in range(4, 33):
                kappa = 10 ** (quarter / 4)
                matrix = with_values(quarter, falling(kind, 60, kappa), width)
                matrix *= 0.02 * sqrt(60 * width) / matrix.norm()
                found = summary(matrix.to(stored), stored)
                moved = abs(found.kappa.item() / kappa - 1)
                cases += 1
                missed += bool(found.is_kappa_known) and moved > 0.1
                assert not (found.is_kappa_known and moved > 0.25), (kind, width, kappa)
                falsely += not found.is_kappa_known and moved < 0.01
                above += found.kappa_floor.item() > 1.002 * kappa
                assert found.kappa_floor.item() < 2 * kappa, (kind, width, kappa)
    assert cases == 174
    assert missed <= 5
    assert falsely <= 5
    assert above <= 5


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_the_noise_is_what_rounding_adds(stored: torch.dtype) -> None:
    matrix = 0.02 * random(23, 200, 300)
    added = (matrix.to(stored).double() - matrix).square().mean().sqrt()
    singular = singular_values(matrix)
    assert _spectra._noise(singular, (200, 300), stored).item() == pytest.approx(
        added.item(), rel=0.02
    )
    lone = torch.tensor([1.0, 1.0, 0.3], dtype=torch.float64)
    noise = _spectra._noise(lone, (3, 13), stored)
    repulsion = sqrt(2 * (1 + 2 * 0.09) - 1)
    floor = 5 * (repulsion + sqrt(repulsion**2 + 2)) * noise.item()
    assert rounding_floor(lone, (3, 13), stored).item() == pytest.approx(floor)
    least = 1 / (0.3 + 2 * repulsion * noise.item())
    assert summarise(lone, (3, 13), stored).kappa_floor.item() == pytest.approx(least, rel=1e-12)


def test_half_precision_has_no_numbers_between_its_smallest() -> None:
    singular = torch.full((50,), 1e-5, dtype=torch.float64)
    smallest = 2.0**-24
    floor = rounding_floor(singular, (50, 50), torch.float16).item()
    noise = smallest / sqrt(12)
    assert floor == pytest.approx(10 * noise * sqrt(99), rel=1e-6)


@pytest.mark.parametrize(
    ("shape", "count"), [((16, 16), 3000), ((24, 32), 1500), ((100, 95), 120), ((16, 64), 1500)]
)
def test_null_models_are_what_gaussian_matrices_have(shape: tuple[int, int], count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.linalg.svdvals(torch.randn(count, *shape, generator=generator).double())
    kappas = (drawn[:, 0] / drawn[:, -1]).log()
    error = (kappas.std() / sqrt(count)).item()
    assert null_log_kappa(*shape) == pytest.approx(kappas.mean().item(), abs=0.03 + 3 * error)
    assert null_log_kappa(*shape) == null_log_kappa(*shape[::-1])
    rms = drawn.square().mean(1, keepdim=True).sqrt()
    deficits = -(drawn / rms).log().sum(1)
    error = (deficits.std() / sqrt(count)).item()
    assert null_entropy_deficit(*shape) == pytest.approx(deficits.mean().item(), abs=3 * error)
    assert null_entropy_deficit(*shape) == null_entropy_deficit(*shape[::-1])


def test_null_condition_numbers_have_their_known_limits() -> None:
    for q in (0.1, 0.25, 0.6):
        limit = (1 + sqrt(q)) / (1 - sqrt(q))
        assert null_kappa(round(q * 1e6), 10**6) == pytest.approx(limit, rel=0.01)
    assert null_log_kappa(10**6, 10**6) - log(10**6) == pytest.approx(1.537, abs=1e-3)
    assert null_kappa(1, 30) == 1
    rising = [null_kappa(100, n) for n in (100, 101, 102, 105, 110, 150, 400)]
    assert all(one > other for one, other in pairwise(rising))
    assert null_entropy_deficit(1, 1000) == pytest.approx(0, abs=1e-6)
    assert null_entropy_deficit(1, 1) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("q", [0.1, 0.5, 0.97, 1.0])
def test_the_law_is_the_integral_of_its_density(q: float) -> None:
    low, high = (1 - sqrt(q)) ** 2, (1 + sqrt(q)) ** 2

    def density(x: float) -> float:
        return sqrt(max((high - x) * (x - low), 0)) / (2 * pi * q * x)

    points = np.linspace(low, high, 9)
    found = _spectra._law(torch.from_numpy(points), q)
    expected = [quad(density, low, x, limit=300)[0] for x in points[1:]]
    assert found[0].item() == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(found[1:].numpy(), expected, atol=1e-6)
    outside = _spectra._law(torch.tensor([low - 1, high + 1]).double(), q)
    assert outside.tolist() == pytest.approx([0, 1], abs=1e-12)


def test_noise_looks_like_noise_and_a_planted_signal_stands_out() -> None:
    noise = 0.3 * random(14, 100, 300)
    found = marchenko_pastur(singular_values(noise), (100, 300))
    assert found.variance.item() == pytest.approx(0.09, rel=0.03)
    assert found.distance < 0.04
    assert found.outliers == 0
    signal = with_values(15, torch.tensor([300.0, 30.0, 15.0]).double(), 300)
    planted = noise + torch.nn.functional.pad(signal, (0, 0, 0, 97))
    found = marchenko_pastur(singular_values(planted), (100, 300))
    assert found.outliers == 3
    assert found.variance.item() == pytest.approx(0.09, rel=0.06)
    many = with_values(25, torch.full((10,), 11.0).double(), 300)
    found = marchenko_pastur(
        singular_values(noise + torch.nn.functional.pad(many, (0, 0, 0, 90))), (100, 300)
    )
    assert found.outliers == 10
    assert found.variance.item() == pytest.approx(0.09, rel=0.08)
    structured = random(16, 100, 300) * torch.logspace(0, 2, 100)[:, None]
    assert marchenko_pastur(singular_values(structured), (100, 300)).distance > 0.3


@pytest.mark.parametrize("scale", [1.0, 30.0, 1 / 30])
def test_the_distance_is_kolmogorovs(scale: float) -> None:
    matrix = random(17, 40, 60)
    matrix[:30] *= scale
    singular = singular_values(matrix)
    found = marchenko_pastur(singular, (60, 40))
    eigenvalues = (singular.square() / 60 / found.variance).numpy()
    law = _spectra._law(torch.from_numpy(eigenvalues), 40 / 60).numpy()
    gaps = [
        abs(np.mean(below) - at)
        for value, at in zip(eigenvalues, law, strict=True)
        for below in (eigenvalues < value, eigenvalues <= value)
    ]
    assert found.distance.item() == pytest.approx(max(gaps))


def law_of(matrix: torch.Tensor) -> _spectra.MarchenkoPastur:
    return marchenko_pastur(singular_values(matrix), effective_shape(matrix), matrix.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_and_columns_of_zeros_are_no_part_of_the_law(dtype: torch.dtype) -> None:
    rows, columns = random(40, 256, 1024), random(41, 512, 512)
    rows[::2] = 0
    columns[:, :112] = 0
    for matrix, kept in ((rows, rows[1::2]), (columns, columns[:, 112:])):
        found, expected = law_of(matrix.to(dtype)), law_of(kept.to(dtype))
        assert found.outliers == expected.outliers == 0
        assert found.variance.item() == pytest.approx(expected.variance.item(), rel=1e-5)
        assert found.distance.item() == pytest.approx(expected.distance.item(), abs=1e-5)
        assert found.variance.item() == pytest.approx(1, rel=0.01)
        assert found.distance < 0.03


def test_the_effective_shape_is_without_rows_and_columns_of_zeros() -> None:
    matrix = random(42, 9, 12)
    matrix[2:5] = 0
    matrix[:, 7] = 0
    matrix[6, 3] = torch.nan
    assert [int(side) for side in effective_shape(matrix)] == [6, 11]
    assert [int(side) for side in effective_shape(torch.zeros(3, 4))] == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_rounding_alone_makes_follows_no_law(dtype: torch.dtype) -> None:
    for rank in (4, 100):
        product = random(43, 256, rank).float() @ random(44, rank, 256).float()
        if dtype == torch.float64:
            product = random(43, 256, rank) @ random(44, rank, 256)
        found = law_of(product.to(dtype))
        assert found.variance.isnan()
        assert found.distance.isnan()
        assert found.outliers.isnan()
    noise = 0.5 * random(45, 256, 256)
    planted = law_of((noise + random(43, 256, 4) @ random(44, 4, 256)).to(dtype))
    assert planted.outliers == 4
    assert planted.variance.item() == pytest.approx(0.25, rel=0.02)


def test_a_law_needs_eight_eigenvalues() -> None:
    assert law_of(random(46, 7, 20)).outliers.isnan()
    assert law_of(random(46, 8, 20)).outliers == 0
    assert law_of(torch.zeros(20, 20)).distance.isnan()


def test_a_hundredth_of_random_matrices_has_an_outlier() -> None:
    outliers = [
        marchenko_pastur(singular_values(random(seed, 30, 60)), (30, 60)).outliers.item() > 0
        for seed in range(300)
    ]
    assert 0 < np.mean(outliers) <= 0.02


def test_permuting_keeps_the_entries_and_takes_the_structure() -> None:
    matrix = torch.outer(torch.arange(1.0, 31), torch.arange(1.0, 41)) + random(18, 30, 40).float()
    before = torch.get_rng_state()
    found = permuted(matrix, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.shape == matrix.shape
    assert torch.equal(found.flatten().sort().values, matrix.flatten().sort().values)
    assert torch.equal(found, permuted(matrix, 3))
    assert not torch.equal(found, permuted(matrix, 4))
    centred = [one - one.mean() for one in (matrix, found)]
    assert summary(centred[1]).stable_rank > 5 * summary(centred[0]).stable_rank


def test_the_start_is_the_same_every_time_and_leans_on_no_plausible_direction() -> None:
    n = 4096
    start = start_vector(n, "cpu")
    assert torch.equal(start, start_vector(n, "cpu"))
    assert start.norm().item() == pytest.approx(1)
    places = torch.arange(n).double()
    waves = [torch.cos(pi * f * (places + 0.5) / n) for f in range(200)]
    blocks = [((places // size) % 2) * 2 - 1 for size in (1, 2, 4, 64, 512, 2048)]
    parts = torch.stack([(start.double() @ one / one.norm()).abs() for one in (*waves, *blocks)])
    assert (parts * sqrt(n)).max() < 4.5
    assert (parts * sqrt(n)).median() > 0.3
    assert start_vector(1, "cpu").abs().tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_power_iteration_rises_to_the_largest_and_never_above(dtype: torch.dtype) -> None:
    for seed, shape in ((19, (60, 90)), (20, (90, 60)), (21, (50, 1))):
        matrix = random(seed, *shape).to(dtype)
        largest = np.linalg.svd(matrix.double().numpy(), compute_uv=False)[0]
        vector, found = start_vector(shape[1], "cpu"), []
        for _ in range(200):
            size, vector = power_iteration(matrix, vector)
            found.append(size.item())
        assert max(found) <= largest
        assert found[-1] == pytest.approx(largest, rel=1e-4)
        assert all(late >= early * (1 - 1e-6) for early, late in pairwise(found))
        size, _ = power_iteration(matrix, start_vector(shape[1], "cpu"), 20)
        assert size.item() == pytest.approx(found[19], rel=1e-6)


def test_autocast_does_not_reach_power_iteration() -> None:
    matrix, start = random(22, 40, 40).float(), start_vector(40, "cpu")
    outside = power_iteration(matrix, start, 5)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(power_iteration(matrix, start, 5)[0], outside)


@pytest.mark.parametrize("width", [2, 4, 6, 10, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_guess_without_an_image_is_left(
    width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_spectra, "_BLOCK", 2 * width)
    start = start_vector(width, "cpu")
    assert start.sum() == 0
    matrix = torch.full((5, width), 0.25, dtype=dtype)
    matrix[3] = 0.5
    largest = 0.25 * sqrt(8 * width)
    once, vector = power_iteration(matrix, start, 1)
    assert 0.25 * sqrt(width) * (1 - 1e-5) <= once <= largest
    for steps, guess in ((1, vector), (2, start), (5, start)):
        found = power_iteration(matrix, guess, steps)[0]
        assert found.item() == pytest.approx(largest, rel=1e-5)
        assert found <= largest


@pytest.mark.parametrize("scale", [1e25, 1e-22, 1e-37])
def test_the_size_of_entries_does_not_overflow(scale: float) -> None:
    matrix = random(47, 30, 40).float()
    start = start_vector(40, "cpu")
    one, direction = power_iteration(matrix, start, 8)
    other, same = power_iteration(scale * matrix, start, 8)
    assert other.item() / scale == pytest.approx(one.item(), rel=1e-5)
    torch.testing.assert_close(same, direction)


def test_a_matrix_without_a_norm_leaves_the_guess_as_it_was() -> None:
    start = start_vector(5, "cpu")
    size, vector = power_iteration(torch.zeros(4, 5), start)
    assert size == 0
    assert torch.equal(vector, start)
    size, vector = power_iteration(torch.full((4, 5), torch.nan), start)
    assert size.isnan()
    assert torch.equal(vector, start)
    size, vector = power_iteration(torch.full((4, 5), torch.inf), start)
    assert not size.isfinite()
    assert torch.equal(vector, start)
