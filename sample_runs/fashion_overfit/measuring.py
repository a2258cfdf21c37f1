"""Every measure of representations, at chosen epochs, on rows that are trained on and that are not.

The live probe of entropylens has rows of the training batches and as much time as `max_overhead`
leaves. To compare measures, each is taken at the same epochs, of the same rows, off the clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import cross_entropy

import entropylens as el
from entropylens.readings import RepresentationReading
from entropylens.transfer import Stamp, Transfer
from entropylens_callbacks.lightning import EntropyLensCallback
from sample_runs.fashion_overfit.images import Labelled
from sample_runs.fashion_overfit.net import states_of

__all__ = ["SCHEMA", "Measuring", "measure"]

SCHEMA: Final = pa.schema(
    [
        ("epoch", pa.int16()),
        ("rows", pa.dictionary(pa.int8(), pa.string())),
        ("layer", pa.dictionary(pa.int8(), pa.string())),
        ("name", pa.dictionary(pa.int8(), pa.string())),
        ("value", pa.float32()),
    ]
)


@dataclass(frozen=True)
class Measured:
    """A value of one layer, or of the whole net where ``layer`` is empty."""

    layer: str
    name: str
    value: float


def measure(states: Mapping[str, Tensor], labels: Tensor) -> list[Measured]:
    """What do all diagnostics that read representations say of these?

    Args:
        states: By layer ``[n, width]``.
        labels: ``[n]``.

    Returns:
        Values of single layers, as far as they are known; names without ``representation/``.
    """
    arrived: list[Measured] = []

    def deliver(table: str, columns: dict[str, Any]) -> None:
        names = (name.removeprefix("representation/") for name in columns["name"])
        rows = map(Measured, columns["module"], names, columns["value"])
        arrived.extend(one for one in rows if one.layer)

    transfer = Transfer(deliver)
    readers = [found for found in el.all_diagnostics().values() if found.reads == "representation"]
    for name, state in states.items():
        # Alone, for some measures are taken of the last layer only.
        reading = RepresentationReading(states={name: state}, labels=labels.tolist())
        for found in readers:
            for block in found.measure(reading, found.initial_state())[0]:
                transfer.add(block, Stamp(0, 0.0, "eval"))
    transfer.flush(wait=True)
    return arrived


class Measuring(Callback):  # type: ignore[misc]
    """Measures before training and after some of its epochs, and writes it to the run's log too.

    In the log names are ``training/hidden/dse``, ``held_out/accuracy`` and so on, phase eval.

    Args:
        watcher: Of the same Trainer, before this callback.
        epochs: After which; 0 is before the first.
        rows: By name, each with the labels that it is judged by.
        probe: Rows of each of which states are looked at: the first.
    """

    def __init__(
        self,
        watcher: EntropyLensCallback,
        epochs: tuple[int, ...],
        rows: Mapping[str, Labelled],
        probe: int,
    ) -> None:
        self.watcher = watcher
        self.epochs, self.rows, self.probe = epochs, rows, probe
        self.found: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measure(0, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure where a validation ends, which is after an epoch."""
        if not trainer.sanity_checking:
            self._measure(trainer.current_epoch + 1, pl_module)

    @torch.no_grad()
    def _measure(self, epoch: int, module: LightningModule) -> None:
        if epoch not in self.epochs:
            return
        was_training = module.training
        module.eval()
        for rows, given in self.rows.items():
            logits, probed = module(given.images), given[: self.probe]
            right = (logits.argmax(-1) == given.labels).float().mean()
            whole = [
                Measured("", "accuracy", float(right)),
                Measured("", "loss", float(cross_entropy(logits, given.labels))),
            ]
            states = states_of(module.net, probed.images)
            measured = [*whole, *measure(states, probed.labels)]
            for one in measured:
                row = (epoch, rows, one.layer, one.name, one.value)
                for column, value in zip(self.found.values(), row, strict=True):
                    column.append(value)
            lens = self.watcher.lens
            if lens is not None:
                told = {f"{m.layer}/{m.name}".lstrip("/"): m.value for m in measured}
                lens.log(told, source=rows, phase="eval")
                lens.restart_clock()
        module.train(was_training)

    def table(self) -> pa.Table:
        """All that was measured, in order."""
        return pa.table(self.found, schema=SCHEMA)
