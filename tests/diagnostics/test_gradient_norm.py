import pytest
import torch
from readings import gradients

from entropylens.diagnostics.gradient_norm import GradientNorm, total_norm


def test_it_equals_the_norm_of_all_gradients_as_one_vector() -> None:
    reading = gradients()
    (block,), _ = GradientNorm().measure(reading, None)
    joined = torch.cat([g.double().flatten() for g in reading.gradients.values()])
    assert block.columns["value"].item() == pytest.approx(joined.norm().item(), rel=1e-6)


def test_it_is_what_clipping_returns() -> None:
    parameter = torch.nn.Parameter(torch.zeros(5))
    parameter.grad = torch.arange(5.0)
    clipped_from = torch.nn.utils.clip_grad_norm_([parameter], 100.0)
    assert total_norm([parameter.grad]).item() == pytest.approx(clipped_from.item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_a_large_tensor_keeps_its_digits(dtype: torch.dtype, layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = (torch.rand(1000, 2003, generator=generator) + 0.5).to(dtype)
    if layout == "strided":
        gradient = gradient[:, ::10]
    exact = gradient.double().norm().item()
    assert total_norm([gradient]).item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_shows(bad: float) -> None:
    norm = total_norm([torch.ones(3), torch.tensor([bad])])
    assert not norm.isfinite()
