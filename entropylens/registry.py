"""What a diagnostic is, what it may read, and where all of them are found.

A diagnostic is one file in ``entropylens/diagnostics/``: pure tensor functions and, under them,
a small class registered with `diagnostic`. Nothing else has to change for it to be scheduled,
logged, documented and tested.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

from entropylens.dictionary import Metric
from entropylens.errors import unknown_name
from entropylens.schedule import PRESETS, Schedule

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "READINGS",
    "Block",
    "Diagnostic",
    "GradientReading",
    "Lookup",
    "Metric",
    "OptimizerReading",
    "Scalars",
    "StepReading",
    "TokenReading",
    "UpdateReading",
    "all_diagnostics",
    "diagnostic",
    "resolve_schedules",
    "write_dictionary",
]


@dataclass(frozen=True)
class Lookup:
    """A column of host values chosen by an index that is still on the device."""

    values: Sequence[Any]
    index: Tensor


@dataclass(frozen=True)
class Scalars:
    """A column of single numbers, some on the host and some still on a device."""

    values: Sequence[Tensor | float]
    """Numbers and tensors of one element, of any device and dtype."""


@dataclass(frozen=True)
class Block:
    """Rows of one table as columns, still on the device.

    Args:
        table: A table of the log (`entropylens.records.SCHEMAS`).
        columns: Column name to a 1-d tensor, a sequence of that length, a `Lookup`, `Scalars`, or a
            scalar for all rows.
            A boolean tensor under ``present`` keeps only the rows where it is true; a metric whose
            ``weight`` is 0 was not measured and is not written.
    """

    table: str
    columns: Mapping[str, Any]

    @classmethod
    def metrics(
        cls,
        names: Sequence[str],
        values: Tensor | Scalars,
        *,
        weight: Tensor | float | None = None,
        modules: Sequence[str] | str = "",
    ) -> Block:
        """Values of several metrics: ``values[i]`` is the value of ``names[i]``.

        Args:
            names: Metric names.
            values: ``[len(names)]``, any real dtype, or so many `Scalars`.
            weight: Tokens behind each value, one for all or ``[len(names)]``.
            modules: Module of each value, or one for all; empty for the whole run.

        Returns:
            The block.
        """
        columns = {"name": list(names), "value": values, "weight": weight, "module": modules}
        return cls(
            "metrics", {key: column for key, column in columns.items() if column is not None}
        )


@dataclass(frozen=True, kw_only=True)
class TokenReading:
    """Measured tokens of one optimiser step, all micro-batches together, ``n`` in number.

    Tokens are all scored ones, or a uniform sample without replacement of each micro-batch.
    """

    logprob: Tensor
    """``[n]`` log-probability of the target, nats."""
    entropy: Tensor
    """``[n]`` Shannon entropy of the predictive distribution, nats."""
    varentropy: Tensor | None = None
    """``[n]`` variance of the log-probability under it, nats squared."""
    max_probability: Tensor | None = None
    """``[n]`` probability of the most probable token."""
    present: Tensor
    """``[n]`` bool: false where a slot holds no scored token."""
    weight: Tensor
    """``[n]`` scored tokens that each row stands for; 0 where not present."""
    position: Tensor
    """``[n]`` index among the scored tokens of its sequence, from 0."""
    sequence: Tensor
    """``[n]`` index into ``sequence_tokens`` and ``sample_ids``."""
    token_id: Tensor
    """``[n]`` the target."""
    distribution_weight: Tensor | None = None
    """``[n]`` scored tokens that each row stands for in ``varentropy`` and ``max_probability``, 0
    where the row's whole distribution was not looked at: a fused head gives ``logprob`` and
    ``entropy`` of every token, the rest only a sample's. None is ``weight``."""
    key: Tensor
    """``[n]`` independent uniform numbers in 0..1, for whoever needs a uniform sub-sample: the
    smallest keys are one. Drawn from a generator of our own, never from the training's."""
    sequence_tokens: Tensor
    """``[sequences]`` scored tokens of every sequence of the step."""
    sample_ids: Sequence[str] | None = None
    """Identifier of each sequence, where the loop gave them."""
    vocabulary: int
    """Number of classes, V."""
    grids: Sequence[tuple[int, int]] | None = None
    """``(rows, columns)`` of each micro-batch when every position is there in order, else None."""


@dataclass(frozen=True, kw_only=True)
class GradientReading:
    """Gradients of one optimiser's parameters, of this rank, without a loss scale."""

    gradients: Mapping[str, Tensor]
    """By parameter name; a sharded one (DTensor) is this rank's part."""
    optimizer: str = ""
    """Which optimiser's, where there are several."""
    clipped: bool = True
    """As the optimiser uses them; false before clipping, where a trainer shows them so."""


@dataclass(frozen=True, kw_only=True)
class UpdateReading:
    """One optimiser's trainable parameters before and after its step."""

    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]
    optimizer: str = ""
    """Which optimiser's, where there are several."""


@dataclass(frozen=True, kw_only=True)
class OptimizerReading:
    """What one optimiser's step shows without looking at a tensor's content."""

    name: str = ""
    """Empty where the run has one optimiser."""
    loss: Tensor | float | None = None
    """``[]`` the loss that this optimiser alone follows, where each has its own."""
    learning_rates: Sequence[Tensor | float] = ()
    """One for each parameter group, as used by this step."""
    gradient_norm_before_clip: Tensor | float | None = None
    skipped: Tensor | float | None = None
    """``[]`` 1 where the step was called off (a gradient scaler found an overflow), else 0."""


@dataclass(frozen=True, kw_only=True)
class StepReading:
    """What is known at the end of an optimiser step without looking at a tensor's content."""

    loss: Tensor | float | None = None
    """``[]`` mean loss of the step as the trainer defines it."""
    optimizers: Sequence[OptimizerReading] = ()
    tokens: Tensor | None = None
    """``[]`` scored tokens of this step on this rank."""
    tokens_seen: Tensor | None = None
    """``[]`` scored tokens since the first step of the run; None once a step was not counted."""
    seconds: float | None = None
    """Wall time of the step; evaluation and checkpoints between steps left out."""
    device_memory: int | None = None
    """Bytes allocated on the accelerator."""
    resident_memory: int | None = None
    """Bytes of this process in host memory."""
    overhead: float | None = None
    """Share of wall time that entropylens took since it was last written."""
    rows: int | None = None
    """Tokens measured a step at most, as the overhead budget has it now."""
    widening: int | None = None
    """Factor by which the overhead budget widens intervals now."""


READINGS: Final[Mapping[str, type]] = {
    "tokens": TokenReading,
    "gradients": GradientReading,
    "update": UpdateReading,
    "step": StepReading,
}
"""What a diagnostic may read, by the word it is declared with."""


class Diagnostic(ABC):
    """A quantity, when it is due, and the rows it emits.

    Subclasses implement `measure`, are registered with `diagnostic`, and hold no data of their
    own: what has to be remembered from one measurement to the next is returned as state.
    """

    name: ClassVar[str]
    reads: ClassVar[str]
    metrics: ClassVar[Mapping[str, Metric]]
    schedules: ClassVar[Mapping[str, Schedule]]

    def initial_state(self) -> Any:
        """What `measure` is given as state the first time."""
        return None

    @abstractmethod
    def measure(self, reading: Any, state: Any) -> tuple[list[Block], Any]:
        """Measure one step.

        No host synchronisation: no ``.item()``, no ``if tensor``, no boolean-mask indexing.

        Args:
            reading: An instance of the class that `READINGS` holds under ``reads``.
            state: What the previous call returned, or `initial_state`.

        Returns:
            The rows, as tensors on the reading's device, and the new state.
        """


_registered: dict[str, Diagnostic] = {}
_D = TypeVar("_D", bound=type[Diagnostic])


@dataclass(frozen=True)
class diagnostic:
    """Register a `Diagnostic` subclass under its file's name.

    Args:
        reads: A key of `READINGS`.
        every: Interval in optimiser steps by preset; a preset left out, or 0, is off.
        floor: The widest interval to which the overhead budget may thin it: one for all presets, or
            by preset.
        metrics: Every metric name it writes, with its definition; ``*`` stands for a variable part.

    Raises:
        ValueError: ``reads`` or a preset is unknown, or the name is taken.
    """

    reads: str
    every: Mapping[str, int]
    floor: int | Mapping[str, int] = 1000
    metrics: Mapping[str, Metric] = field(default_factory=dict)

    def __call__(self, cls: _D) -> _D:
        """Register ``cls`` and return it."""
        name = cls.__module__.rpartition(".")[2]
        if self.reads not in READINGS:
            raise ValueError(
                f"diagnostic {name}: expected reads to be one of {', '.join(READINGS)}, "
                f"got {self.reads!r}"
            )
        if unknown := set(self.every) - set(PRESETS):
            raise ValueError(
                f"diagnostic {name}: expected presets {', '.join(PRESETS)}, got {sorted(unknown)}"
            )
        if name in _registered and type(_registered[name]).__qualname__ != cls.__qualname__:
            raise ValueError(
                f"diagnostic {name}: expected one registered class a file, got "
                f"{type(_registered[name]).__qualname__} and {cls.__qualname__}"
            )
        cls.name, cls.reads, cls.metrics = name, self.reads, self.metrics
        floors = (
            self.floor if isinstance(self.floor, Mapping) else dict.fromkeys(PRESETS, self.floor)
        )
        cls.schedules = {
            preset: Schedule(self.every.get(preset, 0), floors[preset]) for preset in PRESETS
        }
        _registered[name] = cls()
        return cls


@cache
def _import_all() -> None:
    package = import_module("entropylens.diagnostics")
    for module in iter_modules(package.__path__):
        if not module.name.startswith("_"):
            import_module(f"{package.__name__}.{module.name}")


def all_diagnostics() -> dict[str, Diagnostic]:
    """Every registered diagnostic by name.

    Returns:
        A new dictionary in the order of names.

    Example:
        >>> "token_entropy" in all_diagnostics()
        True
    """
    _import_all()
    return dict(sorted(_registered.items()))


def resolve_schedules(
    preset: str, chosen: Mapping[str, Schedule | int | bool]
) -> dict[str, Schedule]:
    """The schedule of every diagnostic that is on.

    Args:
        preset: A name of `entropylens.schedule.PRESETS`.
        chosen: What differs from it: a `Schedule`, an interval in steps, False for off, True for on
            (where the preset has it off, as in the first preset that has it on).

    Returns:
        Schedules by diagnostic; those that are off are left out.

    Raises:
        ValueError: An unknown diagnostic (with the nearest name) or a bad interval.

    Example:
        >>> resolve_schedules("fast", {"token_entropy": 7})["token_entropy"].every
        7
    """
    known = all_diagnostics()
    for name in chosen:
        if name not in known:
            raise ValueError(unknown_name("Lens", "diagnostic", name, known))
    schedules = {}
    for name, found in known.items():
        schedule, wanted = found.schedules[preset], chosen.get(name, True)
        if isinstance(wanted, Schedule):
            schedule = wanted
        elif wanted is False:
            schedule = Schedule(0)
        elif wanted is not True:
            schedule = Schedule(wanted, max(wanted, schedule.floor))
        elif name in chosen and not schedule.every:
            schedule = next(s for s in map(found.schedules.get, PRESETS) if s and s.every)
        if schedule.every:
            schedules[name] = schedule
    return schedules


def write_dictionary(path: Path | None = None) -> None:
    """Write the metric dictionary that docs, tooltips and ``explain`` read.

    Args:
        path: By default ``entropylens/dictionary.json`` beside this file.
    """
    metrics = {
        name: {**asdict(metric), "diagnostic": found.name}
        for found in all_diagnostics().values()
        for name, metric in found.metrics.items()
    }
    text = json.dumps({"metrics": dict(sorted(metrics.items()))}, indent=1, ensure_ascii=False)
    (path or Path(__file__).with_name("dictionary.json")).write_text(text + "\n", encoding="utf-8")
