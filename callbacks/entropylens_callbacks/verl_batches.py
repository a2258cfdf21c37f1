"""A step of verl's driver: the fields of its DataProto, its groups, its settings."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "clip_bounds",
    "common_size",
    "generated_mask",
    "groups_of",
    "pass_rate",
    "plain_settings",
    "reward_components",
    "setting",
    "tensors_of",
]

_READ_FROM: Final = "verl-project/verl at 1dda039b9 (2026-08-22)"
_NEEDED: Final = ("responses", "response_mask", "old_log_probs", "advantages")
_OF_TOKENS: Final = ("rollout_log_probs", "ref_log_prob")
_OPTIONAL: Final = ("prompts", "attention_mask", "token_level_scores")
_RATIO_CLIPPED: Final = frozenset(("vanilla", "gspo"))
"""Policy losses whose clip_ratio bounds a ratio; that of others bounds another divergence."""


def tensors_of(batch: Any, entropys: Tensor | None) -> dict[str, Tensor]:
    """The fields of a batch that are used, ``[B, C]`` where they are of tokens.

    Raises:
        ValueError: It is no such batch, or fields are missing or of other shapes.
    """
    held = getattr(batch, "batch", None)
    if held is None or getattr(batch, "non_tensor_batch", None) is None:
        raise ValueError(
            f"VerlTap.observe: expected a DataProto with batch and non_tensor_batch, got "
            f"{type(batch).__name__}; read from {_READ_FROM}"
        )
    present = set(held.keys())
    found = {n: held[n] for n in (*_NEEDED, *_OF_TOKENS, *_OPTIONAL) if n in present}
    if "response_mask" not in found and {"responses", "attention_mask"} <= found.keys():
        found["response_mask"] = generated_mask(found)
    missing = [name for name in _NEEDED if name not in found]
    if missing:
        raise ValueError(
            f"VerlTap.observe: expected {', '.join(_NEEDED)} in the batch, got one without "
            f"{', '.join(missing)} (it has {', '.join(sorted(map(str, present))) or 'nothing'}); "
            f"call it after compute_advantage; fields are those of {_READ_FROM}"
        )
    if entropys is not None:
        found["entropys"] = entropys
    shape = _shape(found["responses"])
    for name in (*_NEEDED, *_OF_TOKENS, "entropys"):
        if name in found and _shape(found[name]) != shape:
            raise ValueError(
                f"VerlTap.observe: expected {name} [B, C] padded as responses {shape}, got "
                f"{_shape(found[name])}"
            )
    return found


def _shape(tensor: Tensor) -> tuple[int, ...] | str:
    return "nested" if tensor.is_nested else tuple(tensor.shape)


def generated_mask(found: Mapping[str, Tensor]) -> Tensor:
    """``[B, C]`` bool: the completion, as verl counts its length.

    Not ``response_mask``, in which tool output is 0 and so is what rejection sampling takes out.
    """
    width = found["responses"].shape[1]
    attention = found.get("attention_mask")
    mask = found["response_mask"] if attention is None else attention[:, -width:]
    return mask.bool()


def groups_of(uid: Sequence[Any] | None, device: torch.device) -> Tensor | None:
    """``[B]`` index of each row's prompt, by first appearance; None where it is not told."""
    if uid is None:
        return None
    numbers: dict[Any, int] = {}
    return torch.tensor([numbers.setdefault(name, len(numbers)) for name in uid], device=device)


def common_size(group: Tensor | None) -> int | None:
    """Completions of each prompt, if all have as many."""
    if group is None:
        return None
    sizes = set(Counter(group.tolist()).values())
    return sizes.pop() if len(sizes) == 1 else None


def pass_rate(correct: Tensor, group: Tensor) -> Tensor:
    """``[B]`` share of right completions in each row's group; NaN where one is not known."""
    sums = torch.zeros_like(correct).index_add(0, group, correct)
    counts = torch.zeros_like(correct).index_add(0, group, torch.ones_like(correct))
    return (sums / counts)[group]


def reward_components(batch: Any, device: torch.device) -> dict[str, Tensor]:
    """``[B]`` numbers that the reward function told beside the reward, by name."""
    names = (getattr(batch, "meta_info", None) or {}).get("reward_extra_keys", ())
    told = {name: batch.non_tensor_batch.get(name) for name in names}
    parts = {}
    for name, values in told.items():
        if values is not None and all(_is_number(value) for value in values):
            numbers = [torch.nan if value is None else float(value) for value in values]
            parts[str(name)] = torch.tensor(numbers, device=device)
    return parts


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | np.bool_ | np.number)


def plain_settings(config: Any) -> dict[str, Any]:
    """Settings as a dictionary, of a DictConfig too."""
    omegaconf = sys.modules.get("omegaconf")
    if omegaconf is not None and omegaconf.OmegaConf.is_config(config):
        config = omegaconf.OmegaConf.to_container(config, resolve=True)
    return dict(config or {})


def setting(config: Mapping[str, Any], path: str) -> Any:
    """A setting by its dotted path; None where it is not set."""
    found: Any = config
    for name in path.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def clip_bounds(config: Mapping[str, Any]) -> tuple[float, float] | None:
    """``(low, high)`` of a loss that clips ratios; ``clip_ratio`` stands in for what is unset."""
    actor = setting(config, "actor_rollout_ref.actor") or {}
    mode = setting(actor, "policy_loss.loss_mode") or "vanilla"
    if mode not in _RATIO_CLIPPED:
        return None
    both = [setting(actor, f"clip_ratio_{side}") for side in ("low", "high")]
    low, high = (setting(actor, "clip_ratio") if one is None else one for one in both)
    return None if low is None or high is None else (float(low), float(high))
