"""What a model makes of a fixed set of inputs: hidden states and attention, layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from entropylens.capture.asking import Asked, Asking
from entropylens.capture.attention import AttentionTap, Queries, joined, moved
from entropylens.capture.call import Call
from entropylens.capture.forward import predicts_next_token
from entropylens.capture.layers import Hidden, Walk, layers_of
from entropylens.capture.probe import Batch, few_states
from entropylens.capture.tokens import Grid
from entropylens.diagnostics._clusters import spectral_clusters
from entropylens.registry import AttentionReading, AttentionRows, RepresentationReading

__all__ = ["Insides", "ProbeSet", "Seen"]

ROWS: Final = 512
LEAST_ROWS: Final = 8
_LEAST_CLUSTERED: Final = 20
_WIDEST: Final = 16_384
"""Numbers of an input that clusters are made of; of more, so many evenly spaced ones."""
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
        """The inputs as a training forward of this model would show them.

        Raises:
            ValueError: They hold no tensor with a row for each entry, or labels are not as many.
        """
        device = next(model.parameters()).device
        arguments = self.inputs if isinstance(self.inputs, Mapping) else {}
        call = Call.of(model, () if arguments else (self.inputs,), arguments)
        call = call.map(lambda tensor: tensor.to(device))
        given = call.tensors()
        if not given or not given[0].ndim:
            raise ValueError(
                "ProbeSet: expected inputs that hold a tensor with a row for each entry, got none"
            )
        rows = given[0].shape[0]
        if self.labels is None:
            return Batch(call=call, grid=_places_of(model, call, rows), has_targets=False)
        if self.labels.ndim not in (1, 2) or self.labels.shape[0] != rows:
            raise ValueError(
                f"ProbeSet: expected labels [{rows}] or [{rows}, T], as many as there are rows of "
                f"the inputs, got shape {tuple(self.labels.shape)}"
            )
        targets = self.labels.reshape(rows, -1).to(device)
        return Batch(call=call, grid=Grid(targets=targets, present=targets >= 0))


@dataclass(frozen=True)
class Seen:
    """What one look saw, still on the device."""

    states: dict[str, Tensor]
    """``[N, D]`` by layer."""
    attention: AttentionReading | None


@dataclass(frozen=True)
class _Part:
    """Rows of one batch, and where in its hidden states to look."""

    model: Asked
    call: Call
    rows: int
    row: Tensor
    column: Tensor
    positions: tuple[int, ...]
    """How many there may be of a sequence of tokens; none of entries that are no such."""
    mask: Tensor | None
    """``[rows, T]`` which positions of entries are no padding."""
    queries: Queries | None


class Insides:
    """Keeps a few rows of what a model is given, and sees what it makes of them.

    Looking, the model runs without gradients or dropout, in evaluation mode; its weights, buffers,
    modes and hooks, what its forward gathers in lists and dicts, and the global random number
    generators are left as they were. A forward that would write to a weight, or communicate with
    other ranks, is stopped before it does.

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
        self._has_inputs = self._has_targets = True
        self._once: _Rows | None = None
        self.rows = 0
        """Kept by now."""
        self.are_tokens = False
        self._names = {id(m): name for name, m in self._asking.whole.model.named_modules()}
        self.layers = layers_of(self._asking.whole.model, wanted.layers) if wanted.layers else []
        """Names of those that are looked at; without a wish known once a batch is kept."""

    @property
    def is_complete(self) -> bool:
        """Whether there are as many rows as are wanted."""
        return self.rows >= self._wanted.rows or len(self._parts) >= _MOST_BATCHES

    @property
    def lone_classes(self) -> int:
        """Classes of which there is one row, once that is known: they have no spread to compare."""
        labels = None if self._once is None else self._once.labels
        return 0 if labels is None else sum(n == 1 for n in Counter(labels).values())

    def keep(self, batch: Batch, generator: torch.Generator) -> bool:
        """Keep rows of a batch until there are enough.

        Returns:
            False where they cannot be cut out of its arguments.
        """
        model = self._asking.of(batch.call.module)
        if not (self._wanted.layers or self._parts):
            # Of what is called: a module may hold a frozen model beside the one that it trains.
            path = self._names.get(id(batch.call.module), "")
            within = layers_of(batch.call.module)
            self.layers = [f"{path}.{name}" if path else name for name in within]
        states = few_states(model, batch, generator, self._wanted.rows - self.rows)
        if states is None:
            return False
        # What is the same for all rows may change later.
        call, rows, width = (
            states.call.map(torch.clone),
            states.chosen.shape[0],
            states.part.shape[1],
        )
        offset = model.offset(call, width)
        is_text, mask = width > 1, call.kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] != rows:
            mask = None
        present = _present(call, states.part, offset) if is_text else mask
        self._parts.append(
            _Part(
                model=model,
                call=call,
                rows=rows,
                row=states.row,
                column=states.places.column,
                positions=(offset + width, offset + width + 1) if is_text else (),
                mask=mask,
                queries=None if present is None else Queries.of_tokens(present.bool(), generator),
            )
        )
        self.are_tokens = self.are_tokens or is_text
        self._targets.append(states.part.targets[states.row, states.column])
        self._weights.append(states.weight)
        self._has_targets = self._has_targets and batch.has_targets
        self._keep_inputs(self._parts[-1])
        self.rows += states.row.shape[0]
        return True

    def _keep_inputs(self, part: _Part) -> None:
        given = next((t for t in part.call.tensors() if t.ndim and t.shape[0] == part.rows), None)
        if given is None or part.positions or not given.is_floating_point():
            self._has_inputs = False
        elif self._has_inputs:
            self._inputs.append(given[part.row].flatten(1).float())
            self._has_inputs = len({one.shape[1] for one in self._inputs}) == 1
        if not self._has_inputs:
            self._inputs.clear()

    def look(self, *, states: bool, attention: bool) -> Seen:
        """Run the model on what is kept.

        Args:
            states: Whether hidden states are wanted.
            attention: Whether attention is.

        Raises:
            ValueError: Somebody else's hooks are on the model.
            RuntimeError: Its forward communicates with other ranks, or writes to its weights.
        """
        found: dict[str, list[Tensor]] = {}
        rows: dict[str, list[AttentionRows]] = {}
        for part in self._parts:
            walk = Walk(part.model.model, self.layers if states else (), partial(_states, part))
            walk.names = self._names
            tap = AttentionTap(walk.place, part.rows, part.queries)
            with part.model.in_evaluation():
                walk.begin(part.call.module)
                with tap if attention else nullcontext():
                    part.model.run(part.call)
            for name, one in walk.found.items():
                found.setdefault(name, []).append(one)
            for name, some in tap.found.items():
                rows.setdefault(name, []).append(some)
        joint = {name: torch.cat(values) for name, values in found.items()}
        return Seen(
            states={name: values for name, values in joint.items() if len(values) == self.rows},
            attention=AttentionReading(layers=_on_one_device(rows)) if rows else None,
        )

    def tensors(self, seen: Seen) -> dict[str, Any]:
        """What `reading` takes, still on the device."""
        if self._once is not None:
            self._inputs.clear()
            return {"states": seen.states}
        return {
            "states": seen.states,
            "inputs": torch.cat(self._inputs) if self._has_inputs else None,
            "targets": torch.cat(self._targets) if self._has_targets else None,
            "weights": torch.cat(self._weights),
        }

    def reading(self, tensors: Mapping[str, Any]) -> RepresentationReading:
        """A reading of what `tensors` gave, brought to the host.

        Raises:
            ValueError: Fewer than 8 rows are there.
        """
        if self._once is None:
            self._once = _sorted_out(tensors)
        once = self._once
        return RepresentationReading(
            states={name: values[once.kept] for name, values in tensors["states"].items()},
            labels=once.labels,
            input_clusters=once.clusters,
            are_tokens=self.are_tokens,
        )


@dataclass(frozen=True)
class _Rows:
    """What is known of the rows once they have been on the host."""

    kept: Tensor
    labels: list[int] | None
    clusters: list[int] | None


def _sorted_out(tensors: Mapping[str, Any]) -> _Rows:
    inputs, targets = tensors["inputs"], tensors["targets"]
    kept = (tensors["weights"] > 0).nonzero()[:, 0]
    if inputs is not None:
        # A small training set comes twice.
        first = {inputs[at].numpy().tobytes(): at for at in reversed(kept.tolist())}
        kept = torch.tensor(sorted(first.values()), dtype=torch.long)
    count = len(kept)
    if count < LEAST_ROWS:
        raise ValueError(
            f"ProbeSet: expected at least {LEAST_ROWS} rows with a target, got {count}"
        )
    clusters = None
    if inputs is not None and count >= _LEAST_CLUSTERED:
        step = -(-inputs.shape[1] // _WIDEST)
        clusters = spectral_clusters(inputs[kept, ::step])
    return _Rows(kept, None if targets is None else targets[kept].tolist(), clusters)


def _places_of(model: nn.Module, call: Call, rows: int) -> Grid:
    """Where to look without labels: at every position of a text, or at every row."""
    ids, mask = call.kwargs.get("input_ids"), call.kwargs.get("attention_mask")
    given = call.tensors()[0]
    places = given.new_zeros(rows, 1, dtype=torch.long)
    if predicts_next_token(model) and isinstance(ids, Tensor) and ids.ndim == 2:
        places = torch.zeros_like(ids, dtype=torch.long)
    is_mask = isinstance(mask, Tensor) and mask.shape == places.shape
    present = mask.bool() if isinstance(mask, Tensor) and is_mask else places == 0
    return Grid(targets=places, present=present)


def _present(call: Call, part: Grid, offset: int) -> Tensor:
    """``[rows, T]`` scored positions of the model's own sequences."""
    rows, width = part.shape
    lengths = {t.shape[1] for t in call.tensors() if t.ndim > 1 and t.shape[0] == rows}
    length = next((n for n in (offset + width + 1, offset + width) if n in lengths), offset + width)
    found = part.present.new_zeros(rows, length)
    found[:, offset : offset + width] = part.present
    return found


def _states(part: _Part, found: Hidden) -> Tensor | None:
    """``[n, D]`` the hidden states of a layer at the part's rows; None where it has none of them.

    Where rows are no sequences of tokens, positions are averaged over, padding left out.
    """
    hidden = found.with_features_last(part.rows)
    if hidden is None:
        return None
    row, column = _beside(part.row, hidden), _beside(part.column, hidden)
    if part.positions:
        fits = hidden.ndim == 3 and hidden.shape[1] in part.positions
        return hidden[row, column].float() if fits else None
    if hidden.ndim == 3:
        hidden = _mean_over_positions(hidden.float(), part.mask)
    return hidden[row].float()


def _mean_over_positions(hidden: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None or mask.shape[1] != hidden.shape[1]:
        return hidden.mean(1)
    present = _beside(mask != 0, hidden)[..., None]
    return torch.where(present, hidden, 0.0).sum(1) / present.sum(1).clamp(min=1)


def _beside(value: Tensor, other: Tensor) -> Tensor:
    """On the other's device; a model may be spread over several."""
    return value if value.device == other.device else value.to(other.device)


def _on_one_device(rows: Mapping[str, Sequence[AttentionRows]]) -> dict[str, AttentionRows]:
    layers = {name: joined(parts) for name, parts in rows.items()}
    first = next(iter(layers.values())).reach.device
    if all(one.reach.device == first for one in layers.values()):
        return layers
    return {name: moved(one, first) for name, one in layers.items()}
