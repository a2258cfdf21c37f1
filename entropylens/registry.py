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
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from entropylens.dictionary import Metric
from entropylens.errors import unknown_name
from entropylens.readings import (
    READINGS,
    AttentionReading,
    AttentionRows,
    ControlReading,
    GradientReading,
    MatricesReading,
    OptimizerReading,
    PolicyReading,
    PreferenceReading,
    ProbeReading,
    RepresentationReading,
    RolloutReading,
    RouterReading,
    SampledReading,
    StepReading,
    TokenReading,
    UpdateReading,
    WeightReading,
)
from entropylens.rules import entropy_law, forecast
from entropylens.schedule import PRESETS, Schedule

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "READINGS",
    "AttentionReading",
    "AttentionRows",
    "Block",
    "ControlReading",
    "Diagnostic",
    "GradientReading",
    "Lists",
    "Lookup",
    "MatricesReading",
    "Metric",
    "OptimizerReading",
    "PolicyReading",
    "PreferenceReading",
    "ProbeReading",
    "RepresentationReading",
    "RolloutReading",
    "RouterReading",
    "SampledReading",
    "Scalars",
    "StepReading",
    "TokenReading",
    "UpdateReading",
    "WeightReading",
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
class Lists:
    """A column of lists: row i is ``values[i]`` where ``present[i]``."""

    values: Tensor
    """``[rows, width]``"""
    present: Tensor
    """``[rows, width]`` bool."""


@dataclass(frozen=True)
class Block:
    """Rows of one table as columns, still on the device.

    Args:
        table: A table of the log (`entropylens.records.SCHEMAS`).
        columns: Column name to a 1-d tensor, a sequence of that length, a `Lookup`, `Lists`,
            `Scalars`, or a scalar for all rows.
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
    writers = {found.name: found.metrics for found in all_diagnostics().values()}
    writers |= {"entropy_law": entropy_law.METRICS, "forecast": forecast.METRICS}
    metrics = {
        name: {**asdict(metric), "diagnostic": writer}
        for writer, defined in writers.items()
        for name, metric in defined.items()
    }
    text = json.dumps({"metrics": dict(sorted(metrics.items()))}, indent=1, ensure_ascii=False)
    (path or Path(__file__).with_name("dictionary.json")).write_text(text + "\n", encoding="utf-8")
