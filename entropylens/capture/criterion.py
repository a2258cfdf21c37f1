"""What a loss module is given: logits and the classes they are scored on."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from entropylens.capture.forward import Forward, ForwardEvents, Hook, in_backward
from entropylens.capture.tokens import LogitTokens

__all__ = ["CriterionTap"]


class CriterionTap:
    """Reads a `torch.nn.CrossEntropyLoss` where it runs with gradients and anything is due.

    Its classes are on axis 1, targets that equal its ``ignore_index`` are masked; calls with
    probabilities for targets, and calls within a compiled graph, are left alone.

    Args:
        criterion: The loss module.
        events: Asked what is due; must not raise.
        guard: Runs a function so that neither its errors nor its time escape unseen.
    """

    def __init__(
        self,
        criterion: nn.CrossEntropyLoss,
        events: ForwardEvents,
        guard: Callable[[str, Callable[[], None]], None],
    ) -> None:
        self._events, self._guard = events, guard
        self._ignored = criterion.ignore_index
        hook = Hook(self._after_call, guard)
        self._handle = criterion.register_forward_hook(hook, with_kwargs=True)

    def remove(self) -> None:
        """Take the hook out."""
        self._handle.remove()

    def _after_call(
        self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any
    ) -> None:
        if self._events.due and torch.is_grad_enabled() and not in_backward():
            self._guard("loss hook", lambda: self._read(args, kwargs))

    def _read(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        logits = args[0] if args else kwargs.get("input")
        targets = args[1] if len(args) > 1 else kwargs.get("target")
        if not isinstance(logits, Tensor) or not isinstance(targets, Tensor):
            return
        if targets.is_floating_point():
            return
        if logits.ndim == 1:
            logits, targets = logits[None], targets[None]
        tokens = LogitTokens.of(
            logits.detach().movedim(1, -1), targets.detach(), targets != self._ignored
        )
        self._events.take_forward(Forward(tap=self, loss=None, tokens=tokens, loss_is_sum=False))
