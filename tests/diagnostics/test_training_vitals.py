import torch
from readings import step

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
