"""What TRL's DPO, KTO and Reward trainers know of the sequences whose preferences they learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from entropylens.capture.forward import Hook, in_backward
from entropylens.capture.policy import on_device
from entropylens.diagnostics._summaries import wide_dtype
from entropylens.registry import PreferenceReading

if TYPE_CHECKING:
    from entropylens import Lens

__all__ = ["PreferenceWatch"]

_TRAINERS: Final = frozenset(("DPOTrainer", "KTOTrainer", "RewardTrainer"))
_TESTED: Final = "1.16"


class PreferenceWatch:
    """Reads one DPO, KTO or Reward trainer: what its loss sees of chosen and rejected sequences.

    Nothing of the trainer is changed. Hooks on its models look only while a watched loss is
    computed, and only at forwards of the very batch that the loss was given, which KTO's of
    mismatched completions are not: with gradients it is the policy's, without the reference's.

    Args:
        trainer: One that `suits`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._lens: Lens | None = None
        self._handles: list[Any] = []
        self._inputs: Mapping[str, Any] | None = None
        self._policy: dict[str, Tensor] = {}
        self._reference: Tensor | None = None
        self._has_complained = False

    @staticmethod
    def suits(trainer: Any) -> bool:
        """Whether a trainer learns from preferences between sequences that it is given."""
        return any(parent.__name__ in _TRAINERS for parent in type(trainer).__mro__)

    @property
    def complaint(self) -> str:
        """What to say where a loss has shown nothing."""
        return (
            f"attach: expected the loss of {type(self._trainer).__name__} to call its model with "
            f"the batch's input_ids, as TRL {_TESTED} does; it did not, so preferences are not "
            f"recorded; install trl=={_TESTED}.* or report it"
        )

    def open(self, lens: Lens, *models: Any) -> None:
        """Hook the trainer's models, and what it calls in their place, for one training."""
        self.close()
        self._lens = lens
        hook = Hook(self._after_forward, lens.aside)
        trainer = self._trainer
        for model in {trainer.model, getattr(trainer, "ref_model", None), *models}:
            if isinstance(model, nn.Module):
                self._handles.append(model.register_forward_hook(hook, with_kwargs=True))

    def close(self) -> None:
        """Take the hooks out and drop what is held."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._lens = None
        self._forget()

    # -- a micro-batch -----------------------------------------------------------------------

    def begin(self, inputs: Any) -> None:
        """A watched loss is about to be computed."""
        self._forget()
        lens = self._lens
        if lens is not None and "preference" in lens.watch.due and isinstance(inputs, Mapping):
            self._inputs = inputs

    def end(self) -> None:
        """A watched loss has been computed: show what its forwards told."""
        inputs, lens = self._inputs, self._lens
        if inputs is None or lens is None:
            return
        policy, reference = self._policy, self._reference
        self._forget()
        if policy:
            lens.watch.take_preference(_reading(inputs, policy, self._known(inputs, reference)))
        elif not self._has_complained:
            self._has_complained = True
            lens.event("capture", self.complaint, severity="warning")

    def _forget(self) -> None:
        self._inputs, self._policy, self._reference = None, {}, None

    def _known(self, inputs: Mapping[str, Any], reference: Tensor | None) -> Tensor | None:
        """The reference's log-probabilities: of a forward, or as they came with the batch.

        Those that were computed beforehand for a loss that discounts a longer sequence's last
        tokens (``ld_alpha``) are no sums over all tokens.
        """
        if reference is not None or getattr(self._trainer, "ld_alpha", None) is not None:
            return reference
        if "ref_logps" in inputs:
            return inputs["ref_logps"]
        halves = [inputs.get(f"ref_{side}_logps") for side in ("chosen", "rejected")]
        known = [half for half in halves if isinstance(half, Tensor)]
        return torch.cat(known) if len(known) == len(halves) else None

    # -- a forward ---------------------------------------------------------------------------

    def _after_forward(
        self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any
    ) -> None:
        inputs, lens = self._inputs, self._lens
        if inputs is None or lens is None or in_backward():
            return
        found = kwargs.get("input_ids")
        if found is None or found is not inputs.get("input_ids"):
            return
        is_policy = torch.is_grad_enabled()
        lens.aside("preference hook", lambda: self._read(inputs, output, is_policy=is_policy))

    def _read(self, inputs: Mapping[str, Any], output: Any, *, is_policy: bool) -> None:
        mask, logprob = inputs.get("completion_mask"), getattr(output, "log_probs", None)
        logits = getattr(output, "logits", None)
        if mask is not None and logprob is not None:
            mask = mask[:, 1:].bool()
            if not is_policy:
                self._reference = _summed(logprob, mask)
                return
            self._policy = {"logprob": _summed(logprob, mask), "tokens": mask.sum(1)}
            if (entropy := getattr(output, "entropy", None)) is not None:
                self._policy["entropy"] = _summed(entropy, mask)
        elif mask is None and is_policy and logits is not None and logits.shape[1:] == (1,):
            self._policy = {"reward": logits[:, 0].detach().clone()}


def _summed(values: Tensor, mask: Tensor) -> Tensor:
    """``[n]`` sums over a sequence's tokens; prompt tuning puts virtual ones before the others."""
    values = values[:, -mask.shape[1] :]
    return torch.where(mask, values, 0.0).sum(1, dtype=wide_dtype(values))


def _reading(
    inputs: Mapping[str, Any], policy: Mapping[str, Tensor], reference: Tensor | None
) -> PreferenceReading:
    """Rows are chosen sequences, then their rejected ones, unless each bears a label."""
    some = next(iter(policy.values()))
    label = inputs.get("label")
    if label is None:
        chosen = torch.arange(len(some), device=some.device) < len(some) // 2
    else:
        chosen = torch.as_tensor(label, dtype=torch.bool, device=some.device)
    return PreferenceReading(
        chosen=chosen,
        paired=label is None,
        reference_logprob=None if reference is None else on_device(reference, some.device),
        **policy,
    )
