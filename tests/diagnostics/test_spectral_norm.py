import numpy as np
import pytest
import torch

from entropylens.diagnostics.spectral_norm import SpectralNorm
from entropylens.registry import MatricesReading


def random(seed: int, m: int, n: int) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def looked(
    matrices: dict[str, torch.Tensor], state: dict[str, torch.Tensor]
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    blocks, state = SpectralNorm().measure(MatricesReading(matrices=matrices), state)
    found = {
        str(block.columns["module"]): block.columns["value"].item()
        for block in blocks
        if block.columns["weight"].item() > 0
    }
    return found, state


def test_looks_rise_to_the_largest_singular_value_from_below() -> None:
    matrices = {"wide": random(0, 20, 50), "tall": random(1, 60, 25).bfloat16()}
    largest = {
        name: np.linalg.svd(matrix.double().numpy(), compute_uv=False)[0]
        for name, matrix in matrices.items()
    }
    state, before = SpectralNorm().initial_state(), dict.fromkeys(matrices, 0.0)
    for _ in range(150):
        found, state = looked(matrices, state)
        for name, size in found.items():
            assert before[name] * (1 - 1e-6) <= size <= largest[name]
        before = found
    assert before == pytest.approx(largest, rel=1e-4)


def test_the_first_look_takes_five_steps_and_a_later_one_takes_two() -> None:
    matrix = random(2, 30, 40)
    gram = (matrix.T @ matrix).double()
    _, state = looked({"w": matrix}, {})
    for _ in range(2):
        before = state["w"].double()
        found, state = looked({"w": matrix}, state)
        before = gram @ before
        before /= before.norm()
        image = gram @ before
        torch.testing.assert_close(state["w"].double(), image / image.norm(), atol=1e-6, rtol=1e-5)
        length = (matrix.double() @ before).norm()
        assert found["w"] == pytest.approx((image.norm() / length).item(), rel=1e-5)
    first, _ = looked({"w": torch.diag(torch.tensor([1.0, 1.1]))}, {})
    powers = [1.1**n for n in (18, 20)]
    expected = np.sqrt((1 + powers[1]) / (1 + powers[0]))
    assert first["w"] == pytest.approx(expected, rel=2e-6)


def test_a_matrix_of_rank_one_is_exact_at_once() -> None:
    column, row = random(3, 30, 1), random(4, 1, 40)
    found, _ = looked({"w": column @ row}, {})
    assert found["w"] == pytest.approx((column.norm() * row.norm()).item(), rel=3e-6)


def test_a_change_of_the_weights_is_followed() -> None:
    matrix, state = random(5, 40, 40), SpectralNorm().initial_state()
    spike = torch.outer(random(6, 40, 1)[:, 0], random(7, 40, 1)[:, 0])
    for at in range(40):
        found, state = looked({"w": matrix + spike * at / 20}, state)
    now = torch.linalg.matrix_norm(matrix + spike * 39 / 20, 2).item()
    assert 0.99 * now <= found["w"] <= now


def test_a_scale_scales_it_and_rows_in_another_order_change_nothing() -> None:
    matrix = random(8, 30, 40)
    one = looked({"w": matrix}, {})[0]["w"]
    assert looked({"w": -4 * matrix}, {})[0]["w"] == pytest.approx(4 * one, rel=1e-6)
    assert looked({"w": matrix.flip(0)}, {})[0]["w"] == pytest.approx(one, rel=1e-5)


def test_a_matrix_of_another_shape_starts_anew_and_one_that_is_gone_is_forgotten() -> None:
    _, state = looked({"w": random(9, 20, 30), "gone": random(10, 4, 4)}, {})
    other = random(11, 20, 25)
    found, state = looked({"w": other}, state)
    assert set(state) == {"w"}
    fresh, _ = looked({"w": other}, {})
    assert found == fresh


def test_an_unknown_entry_leaves_the_matrix_out_and_its_direction_alone() -> None:
    matrix = random(12, 10, 12)
    _, state = looked({"w": matrix}, {})
    spoilt = matrix.clone()
    spoilt[0, 0] = torch.nan
    found, after = looked({"w": spoilt}, state)
    assert found == {}
    assert torch.equal(after["w"], state["w"])
    assert looked({"w": torch.zeros(10, 12)}, state)[0] == {"w": 0}


def test_no_matrices_write_nothing() -> None:
    assert looked({}, {}) == ({}, {})


def test_a_constant_matrix_has_its_norm_at_the_first_look() -> None:
    for width in (2, 4, 20):
        found, _ = looked({"w": torch.full((5, width), 0.5)}, {})
        assert found["w"] == pytest.approx(0.5 * np.sqrt(5 * width), rel=1e-5)
