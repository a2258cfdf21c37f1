"""What a model's own training forward shows: loss, logits and the targets they are scored on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Forward", "tap_forward"]


@dataclass(frozen=True, kw_only=True)
class Forward:
    """One training forward: what the output and the arguments hold, each detached."""

    loss: Tensor | None
    logits: Tensor | None
    targets: Tensor | None
    loss_is_sum: bool
    """The loss is this micro-batch's share of the step's sum, not a mean of its own."""


def tap_forward(model: nn.Module, on_forward: Callable[[Forward], None]) -> Any:
    """Call ``on_forward`` after each forward of ``model`` that runs with gradients.

    Generation, evaluation and reference passes run without gradients and are not seen; nor are the
    re-computed forwards of gradient checkpointing, which re-run submodules, not the model.

    Args:
        model: Its output may be a mapping or object with ``logits`` and ``loss``, as in
            transformers; any other output is left alone.
        on_forward: Receives detached tensors; must not raise.

    Returns:
        A handle whose ``remove()`` ends it.
    """
    shifted = _predicts_next_token(model)

    def hook(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        logits, loss = _field(output, "logits"), _field(output, "loss")
        if logits is None and loss is None:
            return
        labels = kwargs.get("labels")
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            logits = labels = None
        elif logits is not None:
            logits, labels = _aligned(logits.detach(), labels.detach(), shifted)
        on_forward(
            Forward(
                loss=None if loss is None else loss.detach(),
                logits=logits,
                targets=labels if logits is not None else None,
                loss_is_sum=kwargs.get("num_items_in_batch") is not None,
            )
        )

    return model.register_forward_hook(hook, with_kwargs=True)


def _field(output: Any, name: str) -> Tensor | None:
    value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return value if isinstance(value, Tensor) else None


def _predicts_next_token(model: nn.Module) -> bool:
    """Whether position t of the logits is scored on label t + 1, as transformers' causal LMs do."""
    unwrap: Any = getattr(model, "get_base_model", None)
    base = model if unwrap is None else unwrap()
    loss_type = getattr(base, "loss_type", None)
    if isinstance(loss_type, str):
        return loss_type == "ForCausalLM"
    return type(base).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def _aligned(logits: Tensor, labels: Tensor, shifted: bool) -> tuple[Tensor | None, Tensor | None]:
    """Logits and the targets they predict; None where the shapes say that they do not."""
    if shifted and logits.ndim == 3 and labels.shape == logits.shape[:-1]:
        return logits[:, :-1], labels[:, 1:]
    if not shifted and labels.shape == logits.shape[:-1] and logits.shape[-1] > 1:
        return logits, labels
    return None, None
