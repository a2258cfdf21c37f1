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


def tap_forward(
    model: nn.Module,
    on_forward: Callable[[Forward], None],
    guard: Callable[[str, Callable[[], None]], None],
    take_labels: Callable[[], Tensor | None] = lambda: None,
) -> Any:
    """Call ``on_forward`` after each forward of ``model`` that runs with gradients.

    Generation, evaluation and reference passes run without gradients and are not seen; nor are the
    re-computed forwards of gradient checkpointing, which re-run submodules, not the model. A model
    that is compiled afterwards breaks its graph at its end; with ``fullgraph=True``, tap what
    `torch.compile` returned.

    Args:
        model: Its output may be a mapping or object with ``logits`` and ``loss``, as in
            transformers; any other output is left alone.
        on_forward: Receives detached tensors.
        guard: Runs a function so that neither its errors nor its time escape unseen.
        take_labels: Asked for the labels of a forward that is not given any itself.

    Returns:
        A handle whose ``remove()`` ends it.
    """
    shifted = _predicts_next_token(model)

    def read(kwargs: Mapping[str, Any], output: Any) -> None:
        logits, loss = _field(output, "logits"), _field(output, "loss")
        if logits is None and loss is None:
            return
        labels = kwargs.get("labels")
        labels = take_labels() if labels is None else labels
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

    def hook(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        if torch.is_grad_enabled():
            guard("forward hook", lambda: read(kwargs, output))

    # Traced into the model's graph, our clocks and counters would break it or be frozen in it.
    return model.register_forward_hook(_Hook(torch.compiler.disable(hook)), with_kwargs=True)


class _Hook:
    """A hook that stays behind when its model is pickled or copied: `torch.save`, an EMA's copy."""

    def __init__(self, run: Callable[..., None] | None = None) -> None:
        self._run = run

    def __call__(self, *args: Any) -> None:
        if self._run is not None:
            self._run(*args)

    def __reduce__(self) -> tuple[type["_Hook"], tuple[()]]:
        return _Hook, ()


def _field(output: Any, name: str) -> Tensor | None:
    value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return value if isinstance(value, Tensor) else None


def _predicts_next_token(model: nn.Module) -> bool:
    """Whether position t of the logits is scored on label t + 1, as transformers' causal LMs do."""
    base = _bare(model)
    loss_type, name = getattr(base, "loss_type", None), type(base).__name__
    if isinstance(loss_type, str):
        # Vision-language models shift as causal ones do; T5 and its like shift the decoder's input.
        takes_both = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
        return loss_type in ("ForCausalLM", "ForConditionalGeneration") and not takes_both
    # XLM and XLNet have labels that are in place already.
    return name.endswith(("ForCausalLM", "LMHeadModel")) and not (
        name.endswith("WithLMHeadModel") or name.startswith("XLNet")
    )


def _bare(model: nn.Module) -> Any:
    """The model within what parallel training, `torch.compile` and PEFT wrap around it."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return _bare(model.module)
    if isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
        return _bare(compiled)
    unwrap: Any = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def _aligned(logits: Tensor, labels: Tensor, shifted: bool) -> tuple[Tensor | None, Tensor | None]:
    """Logits and the targets they predict; None where the shapes say that they do not."""
    if shifted and logits.ndim == 3 and labels.shape == logits.shape[:-1]:
        return logits[:, :-1], labels[:, 1:]
    if not shifted and labels.shape == logits.shape[:-1] and logits.shape[-1] > 1:
        return logits, labels
    return None, None
