from itertools import combinations
from math import e, log, log2

import numpy as np
import pytest
import torch

from entropylens.diagnostics._clusters import spectral_clusters
from entropylens.diagnostics._diffusion import (
    affinities,
    bandwidth_health,
    diffusion_matrix,
    diffusion_mutual_information,
    diffusion_spectral_entropy,
    median_bandwidth,
    renyi_diffusion_entropy,
    squared_distances,
)
from entropylens.diagnostics._diffusion_estimate import estimated_diffusion_entropy
from entropylens.diagnostics._kernel_bandwidths import kde_bandwidths


def cloud(rows: int = 40, width: int = 6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator)


def parts(seed: int = 0, parted: float = 6.0) -> tuple[torch.Tensor, list[int]]:
    """Three clusters of 20, 15 and 25 rows."""
    labels = [0] * 20 + [1] * 15 + [2] * 25
    return cloud(60, seed=seed) + parted * torch.eye(6)[labels], labels


def walk_entropy(states: np.ndarray, bandwidth: float, alpha: float, t: float = 1.0) -> float:
    """Of the walk that is not symmetric, point by point."""
    rows = len(states)
    near = np.array(
        [[np.exp(-sum((a - b) ** 2) / (2 * bandwidth**2)) for b in states] for a in states]
    )
    density = [sum(near[i]) ** alpha for i in range(rows)]
    kernel = np.array(
        [[near[i, j] / density[i] / density[j] for j in range(rows)] for i in range(rows)]
    )
    walk = kernel / kernel.sum(1, keepdims=True)
    found = np.abs(np.linalg.eigvals(walk)) ** t
    shares = found / found.sum()
    return float(-sum(p * np.log2(p) for p in shares if p > 0))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("t", [1.0, 3.0])
def test_the_entropy_is_that_of_the_walk_whatever_is_done_to_the_density(
    alpha: float, t: float
) -> None:
    states = cloud() + 2 * torch.arange(40)[:, None].lt(30)
    expected = walk_entropy(states.double().numpy(), 1.5, alpha, t)
    found = diffusion_spectral_entropy(states, bandwidth=1.5, alpha=alpha, t=t)
    assert float(found) == pytest.approx(expected, abs=1e-9)
    fast = diffusion_spectral_entropy(states, bandwidth=1.5, alpha=alpha, t=t, precision="fast")
    assert float(fast) == pytest.approx(expected, abs=1e-5)


def test_correcting_for_the_density_changes_the_spectrum_and_the_released_one_does_not() -> None:
    states = cloud() + 2 * torch.arange(40)[:, None].lt(30)
    kernel = affinities(states, 1.0).numpy()
    root = np.diag(kernel.sum(1) ** -0.5)
    released = np.linalg.eigvalsh(root @ kernel @ root)[::-1]
    zero, half = (
        np.linalg.eigvalsh(diffusion_matrix(states, 1.0, alpha).numpy())[::-1]
        for alpha in (0.0, 0.5)
    )
    assert zero == pytest.approx(released, abs=1e-12)
    assert abs(half - released)[2:5].min() > 0.01


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_largest_eigenvalue_is_one_and_the_trace_known(alpha: float) -> None:
    matrix = diffusion_matrix(cloud(), "median", alpha)
    assert float(torch.linalg.eigvalsh(matrix)[-1]) == pytest.approx(1.0, abs=1e-12)
    if alpha == 0:
        near = affinities(cloud()).numpy()
        assert float(matrix.trace()) == pytest.approx(sum(1 / row.sum() for row in near))


@pytest.mark.parametrize("bandwidth", ["median", 1.0])
@pytest.mark.parametrize("value", [0.0, 1e-3, 123.456])
def test_identical_rows_have_no_entropy(value: float, bandwidth: float | str) -> None:
    for precision in ("exact", "fast"):
        found = diffusion_spectral_entropy(
            torch.full((50, 7), value),
            bandwidth=bandwidth,  # type: ignore[arg-type]
            precision=precision,
        )
        assert float(found) == pytest.approx(0.0, abs=1e-9)


def test_rows_that_differ_by_rounding_alone_are_identical() -> None:
    direction = torch.tensor([1.0, 10.0, 100.0])
    rounded = torch.stack([torch.nextafter(direction, i % 3 * direction) for i in range(30)])
    assert float(squared_distances(rounded).max()) > 0
    assert float(diffusion_spectral_entropy(rounded)) == pytest.approx(0.0, abs=0.05)


def test_far_points_have_all_the_entropy_there_is() -> None:
    found = diffusion_spectral_entropy(1e3 * torch.eye(50), bandwidth=1.0)
    assert float(found) == pytest.approx(log2(50), abs=1e-9)


@pytest.mark.parametrize("clusters", [2, 4, 5])
def test_far_clusters_of_one_point_count_as_their_number(clusters: int) -> None:
    states = 1e3 * torch.eye(clusters).repeat_interleave(12, 0)
    found = diffusion_spectral_entropy(states, bandwidth=1.0)
    assert float(found) == pytest.approx(log2(clusters), abs=1e-9)
    fast = diffusion_spectral_entropy(states, bandwidth=1.0, precision="fast")
    assert float(fast) == pytest.approx(log2(clusters), abs=1e-3)


def test_rotation_translation_order_and_scale_do_not_matter() -> None:
    states = cloud().double()
    expected = float(diffusion_spectral_entropy(states))
    rotation = torch.linalg.qr(cloud(6, 6, 3).double())[0]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    for same in (states @ rotation, states + 7, states[order], 1e3 * states, 1e-3 * states):
        assert float(diffusion_spectral_entropy(same)) == pytest.approx(expected, abs=1e-9)
    fixed = float(diffusion_spectral_entropy(states, bandwidth=2.0))
    assert fixed != pytest.approx(expected, abs=0.05)
    scaled = diffusion_spectral_entropy(5 * states, bandwidth=10.0)
    assert float(scaled) == pytest.approx(fixed, abs=1e-9)


def test_the_released_bandwidth_measures_the_scale_of_the_states() -> None:
    states = cloud(600, 64)
    found = [
        float(diffusion_spectral_entropy(scale * states, bandwidth=10.0, precision="fast"))
        for scale in (0.1, 0.3, 1, 3, 10)
    ]
    assert found == pytest.approx([0.09, 0.66, 4.5, 9.14, 9.23], abs=0.05)
    wide = diffusion_spectral_entropy(cloud(600, 1024), bandwidth=10.0, precision="fast")
    assert float(wide) == pytest.approx(9.23, abs=0.01)


def test_the_entropy_of_gaussian_rows_grows_with_their_number_as_published() -> None:
    found = [float(diffusion_spectral_entropy(cloud(rows, 64))) for rows in (100, 200, 400)]
    assert found == pytest.approx([3.35, 3.59, 3.72], abs=0.05)


def test_the_median_is_that_of_all_pairs_where_they_differ() -> None:
    for rows in (2, 3, 9, 12):
        states = cloud(rows)
        lengths = sorted(float((a - b).double().norm()) for a, b in combinations(states, 2))
        found = median_bandwidth(states, squared_distances(states), 1.5)
        assert float(found) == pytest.approx(1.5 * lengths[(len(lengths) - 1) // 2], rel=1e-6)


def test_pairs_that_coincide_have_no_part_in_the_median() -> None:
    states = cloud(30) + 5
    states[:25] = states[0]
    lengths = [float((a - b).double().norm()) for a, b in combinations(states, 2)]
    apart = sorted(length for length in lengths if length > 0)
    found = median_bandwidth(states, squared_distances(states))
    assert float(found) == pytest.approx(apart[(len(apart) - 1) // 2], rel=1e-6)
    alike = torch.full((9, 4), 3.0)
    assert float(median_bandwidth(alike, squared_distances(alike))) == pytest.approx(6e-6)


def test_a_growing_collapse_lowers_the_entropy_step_by_step() -> None:
    def collapsed(share: float, states: torch.Tensor) -> float:
        found = states.clone()
        found[: int(share * len(states))] = states[0]
        return float(diffusion_spectral_entropy(found))

    apart = 1 + 1e-3 * cloud(512, 64)
    at = [collapsed(share, apart) for share in (0.69, 0.7, 0.71, 0.72)]
    assert max(at) - min(at) < 0.2
    layer = cloud(512, 64).relu()
    layer[0] = 0
    at = [collapsed(share, layer) for share in (0.0, 0.42, 0.76, 0.93)]
    assert at == sorted(at, reverse=True)
    assert at[2] < 2
    assert at[3] < 1


def test_near_duplicates_far_from_the_origin_keep_their_distance() -> None:
    states = 1e3 + 1e-3 * cloud().double()
    wide = states.numpy().astype(np.longdouble)
    expected = np.array([[sum((a - b) ** 2) for b in wide] for a in wide], dtype=np.float64)
    assert squared_distances(states).numpy() == pytest.approx(expected, rel=1e-8, abs=1e-20)


def test_a_state_that_is_not_finite_makes_the_entropy_unknown() -> None:
    for bad in (torch.nan, torch.inf):
        states = cloud()
        states[3, 2] = bad
        assert diffusion_spectral_entropy(states).isnan()


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_entropy_of_order_two_is_that_of_the_eigenvalues(alpha: float) -> None:
    matrix = diffusion_matrix(cloud(), "median", alpha)
    shares = np.linalg.eigvalsh(matrix.numpy())
    shares = shares / shares.sum()
    found = float(renyi_diffusion_entropy(matrix))
    assert found == pytest.approx(-log2(sum(shares**2)), abs=1e-9)
    assert found < float(diffusion_spectral_entropy(cloud(), alpha=alpha))


def test_health_is_that_of_a_loop_over_rows() -> None:
    states = cloud()
    near = affinities(states, 1.2).numpy()
    counts, own = [], []
    for i, row in enumerate(near):
        others = np.delete(row, i)
        counts.append(others.sum() ** 2 / (others**2).sum())
        own.append(1 / (1 + others.sum()))
    found = bandwidth_health(states, 1.2)
    assert float(found.neighbours) == pytest.approx(np.median(counts))
    assert float(found.self_share) == pytest.approx(np.median(own))
    assert float(found.least_affinity) == pytest.approx(near.min())


def test_a_bandwidth_is_flagged_when_too_narrow_and_when_too_wide() -> None:
    states = cloud(121, 16)
    flags = [
        tuple(float(flag) for flag in bandwidth_health(states, bandwidth)[3:])
        for bandwidth in (1e-3, 0.4, 1.3, 4.0, 50.0)
    ]
    assert flags == [(1, 1, 0), (1, 1, 0), (0, 1, 0), (0, 0, 0), (0, 0, 1)]
    alone = bandwidth_health(1e3 * torch.eye(4), 1e-3)
    assert (float(alone.neighbours), float(alone.self_share)) == (0.0, 1.0)


def test_the_bandwidths_of_gaussian_data_are_those_of_the_table() -> None:
    table = {
        0.01: (2.79, 3.94, 9.96),
        0.03: (2.03, 2.87, 5.71),
        0.1: (1.37, 1.94, 3.04),
        0.3: (0.868, 1.23, 1.62),
        1.0: (0.372, 0.526, 0.62),
    }
    for alpha, expected in table.items():
        assert kde_bandwidths(alpha) == pytest.approx(expected, rel=6e-3)
    assert kde_bandwidths(log(1000) / 256).self_loop == pytest.approx(6, abs=0.1)
    with pytest.raises(ValueError, match="expected log"):
        kde_bandwidths(0.0)


def test_the_narrowest_kernel_has_no_spread_left_and_the_widest_little() -> None:
    # I(b) = log(b) / 2 and 3 b^2 / 4 at the two ends.
    assert kde_bandwidths(50.0).condensation == pytest.approx(e**-50, rel=1e-6)
    assert kde_bandwidths(1e-6).condensation == pytest.approx((0.75e6) ** 0.25, rel=1e-2)


def test_few_points_make_a_density_below_the_condensation_bandwidth() -> None:
    # The spec's table for d = 16, n = 121: the median sum of squared shares of a fresh point.
    draws = np.random.default_rng(0).standard_normal((1000, 122, 16))
    fresh = draws[:, :1] * 4 / np.linalg.norm(draws[:, :1], axis=-1, keepdims=True)
    squared = ((draws[:, 1:] - fresh) ** 2).sum(-1)
    condensation, gaussian, _ = kde_bandwidths(log(121) / 16)
    widths = (0.5 * condensation, condensation, gaussian, 2 * gaussian)
    for width, expected in zip(widths, (0.95, 0.36, 0.12, 0.013), strict=True):
        near = np.exp(-(squared - squared.min(1, keepdims=True)) / (2 * width**2))
        shares = near / near.sum(1, keepdims=True)
        assert np.median((shares**2).sum(1)) == pytest.approx(expected, rel=0.15)


def test_a_row_sees_half_itself_where_the_self_loop_bandwidth_is() -> None:
    bandwidth = kde_bandwidths(log(600) / 64).self_loop
    found = float(bandwidth_health(cloud(600, 64), bandwidth).self_share)
    assert found == pytest.approx(0.5, abs=0.1)


def information(states: torch.Tensor, labels: list[int], repeats: int = 5) -> float:
    generator = torch.Generator().manual_seed(0)
    return float(diffusion_mutual_information(states, labels, repeats=repeats, generator=generator))


def test_information_is_that_of_a_loop_over_classes_and_subsets() -> None:
    states, labels = parts()
    wide = states.double().numpy()
    bandwidth = float(median_bandwidth(states, squared_distances(states)))
    generator = torch.Generator().manual_seed(0)
    expected = 0.0
    for label in (0, 1, 2):
        rows = [i for i, other in enumerate(labels) if other == label]
        subsets = [torch.randperm(60, generator=generator)[: len(rows)] for _ in range(2)]
        of_any = np.mean([walk_entropy(wide[s.numpy()], bandwidth, 0) for s in subsets])
        expected += len(rows) / 60 * float(of_any - walk_entropy(wide[rows], bandwidth, 0))
    assert information(states, labels, repeats=2) == pytest.approx(expected, abs=1e-9)
    assert expected > 0.3


def test_random_labels_tell_nothing() -> None:
    generator = np.random.default_rng(1)
    for classes, deviation in ((2, 0.010), (10, 0.014)):
        found = [
            information(cloud(400, 16, seed), generator.integers(0, classes, 400).tolist())
            for seed in range(4)
        ]
        assert np.mean(found) == pytest.approx(0.0, abs=2 * deviation)
        assert np.std(found) < 2 * deviation


def test_a_class_of_the_whole_tells_nothing() -> None:
    assert information(cloud(), [7] * 40) == pytest.approx(0.0, abs=1e-9)


def test_subsets_are_drawn_with_the_generator_that_is_given() -> None:
    states, labels = parts()
    before = torch.get_rng_state()
    assert information(states, labels) == information(states, labels)
    assert torch.equal(before, torch.get_rng_state())


def test_classes_of_one_row_and_missing_labels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got 2 of 3 with one; .* tokens"):
        information(cloud(4), [0, 0, 1, 2])
    with pytest.raises(ValueError, match="a label for each of 4 rows, got 3"):
        information(cloud(4), [0, 0, 1])


def agreement(first: list[int], second: list[int]) -> float:
    """Adjusted Rand index."""
    table = np.zeros((max(first) + 1, max(second) + 1))
    np.add.at(table, (first, second), 1)

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    rows, columns = pairs(table.sum(1)), pairs(table.sum(0))
    chance = rows * columns / pairs(table.sum())
    return (pairs(table) - chance) / ((rows + columns) / 2 - chance)


def test_clusters_that_lie_apart_are_found() -> None:
    states, labels = parts(parted=30.0)
    assert agreement(spectral_clusters(states, 3), labels) == 1.0
    assert agreement(spectral_clusters(states.reshape(60, 2, 3), 3), labels) == 1.0
    with pytest.raises(ValueError, match="expected 10 inputs or more, got 9"):
        spectral_clusters(states[:9])


def test_clusters_are_those_of_scikit_learn() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    for seed in range(3):
        states = parts(seed, parted=3.0)[0]
        theirs = cluster.SpectralClustering(
            n_clusters=10, affinity="nearest_neighbors", assign_labels="cluster_qr", random_state=0
        ).fit(states.numpy())
        assert agreement(spectral_clusters(states), theirs.labels_.tolist()) > 0.95


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_an_estimate_is_within_its_error_of_all_points(alpha: float) -> None:
    states = cloud(200, 8) + 3 * torch.arange(200)[:, None].lt(100)
    exact = float(diffusion_spectral_entropy(states, bandwidth=2.0, alpha=alpha))
    far, errors = [], []
    for seed in range(10):
        value, error = estimated_diffusion_entropy(
            states,
            bandwidth=2.0,
            alpha=alpha,
            probes=16,
            steps=25,
            generator=torch.Generator().manual_seed(seed),
        )
        far.append((float(value) - exact) / float(error))
        errors.append(float(error))
    assert max(errors) < 0.02
    assert 0.4 < np.sqrt(np.mean(np.square(far))) < 1.8
    assert abs(np.mean(far)) < 1.2


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_of_a_state_that_is_not_finite_there_is_no_estimate(bad: float) -> None:
    states = cloud()
    for broken, bandwidth in ((states.clone(), 2.0), (states, bad)):
        if broken is not states:
            broken[3, 2] = bad
        generator = torch.Generator().manual_seed(0)
        found = estimated_diffusion_entropy(broken, bandwidth=bandwidth, generator=generator)
        assert torch.stack(found).isnan().all()


def test_rows_of_affinities_are_taken_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def estimate() -> float:
        generator = torch.Generator().manual_seed(0)
        return float(estimated_diffusion_entropy(cloud(), bandwidth=2.0, generator=generator)[0])

    whole = estimate()
    monkeypatch.setattr("entropylens.diagnostics._diffusion_estimate._ROWS", 7)
    assert estimate() == pytest.approx(whole, abs=1e-9)
