"""What every run records: loss, learning rate, tokens, time, memory, and our own cost."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from torch import Tensor

from entropylens.registry import (
    Block,
    Diagnostic,
    Metric,
    OptimizerReading,
    Scalars,
    StepReading,
    diagnostic,
)

__all__ = ["TrainingVitals"]

_GIB: Final = 2.0**30
_TINY: Final = 1e-30
"""Added to norms, so that two of 0 are equal."""
_HOST = "read from the trainer or the clock; no device work"


def _metric(question: str, formula: str, unit: str, high: str, low: str, **other: str) -> Metric:
    fixed = {"estimator": "exact, this rank", "cost": _HOST, "source": "Definition"}
    return Metric(
        question=question, formula=formula, unit=unit, high=high, low=low, **{**fixed, **other}
    )


METRICS: Final[Mapping[str, Metric]] = {
    "loss/mean": _metric(
        "Is the model learning?",
        "the loss the trainer minimises in this step: over its micro-batches summed where the "
        "trainer divides by the step's tokens, averaged where it does not; module is the optimiser "
        "where each of several follows a loss of its own",
        "nats (cross-entropy)",
        "not learning, a bad batch, or divergence",
        "learning, or memorising",
    ),
    "learning_rate": _metric(
        "How large a step does the schedule ask for?",
        "lr of each parameter group as this step used it; module is the group's index where there "
        "are several, the optimiser's name, or both",
        "1",
        "bold steps",
        "small steps",
    ),
    "gradient/norm/before_clip": _metric(
        "How large is the gradient that came out of backward?",
        "sqrt(sum of squares) over all parameters, as clipping returned it",
        "1",
        "a bad batch or instability; clipping hides it from the optimiser but not from here",
        "a flat region or a vanishing signal",
        estimator="the value that the loop's own clipping computed, or our norm of the gradients "
        "that Lightning shows before it clips; after unscaling; absent where neither is there",
    ),
    "gradient/clip_scale": _metric(
        "Which part of the gradient did clipping leave?",
        "min(1, gradient/norm/after_clip / gradient/norm/before_clip); 1 where the latter is 0",
        "1",
        "1, but for rounding of up to about 1e-4: not clipped",
        "clipped: the step is as much smaller. Far below 1 in most steps, the threshold and not "
        "the gradient sets the size of steps (Adam's are hardly touched by it)",
        estimator="in steps in which gradients are due; absent where the norm before clipping is "
        "not known, and of sharded gradients. Both norms must be Euclidean: not with another "
        "norm_type of clip_grad_norm_",
    ),
    "optimizer/skipped": _metric(
        "Was this step's update called off?",
        "1 where the optimiser made no update because a gradient scaler found an overflow, else 0",
        "1",
        "the loss scale is too high for these gradients, or they are not finite",
        "every step updates",
        estimator="the scaler's own flag where the optimiser steps with it (fused); elsewhere "
        "whether the optimiser was called, which is known from its first call on",
        ranks="max",
    ),
    "tokens/step": _metric(
        "How many scored tokens did this step learn from?",
        "number of targets that are not masked, over all micro-batches; over ranks summed",
        "tokens",
        "long or densely scored batches",
        "short batches or mostly masked ones",
        ranks="sum",
    ),
    "tokens/seen": _metric(
        "How many scored tokens has the run learnt from so far?",
        "sum of tokens/step since step 1, resumed runs included; over ranks summed",
        "tokens",
        "late in training",
        "early in training",
        estimator="exact; absent from the first step on that the overhead budget left uncounted",
        ranks="sum",
    ),
    "throughput/tokens_per_second": _metric(
        "How fast does it train?",
        "tokens/step divided by step/seconds",
        "tokens/s",
        "fast",
        "input-bound, throttled, or disturbed",
        ranks="sum",
    ),
    "step/seconds": _metric(
        "How long does a step take?",
        "wall time from the end of the last step to the end of this one, without evaluation",
        "s",
        "stragglers, input stalls, checkpoints, other load",
        "fast",
        ranks="max",
    ),
    "memory/device/allocated": _metric(
        "How much memory do tensors take on the accelerator?",
        "torch's allocated bytes / 2^30 at the end of the step",
        "GiB",
        "close to the device's limit: out-of-memory is near",
        "room for a larger batch",
        ranks="max",
    ),
    "memory/process/resident": _metric(
        "How much host memory does the training process take?",
        "resident set size / 2^30",
        "GiB",
        "growing without end: a leak",
        "small",
        ranks="max",
    ),
    "overhead/fraction": _metric(
        "What does entropylens cost?",
        "(time in our hooks and calls on the training thread + CPU time of our writer thread) / "
        "wall time, since the last such row",
        "1",
        "above max_overhead: rows and intervals are being thinned",
        "cheap",
        estimator="on a CPU the clock; on an accelerator the host's share and device events",
        ranks="max",
    ),
    "overhead/rows": _metric(
        "How many tokens of a step are measured at most?",
        "the budget's present limit",
        "tokens",
        "complete",
        "sampled, to keep the promised overhead",
        ranks="min",
    ),
    "overhead/widening": _metric(
        "By how much has the budget widened the intervals?",
        "factor on every interval but that of vitals, up to the diagnostic's floor",
        "1",
        "measured rarely, to keep the promised overhead",
        "1: as the preset says",
        ranks="max",
    ),
    "framework/*": _metric(
        "What does the trainer itself report under this name?",
        "the value that the framework passed to its loggers",
        "as the framework defines it",
        "see the framework's documentation",
        "see the framework's documentation",
        estimator="the framework's own; may be averaged over its logging interval",
        source="The training framework",
    ),
    "user/*": _metric(
        "What did the training script log under this name?",
        "the value given to Lens.log",
        "as the script defines it",
        "see the script",
        "see the script",
        source="The training script",
    ),
}


def _values(reading: StepReading) -> Iterator[tuple[str, Tensor | float | None]]:
    yield "loss/mean", reading.loss
    yield "tokens/step", reading.tokens
    yield "tokens/seen", reading.tokens_seen
    yield "step/seconds", reading.seconds
    if reading.tokens is not None and reading.seconds:
        yield "throughput/tokens_per_second", reading.tokens / reading.seconds
    if reading.device_memory is not None:
        yield "memory/device/allocated", reading.device_memory / _GIB
    if reading.resident_memory is not None:
        yield "memory/process/resident", reading.resident_memory / _GIB
    yield "overhead/fraction", reading.overhead
    yield "overhead/rows", reading.rows
    yield "overhead/widening", reading.widening


def _of_optimizer(reading: OptimizerReading) -> Iterator[tuple[str, str, Tensor | float | None]]:
    name = reading.name
    yield "loss/mean", name, reading.loss
    yield "gradient/norm/before_clip", name, reading.gradient_norm_before_clip
    yield "gradient/clip_scale", name, _clip_scale(reading)
    yield "optimizer/skipped", name, reading.skipped
    for group, rate in enumerate(reading.learning_rates):
        parts = [name, str(group)] if len(reading.learning_rates) > 1 else [name]
        yield "learning_rate", "/".join(part for part in parts if part), rate


def _clip_scale(reading: OptimizerReading) -> Tensor | None:
    before, after = reading.gradient_norm_before_clip, reading.gradient_norm_after_clip
    if before is None or after is None:
        return None
    if isinstance(before, Tensor):
        before = before.reshape(())
    return ((after + _TINY) / (before + _TINY)).clamp(max=1.0)


@diagnostic(
    reads="step",
    every={"fast": 1, "balanced": 1, "full": 1},
    floor={"fast": 200, "balanced": 100, "full": 100},
    metrics=METRICS,
)
class TrainingVitals(Diagnostic):
    """The scalars that every run records; what is not known is not written."""

    def measure(self, reading: StepReading, state: Any) -> tuple[list[Block], Any]:
        """Write what is known about one step."""
        rows = [(name, "", value) for name, value in _values(reading)]
        for optimizer in reading.optimizers:
            rows += _of_optimizer(optimizer)
        known = [row for row in rows if row[2] is not None]
        if not known:
            return [], state
        names, modules, values = zip(*known, strict=True)
        return [Block.metrics(names, Scalars(values), modules=modules)], state
