"""One cell: healthy steps up to the fault, and from there a run for each fault and one for none."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from math import isfinite
from time import perf_counter
from typing import Any, Final

import torch

from benchmarks.step_parts.faults import COURSES, FAULTS, PLAIN, Course, Fault
from benchmarks.step_parts.guards import GUARDS
from benchmarks.step_parts.programs import (
    OPTIMISERS,
    PROGRAMS,
    RATES,
    cross_entropy,
    evaluate,
    generator,
)

__all__ = ["TWIN", "Plan", "Training", "run_cell"]

TWIN: Final = "twin"


@dataclass(frozen=True)
class Plan:
    """When what happens.

    Args:
        fault: Step of the fault: so many healthy steps come before it.
        lead: Of these, steps that every fork makes for itself, so that a guard that was
            taken up from its state has seen a batch.
        moments: Steps after the fault at which a part of the test samples is judged, the last of
            them the end of the longest fault that ends.
        after: Further steps.
        rate: Learning rate, instead of the pair's best.
    """

    fault: int = 200
    lead: int = 5
    moments: tuple[int, ...] = (1, 2, 5, 10, 20)
    after: int = 100
    rate: float | None = None

    @property
    def end(self) -> int:
        """Steps of a whole run."""
        return self.fault + self.moments[-1] + self.after


class Training:
    """A model in training, that can be forked.

    Args:
        program: A name of `PROGRAMS`.
        optimiser: A name of `OPTIMISERS`.
        seed: Of the first parameters and of the order of data.
        policy: A name of `GUARDS`.
        rate: Learning rate; by default the pair's best.
        state: What `snapshot` gave.
    """

    def __init__(
        self,
        program: str,
        optimiser: str,
        seed: int,
        policy: str,
        rate: float | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.program, self.optimiser, self.seed = PROGRAMS[program], optimiser, seed
        self.material = self.program.material()
        self.rate = rate or RATES[program][optimiser]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model, self._judged = self.program.build(), self.program.build()
        self._judged.requires_grad_(False).eval()
        self.optimizer = OPTIMISERS[optimiser](self.model.parameters())
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(deepcopy(state["optimizer"]))
        self.guard = GUARDS[policy](
            self.model, self.optimizer, None if state is None else deepcopy(state["guard"])
        )

    def snapshot(self) -> dict[str, Any]:
        """All that another needs to go on exactly from here."""
        return {
            "model": deepcopy(self.model.state_dict()),
            "optimizer": deepcopy(self.optimizer.state_dict()),
            "guard": self.guard.state_dict(),
        }

    def step(self, step: int, course: Course = PLAIN, fault: Fault | None = None) -> None:
        """One step of training, of its number in the course; with the fault, if it is there now."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * course.rate(step, self.optimiser)
        if fault is not None:
            fault.set(self.optimizer)
        inputs, targets = (
            self.material.garbage(generator(self.seed, step, stream=1))
            if fault is not None and fault.garbage
            else self.material.batch(
                generator(self.seed, step), course.share, step < course.shifted
            )
        )
        loss = cross_entropy(self.model(inputs), targets)
        loss.backward()
        if fault is not None:
            found = (p.grad for p in self.model.parameters() if p.grad is not None)
            fault.spoil(found, self.seed, step)
        self.guard.step(inputs, targets, loss.detach())
        self.optimizer.zero_grad()

    def judge(self, count: int) -> dict[str, float | None]:
        """Accuracy in percent and loss on held-out samples, asked of a copy in evaluation mode."""
        self._judged.load_state_dict(self.model.state_dict())
        classes = self.material.classes
        accuracy, loss = evaluate(self._judged, self.material.test, count, classes)
        return {"accuracy": round(accuracy, 4), "loss": loss if isfinite(loss) else None}

    def length_of(self, step: int, fault: Fault | None) -> float | None:
        """Make a step; the norm of the change of all parameters, None where it is not finite."""
        before = [p.detach().clone() for p in self.model.parameters()]
        self.step(step, fault=fault)
        after = [p.detach() for p in self.model.parameters()]
        apart = torch._foreach_norm(torch._foreach_sub(after, before))
        norm = torch.stack(apart).norm().item()
        return norm if isfinite(norm) else None


def run_cell(
    program: str,
    optimiser: str,
    seed: int,
    policy: str,
    plan: Plan = Plan(),
    faults: Mapping[str, Fault] = FAULTS,
    courses: Mapping[str, Course] = COURSES,
) -> dict[str, Any]:
    """Train once to the fault, and on from there with each.

    Returns:
        ``before``, what the model knew at the fault; ``runs`` by fault, and the ``twin`` without
        one, each with its judgements by moment, its final one, and the norms of its first updates;
        ``healthy``: steps, looks and interventions of what had no fault, by course; ``seconds``.
    """
    begun = perf_counter()
    with _closing(Training(program, optimiser, seed, policy, plan.rate)) as training:
        for step in range(plan.fault - plan.lead):
            training.step(step)
        state = training.snapshot()
        healthy = {"to_the_fault": _counts(training, plan.fault - plan.lead)}
    wanted = {TWIN: None} | {k: v for k, v in faults.items() if v.concerns(optimiser)}
    runs: dict[str, Any] = {}
    for name, fault in wanted.items():
        with _closing(Training(program, optimiser, seed, policy, plan.rate, state)) as training:
            before, runs[name] = _run(training, plan, fault)
    twin = runs[TWIN]
    healthy["twin"] = {k: twin[k] for k in ("steps", "looks", "interventions", "final")}
    for name, course in courses.items():
        with _closing(Training(program, optimiser, seed, policy, plan.rate)) as training:
            for step in range(course.steps):
                training.step(step, course)
            final = training.judge(training.program.whole)
            healthy[name] = {**_counts(training, course.steps), "final": final}
    return {
        "program": program,
        "optimiser": optimiser,
        "seed": seed,
        "policy": policy,
        "before": before,
        "runs": runs,
        "healthy": healthy,
        "seconds": round(perf_counter() - begun, 2),
    }


def _run(
    training: Training, plan: Plan, fault: Fault | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was known before the fault, the same for every fork; and the run from there."""
    begun, first = perf_counter(), (training.guard.looks, training.guard.interventions)
    for step in range(plan.fault - plan.lead, plan.fault):
        training.step(step)
    part = training.program.part
    before = training.judge(part)
    moments: dict[str, Any] = {}
    lengths: list[float | None] = []
    for made in range(1, plan.end - plan.fault + 1):
        step = plan.fault + made - 1
        is_on = fault is not None and made <= fault.steps
        if made <= plan.moments[-1]:
            lengths.append(training.length_of(step, fault if is_on else None))
        else:
            training.step(step, fault=fault if is_on else None)
        if made in plan.moments:
            moments[str(made)] = training.judge(part)
    return before, {
        "moments": moments,
        "final": training.judge(training.program.whole),
        "final_part": training.judge(part),
        "updates": lengths,
        "steps": plan.end - plan.fault + plan.lead,
        "looks": training.guard.looks - first[0],
        "interventions": training.guard.interventions - first[1],
        "seconds": round(perf_counter() - begun, 3),
    }


def _counts(training: Training, steps: int) -> dict[str, Any]:
    guard = training.guard
    return {"steps": steps, "looks": guard.looks, "interventions": guard.interventions}


@contextmanager
def _closing(training: Training) -> Iterator[Training]:
    try:
        yield training
    finally:
        training.guard.close()
