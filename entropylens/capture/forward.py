"""What a model's own training forward shows: loss, and the tokens it is scored on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from entropylens.capture.call import Call
from entropylens.capture.head import backbone_of, bare, head_of, unwrapped, vocabulary_of
from entropylens.capture.tokens import FusedTokens, Grid, HiddenTokens, LogitTokens, TokenSource

__all__ = ["Forward", "ForwardEvents", "Hook", "ModelTap", "in_backward", "predicts_next_token"]

_IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Forward:
    """One training forward: what the output and the arguments hold, each detached."""

    tap: object
    """Who saw it."""
    loss: Tensor | None
    tokens: TokenSource | None
    loss_is_sum: bool
    """The loss is this micro-batch's share of the step's sum, not a mean of its own."""
    call: Call | None = None
    """What the model was given."""


class ForwardEvents(Protocol):
    """What `ModelTap` asks and tells."""

    @property
    def due(self) -> Mapping[str, Any]:
        """What diagnostics that are due in the step in progress read; empty if none is."""

    @property
    def next_labels(self) -> Tensor | None:
        """The labels of the coming forward, where the trainer keeps them from the model."""

    def take_forward(self, forward: Forward) -> None:
        """A training forward has ended."""


class ModelTap:
    """Reads each forward of ``model`` that runs with gradients, in steps in which anything is due.

    Generation, evaluation and reference passes run without gradients and are not seen; nor are
    forwards that are run again within the backward pass (gradient checkpointing of a whole model).
    Within a compiled graph nothing is read: tap what `torch.compile` returned.

    Read are outputs with ``logits`` and ``loss``, as transformers' models give them, those of TRL's
    fused head (``log_probs`` and ``entropy`` instead of logits), and those of causal models that
    build no logits at all: there, and for what the fused head does not compute, sampled rows of the
    backbone's last hidden state are projected. Any other output is left alone.

    Args:
        model: The model, or what parallel training, `torch.compile` or PEFT made of it.
        events: Asked what is due; must not raise.
        guard: Runs a function so that neither its errors nor its time escape unseen.
    """

    def __init__(
        self,
        model: nn.Module,
        events: ForwardEvents,
        guard: Callable[[str, Callable[[], None]], None],
    ) -> None:
        self._model, self._events, self._guard = model, events, guard
        self._is_shifted = predicts_next_token(model)
        self._hidden: Tensor | None = None
        self._watches_backbone = False
        self._handles = [
            model.register_forward_hook(Hook(self._after_forward, guard), with_kwargs=True)
        ]

    def remove(self) -> None:
        """Take the hooks out and drop what is held."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hidden = None

    # -- hooks -------------------------------------------------------------------------------

    def _after_forward(
        self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any
    ) -> None:
        if self._events.due and torch.is_grad_enabled() and not in_backward():
            self._guard("forward hook", lambda: self._read(args, kwargs, output))

    def _after_backbone(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._events.due and torch.is_grad_enabled() and not in_backward():
            self._guard("backbone hook", lambda: self._keep_hidden(output))

    def _keep_hidden(self, output: Any) -> None:
        hidden = _field(output, "last_hidden_state")
        self._hidden = None if hidden is None else hidden.detach()

    # -- what a forward shows ----------------------------------------------------------------

    def _read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        hidden, self._hidden = self._hidden, None
        loss = _field(output, "loss")
        tokens = self._tokens(kwargs, output, hidden)
        if loss is None and tokens is None:
            return
        self._events.take_forward(
            Forward(
                tap=self,
                loss=None if loss is None else loss.detach(),
                tokens=tokens,
                loss_is_sum=kwargs.get("num_items_in_batch") is not None,
                call=Call.of(unwrapped(self._model), args, kwargs),
            )
        )

    def _tokens(
        self, kwargs: Mapping[str, Any], output: Any, hidden: Tensor | None
    ) -> TokenSource | None:
        given = kwargs.get("labels")
        labels = _classes(self._events.next_labels if given is None else given)
        logits, fused = _field(output, "logits"), _field(output, "log_probs")
        if fused is not None:
            return self._fused(kwargs, output, labels, hidden)
        if labels is None:
            return None
        if logits is not None:
            return self._from_logits(kwargs, logits.detach(), labels)
        return self._from_hidden(kwargs, labels, hidden)

    def _from_logits(
        self, kwargs: Mapping[str, Any], logits: Tensor, labels: Tensor
    ) -> LogitTokens | None:
        if self._is_shifted and logits.ndim == 3 and labels.shape == logits.shape[:-1]:
            documents = _documents(kwargs, labels)
            return LogitTokens.of(logits[:, :-1], labels[:, 1:], documents=_shifted(documents))
        if not self._is_shifted and labels.shape == logits.shape[:-1] and logits.shape[-1] > 1:
            return LogitTokens.of(logits, labels)
        return None

    def _fused(
        self, kwargs: Mapping[str, Any], output: Any, labels: Tensor | None, hidden: Tensor | None
    ) -> FusedTokens | None:
        logprob, entropy = _field(output, "log_probs"), _field(output, "entropy")
        mask, shifted = _field(output, "label_mask"), kwargs.get("shift_labels")
        if logprob is None or entropy is None or mask is None:
            return None
        self._watch_backbone()
        found = _targets(kwargs, labels, shifted, logprob)
        if found is None:
            return None
        targets, documents = found
        if hidden is not None:
            # Prompt tuning puts virtual tokens before the labelled ones, in both alike.
            aligned = hidden if isinstance(shifted, Tensor) else hidden[:, :-1]
            hidden = aligned if aligned.shape[:-1] == logprob.shape else None
        head = None if hidden is None else head_of(self._model)
        grid = Grid(targets=targets, present=mask & (targets >= 0), documents=documents)
        vocabulary = vocabulary_of(self._model) if head is None else head.weight.shape[0]
        return FusedTokens(
            logprob=logprob.detach(),
            entropy=entropy.detach(),
            grid=grid,
            hidden=hidden,
            head=head,
            vocabulary=vocabulary,
        )

    def _from_hidden(
        self, kwargs: Mapping[str, Any], labels: Tensor, hidden: Tensor | None
    ) -> HiddenTokens | None:
        head = head_of(self._model) if self._is_shifted else None
        if head is None:
            return None
        self._watch_backbone()
        if hidden is None or hidden.shape[:-1] != labels.shape:
            return None
        targets, documents = labels[:, 1:], _shifted(_documents(kwargs, labels))
        present = (targets >= 0) & (targets < head.weight.shape[0])
        grid = Grid(targets=targets, present=present, documents=documents)
        return HiddenTokens(hidden=hidden[:, :-1], head=head, grid=grid)

    def _watch_backbone(self) -> None:
        """From the next forward on, know the last hidden state."""
        if not self._watches_backbone:
            self._watches_backbone = True
            if (backbone := backbone_of(self._model)) is not None:
                hook = Hook(self._after_backbone, self._guard)
                self._handles.append(backbone.register_forward_hook(hook))


class Hook:
    """A hook that raises nothing, and that stays behind when its model is pickled or copied.

    Saved by `torch.save`, or copied for an EMA, a model takes a hook along that does nothing.

    Args:
        run: What to do after a call of the module.
        guard: Told what it raised.
    """

    def __init__(
        self,
        run: Callable[..., None] | None = None,
        guard: Callable[[str, Callable[[], None]], None] | None = None,
    ) -> None:
        self._run, self._guard = run, guard

    def __call__(self, *args: Any) -> None:
        """Run, unless this is a copy."""
        # Within a compiled graph it does nothing: to leave the graph for it would change what is
        # fused with what, and the numbers with it, or be refused (fullgraph).
        if is_compiling() or self._run is None or self._guard is None:
            return
        try:
            self._run(*args)
        except Exception as error:
            self._guard("hook", partial(_raise, error))

    def __reduce__(self) -> tuple[type["Hook"], tuple[()]]:
        return Hook, ()


def _raise(error: Exception) -> NoReturn:
    raise error


def in_backward() -> bool:
    """Whether this runs within a backward pass, where checkpointing repeats forwards."""
    return torch._C._current_graph_task_id() != -1


def _field(output: Any, name: str) -> Tensor | None:
    value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return value if isinstance(value, Tensor) else None


def _classes(labels: Any) -> Tensor | None:
    is_integer = isinstance(labels, Tensor) and not labels.is_floating_point()
    return labels.detach() if is_integer else None


def predicts_next_token(model: nn.Module) -> bool:
    """Whether position t of the logits is scored on label t + 1, as transformers' causal LMs do."""
    base = bare(model)
    loss_type, name = getattr(base, "loss_type", None), type(base).__name__
    if isinstance(loss_type, str):
        # Vision-language models shift as causal ones do; T5 and its like shift the decoder's input.
        takes_both = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
        return loss_type in ("ForCausalLM", "ForConditionalGeneration") and not takes_both
    # XLM and XLNet have labels that are in place already.
    return name.endswith(("ForCausalLM", "LMHeadModel")) and not (
        name.endswith("WithLMHeadModel") or name.startswith("XLNet")
    )


def _documents(kwargs: Mapping[str, Any], labels: Tensor) -> Tensor | None:
    """Number of each position's document where several share a row: positions start anew at 0.

    Beside an attention mask position numbers say where padding ends, not where documents do.
    """
    positions = kwargs.get("position_ids")
    if not isinstance(positions, Tensor) or kwargs.get("attention_mask") is not None:
        return None
    if positions.ndim != 2 or positions.shape[1] != labels.shape[1]:
        return None
    starts = (positions == 0).expand(labels.shape).clone()
    starts[:, 0] = True
    return (starts.flatten().cumsum(0) - 1).view(labels.shape)


def _shifted(documents: Tensor | None) -> Tensor | None:
    return None if documents is None else documents[:, 1:]


def _targets(
    kwargs: Mapping[str, Any], labels: Tensor | None, shifted: Any, logprob: Tensor
) -> tuple[Tensor, Tensor | None] | None:
    """The labels that a fused head scored, and their documents; None where they do not fit."""
    if isinstance(shifted, Tensor) and shifted.shape == logprob.shape:
        return shifted, None
    rows, width = logprob.shape
    if labels is None or labels.shape[0] != rows or labels.shape[1] > width + 1:
        return None
    missing = width + 1 - labels.shape[1]
    if missing:
        virtual = labels.new_full((rows, missing), _IGNORED)
        return torch.cat([virtual, labels], dim=1)[:, 1:], None
    return labels[:, 1:], _shifted(_documents(kwargs, labels))
