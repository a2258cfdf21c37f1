from math import log
from typing import Any

import numpy as np
import pytest
import torch

from entropylens.diagnostics._spectra import null_entropy_deficit, null_kappa
from entropylens.diagnostics.weight_spectrum import METRICS, WeightSpectrum, chosen_ranks
from entropylens.registry import Block, Lists, WeightReading
from entropylens.transfer import Stamp, Transfer


def random(seed: int, m: int, n: int) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def reading(
    matrix: torch.Tensor, name: str = "w", stored: torch.dtype = torch.float32
) -> WeightReading:
    return WeightReading(name=name, matrix=matrix, stored=stored)


def metrics(blocks: list[Block]) -> dict[tuple[str, str], float]:
    """By module and name, what would be written."""
    found: dict[tuple[str, str], float] = {}
    for block in blocks:
        if block.table == "metrics":
            columns = block.columns
            rows = zip(columns["name"], columns["value"], columns["weight"], strict=True)
            found |= {
                (str(columns["module"]), name): float(value)
                for name, value, weight in rows
                if weight > 0
            }
    return found


def measured(one: WeightReading) -> dict[str, float]:
    blocks, _ = WeightSpectrum().measure(one, {})
    return {name.removeprefix("conditioning/"): v for (_, name), v in metrics(blocks).items()}


def written(blocks: list[Block], table: str) -> list[dict[str, Any]]:
    arrived: list[dict[str, Any]] = []
    transfer = Transfer(lambda to, columns: arrived.append(columns) if to == table else None)
    for block in blocks:
        transfer.add(block, Stamp(1, 0.0, "train"))
    transfer.flush(wait=True)
    return arrived


def test_every_metric_equals_a_reference_written_in_numpy() -> None:
    for m, n in ((24, 40), (50, 30), (32, 32)):
        matrix = random(m, m, n)
        s = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
        k, longer = min(m, n), max(m, n)
        p = s / s.sum()
        volume = float(np.sum(np.log(s)))
        deficit = k / 2 * log(float((s**2).sum()) / k) - volume
        found = measured(reading(matrix))
        law = {name: found.pop(name) for name in ("outliers", "marchenko_pastur_distance")}
        assert law["outliers"] == 0
        assert 1 / (2 * k) <= law["marchenko_pastur_distance"] < 4 / k
        assert found == pytest.approx(
            {
                "kappa": s[0] / s[-1],
                "kappa_max": s[0] / s[-1],
                "kappa_to_null": s[0] / s[-1] / null_kappa(k, longer),
                "sigma_max": s[0],
                "sigma_min": s[-1],
                "stable_rank": (matrix.double() ** 2).sum().item() / s[0] ** 2,
                "effective_rank": np.exp(-(p * np.log(p)).sum()),
                "log_volume": volume,
                "entropy_deficit": deficit,
                "entropy_deficit_to_null": deficit - null_entropy_deficit(k, longer),
            },
            rel=1e-6,
        )


def test_a_fresh_gaussian_matrix_is_as_its_null() -> None:
    found = [measured(reading(random(seed, 60, 90))) for seed in range(60)]
    assert np.mean([one["entropy_deficit_to_null"] for one in found]) == pytest.approx(0, abs=0.3)
    assert np.exp(np.mean([np.log(one["kappa_to_null"]) for one in found])) == pytest.approx(
        1, abs=0.05
    )


def test_turning_either_side_changes_nothing() -> None:
    matrix = random(1, 30, 50)
    turns = [
        torch.linalg.qr(random(2 + at, size, size).double()).Q for at, size in ((0, 30), (1, 50))
    ]
    one = measured(reading(matrix.double()))
    other = measured(reading(turns[0] @ matrix.double() @ turns[1]))
    assert other == pytest.approx(one, rel=1e-8)
    assert measured(reading(matrix.double().T)) == pytest.approx(one, rel=1e-8)


def test_a_scale_changes_only_sizes_and_volume() -> None:
    one, scaled = (measured(reading(scale * random(4, 20, 35))) for scale in (1, 8))
    sizes = {"sigma_max": 8, "sigma_min": 8}
    for name, value in one.items():
        expected = value + 20 * log(8) if name == "log_volume" else value * sizes.get(name, 1)
        assert scaled[name] == pytest.approx(expected, rel=1e-6, abs=1e-6), name


def test_a_kappa_that_storage_hides_is_written_as_a_floor() -> None:
    left, right = (torch.linalg.qr(random(seed, 40, 40).double()).Q for seed in (5, 6))
    values = torch.ones(40, dtype=torch.float64)
    values[-1] = 1e-6
    matrix = (left * values) @ right
    known = measured(reading(matrix, stored=torch.float64))
    assert known["kappa"] == pytest.approx(1e6, rel=1e-6)
    assert not {"kappa_floor", "kappa_floor_to_null"} & set(known)
    hidden = measured(reading(matrix.bfloat16(), stored=torch.bfloat16))
    assert 100 < hidden["kappa_floor"] < 1e6
    assert hidden["kappa_max"] == hidden["kappa_floor"]
    assert hidden["kappa_floor_to_null"] == pytest.approx(
        hidden["kappa_floor"] / null_kappa(40, 40)
    )
    assert not {"kappa", "kappa_to_null", "sigma_min"} & set(hidden)
    assert hidden["sigma_max"] == pytest.approx(1, abs=0.01)


def test_a_product_of_thin_factors_has_no_volume() -> None:
    found = measured(reading(random(7, 40, 3) @ random(8, 3, 50), stored=torch.bfloat16))
    assert set(found) == {
        "kappa_floor",
        "kappa_max",
        "sigma_max",
        "stable_rank",
        "effective_rank",
        "kappa_floor_to_null",
    }
    assert found["effective_rank"] == pytest.approx(3, abs=0.2)


def test_the_largest_kappa_is_of_each_matrix_as_it_was_last_seen() -> None:
    diagonals = [("a", (1.0, 2.0)), ("b", (1.0, 9.0)), ("a", (1.0, 4.0)), ("b", (1.0, 3.0))]
    state, largest = WeightSpectrum().initial_state(), []
    for name, values in diagonals:
        shown = reading(torch.diag(torch.tensor(values)), name)
        blocks, after = WeightSpectrum().measure(shown, state)
        assert after is not state
        state = after
        largest.append(metrics(blocks)["", "conditioning/kappa_max"])
    assert largest == pytest.approx([2, 9, 9, 4])
    assert METRICS["conditioning/kappa_max"].ranks == "max"


def test_a_matrix_with_an_unknown_entry_writes_nothing_of_its_own() -> None:
    _, state = WeightSpectrum().measure(reading(torch.diag(torch.tensor([1.0, 5.0])), "a"), {})
    spoilt = random(9, 5, 8)
    spoilt[2, 2] = torch.nan
    blocks, state = WeightSpectrum().measure(reading(spoilt, "b"), state)
    assert metrics(blocks) == {("", "conditioning/kappa_max"): pytest.approx(5)}
    assert written(blocks, "spectra") == []
    assert measured(reading(spoilt)) == {}


def test_of_zeros_only_the_size_is_written() -> None:
    assert measured(reading(torch.zeros(4, 6))) == {"sigma_max": 0}


def test_the_singular_values_are_written_as_one_row() -> None:
    matrix = random(10, 30, 20)
    blocks, _ = WeightSpectrum().measure(reading(matrix, "layers.0"), {})
    (columns,) = written(blocks, "spectra")
    assert (columns["module"], columns["kind"]) == ("layers.0", "singular_values")
    (values,) = columns["values"]
    expected = np.linalg.svd(matrix.numpy(), compute_uv=False)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert isinstance(blocks[-1].columns["values"], Lists)


def test_of_many_singular_values_256_are_written_evenly_and_with_both_ends() -> None:
    for count in (1, 2, 255, 256, 257, 300, 511, 512, 576, 5000):
        ranks = chosen_ranks(count, "cpu").numpy()
        assert len(ranks) == min(count, 256)
        assert (ranks[0], ranks[-1]) == (0, count - 1)
        np.testing.assert_allclose(ranks, np.linspace(0, count - 1, len(ranks)), atol=0.5)
        assert len(set(ranks)) == len(ranks)
    matrix = torch.diag(torch.arange(300.0, 0, -1))
    blocks, _ = WeightSpectrum().measure(reading(matrix), {})
    (columns,) = written(blocks, "spectra")
    expected = 300 - chosen_ranks(300, "cpu").numpy()
    np.testing.assert_allclose(columns["values"][0], expected, rtol=1e-6)


def test_a_product_of_thin_factors_has_the_spectrum_of_its_rank_and_no_null() -> None:
    matrix = random(0, 20, 3) @ random(1, 3, 30)
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)[:3]
    one = WeightReading(name="w.lora", matrix=matrix, stored=torch.float32, rank=3)
    found = measured(one)
    assert found["kappa"] == pytest.approx(values[0] / values[2], rel=1e-4)
    assert found["sigma_min"] == pytest.approx(values[2], rel=1e-4)
    assert found["log_volume"] == pytest.approx(np.log(values).sum(), rel=1e-4)
    absent = {"kappa_to_null", "entropy_deficit_to_null", "outliers", "marchenko_pastur_distance"}
    assert not found.keys() & (absent | {"kappa_max"})
    _, state = WeightSpectrum().measure(one, {"w": torch.tensor(7.0)})
    assert list(state) == ["w"]


def test_a_rank_that_is_no_less_than_the_shape_is_none() -> None:
    matrix = random(0, 20, 30)
    for rank in (20, 25):
        one = WeightReading(name="w", matrix=matrix, stored=torch.float32, rank=rank)
        assert measured(one) == measured(reading(matrix))
        assert list(WeightSpectrum().measure(one, {})[1]) == ["w"]
    below = WeightReading(name="w", matrix=matrix, stored=torch.float32, rank=19)
    assert "kappa_to_null" not in measured(below)


def test_a_thin_product_whose_kappa_is_hidden_is_not_compared_with_chance() -> None:
    matrix = random(0, 20, 3) @ random(1, 3, 30)
    matrix[:, 0] = 1e-9
    one = WeightReading(name="w.lora", matrix=matrix, stored=torch.bfloat16, rank=8)
    found = measured(one)
    assert "kappa_floor" in found
    assert "kappa_floor_to_null" not in found


def test_dead_inputs_make_no_outliers() -> None:
    matrix = random(3, 128, 128)
    matrix[:, :28] = 0
    found = measured(reading(matrix))
    assert found["outliers"] == 0
    assert found["marchenko_pastur_distance"] < 0.04
    thin = (random(4, 128, 4) @ random(5, 4, 128)).bfloat16()
    assert not {"outliers", "marchenko_pastur_distance"} & set(
        measured(reading(thin, stored=torch.bfloat16))
    )


def test_the_worst_of_all_is_told_once_all_were_seen() -> None:
    state: dict[str, torch.Tensor] = {}
    told = []
    for name in ("a", "b", "a"):
        one = WeightReading(name=name, matrix=random(1, 5, 6), stored=torch.float32, matrices=2)
        blocks, state = WeightSpectrum().measure(one, state)
        told.append(("", "conditioning/kappa_max") in metrics(blocks))
    assert told == [False, True, True]
