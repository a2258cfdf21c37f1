"""Trainer events in, Lens calls out: one module a framework."""

import os
import re
from collections.abc import Mapping
from typing import Any, Final

from entropylens.schedule import check_preset

__all__ = ["HEADLINES", "lightning_callbacks", "loggable", "with_tokens_at_each_step"]

HEADLINES: Final = (
    "entropy/token/mean",
    "entropy/token/p05",
    "entropy/token/p95",
    "surprisal_gap/mean",
    "entropy/change/predicted",
    "mismatch/kl",
    "kl/mean",
    "gradient/norm/before_clip",
    "update/relative_norm",
    "optimizer/skipped",
    "overhead/fraction",
)
"""What is passed on to the user's other loggers unless told otherwise."""


def lightning_callbacks() -> list[Any]:
    """What Lightning adds to every Trainer: nothing, unless the environment asks for it.

    ``ENTROPYLENS=1`` attaches an `EntropyLensCallback`, and so does the name of a preset,
    ``ENTROPYLENS=fast``. Lightning calls this through its entry point; a Trainer that is given an
    EntropyLensCallback of its own keeps that one alone.

    Raises:
        ValueError: ``ENTROPYLENS`` is neither 0, 1, empty, nor a preset.
    """
    asked = os.environ.get("ENTROPYLENS", "0")
    if asked in ("", "0"):
        return []
    preset = "balanced" if asked == "1" else check_preset("ENTROPYLENS", asked)
    from entropylens_callbacks.lightning import EntropyLensCallback

    return [EntropyLensCallback(preset=preset, is_fallback=True)]


def loggable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a trainer logs the numbers, under names that our log allows.

    Args:
        values: Numbers, tensors of one element, and whatever else a trainer logs.

    Example:
        >>> loggable({"Val Loss": 1, "note": "text", "acc@1": 0.5})
        {'val_loss': 1, 'acc_1': 0.5}
    """
    named = {
        re.sub(r"/+", "/", re.sub(r"[^a-z0-9_/]+", "_", name.lower())).strip("_/"): value
        for name, value in values.items()
    }
    return {name: value for name, value in named.items() if name and is_number(value)}


def is_number(value: Any) -> bool:
    """Whether a value of a trainer's log is a number, on the host or on a device."""
    is_scalar = isinstance(value, int | float) and not isinstance(value, bool)
    return is_scalar or getattr(value, "numel", lambda: 0)() == 1


def with_tokens_at_each_step(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a Lens that measures entropies as often as it measures a policy.

    A step of reinforcement learning holds a generation and a few seconds of training at the least:
    the statistics of its tokens, which trainers compute anyway, are cheap beside it.

    Args:
        options: Arguments as the user gave them, which come first.
    """
    every = {"fast": 10, "balanced": 1}.get(options.get("preset", "balanced"), 1)
    tokens = dict.fromkeys(("token_entropy", "surprisal"), every)
    return {**options, "diagnostics": {**tokens, **(options.get("diagnostics") or {})}}
