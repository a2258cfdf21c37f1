"""The output head of a language model, for those whose logits are never built."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Head",
    "backbone_of",
    "bare",
    "head_of",
    "head_settings",
    "unwrapped",
    "vocabulary_of",
]


@dataclass(frozen=True, kw_only=True)
class Head:
    """Logits are ``cap(scale * (hidden @ weight.T + bias))``, with ``cap(u) = c tanh(u / c)``."""

    weight: Tensor
    """``[V, d]``"""
    bias: Tensor | None = None
    """``[V]``"""
    soft_cap: float | None = None
    """c, as in Gemma 2; None is no cap."""
    logit_scale: float = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits ``[..., V]`` of hidden states ``[..., d]``.

        The product is taken in the dtype of ``hidden``, as the model's own head does.
        """
        product = hidden @ self.weight.to(hidden.dtype).mT
        product = product if self.bias is None else product + self.bias
        product = product.float() * self.logit_scale
        if self.soft_cap is None:
            return product
        return torch.tanh(product / self.soft_cap) * self.soft_cap


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within what parallel training and `torch.compile` wrap around it."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    if isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
        return unwrapped(compiled)
    return model


def bare(model: nn.Module) -> Any:
    """The model within what parallel training, `torch.compile` and PEFT wrap around it."""
    inner = unwrapped(model)
    unwrap: Any = getattr(inner, "get_base_model", None)
    return inner if unwrap is None else unwrap()


def backbone_of(model: nn.Module) -> nn.Module | None:
    """The module under the head, whose output has ``last_hidden_state``; None if it has none."""
    base = bare(model)
    found = getattr(base, "base_model", None)
    return found if isinstance(found, nn.Module) and found is not base else None


def head_of(model: nn.Module) -> Head | None:
    """The head as it is now: trainers and adapters replace it on the way.

    Returns:
        None where the model names no head, or one that is sharded or quantised, which only its own
        code can multiply with.
    """
    base = bare(model)
    embeddings = getattr(base, "get_output_embeddings", lambda: None)()
    weight = getattr(embeddings, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        return None
    if hasattr(weight, "placements"):
        return None
    bias, (scale, cap) = getattr(embeddings, "bias", None), head_settings(model)
    return Head(
        weight=weight.detach(),
        bias=bias.detach() if isinstance(bias, Tensor) else None,
        soft_cap=cap,
        logit_scale=scale,
    )


def head_settings(model: nn.Module) -> tuple[float, float | None]:
    """Logit scale and soft cap of the model's head, by its configuration."""
    config = _text_config(bare(model))
    return _logit_scale(config), getattr(config, "final_logit_softcapping", None)


def vocabulary_of(model: nn.Module) -> int:
    """Number of classes by the model's configuration; 0 where it does not say."""
    return int(getattr(_text_config(bare(model)), "vocab_size", 0) or 0)


def _text_config(base: Any) -> Any:
    config = getattr(base, "config", None)
    text = getattr(config, "get_text_config", None)
    return config if text is None else text()


def _logit_scale(config: Any) -> float:
    """What the family multiplies its logits with before the cap; each has its own word for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None)
        if scale is not None:
            return float(scale)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    # Granite and MiniCPM divide by it, HyperCLOVA X multiplies.
    is_factor = getattr(config, "model_type", "") == "hyperclovax"
    return float(scaling) if is_factor else 1.0 / float(scaling)
