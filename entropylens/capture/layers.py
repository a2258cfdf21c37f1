"""Which layers of a model show what it has made of its inputs, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from math import ceil
from typing import Any, Final

import torch
from torch import Tensor, nn

from entropylens.capture.call import tensors_in

__all__ = ["Hidden", "Walk", "layers_of"]

MOST: Final = 4
_LEAST_SHARE: Final = 0.5
"""Of the parameters, that repeated blocks hold where they are the model."""
_FEATURES: Final = {
    "out_channels": True,
    "num_features": True,
    "num_channels": True,
    "out_features": False,
    "embedding_dim": False,
}
"""What modules call the number of their features, and whether these stand right after the batch."""


def layers_of(model: nn.Module, patterns: Sequence[str] = ()) -> list[str]:
    """Names of the layers to look at, in the model's order.

    Without patterns up to four, evenly spaced, the last among them: of the blocks of a transformer
    or of another model that mostly repeats one; else of the parts that follow one another and hold
    parameters, but for the last, which is the head.

    Args:
        model: Without what parallel training wraps around it.
        patterns: Names of modules, where ``*`` stands for any text.

    Raises:
        ValueError: A pattern fits no module.
    """
    names = [name for name, _ in model.named_modules() if name]
    if patterns:
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"ProbeSet: expected layers to name modules of the model, such as "
                    f"{', '.join(names[:3])}, got {pattern!r}"
                )
        return [n for n in names if any(fnmatchcase(n, pattern) for pattern in patterns)]
    found = _blocks(model) or _parts(model)
    if len(found) <= MOST:
        return found
    return [found[ceil((i + 1) * len(found) / MOST) - 1] for i in range(MOST)]


def _blocks(model: nn.Module) -> list[str]:
    """The blocks that the model mostly consists of; none where there are no such."""
    whole = _size(model)
    best: tuple[int, list[str]] = (0, [])
    for name, module in model.named_modules():
        children = dict(module.named_children())
        kinds = {type(child) for child in children.values()}
        is_list = isinstance(module, nn.ModuleList | nn.Sequential) and len(children) > 1
        if not is_list or len(kinds) > 1 or any(not _size(c) for c in children.values()):
            continue
        if any(not dict(child.named_children()) for child in children.values()):
            continue
        if _size(module) > max(best[0], _LEAST_SHARE * (whole - _embedding_size(model))):
            best = (_size(module), [f"{name}.{child}" if name else child for child in children])
    return best[1]


def _parts(model: nn.Module) -> list[str]:
    """The parts that follow one another, down to where there is more than one."""
    path, module = "", model
    while True:
        parts = [(n, child) for n, child in module.named_children() if _size(child)]
        if len(parts) != 1 or not dict(parts[0][1].named_children()):
            break
        path, module = f"{path}{parts[0][0]}.", parts[0][1]
    if isinstance(module, nn.Sequential):
        # What stands between two parts with parameters, such as an activation, ends the first.
        order = [name for name, _ in module.named_children()]
        starts = [order.index(name) for name, _ in parts]
        return [f"{path}{order[start - 1]}" for start in starts[1:]]
    return [f"{path}{name}" for name, _ in parts[:-1]]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _embedding_size(model: nn.Module) -> int:
    return sum(
        module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding)
    )


@dataclass(frozen=True)
class Hidden:
    """What a layer gave."""

    output: Any
    features: int | None
    """Of the last module with weights before it ended; None is not known."""
    features_first: bool
    """Whether that module has its features right after the batch, as convolutions do."""
    is_sequence_first: bool
    """Whether the layer says that its first axis is the sequence's."""

    def with_features_last(self, rows: int) -> Tensor | None:
        """``[rows, D]`` or ``[rows, positions, D]``; None where it has no such axis of rows."""
        found = next(iter(tensors_in(self.output)), None)
        if found is None or found.ndim < 2 or not found.is_floating_point():
            return None
        is_turned = found.ndim == 3 and found.shape[1] == rows
        if is_turned and (found.shape[0] != rows or self.is_sequence_first):
            found = found.movedim(1, 0)
        elif found.shape[0] != rows:
            return None
        found = found.movedim(self._axis(found.shape), -1)
        return found.flatten(1, -2) if found.ndim > 3 else found

    def _axis(self, shape: torch.Size) -> int:
        likely = 1 if self.features_first else len(shape) - 1
        fitting = [at for at in range(1, len(shape)) if shape[at] == self.features]
        return fitting[0] if len(fitting) == 1 else likely


class Walk:
    """Where a forward is, and what the wanted layers gave when each first ended.

    Hooks are put on the modules as they are then, to be taken away by whoever has put others aside.

    Args:
        model: Whose layers are wanted.
        wanted: Their names.
        read: Makes of a layer's output what is kept of it, at once: it may be written over later.
    """

    def __init__(
        self,
        model: nn.Module,
        wanted: Collection[str],
        read: Callable[[Hidden], Tensor | None],
    ) -> None:
        self.found: dict[str, Tensor] = {}
        self.names: Mapping[int, str] = {id(m): name for name, m in model.named_modules()}
        self._wanted, self._read = {*wanted}, read
        self._path: list[str] = []
        self._features: tuple[int | None, bool] = (None, False)

    def place(self) -> str:
        """Name of the module that runs."""
        return self._path[-1] if self._path else ""

    def begin(self, module: nn.Module) -> None:
        """Follow the next forward of a module."""
        for part in module.modules():
            part.register_forward_pre_hook(partial(self._enter, self.names.get(id(part), "")))
            part.register_forward_hook(self._leave)

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        self._path.append(name)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        name = self._path.pop()
        self._features = next(_features(module), self._features)
        if name not in self._wanted or name in self.found:
            return
        turned = any(getattr(part, "batch_first", True) is False for part in module.modules())
        states = self._read(Hidden(output, *self._features, is_sequence_first=turned))
        if states is not None:
            self.found[name] = states


def _features(module: nn.Module) -> Iterator[tuple[int, bool]]:
    """How many features a module with weights of its own has, and whether they stand first."""
    if not any(True for _ in module.parameters(recurse=False)) and not _normalises(module):
        return
    if isinstance(module, nn.LayerNorm):
        yield module.normalized_shape[-1], False
    for name, first in _FEATURES.items():
        if isinstance(size := getattr(module, name, None), int):
            yield size, first


def _normalises(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase)
