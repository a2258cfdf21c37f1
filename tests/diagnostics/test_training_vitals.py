import pytest
import torch
from readings import step
from torch import nn

from entropylens.diagnostics.training_vitals import TrainingVitals
from entropylens.registry import OptimizerReading, StepReading


def rows(reading: StepReading) -> dict[tuple[str, str], float]:
    blocks, _ = TrainingVitals().measure(reading, None)
    found = {}
    for block in blocks:
        values = block.columns["value"].values
        triples = zip(block.columns["name"], block.columns["module"], values, strict=True)
        found.update({(name, module): float(value) for name, module, value in triples})
    return found


def test_what_is_known_is_written_in_its_unit() -> None:
    found = rows(step())
    assert found["loss/mean", ""] == 2.5
    assert found["gradient/norm/before_clip", ""] == 1.5
    assert found["gradient/clip_scale", ""] == pytest.approx(2 / 3)
    assert found["learning_rate", "0"] == 1e-3
    assert found["learning_rate", "1"] == 1e-4
    assert found["tokens/seen", ""] == 1000
    assert found["throughput/tokens_per_second", ""] == 200.0
    assert found["memory/device/allocated", ""] == 1.0
    assert found["memory/process/resident", ""] == 2.0
    assert found["overhead/fraction", ""] == 0.01
    assert found["optimizer/skipped", ""] == 0.0


def test_what_is_unknown_is_absent() -> None:
    assert rows(StepReading()) == {}


def of(*optimizers: OptimizerReading) -> dict[tuple[str, str], float]:
    return rows(StepReading(optimizers=optimizers))


def test_one_parameter_group_has_no_module() -> None:
    assert of(OptimizerReading(learning_rates=[0.5])) == {("learning_rate", ""): 0.5}


def test_several_optimisers_are_told_apart_and_so_are_their_groups() -> None:
    generator = OptimizerReading(name="generator", loss=2.0, learning_rates=[0.5, 0.25], skipped=1)
    critic = OptimizerReading(name="critic", learning_rates=[0.125], gradient_norm_before_clip=3.0)
    assert of(generator, critic) == {
        ("loss/mean", "generator"): 2.0,
        ("learning_rate", "generator/0"): 0.5,
        ("learning_rate", "generator/1"): 0.25,
        ("optimizer/skipped", "generator"): 1.0,
        ("learning_rate", "critic"): 0.125,
        ("gradient/norm/before_clip", "critic"): 3.0,
    }


def test_a_rate_that_is_a_tensor_is_not_read_on_the_host() -> None:
    found = of(OptimizerReading(learning_rates=[torch.tensor(0.5), 0.25]))
    assert found == {("learning_rate", "0"): 0.5, ("learning_rate", "1"): 0.25}
    rate = torch.tensor(0.5, device="meta")
    device = StepReading(optimizers=[OptimizerReading(learning_rates=[rate])])
    (block,), _ = TrainingVitals().measure(device, None)
    assert block.columns["value"].values[0].device.type == "meta"


def clip_scale(before: float | torch.Tensor | None, after: float | None) -> float | None:
    known = None if after is None else torch.tensor(after)
    norms = {"gradient_norm_before_clip": before, "gradient_norm_after_clip": known}
    return of(OptimizerReading(**norms)).get(("gradient/clip_scale", ""))  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_the_scale_of_clipping_is_the_factor_that_torch_multiplied_by(limit: float) -> None:
    parameter = nn.Parameter(torch.zeros(50))
    gradient = torch.randn(50, generator=torch.Generator().manual_seed(0))
    parameter.grad = gradient.clone()
    before = nn.utils.clip_grad_norm_([parameter], limit)
    found = clip_scale(before, parameter.grad.norm().item())
    assert found == pytest.approx(float(parameter.grad[0] / gradient[0]), rel=1e-5)
    assert found == pytest.approx(min(1.0, limit / float(before)), rel=1e-5)


def test_the_scale_of_clipping_is_one_of_no_gradient_and_unknown_without_both_norms() -> None:
    assert clip_scale(0.0, 0.0) == 1.0
    assert clip_scale(torch.tensor([4.0]), 1.0) == 0.25
    assert clip_scale(1.0, 1.00001) == 1.0
    assert clip_scale(None, 1.0) is None
    assert clip_scale(1.0, None) is None
    assert str(clip_scale(float("nan"), 1.0)) == "nan"
