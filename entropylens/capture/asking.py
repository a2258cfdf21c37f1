"""What a model says at a few places of a batch under given weights, asked without a trace."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from inspect import signature
from math import prod
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from entropylens.capture.call import Call
from entropylens.capture.contexts import (
    Harmless,
    full_precision,
    no_compiled_code,
    no_fused_layers,
    own_forwards,
)
from entropylens.capture.forward import Hook, predicts_next_token
from entropylens.capture.head import backbone_of, bare, head_settings, unwrapped, vocabulary_of

__all__ = ["Asked", "Asking", "Places", "asked", "logits_of", "obstacle", "wide"]

STATES: Final = 256
ELEMENTS: Final = 1 << 24
"""Logits of all states together, in each of a few tensors: 64 MiB."""
MOST_BYTES: Final = 4 << 30
"""Of copies of weights, while a step lasts."""
_LEAST_STATES: Final = 16
_NOT_FOR_THE_BACKBONE: Final = frozenset(
    ("labels", "shift_labels", "fused_lm_head", "num_items_in_batch", "use_cache", "return_dict",
     "logits_to_keep", "output_hidden_states", "output_attentions", "output_router_logits")
)  # fmt: skip
_LARGEST_COUNTER: Final = 1 << 20
"""Entries of a whole-numbered buffer that may be written to; larger ones are packed weights."""
_RELATIVE_DIFFERENCE: Final = 3e-4
"""Half the width of the finite difference, as a share of the weights' norm: less loses digits to
rounding in float32, more to curvature."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where in a call's logits to look: rows and columns of a grid of positions."""

    row: Tensor
    """``[m]``"""
    column: Tensor
    """``[m]``"""
    columns: int
    """Positions of a row."""


def obstacle(model: nn.Module) -> str | None:
    """Why a model cannot be asked; None where it can.

    Its weights have to be plain, whole on this rank, and small enough to be copied in float32.
    """
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            return "its weights are sharded"
    for parameter in model.parameters():
        if hasattr(parameter, "placements") or hasattr(parameter, "ds_id"):
            return "its weights are sharded"
        if isinstance(parameter, nn.UninitializedParameter):
            return "its weights are not there before the first forward"
        if not parameter.is_floating_point() and not parameter.is_complex():
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


def asked(model: nn.Module) -> Asked:
    """A model that can be asked: one with a backbone and an output head, or any other."""
    base = bare(model)
    head: Any = getattr(base, "get_output_embeddings", lambda: None)()
    # Where there are other parts, as in BERT's head, the backbone's output passes layers before it.
    parts = [part for part in base.children() if any(True for _ in part.parameters())]
    is_bare = {*parts} == {backbone_of(model), head}
    return _LanguageModel(model) if is_bare and predicts_next_token(model) else _Module(model)


class Asking:
    """A model to be asked, or the language model within it that was called.

    A language model is asked by itself, since it is known where its tokens are.

    Args:
        model: As the trainer holds it, without an `obstacle`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.whole = asked(model)
        self._within: Asked | None = None

    def of(self, module: nn.Module) -> Asked:
        """What to ask about a call of this module."""
        if module is self.whole.model:
            return self.whole
        if self._within is None or self._within.model is not module:
            self._within = asked(module)
        return self.whole if self._within.makes_all_logits else self._within


class Asked(nn.Module):
    """Logits of a model at a few places, under weights that are given, and their derivative.

    The model runs without dropout, without autocast, in the full precision of at least float32;
    batch norm as the loss has it: in training it normalises with the batch's own statistics, those
    of the rows that it is asked about. The model's weights and buffers are never written to, its
    hooks do not fire, and the global random number generators are left as they were.

    Where forward-mode differentiation is not supported (a fused kernel, an autograd function
    without it), the derivative is a central difference along the update, of 0.03 % of the weights'
    norm to either side however long the update is; it costs one forward more.

    Args:
        model: As the trainer holds it, without an `obstacle`.
    """

    makes_all_logits = True
    """Whether it makes the logits of all positions to give those of a few."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = unwrapped(model)
        self.limit = STATES
        """States at most."""
        self.is_exact = True
        """Whether derivatives are differentiated; false once that was not supported."""

    def names(self) -> dict[int, str]:
        """The model's names of its parameters, by their identity."""
        return {id(parameter): name for name, parameter in self.model.named_parameters()}

    def fitting(self, call: Call) -> Call | None:
        """The call as `forward` takes it; None where it does not."""
        return call

    def offset(self, call: Call, columns: int) -> int:
        """Positions of the call before those of the grid; negative where it does not fit."""
        return 0

    @contextmanager
    def as_trained(self) -> Iterator[None]:
        """No dropout, no hooks, no autocast, full precision, operations that have derivatives.

        Raises:
            ValueError: Somebody else's forward hooks are on the model.
        """
        with self._aside(_is_batch_norm), sdpa_kernel(SDPBackend.MATH):
            yield

    @contextmanager
    def in_evaluation(self) -> Iterator[None]:
        """As in `as_trained`, but batch norm with its running statistics, and kernels as they are.

        Raises:
            ValueError: Somebody else's forward hooks are on the model.
        """
        with self._aside(lambda module: False):
            yield

    @contextmanager
    def _aside(self, stays_in_training: Callable[[nn.Module], bool]) -> Iterator[None]:
        self._refuse_hooks()
        modules = [*self.model.modules()]
        held = [(m, m.training, dict(m.__dict__), dict(m._buffers)) for m in modules]
        gathered = [(value, copy(value)) for module in modules for value in _gatherers(module)]
        device = next(self.model.parameters()).device
        try:
            for module in modules:
                module.training = module.training and stays_in_training(module)
                module._forward_hooks = type(module._forward_hooks)()
                module._forward_pre_hooks = type(module._forward_pre_hooks)()
            with ExitStack() as stack:
                for setting in (
                    full_precision(),
                    no_fused_layers(),
                    no_compiled_code(),
                    own_forwards(modules),
                    torch.autocast(device.type, enabled=False),
                    torch.random.fork_rng([device] if device.type == "cuda" else []),
                ):
                    stack.enter_context(setting)
                yield
        finally:
            for module, mode, attributes, buffers in held:
                # A forward may have set some of them: to what it found under our weights.
                module.__dict__.clear()
                module.__dict__.update(attributes)
                module.training = mode
                if isinstance(module._buffers, dict):
                    module._buffers.clear()
                    module._buffers.update(buffers)
            for value, before in gathered:
                value.clear()
                value.extend(before) if isinstance(value, list) else value.update(before)

    def logits(self, weights: Mapping[str, Tensor], call: Call, places: Places) -> Tensor:
        """``[m, V]`` logits, at least float32, within `as_trained`.

        Args:
            weights: Trained parameters by the model's names for them.
            call: What the model is given.
            places: Where to look.
        """
        given = {f"model.{name}": wide(value) for name, value in weights.items()}
        known = self._with_buffers(self._widened() | given)
        inputs = call.map(lambda value: wide(value) if value.is_floating_point() else value)
        return functional_call(self, known, (inputs, places))

    def run(self, call: Call) -> Any:
        """Have the model run as it is, for what is seen on the way: its output, or its backbone's.

        Args:
            call: What the model is given.
        """
        device, half = next(self.model.parameters()).device, self._half_precision()
        given = [tensor.dtype for tensor in call.tensors() if tensor.is_floating_point()]
        is_mixed = half is not None and torch.float32 in given
        with Harmless(self.model), torch.autocast(device.type, dtype=half, enabled=is_mixed):
            return functional_call(self, self._with_buffers({}), (call, None))

    def _half_precision(self) -> torch.dtype | None:
        """What weights are stored in that need autocast beside inputs in single precision."""
        dtypes = {parameter.dtype for parameter in self.model.parameters()}
        return next((d for d in (torch.bfloat16, torch.float16) if d in dtypes), None)

    def _with_buffers(self, known: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies of what may be written to beside these: statistics, codebooks, counters."""
        for name, buffer in self.named_buffers():
            if buffer.is_floating_point() or buffer.numel() <= _LARGEST_COUNTER:
                known[name] = known.get(name, buffer).clone()
        return known

    def derivative(
        self,
        weights: Mapping[str, Tensor],
        direction: Mapping[str, Tensor],
        call: Call,
        places: Places,
    ) -> tuple[Tensor, Tensor]:
        """Logits and their derivative along a direction, ``[m, V]`` each, within `as_trained`."""
        start = {name: wide(value) for name, value in weights.items()}
        along = {name: wide(value) for name, value in direction.items()}
        if self.is_exact:
            try:
                with warnings.catch_warnings():
                    # torch's own decompositions are written in what it has deprecated.
                    warnings.simplefilter("ignore", DeprecationWarning)
                    found: Any = jvp(lambda w: self.logits(w, call, places), (start,), (along,))
                return found[0], found[1]
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                self.is_exact = False
        share = self._share(start, along)
        ahead, behind = (
            self.logits({n: w + sign * share * along[n] for n, w in start.items()}, call, places)
            for sign in (1.0, -1.0)
        )
        return self.logits(start, call, places), (ahead - behind) / (2 * share)

    @staticmethod
    def _share(start: Mapping[str, Tensor], along: Mapping[str, Tensor]) -> Tensor:
        """Half the width of the finite difference, as a share of the direction."""
        size, step = (
            torch.stack([*torch._foreach_norm([*values.values()])]).norm()
            for values in (start, along)
        )
        share = _RELATIVE_DIFFERENCE * size / step
        return torch.where(share.isfinite() & (share > 0), share, 1.0)

    def _widened(self) -> dict[str, Tensor]:
        """Weights and buffers that have less than single precision, in float32."""
        return {
            name: value.detach().float()
            for name, value in (*self.named_parameters(), *self.named_buffers())
            if value.is_floating_point() and wide(value) is not value
        }

    def _refuse_hooks(self) -> None:
        foreign = [
            f"{name or 'the model'}: {getattr(hook, '__qualname__', type(hook).__name__)}"
            for name, module in self.model.named_modules()
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            if not _is_harmless(hook) and module is not self.model
        ]
        if foreign:
            raise ValueError(
                f"entropylens: expected modules without forward hooks of others, which would see "
                f"our forwards or be missed by them, got {', '.join(foreign[:3])}"
            )


class _LanguageModel(Asked):
    """A causal language model of transformers: backbone and head, without all other logits."""

    makes_all_logits = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._backbone = [backbone_of(self.model)]
        self._scale, self._cap = head_settings(self.model)
        size = max(vocabulary_of(self.model), 1)
        self.limit = max(min(STATES, ELEMENTS // size), _LEAST_STATES)

    def fitting(self, call: Call) -> Call | None:
        kwargs = dict(call.kwargs)
        if call.args:
            named = signature(bare(self.model).forward).parameters
            kwargs |= dict(zip(named, call.args, strict=False))
        kept = {
            name: value
            for name, value in kwargs.items()
            if name not in _NOT_FOR_THE_BACKBONE and value is not None
        }
        if not isinstance(kept.get("input_ids"), Tensor):
            return None
        rows = kept["input_ids"].shape[0]
        for name, value in kept.items():
            is_batch = isinstance(value, Tensor) and value.ndim and value.shape[0] == rows
            is_shared = name == "position_ids" and isinstance(value, Tensor) and value.ndim == 2
            if not is_batch and not (is_shared and value.shape[0] == 1):
                return None
        return Call(module=self.model, kwargs=kept)

    def offset(self, call: Call, columns: int) -> int:
        width = int(call.kwargs["input_ids"].shape[1])
        # Shown by hand, completions may come without the prompts before them. With as many columns
        # as inputs none was cut off: targets of a model that was not given labels.
        return 0 if columns == width else width - 1 - columns

    def forward(self, call: Call, places: Places | None) -> Any:
        backbone, base = self._backbone[0], bare(self.model)
        head = base.get_output_embeddings()
        assert backbone is not None
        hidden = backbone(**call.kwargs, use_cache=False).last_hidden_state
        if places is None:
            return hidden
        found = wide(head(hidden[places.row, places.column])) * self._scale
        return found if self._cap is None else torch.tanh(found / self._cap) * self._cap


class _Module(Asked):
    """Any module whose output holds logits."""

    def forward(self, call: Call, places: Places | None) -> Any:
        output = call.module(*call.args, **call.kwargs)
        if places is None:
            return output
        found = logits_of(output)
        assert found is not None
        return wide(positions(found, places.columns)[places.row, places.column])


def logits_of(output: Any) -> Tensor | None:
    """Logits ``[B, ..., V]`` in a module's output: the output itself, or what it names so."""
    found: Any = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif isinstance(output, tuple) and not hasattr(output, "logits"):
        # (logits, loss) as in plain language models.
        found = next((part for part in output if _are_logits(part)), None)
    elif not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
    return found if _are_logits(found) else None


def _are_logits(value: Any) -> bool:
    is_grid = isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2
    return is_grid and value.shape[-1] > 1


def class_axis(ndim: int) -> int:
    """Where logits have their classes if nothing speaks against it: of images first, else last."""
    return 1 if ndim > 3 else -1


def positions(logits: Tensor, columns: int) -> Tensor:
    """``[B, columns, V]``: classes on the last axis or, as in torch's losses, on the first after B.

    Of one position more than there are columns each but the last is scored on the next one's token.

    Raises:
        ValueError: There are not so many positions on either reading.
    """
    likely = class_axis(logits.ndim)
    for axis in (likely, -likely):
        found = logits.movedim(axis, -1)
        if prod(found.shape[1:-1]) == columns:
            return found.reshape(found.shape[0], columns, found.shape[-1])
    if logits.ndim == 3 and logits.shape[1] == columns + 1:
        return logits[:, :columns]
    raise ValueError(
        f"entropylens: expected logits of {columns} positions a row, got shape "
        f"{tuple(logits.shape)}; show the logits that the targets are scored on"
    )


def wide(value: Tensor) -> Tensor:
    """At least float32."""
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def _is_batch_norm(module: nn.Module) -> bool:
    # Synchronised batch norm would wait for the other ranks.
    return isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm)


def _gatherers(module: nn.Module) -> Iterator[Any]:
    """Lists and dicts of a module's own that its forward may put something in."""
    yield from (v for n, v in vars(module).items() if type(v) in (list, dict) and n[0] != "_")


def _is_harmless(hook: Any) -> bool:
    """Ours, and what makes embeddings require a gradient for checkpointing: no value changes."""
    is_ours = isinstance(hook, Hook) or "entropylens" in getattr(hook, "__module__", "")
    return is_ours or "require_grad" in getattr(hook, "__qualname__", "")


def _copied_bytes(model: nn.Module) -> int:
    """What copies of weights take: of the trained ones, and of others that are widened."""
    size = 0
    for parameter in model.parameters():
        full = 8 if parameter.dtype == torch.float64 else 4
        is_wide = parameter.element_size() == full
        if parameter.requires_grad:
            size += parameter.numel() * (2 * full if is_wide else 3 * full)
        elif not is_wide:
            size += parameter.numel() * full
    return size
