"""What a model was given in a training forward, so that it can be asked about it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from entropylens.capture.asking import logits_of
from entropylens.capture.call import Call
from entropylens.capture.forward import Hook, in_backward
from entropylens.capture.head import unwrapped

__all__ = ["InputEvents", "InputsTap"]


class InputEvents(Protocol):
    """What `InputsTap` asks and tells."""

    @property
    def wants_calls(self) -> bool:
        """Whether calls are to be told in the step in progress."""

    def take_call(self, call: Call, logits: Tensor | None) -> None:
        """A training forward has ended; of nested ones the outermost with logits is told last."""


class InputsTap:
    """Sees what a model is given in forwards that run with gradients.

    Watched are the model and, where all trained parameters lie in one submodule of it, that one,
    and so on: a LightningModule's own forward is often not called, but its network's is; or it is
    called and returns the loss of logits that its network returned.

    Args:
        model: The model, or what parallel training or `torch.compile` made of it.
        events: Asked whether it wants to know; must not raise.
        guard: Runs a function so that neither its errors nor its time escape unseen.
    """

    def __init__(
        self,
        model: nn.Module,
        events: InputEvents,
        guard: Callable[[str, Callable[[], None]], None],
    ) -> None:
        self._events, self._guard = events, guard
        self._has_inner = False
        """Whether the last call told had logits: one without that ends next is around it."""
        hook = Hook(self._after_forward, guard)
        self._inner = {module: unwrapped(module) for module in _holders(model)}
        self._handles = [
            module.register_forward_hook(hook, with_kwargs=True) for module in self._inner
        ]

    def remove(self) -> None:
        """Take the hooks out."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _after_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        if self._events.wants_calls and torch.is_grad_enabled() and not in_backward():
            self._guard("inputs hook", partial(self._tell, module, args, kwargs, output))

    def _tell(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        logits, has_inner = logits_of(output), self._has_inner
        self._has_inner = logits is not None
        if logits is None and has_inner:
            return
        call = Call.of(self._inner[module], args, kwargs)
        self._events.take_call(call, None if logits is None else logits.detach())


def _holders(model: nn.Module) -> Iterator[nn.Module]:
    """The model, and those within it that hold all of its trained parameters, outermost first.

    What is within a compiled module is left alone.
    """
    trained = sum(p.requires_grad for p in model.parameters())
    module: nn.Module | None = model
    while module is not None:
        yield module
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            return
        module = next(
            (
                child
                for child in module.children()
                if trained and sum(p.requires_grad for p in child.parameters()) == trained
            ),
            None,
        )
