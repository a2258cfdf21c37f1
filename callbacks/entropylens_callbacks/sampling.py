"""How a TRL trainer draws completions: from all of the policy's distribution, or from a part."""

from typing import Any, Final

from torch import nn

__all__ = ["draws_whole"]

_CHANGES_WHAT_IS_DRAWN: Final = (
    "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "forced_bos_token_id",
    "forced_eos_token_id", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "typical_p",
    "epsilon_cutoff", "eta_cutoff", "sequence_bias", "min_length", "min_new_tokens",
    "exponential_decay_length_penalty", "guidance_scale", "watermarking_config", "top_h",
)  # fmt: skip
"""Settings of a model's own generation that TRL does not set anew."""


def draws_whole(trainer: Any) -> bool:
    """Whether completions are drawn by the model itself, with nothing cut off or pushed."""
    own = getattr(trainer.model, "generation_config", None)
    return (
        not getattr(trainer, "use_vllm", False)
        and getattr(trainer, "rollout_func", None) is None
        and getattr(trainer, "top_p", 1.0) in (None, 1.0)
        and getattr(trainer, "top_k", 0) in (None, 0)
        and not getattr(trainer, "min_p", None)
        and getattr(trainer, "repetition_penalty", 1.0) in (None, 1.0)
        and not getattr(trainer.args, "generation_kwargs", None)
        and not getattr(trainer, "mask_truncated_completions", False)
        and all(getattr(own, n, None) in (None, 0, 1.0, [], {}) for n in _CHANGES_WHAT_IS_DRAWN)
        and not _has_dropout(trainer.model)
    )


def _has_dropout(model: nn.Module) -> bool:
    """Whether two forwards of a training model differ: what drew a token is not what scores it."""
    found = (value for module in model.modules() for value in _dropouts(module))
    return any(value > 0 for value in found)


def _dropouts(module: nn.Module) -> list[float]:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return [module.p]
    named = (v for n, v in vars(module).items() if n.endswith(("dropout", "dropout_p")))
    return [float(v) for v in named if isinstance(v, int | float)]
