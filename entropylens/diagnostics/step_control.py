"""What did the step controller do?"""

from typing import Any, Final

from entropylens.registry import Block, ControlReading, Diagnostic, Metric, Scalars, diagnostic

__all__ = ["StepControl"]


def _metric(question: str, formula: str, high: str, low: str, **other: str) -> Metric:
    fixed = {
        "unit": "1",
        "estimator": "exact; numbers of the host. There only where a run has a controller; in "
        "shadow mode what it would have done",
        "cost": "none",
        "source": "entropylens.control.StepBound",
    }
    return Metric(question=question, formula=formula, high=high, low=low, **{**fixed, **other})


METRICS: Final = {
    "control/step_scale": _metric(
        "By which factor was this step made smaller?",
        "product of the factors of its gradients and of its update; 1 as it came, 0 no step",
        "1: nothing was done",
        "the step was bounded: the events say by what, and on which evidence",
    ),
    "control/looks/count": _metric(
        "How many steps were suspicious enough to ask the model what the update does?",
        "steps since the run, or its part since a resume, began",
        "many triggers: each costs about a forward with its derivative",
        "an ordinary run",
        ranks="max",
    ),
    "control/interventions/count": _metric(
        "How many steps were made smaller or left out?",
        "steps since the run, or its part since a resume, began",
        "read the events: something is wrong with data, rates or numbers",
        "an ordinary run",
        ranks="max",
    ),
}


@diagnostic(
    reads="control",
    every={"fast": 1, "balanced": 1, "full": 1},
    floor={"fast": 1000, "balanced": 100, "full": 100},
    metrics=METRICS,
)
class StepControl(Diagnostic):
    """What bounded a step, and how often anything has."""

    def measure(self, reading: ControlReading, state: Any) -> tuple[list[Block], Any]:
        """Write what was done to a step, and how often anything was."""
        values = [reading.step_scale, float(reading.looks), float(reading.interventions)]
        return [Block.metrics([*METRICS], Scalars(values))], state
