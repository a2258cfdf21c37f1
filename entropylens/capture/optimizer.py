"""What an optimiser's step shows: the gradients it uses, the rates it uses, the update it makes."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from entropylens.registry import GradientReading, UpdateReading

__all__ = ["OptimizerEvents", "OptimizerTap", "unwrap_optimizer"]


class OptimizerEvents(Protocol):
    """What `OptimizerTap` asks and tells."""

    def wants(self, reads: str) -> bool:
        """Whether a diagnostic that reads this is due in the step in progress."""

    def take(self, reads: str, reading: Any) -> None:
        """A reading is ready."""

    def take_learning_rates(self, rates: list[Tensor | float]) -> None:
        """The rates of the parameter groups in the step in progress."""


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimiser inside a trainer's wrapper.

    Raises:
        TypeError: There is none.
    """
    inner = optimizer
    # accelerate's wrapper is an Optimizer too, but one that was never initialised.
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, Optimizer):
        raise TypeError(
            f"Lens: expected a torch.optim.Optimizer or a wrapper of one, "
            f"got {type(optimizer).__name__}"
        )
    return inner


class OptimizerTap:
    """Reads an optimiser just before and just after each of its steps.

    The copy of the parameters that the update needs lives only during a step in which a diagnostic
    that reads the update is due.

    Args:
        optimizer: A torch optimiser, or a wrapper that holds one as ``optimizer``.
        events: Asked what is due; must not raise.
        names: Parameter names by identity; parameters without one are numbered.
        guard: Runs a function so that neither its errors nor its time escape unseen.
    """

    def __init__(
        self,
        optimizer: Any,
        events: OptimizerEvents,
        names: dict[int, str],
        guard: Callable[[str, Callable[[], None]], None],
    ) -> None:
        self._optimizer = unwrap_optimizer(optimizer)
        self._events = events
        self._names = names
        self._before: dict[str, Tensor] | None = None
        self._handles = [
            self._optimizer.register_step_pre_hook(
                lambda *_: guard("optimizer pre-step hook", self._pre)
            ),
            self._optimizer.register_step_post_hook(
                lambda *_: guard("optimizer post-step hook", self._post)
            ),
        ]

    def remove(self) -> None:
        """Take the hooks out and drop what is held."""
        for handle in self._handles:
            handle.remove()
        self._before = None

    def _parameters(self) -> dict[str, Tensor]:
        groups = self._optimizer.param_groups
        trained = [p for group in groups for p in group["params"] if p.requires_grad]
        return {self._names.get(id(p), f"parameter_{i}"): p for i, p in enumerate(trained)}

    @torch.no_grad()
    def _pre(self) -> None:
        events = self._events
        self._before = None
        if events.wants("step"):
            events.take_learning_rates(
                [_rate(group["lr"]) for group in self._optimizer.param_groups]
            )
        if events.wants("gradients"):
            parameters = self._parameters()
            gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
            if gradients:
                events.take("gradients", GradientReading(gradients=gradients))
        if events.wants("update"):
            self._before = {n: p.detach().clone() for n, p in self._parameters().items()}

    @torch.no_grad()
    def _post(self) -> None:
        if self._before is None:
            return
        before, self._before = self._before, None
        after = self._parameters()
        if before.keys() <= after.keys():
            after = {name: after[name].detach() for name in before}
            self._events.take("update", UpdateReading(before=before, after=after))


def _rate(rate: Tensor | float) -> Tensor | float:
    """A learning rate as it is now; one that is a tensor stays on its device."""
    return rate.detach().clone() if isinstance(rate, Tensor) else float(rate)
