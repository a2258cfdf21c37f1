"""What one update of the weights does to the distributions at a few states of the step's batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from entropylens.capture.forward import Hook
from entropylens.capture.head import backbone_of, bare, head_settings, vocabulary_of
from entropylens.capture.policy import PolicyBatch
from entropylens.capture.tokens import Grid, TokenSource, choose, places
from entropylens.registry import ProbeReading

__all__ = ["UpdateProbe", "probe_obstacle"]

SEQUENCES: Final = 16
STATES: Final = 256
TOKENS: Final = 4096
"""Positions of all kept sequences together; one sequence is always kept."""
MOST_BYTES: Final = 4 << 30
"""Of copies of weights, while a step lasts."""
_ELEMENTS: Final = 1 << 24
"""Logits of all states together, in each of the three tensors: 64 MiB."""
_LEAST_STATES: Final = 16
_NOT_FOR_THE_BACKBONE: Final = frozenset(
    ("labels", "shift_labels", "fused_lm_head", "num_items_in_batch", "use_cache", "return_dict",
     "logits_to_keep", "output_hidden_states", "output_attentions", "output_router_logits")
)  # fmt: skip
_DIFFERENCE: Final = 0.5
"""Half the width of the finite difference, as a share of the update."""


def probe_obstacle(model: nn.Module) -> str | None:
    """Why a model cannot be asked what an update does; None where it can, empty where it is no LM.

    It has to be a causal language model with a backbone and an output head, in plain weights, whole
    on this rank, small enough to be copied in float32.
    """
    embeddings: Any = getattr(bare(model), "get_output_embeddings", lambda: None)()
    if backbone_of(model) is None or embeddings is None:
        return ""
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            return "its weights are sharded"
    for parameter in model.parameters():
        if hasattr(parameter, "placements") or hasattr(parameter, "ds_id"):
            return "its weights are sharded"
        if not parameter.is_floating_point():
            return "its weights are quantised"
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return "its prompts are learnt, not its weights"
    size = _copied_bytes(model)
    if size > MOST_BYTES:
        return (
            f"copies of its weights would take {size / 2**30:.1f} GiB, and at most "
            f"{MOST_BYTES >> 30} are taken"
        )
    return None


class UpdateProbe:
    """Asks a model about the same states before and after an optimiser step.

    In a step that is due, up to 16 sequences of the first micro-batch are kept, chosen by a
    generator of our own, 4,096 positions together at the most, and up to 256 of their scored
    tokens. After the update the model's backbone and head are run on them in evaluation mode (no
    dropout, no random numbers), without autocast, in the full precision of at least float32: once
    with the old weights, together with the derivative along the update (forward-mode
    differentiation, `torch.func.jvp`), and once with the new ones. The model's own weights are
    never written to, and its hooks do not fire.

    Where forward-mode differentiation is not supported, the derivative is the central difference of
    half the update to either side, which costs one forward more.

    Args:
        model: As the trainer holds it, without a `probe_obstacle`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._states = _States(model)
        self._kept: _Kept | None = None
        self._has_forward_mode = True

    @property
    def is_empty(self) -> bool:
        """Whether nothing is kept for the step in progress."""
        return self._kept is None

    def clear(self) -> None:
        """Forget what was kept."""
        self._kept = None

    def keep(
        self,
        inputs: Mapping[str, Any],
        source: TokenSource,
        policy: PolicyBatch | None,
        sample_ids: Sequence[str] | None,
        generator: torch.Generator,
    ) -> bool:
        """Keep a few sequences of a training forward.

        Returns:
            False where they cannot be cut out of its arguments, and nothing was kept.
        """
        grid = source.grid
        rows, width = grid.shape
        size = min(SEQUENCES, rows, max(TOKENS // (width + 1), 1))
        device = grid.present.device
        keys = torch.rand(rows, generator=generator, device=device)
        # Sequences without a scored token would be states of nothing.
        keys = torch.where(grid.present.any(1), keys, 2.0)
        chosen = keys.topk(size, largest=False).indices.sort().values
        cut = _cut(inputs, chosen, rows)
        # Shown by hand, completions may come without the prompts before them.
        prompt = -1 if cut is None else cut["input_ids"].shape[1] - 1 - width
        if cut is None or prompt < 0:
            return False
        part = Grid(targets=grid.targets[chosen], present=grid.present[chosen])
        states = choose(part, self._states.limit, generator)
        depth, _, _ = places(part)
        row, column = states.places
        columns: dict[str, Any] = {
            "weight": states.weight,
            "token_id": part.targets.flatten()[states.index].clamp(min=0),
            "position": depth.flatten()[states.index],
            "sequence": chosen[row],
            "sample_ids": sample_ids,
        }
        if policy is not None:
            wide = policy.pull_columns(source)
            columns |= {name: value[chosen[row], column] for name, value in wide.items()}
            columns["clip"] = policy.clip
        self._kept = _Kept(cut, row, column + prompt, columns)
        return True

    def reading(
        self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], temperature: float
    ) -> ProbeReading:
        """What the update did at the states that were kept; there must be some.

        Args:
            before: Trained parameters before the step, by the model's names for them.
            after: The same after it.
            temperature: Of the loss.

        Raises:
            ValueError: They are not the model's own parameters, or somebody's hooks are on it.
        """
        kept, self._kept = self._kept, None
        assert kept is not None
        self._states.check(before)
        with self._states.as_evaluated():
            frozen = self._states.frozen(before)
            old, new = (
                {f"model.{name}": _wide(value.detach()) for name, value in weights.items()}
                for weights in (before, after)
            )
            direction = {name: new[name] - old[name] for name in old}

            def logits(weights: Mapping[str, Tensor]) -> Tensor:
                found = functional_call(
                    self._states, {**frozen, **weights}, (kept.inputs, kept.row, kept.column)
                )
                return found / temperature

            first, change = self._derivative(logits, old, direction)
            last = logits(new)
        return ProbeReading(
            before=first,
            after=last,
            direction=change,
            is_exact=self._has_forward_mode,
            **kept.columns,
        )

    def _derivative(
        self, logits: Any, weights: dict[str, Tensor], direction: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        if self._has_forward_mode:
            try:
                found: Any = jvp(logits, (weights,), (direction,))
                return found[0], found[1]
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                self._has_forward_mode = False
        ahead, behind = (
            logits({n: w + sign * _DIFFERENCE * direction[n] for n, w in weights.items()})
            for sign in (1.0, -1.0)
        )
        return logits(weights), (ahead - behind) / (2 * _DIFFERENCE)


@dataclass(frozen=True)
class _Kept:
    """Inputs of a few sequences, and the states among their tokens."""

    inputs: Mapping[str, Any]
    row: Tensor
    column: Tensor
    columns: Mapping[str, Any]


class _States(nn.Module):
    """The logits of a model at a few places, without those of all others."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._backbone = [backbone_of(model)]
        self._scale, self._cap = head_settings(model)
        size = max(vocabulary_of(model), 1)
        self.limit = max(min(STATES, _ELEMENTS // size), _LEAST_STATES)

    def forward(self, inputs: Mapping[str, Any], row: Tensor, column: Tensor) -> Tensor:
        """``[m, V]`` float32 logits."""
        backbone, base = self._backbone[0], bare(self.model)
        head = base.get_output_embeddings()
        assert backbone is not None
        hidden = backbone(**inputs, use_cache=False).last_hidden_state
        found = _wide(head(hidden[row, column])) * self._scale
        return found if self._cap is None else torch.tanh(found / self._cap) * self._cap

    def check(self, trained: Mapping[str, Tensor]) -> None:
        """Refuse weights that are not the model's, and a model that others listen to."""
        own = dict(self.model.named_parameters())
        for name, value in trained.items():
            if name not in own or own[name].shape != value.shape:
                raise ValueError(
                    f"entropy_change: expected the optimiser to hold the model's own parameters, "
                    f"got {name} {tuple(value.shape)}, which the model does not have"
                )
        foreign = [
            f"{name or 'the model'}: {getattr(hook, '__qualname__', type(hook).__name__)}"
            for name, module in self.model.named_modules()
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            if not _is_harmless(hook) and module is not self.model
        ]
        if foreign:
            raise ValueError(
                f"entropy_change: expected modules without forward hooks of others, which would "
                f"see our forwards or be missed by them, got {', '.join(foreign[:3])}"
            )

    def frozen(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is not trained, in float32, where the model has weights of less precision."""
        floats = {n: p for n, p in self.named_parameters() if p.is_floating_point()}
        if all(_wide(p) is p for p in floats.values()):
            return {}
        trained_names = {f"model.{name}" for name in trained}
        return {n: p.detach().float() for n, p in floats.items() if n not in trained_names}

    @contextmanager
    def as_evaluated(self) -> Iterator[None]:
        """Evaluation mode, no hooks, no autocast, full precision, differentiable attention."""
        modules = [*self.model.modules()]
        held = [(m, m.training, m._forward_hooks, m._forward_pre_hooks) for m in modules]
        device = next(self.model.parameters()).device.type
        try:
            for module in modules:
                module.training = False
                module._forward_hooks = type(module._forward_hooks)()
                module._forward_pre_hooks = type(module._forward_pre_hooks)()
            attention, autocast = (
                sdpa_kernel(SDPBackend.MATH),
                torch.autocast(device, enabled=False),
            )
            with _full_precision(), attention, autocast:
                yield
        finally:
            for module, mode, hooks, pre_hooks in held:
                module.training = mode
                module._forward_hooks, module._forward_pre_hooks = hooks, pre_hooks


@contextmanager
def _full_precision() -> Iterator[None]:
    """No products of less precision than their factors (TF32, bfloat16)."""
    backends: Any = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    settings = [(one, one.fp32_precision) for one in backends if hasattr(one, "fp32_precision")]
    if not settings:
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
        return
    lower = [(one, precision) for one, precision in settings if precision not in ("none", "ieee")]
    try:
        for one, _ in lower:
            one.fp32_precision = "ieee"
        yield
    finally:
        for one, precision in lower:
            one.fp32_precision = precision


def _is_harmless(hook: Any) -> bool:
    """Ours, and what makes embeddings require a gradient for checkpointing: no value changes."""
    is_ours = isinstance(hook, Hook) or "entropylens" in getattr(hook, "__module__", "")
    return is_ours or "require_grad" in getattr(hook, "__qualname__", "")


def _cut(inputs: Mapping[str, Any], chosen: Tensor, rows: int) -> dict[str, Any] | None:
    """The arguments of a forward for some of its sequences; None where one cannot be cut."""
    cut = {}
    for name, value in inputs.items():
        if name in _NOT_FOR_THE_BACKBONE or value is None:
            continue
        if not isinstance(value, Tensor):
            return None
        if value.ndim and value.shape[0] == rows:
            cut[name] = value[chosen]
        elif name == "position_ids" and value.ndim == 2 and value.shape[0] == 1:
            cut[name] = value
        else:
            return None
    return cut if "input_ids" in cut else None


def _copied_bytes(model: nn.Module) -> int:
    """What copies of weights take: of the trained ones, and of others that are widened."""
    size = 0
    for parameter in model.parameters():
        wide = 8 if parameter.dtype == torch.float64 else 4
        is_wide = parameter.element_size() == wide
        if parameter.requires_grad:
            size += parameter.numel() * (2 * wide if is_wide else 3 * wide)
        elif not is_wide:
            size += parameter.numel() * wide
    return size


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype in (torch.float32, torch.float64) else value.float()
