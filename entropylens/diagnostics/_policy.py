"""What a policy-gradient loss does with each token: its ratio, whether it is clipped, its pull."""

import torch
from torch import Tensor

from entropylens.diagnostics._summaries import wide_dtype
from entropylens.registry import PolicyReading, ProbeReading

__all__ = ["distribution_weight", "is_learnt_from", "log_ratio", "pull", "token_pull"]


def log_ratio(reading: PolicyReading) -> Tensor:
    """``[n]`` log pi(a) - log pi_old(a), as the loss takes it: see `PolicyReading.ratio_level`.

    Zero everywhere where the step is on-policy.
    """
    tokens = reading.tokens
    if reading.old_logprob is None:
        return torch.zeros_like(tokens.logprob)
    ratio = torch.where(tokens.present, tokens.logprob - reading.old_logprob, 0.0)
    if reading.ratio_level == "token":
        return ratio
    kind = wide_dtype(ratio)
    nothing = torch.zeros_like(tokens.sequence_tokens, dtype=kind)
    sums, counts = (
        nothing.index_add(0, tokens.sequence, (part * tokens.weight).to(kind))
        for part in (ratio, tokens.present)
    )
    found = sums / counts if reading.ratio_level == "sequence" else sums
    return found[tokens.sequence].to(ratio.dtype)


def is_learnt_from(ratio: Tensor, advantage: Tensor, clip: tuple[float, float] | None) -> Tensor:
    """Whether the clipped surrogate has a gradient at a token: I_clip, true or false.

    False where ``A > 0`` and ``r > 1 + high``, and where ``A < 0`` and ``r < 1 - low``.
    """
    if clip is None:
        return torch.ones_like(ratio, dtype=torch.bool)
    low, high = clip
    above = (advantage > 0) & (ratio > 1 + high)
    below = (advantage < 0) & (ratio < 1 - low)
    return ~(above | below)


def token_pull(log_ratio: Tensor, advantage: Tensor, clip: tuple[float, float] | None) -> Tensor:
    """Pull of the loss at a token's logit, up to the step size eta: r A I_clip.

    0 where A is, whatever the ratio, infinity included.
    """
    ratio = log_ratio.exp()
    pulls = is_learnt_from(ratio, advantage, clip) & (advantage != 0)
    return torch.where(pulls, ratio * advantage, 0.0)


def pull(reading: PolicyReading | ProbeReading) -> Tensor:
    """``[n]`` r A I_clip times the loss's own factor, of every token of a reading."""
    if isinstance(reading, PolicyReading):
        ratio = log_ratio(reading)
    else:
        nothing = torch.zeros_like(reading.weight)
        ratio = nothing if reading.log_ratio is None else reading.log_ratio
    if reading.advantage is None:
        raise ValueError("pull: expected a probe of a policy's step, got one without advantages")
    found = token_pull(ratio, reading.advantage, reading.clip)
    if reading.loss_weight is None:
        return found
    return torch.where(reading.loss_weight == 0, 0.0, found * reading.loss_weight)


def distribution_weight(reading: PolicyReading) -> Tensor:
    """``[n]`` tokens that each row stands for in what needs its whole distribution."""
    tokens = reading.tokens
    return tokens.weight if tokens.distribution_weight is None else tokens.distribution_weight
