"""What every run records: loss, learning rate, tokens, time, memory, and our own cost."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from torch import Tensor

from entropylens.registry import Block, Diagnostic, Metric, StepReading, diagnostic

__all__ = ["TrainingVitals"]

_GIB: Final = 2.0**30
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
        "trainer divides by the step's tokens, averaged where it does not",
        "nats (cross-entropy)",
        "not learning, a bad batch, or divergence",
        "learning, or memorising",
    ),
    "learning_rate": _metric(
        "How large a step does the schedule ask for?",
        "lr of each parameter group as this step used it; module is the group's index where there "
        "are several",
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
        estimator="the value that the loop's own clipping computed, after unscaling; absent where "
        "nothing clips or the loop does not pass it",
    ),
    "tokens/step": _metric(
        "How many scored tokens did this step learn from?",
        "number of targets that are not masked, over all micro-batches of this rank",
        "tokens",
        "long or densely scored batches",
        "short batches or mostly masked ones",
    ),
    "tokens/seen": _metric(
        "How many scored tokens has the run learnt from so far?",
        "sum of tokens/step since step 1, resumed runs included",
        "tokens",
        "late in training",
        "early in training",
    ),
    "throughput/tokens_per_second": _metric(
        "How fast does it train?",
        "tokens/step divided by step/seconds",
        "tokens/s",
        "fast",
        "input-bound, throttled, or disturbed",
    ),
    "step/seconds": _metric(
        "How long does a step take?",
        "wall time from the end of the last step to the end of this one, without evaluation",
        "s",
        "stragglers, input stalls, checkpoints, other load",
        "fast",
    ),
    "memory/device/allocated": _metric(
        "How much memory do tensors take on the accelerator?",
        "torch's allocated bytes / 2^30 at the end of the step",
        "GiB",
        "close to the device's limit: out-of-memory is near",
        "room for a larger batch",
    ),
    "memory/process/resident": _metric(
        "How much host memory does the training process take?",
        "resident set size / 2^30",
        "GiB",
        "growing without end: a leak",
        "small",
    ),
    "overhead/fraction": _metric(
        "What does entropylens cost?",
        "(time in our hooks and calls on the training thread + CPU time of our writer thread) / "
        "wall time, since the last such row",
        "1",
        "above max_overhead: rows and intervals are being thinned",
        "cheap",
        estimator="on a CPU the clock; on an accelerator the host's share and device events",
    ),
    "overhead/rows": _metric(
        "How many tokens of a step are measured at most?",
        "the budget's present limit",
        "tokens",
        "complete",
        "sampled, to keep the promised overhead",
    ),
    "overhead/widening": _metric(
        "By how much has the budget widened the intervals?",
        "factor on every diagnostic's interval, up to its floor",
        "1",
        "measured rarely, to keep the promised overhead",
        "1: as the preset says",
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
    yield "gradient/norm/before_clip", reading.gradient_norm_before_clip
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


@diagnostic(reads="step", every={"fast": 1, "balanced": 1, "full": 1}, floor=100, metrics=METRICS)
class TrainingVitals(Diagnostic):
    """The scalars that every run records; what is not known is not written."""

    def measure(self, reading: StepReading, state: Any) -> tuple[list[Block], Any]:
        """Write what is known about one step, tensors and host numbers apart."""
        known = [(name, value) for name, value in _values(reading) if value is not None]
        host = [(name, value) for name, value in known if not isinstance(value, Tensor)]
        several = len(reading.learning_rates) > 1
        host_modules = [""] * len(host)
        blocks = [
            Block.metrics([name], value.reshape(1))
            for name, value in known
            if isinstance(value, Tensor)
        ]
        for group, rate in enumerate(reading.learning_rates):
            module = str(group) if several else ""
            if isinstance(rate, Tensor):
                blocks.append(Block.metrics(["learning_rate"], rate.reshape(1), modules=module))
                continue
            host.append(("learning_rate", rate))
            host_modules.append(module)
        if host:
            names, values = zip(*host, strict=True)
            table = Block("metrics", {"name": names, "module": host_modules, "value": values})
            blocks.append(table)
        return blocks, state
