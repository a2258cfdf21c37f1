"""What the routers of a mixture of experts decide in a model's own training forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from entropylens.capture.forward import Hook, in_backward
from entropylens.capture.head import bare
from entropylens.registry import RouterReading

__all__ = ["Router", "RouterEvents", "RouterTap", "routers_of"]

_RECORDED: Final = "router_logits"
_PROBABILITIES: Final = ("Gemma4TextRouter", "DiffusionGemmaTextRouter")
"""Classes whose recorded "router logits" are probabilities already, in transformers 5.23."""


@dataclass(frozen=True)
class Router:
    """A module that sends tokens to experts."""

    module: nn.Module
    index: int
    """Where the logits are in its output, if that is a tuple."""

    def logits(self, output: Any) -> Tensor | None:
        """``[tokens, experts]``; None where the output has no such tensor."""
        found = output[self.index] if isinstance(output, tuple) else output
        if not isinstance(found, Tensor) or found.ndim < 2 or hasattr(found, "placements"):
            return None
        found = found.detach().flatten(0, -2)
        names = {parent.__name__ for parent in type(self.module).__mro__}
        return found.log() if names & {*_PROBABILITIES} else found

    @property
    def experts_per_token(self) -> int | None:
        """To how many experts it sends each token, where it says."""
        found = getattr(self.module, "top_k", None)
        return found if isinstance(found, int) else None


def routers_of(model: nn.Module) -> dict[str, Router]:
    """Routers by module path, as transformers' models declare them in ``_can_record_outputs``.

    Args:
        model: A model, or what parallel training, `torch.compile` or PEFT made of it.

    Returns:
        None of them where the model declares none.
    """
    return dict(_declared(bare(model), "", ()))


def _declared(module: nn.Module, path: str, recorders: tuple[Any, ...]) -> Iterator[Any]:
    """As transformers finds them: a model within a model has declarations of its own.

    A router within a router, as in JetMoE's attention, would be the same one again.
    """
    declares = getattr(module, "_can_record_outputs", None)
    if isinstance(declares, Mapping):
        found = declares.get(_RECORDED, ())
        recorders = tuple(found) if isinstance(found, list | tuple) else (found,)
    for recorder in recorders:
        if _matches(recorder, module, path):
            is_bare = isinstance(recorder, str | type)
            yield path, Router(module, 1 if is_bare else recorder.index)
            return
    for name, child in module.named_children():
        yield from _declared(child, f"{path}.{name}" if path else name, recorders)


def _matches(recorder: Any, module: nn.Module, path: str) -> bool:
    target = recorder if isinstance(recorder, type) else getattr(recorder, "target_class", None)
    suffix = recorder if isinstance(recorder, str) else getattr(recorder, "class_name", None)
    layer = getattr(recorder, "layer_name", None)
    is_kind = target is not None and isinstance(module, target)
    is_named = suffix is not None and path.endswith(suffix)
    return (is_kind or is_named) and (layer is None or f".{layer.strip('.')}." in f".{path}.")


class RouterEvents(Protocol):
    """What `RouterTap` asks and tells."""

    @property
    def wants_routers(self) -> bool:
        """Whether routers' decisions are due, and none were taken in the step in progress."""

    def take_routers(self, reading: RouterReading) -> None:
        """A training forward has ended."""


class RouterTap:
    """Reads the routers in the first training forward of each step in which they are due.

    A training forward is one that begins with gradients, outside of a backward pass; what gradient
    checkpointing does with them inside it, and repeats in the backward pass, makes no difference.
    The logits of all layers are held until the model's forward ends: tokens * experts a layer.
    Layers whose rows are not the tokens of the forward are left out (the decoder of an
    encoder-decoder, product keys), as is what runs within a compiled graph or in the replicas of
    `DataParallel`, which run at the same time.

    Args:
        model: One that `suits`, or what parallel training, `torch.compile` or PEFT made of it.
        events: Asked what is due; must not raise.
        guard: Runs a function so that neither its errors nor its time escape unseen.
    """

    def __init__(
        self,
        model: nn.Module,
        events: RouterEvents,
        guard: Callable[[str, Callable[[], None]], None],
    ) -> None:
        self._model, self._events, self._guard = bare(model), events, guard
        self._routers = routers_of(model)
        self._is_open = False
        self._logits: dict[str, Tensor] = {}
        before, after = Hook(self._before_forward, guard), Hook(self._after_forward, guard)
        self._handles = [
            self._model.register_forward_pre_hook(before, with_kwargs=True),
            self._model.register_forward_hook(after, with_kwargs=True),
        ]
        for name, router in self._routers.items():
            hook = Hook(partial(self._after_router, name, router), guard)
            self._handles.append(router.module.register_forward_hook(hook))

    @staticmethod
    def suits(model: nn.Module) -> bool:
        """Whether a model has routers that it declares."""
        return bool(routers_of(model))

    def remove(self) -> None:
        """Take the hooks out and drop what is held."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._logits = {}

    # -- hooks -------------------------------------------------------------------------------

    def _before_forward(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if in_backward() or hasattr(module, "_is_replica"):
            return
        self._logits = {}
        self._is_open = torch.is_grad_enabled() and self._events.wants_routers

    def _after_router(
        self, name: str, router: Router, module: nn.Module, args: Any, output: Any
    ) -> None:
        if self._is_open and not in_backward():
            self._guard("router hook", lambda: self._keep(name, router.logits(output)))

    def _after_forward(
        self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any
    ) -> None:
        if self._is_open and not in_backward():
            self._is_open = False
            self._guard("router hook", lambda: self._read(args, kwargs))

    # -- what a forward shows ----------------------------------------------------------------

    def _keep(self, name: str, logits: Tensor | None) -> None:
        if logits is not None:
            self._logits[name] = logits

    def _read(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        held, self._logits = self._logits, {}
        given = {**dict(zip(_parameters(self._model), args, strict=False)), **kwargs}
        tokens, present = _token_count(given), _present(given)
        held = {n: one for n, one in held.items() if tokens in (None, one.shape[0])}
        if not held:
            return
        # A model that is spread over several devices is read on the one of its first router.
        device = next(iter(held.values())).device
        self._events.take_routers(
            RouterReading(
                logits={name: logits.to(device) for name, logits in held.items()},
                present=None if present is None else present.to(device),
                experts_per_token=self._experts_per_token(held),
            )
        )

    def _experts_per_token(self, names: Mapping[str, Tensor]) -> int | None:
        told = {self._routers[name].experts_per_token for name in names}
        if len(told) == 1 and (found := told.pop()) is not None:
            return found
        config = getattr(self._model, "config", None)
        config = getattr(config, "get_text_config", lambda: config)()
        found = getattr(config, "num_experts_per_tok", None)
        return found if isinstance(found, int) else None


def _parameters(model: nn.Module) -> list[str]:
    return [*inspect.signature(model.forward).parameters]


def _token_count(given: Mapping[str, Any]) -> int | None:
    """Tokens of a forward, padding included, by the shape of its inputs."""
    ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
    if isinstance(ids, Tensor):
        return ids.numel()
    if isinstance(embeddings, Tensor):
        return embeddings.shape[:-1].numel()
    return None


def _present(given: Mapping[str, Any]) -> Tensor | None:
    """``[tokens]`` which are no padding; None where no mask ``[B, T]`` of the tokens says so."""
    mask = given.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.numel() != _token_count(given):
        return None
    return mask.detach().bool().flatten()
