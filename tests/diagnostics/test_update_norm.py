import pytest
import torch

from entropylens.diagnostics.update_norm import UpdateNorm
from entropylens.registry import UpdateReading


def measured(before: torch.Tensor, after: torch.Tensor) -> dict[str, float]:
    reading = UpdateReading(before={"w": before}, after={"w": after})
    (block,), _ = UpdateNorm().measure(reading, None)
    return dict(zip(block.columns["name"], block.columns["value"].tolist(), strict=True))


def test_a_plain_gradient_step_moves_by_rate_times_gradient() -> None:
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    before = weight.detach().clone()
    weight.grad = torch.tensor([6.0, 8.0])
    torch.optim.SGD([weight], lr=0.1).step()
    found = measured(before, weight.detach())
    assert found["update/norm"] == pytest.approx(1.0, rel=1e-6)
    assert found["update/relative_norm"] == pytest.approx(0.2, rel=1e-6)
    assert found["parameter/norm"] == pytest.approx(5.0)


def test_a_skipped_step_is_exactly_zero() -> None:
    weight = torch.randn(7)
    assert measured(weight, weight.clone())["update/norm"] == 0.0
