"""A step of verl's driver: the fields of its DataProto, its groups, its settings."""

import re
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
    "length_limit",
    "pass_rate",
    "plain_settings",
    "reward_components",
    "tensors_of",
]

_READ_FROM: Final = "verl-project/verl at 1dda039b9 (2026-08-22)"
_NEEDED: Final = ("responses", "response_mask", "old_log_probs", "advantages")
_OF_TOKENS: Final = ("rollout_log_probs", "ref_log_prob")
_OPTIONAL: Final = ("prompts", "attention_mask", "token_level_scores")
_RATIO_CLIPPED: Final = frozenset(("vanilla", "gspo"))
"""Policy losses whose clip_ratio bounds a ratio; that of others bounds another divergence."""
_SECRET: Final = re.compile(
    r"(^|_)(secret|password)(_|$)|(^|_)(token|(api|access|auth|encryption|private|ssh)_key)$|^key$"
)
"""Names of settings whose values are not written down, in snake case."""


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
    """Settings as a dictionary, of a DictConfig too, as they were written and without secrets.

    Interpolations stay text, since what ``${oc.env:NAME}`` stands for may be a secret; what stands
    under a name such as ``api_key``, ``token``, ``secret`` or ``password`` is blank.
    """
    container = _omegaconf(config)
    plain = config if container is None else container.to_container(config, resolve=False)
    return dict(_without_secrets(plain or {}))


def _without_secrets(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            name: "" if _is_secret(name, inner) else _without_secrets(inner)
            for name, inner in value.items()
        }
    return [*map(_without_secrets, value)] if isinstance(value, list | tuple) else value


def _is_secret(name: Any, value: Any) -> bool:
    is_told = value is not None and not isinstance(value, bool)
    return is_told and _SECRET.search(str(name).lower().replace("-", "_")) is not None


def _omegaconf(config: Any) -> Any:
    """Functions of omegaconf, if a config is one of its own; it is imported by then."""
    module = sys.modules.get("omegaconf")
    return module.OmegaConf if module is not None and module.OmegaConf.is_config(config) else None


def _setting(config: Any, path: str) -> Any:
    """A setting by its dotted path; None where it is not set or cannot be resolved."""
    container = _omegaconf(config)
    if container is not None:
        try:
            return container.select(config, path)
        except Exception:  # a resolver is anyone's code
            return None
    found = config
    for name in path.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _number(config: Any, path: str) -> float | None:
    found = _setting(config, path)
    return found if isinstance(found, int | float) and not isinstance(found, bool) else None


def length_limit(config: Any) -> float | None:
    """Tokens that a completion may have at most; None where it is not told."""
    return _number(config, "data.max_response_length")


def clip_bounds(config: Any) -> tuple[float, float] | None:
    """``(low, high)`` of a loss that clips ratios; ``clip_ratio`` stands in for what is unset."""
    actor = "actor_rollout_ref.actor"
    mode = _setting(config, f"{actor}.policy_loss.loss_mode") or "vanilla"
    if mode not in _RATIO_CLIPPED:
        return None
    both = [_number(config, f"{actor}.clip_ratio_{side}") for side in ("low", "high")]
    default = _number(config, f"{actor}.clip_ratio")
    low, high = (default if one is None else one for one in both)
    return None if low is None or high is None else (float(low), float(high))
