"""Every published estimate of what learning from a token does to the entropy, side by side."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from entropylens.diagnostics.covariance import (
    natural_gradient_term,
    policy_gradient_term,
    token_covariance,
)
from entropylens.diagnostics.entropy_discriminator import entropy_change_term
from entropylens.diagnostics.steer import steer_released_term, steer_term

__all__ = ["ESTIMATORS", "TokenParts"]


@dataclass(frozen=True, kw_only=True)
class TokenParts:
    """What the estimates are made of: ``n`` sampled tokens that a policy learns from."""

    logprob: Tensor
    """``[n]`` log p of the sampled token, nats."""
    entropy: Tensor
    """``[n]`` H, nats."""
    advantage: Tensor
    """``[n]`` A."""
    pull: Tensor
    """``[n]`` r A I_clip."""
    old_logprob: Tensor | None = None
    """``[n]`` log-probability under the policy that the ratio is taken against, nats; None where
    that is this very policy."""
    expected_discriminator: Tensor | None = None
    """``[n]`` N = E_p[S], nats; None, or NaN in a row, where the distribution was not seen."""
    weight: Tensor
    """``[n]`` scored tokens that each row stands for."""


def _discriminator(parts: TokenParts) -> Tensor:
    if parts.expected_discriminator is None:
        return torch.full_like(parts.logprob, torch.nan)
    return -entropy_change_term(
        parts.logprob, parts.entropy, parts.expected_discriminator, parts.pull
    )


def _steer(parts: TokenParts) -> Tensor:
    return steer_term(parts.logprob, parts.entropy, parts.pull)


def _natural_gradient(parts: TokenParts) -> Tensor:
    return -natural_gradient_term(parts.logprob, parts.entropy, parts.advantage)


def _clip_b(parts: TokenParts) -> Tensor:
    return -policy_gradient_term(parts.logprob, parts.entropy, parts.pull)


def _steer_released(parts: TokenParts) -> Tensor:
    old = parts.logprob if parts.old_logprob is None else parts.old_logprob
    return steer_released_term(parts.logprob, parts.entropy, parts.advantage, old)


def _token_covariance(parts: TokenParts) -> Tensor:
    return -token_covariance(parts.logprob, parts.advantage, parts.weight)


ESTIMATORS: Final[Mapping[str, Callable[[TokenParts], Tensor]]] = {
    "discriminator": _discriminator,
    "steer": _steer,
    "natural_gradient": _natural_gradient,
    "clip_b": _clip_b,
    "steer_released": _steer_released,
    "token_covariance": _token_covariance,
}
"""Predicted entropy change of each token, ``[n]``, nats per unit logit step, by estimate; NaN where
a part that it needs is not known. Where the weight is 0 it means nothing."""
