import pytest
from readings import control

from entropylens.diagnostics.step_control import METRICS, StepControl
from entropylens.registry import ControlReading


def rows(reading: ControlReading) -> dict[str, float]:
    blocks, state = StepControl().measure(reading, None)
    assert state is None
    return {
        name: float(value)
        for block in blocks
        for name, value in zip(block.columns["name"], block.columns["value"].values, strict=True)
    }


def test_what_was_done_is_written() -> None:
    assert rows(control()) == {
        "control/step_scale": 0.25,
        "control/looks/count": 7.0,
        "control/interventions/count": 2.0,
    }


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1.0])
def test_a_step_left_out_and_one_as_it_came_are_numbers_too(scale: float) -> None:
    assert rows(ControlReading(step_scale=scale, looks=0, interventions=0)) == {
        "control/step_scale": scale,
        "control/looks/count": 0.0,
        "control/interventions/count": 0.0,
    }


def test_counts_of_ranks_that_act_alike_are_not_added_up() -> None:
    assert {name: metric.ranks for name, metric in METRICS.items()} == {
        "control/step_scale": "mean",
        "control/looks/count": "max",
        "control/interventions/count": "max",
    }
