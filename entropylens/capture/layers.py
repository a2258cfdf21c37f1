"""Which layers of a model show what it has made of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from math import ceil
from typing import Final

from torch import nn

__all__ = ["layers_of"]

MOST: Final = 4
_LEAST_SHARE: Final = 0.5
"""Of the parameters, that repeated blocks hold where they are the model."""


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
