"""One call of a module, kept so that it can be made again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["Call", "tensors_in"]

_WHOLE: Final = frozenset((torch.int64, torch.int32))
_PLAIN: Final = frozenset((Tensor, nn.Parameter, int, float, bool, str, type(None)))


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a module in a training forward: what it was given."""

    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """A call without the graph behind its arguments."""
        if all(type(one) in _PLAIN for one in (*args, *kwargs.values())):
            # A tree_map takes longer than the step of a small perceptron's optimiser.
            detached = {name: _detached(value) for name, value in kwargs.items()}
            return cls(module=module, args=tuple(map(_detached, args)), kwargs=detached)
        return cls(module=module, args=args, kwargs=kwargs).map(Tensor.detach)

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same with every tensor changed, those within lists, tuples and dicts too."""
        args, kwargs = tree_map_only(Tensor, change, (self.args, dict(self.kwargs)))
        return replace(self, args=args, kwargs=kwargs)

    def tensors(self) -> list[Tensor]:
        """Every tensor that was given, those within lists, tuples and dicts too."""
        return tensors_in((self.args, dict(self.kwargs)))

    def cut(self, chosen: Tensor, rows: int) -> Call | None:
        """The same for some of its ``rows`` rows; None where they cannot be cut out.

        A tensor whose first axis has so many entries is taken to have one for each; any other is
        for all rows alike. One of whole numbers, of a length that no tensor has along its rows, may
        count rows (edges of a graph, offsets of bags) and point anywhere once some are gone.
        """
        lengths: set[int] = set()
        others: list[Tensor] = []

        def part(value: Tensor) -> Tensor:
            if value.ndim and value.shape[0] == rows:
                lengths.update((1, *value.shape[1:]))
                return value[chosen]
            others.append(value)
            return value

        found = self.map(part)
        is_whole = chosen.shape[0] == rows
        may_point = any(
            one.dtype in _WHOLE and one.ndim and one.shape[-1] not in lengths for one in others
        )
        return found if lengths and (is_whole or not may_point) else None


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dicts, in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value
