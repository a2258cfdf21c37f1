"""What a model makes of a fixed set of inputs: hidden states and attention, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from entropylens.capture.asking import Asked, Asking
from entropylens.capture.attention import AttentionTap, Queries, joined
from entropylens.capture.call import Call, tensors_in
from entropylens.capture.layers import layers_of
from entropylens.capture.probe import Batch, few_states
from entropylens.capture.tokens import Grid
from entropylens.diagnostics._clusters import spectral_clusters
from entropylens.registry import AttentionReading, RepresentationReading

__all__ = ["Insides", "ProbeSet", "Seen"]

ROWS: Final = 512
LEAST_ROWS: Final = 8
_MOST_BATCHES: Final = 64


@dataclass(frozen=True, kw_only=True)
class ProbeSet:
    """What representations and attention are measured on, all run long.

    Args:
        inputs: What the model is called with: a tensor, or a mapping of arguments by name. None
            takes the first training batches, up to ``rows`` of their rows.
        labels: ``[N]`` class of each row of the inputs, or ``[N, T]`` of each position, negative
            where there is none; None is not known. Of training batches they are the targets.
        layers: Names of modules, where ``*`` stands for any text; none takes up to four, evenly
            spaced (`entropylens.capture.layers.layers_of`).
        rows: At most; numbers of different numbers of rows cannot be compared.

    Raises:
        ValueError: Labels without inputs, or fewer than 8 rows.
        TypeError: Inputs that are neither.
    """

    inputs: Tensor | Mapping[str, Any] | None = None
    labels: Tensor | None = None
    layers: Sequence[str] = ()
    rows: int = ROWS

    def __post_init__(self) -> None:
        """Check what was given."""
        if self.labels is not None and self.inputs is None:
            raise ValueError("ProbeSet: expected inputs beside labels, got none")
        if self.rows < LEAST_ROWS:
            raise ValueError(f"ProbeSet: expected rows >= {LEAST_ROWS}, got {self.rows}")
        if self.inputs is not None and not isinstance(self.inputs, Tensor | Mapping):
            raise TypeError(
                f"ProbeSet: expected inputs as a tensor or a mapping of arguments by name, got "
                f"{type(self.inputs).__name__}"
            )

    def batch(self, model: nn.Module) -> Batch:
        """The inputs as a training forward would show them."""
        arguments = self.inputs if isinstance(self.inputs, Mapping) else {}
        call = Call.of(model, () if arguments else (self.inputs,), arguments)
        given = call.tensors()
        if not given or not given[0].ndim:
            raise ValueError(
                "ProbeSet: expected inputs that hold a tensor with a row for each entry, got none"
            )
        rows = given[0].shape[0]
        if self.labels is None:
            targets = torch.zeros(rows, 1, dtype=torch.long)
        else:
            targets = self.labels.reshape(rows, -1)
        targets = targets.to(given[0].device)
        return Batch(
            call=call,
            grid=Grid(targets=targets, present=targets >= 0),
            has_targets=self.labels is not None,
        )


@dataclass(frozen=True)
class Seen:
    """What one look saw, still on the device."""

    states: dict[str, Tensor]
    """``[N, D]`` by layer."""
    attention: AttentionReading | None


@dataclass(frozen=True)
class _Part:
    model: Asked
    call: Call
    rows: int
    row: Tensor
    column: Tensor
    columns: int
    queries: Queries | None


class Insides:
    """Keeps a few rows of what a model is given, and sees what it makes of them.

    Looking, the model runs without gradients, dropout or autocast, in evaluation mode; its weights,
    buffers, modes and hooks, and the global random number generators, are left as they were.

    Args:
        model: As the trainer holds it, without an `entropylens.capture.asking.obstacle`.
        wanted: Layers and number of rows.

    Raises:
        ValueError: A pattern of layers fits no module.
    """

    def __init__(self, model: nn.Module, wanted: ProbeSet) -> None:
        self._asking, self._wanted = Asking(model), wanted
        self._parts: list[_Part] = []
        self._inputs: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._has_targets = True
        self.rows = 0
        """Kept by now."""
        self.are_tokens = False
        self._clusters: Sequence[int] | None = None
        self.layers = layers_of(self._asking.whole.model, wanted.layers)

    @property
    def is_complete(self) -> bool:
        """Whether there are as many rows as are wanted."""
        return self.rows >= self._wanted.rows or len(self._parts) >= _MOST_BATCHES

    def keep(self, batch: Batch, generator: torch.Generator) -> bool:
        """Keep rows of a batch until there are enough.

        Returns:
            False where they cannot be cut out of its arguments.
        """
        model = self._asking.of(batch.call.module)
        left = self._wanted.rows - self.rows
        states = few_states(model, batch, generator, left)
        if states is None:
            return False
        width = states.part.shape[1]
        self.are_tokens = self.are_tokens or width > 1
        offset = states.places.column - states.column
        queries = None
        if width > 1:
            first = Queries.of_tokens(states.part, 0, generator)
            queries = Queries(first.columns + offset[0], first.present)
        self._parts.append(
            _Part(
                model=model,
                call=states.call,
                rows=states.chosen.shape[0],
                row=states.row,
                column=states.places.column,
                columns=states.places.columns,
                queries=queries,
            )
        )
        index = states.row, states.column
        self._targets.append(states.part.targets[index])
        self._weights.append(states.weight)
        self._has_targets = self._has_targets and batch.has_targets
        given = next(iter(states.call.tensors()), None)
        if width == 1 and given is not None and given.is_floating_point():
            self._inputs.append(given[states.row].flatten(1).float())
        self.rows += states.row.shape[0]
        return True

    def look(self, *, states: bool, attention: bool) -> Seen:
        """Run the model on what is kept.

        Args:
            states: Whether hidden states are wanted.
            attention: Whether attention is.

        Raises:
            ValueError: Somebody else's hooks are on the model.
        """
        found: dict[str, list[Tensor]] = {}
        rows: dict[str, list[Any]] = {}
        for part in self._parts:
            with part.model.in_evaluation():
                self._run(part, found if states else None, rows if attention else None)
        return Seen(
            states={name: torch.cat(values) for name, values in found.items()},
            attention=AttentionReading(layers={n: joined(v) for n, v in rows.items()})
            if rows
            else None,
        )

    def _run(
        self, part: _Part, found: dict[str, list[Tensor]] | None, rows: dict[str, list[Any]] | None
    ) -> None:
        names = {id(module): name for name, module in self._asking.whole.model.named_modules()}
        path: list[str] = []
        outputs: dict[str, Any] = {}
        for module in part.call.module.modules():
            name = names.get(id(module), "")
            module.register_forward_pre_hook(partial(_enter, path, name))
            if found is not None and name in self.layers:
                module.register_forward_hook(partial(_take, outputs, name))
            module.register_forward_hook(partial(_leave, path))
        tap = AttentionTap(lambda: path[-1] if path else "", part.rows, part.queries)
        with nullcontext() if rows is None else tap:
            part.model.run(part.call)
        if found is not None:
            for name, output in outputs.items():
                if (states := _states(output, part)) is not None:
                    found.setdefault(name, []).append(states.float())
        if rows is not None:
            for name, one in tap.found.items():
                rows.setdefault(name, []).append(one)

    def tensors(self, seen: Seen) -> dict[str, Any]:
        """What `reading` takes, still on the device."""
        return {
            "states": seen.states,
            "inputs": torch.cat(self._inputs) if self._inputs else None,
            "targets": torch.cat(self._targets) if self._has_targets else None,
            "weights": torch.cat(self._weights),
        }

    def reading(self, tensors: Mapping[str, Any]) -> RepresentationReading:
        """A reading of what `tensors` gave, brought to the host.

        Raises:
            ValueError: Fewer than 8 rows are there.
        """
        kept = tensors["weights"] > 0
        count = int(kept.sum())
        if count < LEAST_ROWS:
            raise ValueError(
                f"ProbeSet: expected at least {LEAST_ROWS} rows with a target, got {count}"
            )
        inputs, targets = tensors["inputs"], tensors["targets"]
        if inputs is not None:
            kept = kept & _first_of_equal(tensors["inputs"])
            inputs = tensors["inputs"][kept]
            if self._clusters is None:
                self._clusters = spectral_clusters(inputs)
        return RepresentationReading(
            states={name: values[kept] for name, values in tensors["states"].items()},
            inputs=inputs,
            labels=None if targets is None else targets[kept].tolist(),
            input_clusters=self._clusters if inputs is not None else None,
            are_tokens=self.are_tokens,
        )


def _first_of_equal(inputs: Tensor) -> Tensor:
    """``[N]`` which rows are not the same as one before: a small training set comes twice."""
    _, first = np.unique(inputs.numpy(), axis=0, return_index=True)
    kept = torch.zeros(inputs.shape[0], dtype=torch.bool)
    kept[torch.from_numpy(first)] = True
    return kept


def _enter(path: list[str], name: str, module: nn.Module, args: Any) -> None:
    path.append(name)


def _leave(path: list[str], module: nn.Module, args: Any, output: Any) -> None:
    path.pop()


def _take(outputs: dict[str, Any], name: str, module: nn.Module, args: Any, output: Any) -> None:
    # Of a layer that runs several times, the first.
    outputs.setdefault(name, output)


def _states(output: Any, part: _Part) -> Tensor | None:
    """``[n, D]`` the hidden states of a layer at the part's rows; None where it has none of them.

    Two axes after the features, as images have them, and one before them are averaged over.
    """
    hidden = next(iter(tensors_in(output)), None)
    if hidden is None or hidden.ndim < 2 or not hidden.is_floating_point():
        return None
    if hidden.shape[0] != part.rows:
        if hidden.ndim != 3 or hidden.shape[1] != part.rows:
            return None
        hidden = hidden.movedim(1, 0)
    if part.columns == 1:
        axes = tuple(range(2, hidden.ndim)) if hidden.ndim > 3 else tuple(range(1, hidden.ndim - 1))
        return (hidden.mean(axes) if axes else hidden)[part.row]
    if hidden.ndim != 3 or hidden.shape[1] < part.columns:
        return None
    return hidden[part.row, part.column]
