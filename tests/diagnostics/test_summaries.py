import numpy as np
import pytest
import torch

from entropylens.diagnostics._summaries import centred, correlation


def columns() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, noise = torch.rand(300, generator=generator), torch.rand(300, generator=generator)
    return x, x + noise, torch.ones(300)


def test_correlation_equals_numpys_and_is_blind_to_shift_and_scale() -> None:
    x, y, ones = columns()
    expected = np.corrcoef(x.numpy(), y.numpy())[0, 1]
    assert correlation(x, y, ones).item() == pytest.approx(expected, abs=1e-6)
    assert correlation(5 * x - 2, 3 - y, ones).item() == pytest.approx(-expected, abs=1e-6)
    assert correlation(x, 1 + 1e-3 * y, ones).item() == pytest.approx(expected, abs=1e-3)
    assert correlation(1e-20 * x, 1e15 * y, ones).item() == pytest.approx(expected, abs=1e-6)
    assert correlation(x, 2 * x, ones) == 1
    assert correlation(x, -x, ones > 0) == -1


def test_a_row_counts_like_the_rows_it_stands_for_and_one_without_weight_not_at_all() -> None:
    weight = torch.tensor([2.0, 1.0, 0.0, 3.0])
    first, second = torch.tensor([0.1, 0.5, torch.nan, 0.9]), torch.tensor([0.2, 0.1, 0.0, 0.7])
    rows = [0, 0, 1, 3, 3, 3]
    repeated = np.corrcoef(first[rows].numpy(), second[rows].numpy())[0, 1]
    assert correlation(first, second, weight).item() == pytest.approx(repeated, abs=1e-6)
    both = correlation(
        torch.stack([first, second]), second.expand(2, 4), torch.stack([weight, weight])
    )
    assert both.tolist() == pytest.approx([repeated, 1.0], abs=1e-6)
    assert correlation(first, second, torch.ones(4)).isnan()


@pytest.mark.parametrize("level", [1e-6, 0.3, 1.0, 1e6])
def test_what_varies_by_no_more_than_float32_rounding_does_not_vary(level: float) -> None:
    """Whatever the level: a step of the last bit is no spread, one of a thousandth is."""
    x, _, ones = columns()
    constant = torch.full((300,), level)
    last_bit = torch.where(x > 0.5, constant, constant * (1 + 2**-23))
    assert (last_bit != constant).any()
    for column in (constant, last_bit):
        assert correlation(x, column, ones).isnan()
        assert correlation(column, x, ones).isnan()
        assert not centred(column, ones)[1]
    assert correlation(x, constant * (1 + 1e-3 * x), ones).item() == pytest.approx(1, abs=1e-3)


def test_two_points_lie_on_a_line_whatever_they_are() -> None:
    x, y, _ = columns()
    for count in (0, 1, 2):
        weight = (torch.arange(300) < count).float()
        assert correlation(x, y, weight).isnan()
    assert not correlation(x, y, (torch.arange(300) < 3).float()).isnan()


def test_a_spread_that_hardly_any_weight_has_is_none() -> None:
    column = torch.tensor([1.0, 1.0, 1.0, 2.0])
    assert centred(column, torch.ones(4))[1]
    assert not centred(column, torch.tensor([1e13, 1e13, 1e13, 1.0]))[1]


def test_deviations_add_up_to_nothing_and_are_nothing_without_weight() -> None:
    x, _, _ = columns()
    weight = torch.arange(300) % 4
    deviations, varies = centred(torch.where(weight > 0, x, torch.nan), weight)
    assert varies
    assert (deviations[weight == 0] == 0).all()
    assert (deviations * weight).sum().item() == pytest.approx(0, abs=1e-10)
    kept = x[weight > 0].double() - deviations[weight > 0]
    assert kept.numpy() == pytest.approx(np.average(x.numpy(), weights=weight.numpy()), rel=1e-6)
