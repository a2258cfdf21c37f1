"""A few recent states of a training, so that it can be taken back to before an alarm."""

from __future__ import annotations

from collections import deque
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

__all__ = ["Ring"]


class Ring:
    """Copies in host memory of a model's and its optimiser's state, the newest few.

    Taking one waits for the device; of learning-rate schedulers, data order and random state
    nothing is kept.

    Args:
        model: Its parameters and buffers.
        optimizer: Its state and its settings.
        size: Copies that are kept; each takes about three times the parameters under Adam.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, size: int) -> None:
        self._model, self._optimizer = model, optimizer
        self._kept: deque[tuple[int, dict[str, Any], dict[str, Any]]] = deque(maxlen=size)

    @property
    def steps(self) -> list[int]:
        """Steps after which copies were taken, oldest first."""
        return [step for step, _, _ in self._kept]

    def take(self, step: int) -> None:
        """Keep the state as it is after a step; the oldest copy gives way."""
        model, optimizer = self._model.state_dict(), self._optimizer.state_dict()
        self._kept.append((step, _on_host(model), _on_host(optimizer)))

    def rewind(self, before: int) -> int:
        """Put back the newest state from before a step; newer ones are forgotten.

        Returns:
            The step after which it was taken.

        Raises:
            ValueError: There is none.
        """
        while self._kept and self._kept[-1][0] >= before:
            self._kept.pop()
        if not self._kept:
            raise ValueError(
                f"Ring.rewind: expected a copy from before step {before}, got none that old; keep "
                f"more of them (StepBound.ring) or take them less often (StepBound.ring_every)"
            )
        step, model, optimizer = self._kept[-1]
        with torch.no_grad():
            self._model.load_state_dict(model)
        # It keeps the tensors that it is given.
        self._optimizer.load_state_dict(deepcopy(optimizer))
        return step


def _on_host(state: Any) -> Any:
    return tree_map(_copied, state)


def _copied(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else deepcopy(value)
