"""What a trainer knows of a policy's tokens beyond its forward: advantages, rewards, ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.capture.tokens import FusedTokens, Grid, LogitTokens, TokenSlice, TokenSource
from entropylens.registry import PolicyReading, TokenReading

__all__ = ["RATIO_LEVELS", "PolicyBatch", "delimited", "join_policies", "on_device", "shown_tokens"]

RATIO_LEVELS: Final = ("token", "sequence", "product")
_OF_TOKENS: Final = (
    "advantage",
    "old_logprob",
    "sampler_logprob",
    "reference_logprob",
    "reverse_kl",
    "forward_kl",
    "loss_weight",
    "thoughts",
    "answers",
)
_BY_SEQUENCE_TOO: Final = ("advantage", "loss_weight")
_OF_SEQUENCES: Final = ("reward", "correct", "pass_rate", "group")


@dataclass(frozen=True, kw_only=True)
class PolicyBatch:
    """One micro-batch of ``B`` completions, in the rows of its forward.

    Columns are the last ``C`` that the forward scored, C being the width of completions, the same
    for all fields: the mask's, or all that the forward scored where there is no mask. Fields are as
    in `entropylens.readings.PolicyReading`, ``[B, C]`` where those are ``[n]`` and ``[B]`` where
    they are ``[sequences]``.
    """

    advantage: Tensor
    """``[B, C]``, or ``[B]`` or ``[B, 1]`` for all tokens of a sequence."""
    mask: Tensor | None = None
    """``[B, C]``, true where the loss counts a token; None is everywhere the forward scored."""
    old_logprob: Tensor | None = None
    sampler_logprob: Tensor | None = None
    reference_logprob: Tensor | None = None
    reverse_kl: Tensor | None = None
    forward_kl: Tensor | None = None
    loss_weight: Tensor | None = None
    is_pull_known: bool = True
    thoughts: Tensor | None = None
    answers: Tensor | None = None
    clip: tuple[float, float] | None = None
    ratio_level: str = "token"
    reward: Tensor | None = None
    correct: Tensor | None = None
    pass_rate: Tensor | None = None
    group: Tensor | None = None
    prompts: Sequence[str] | None = None
    completions: Sequence[str] | None = None
    is_own_sample: bool = False
    """Whether the policy that is trained drew the tokens itself, from its whole distribution, and
    none was left out for what it or its reward is."""

    def check(self, shape: tuple[int, int]) -> None:
        """Refuse what does not fit a forward that scored ``shape`` tokens.

        Raises:
            ValueError: A tensor has another shape, or the ratio's level is unknown.
        """
        if self.ratio_level not in RATIO_LEVELS:
            raise ValueError(
                f"policy: expected ratio_level to be one of {', '.join(RATIO_LEVELS)}, got "
                f"{self.ratio_level!r}"
            )
        rows, width = shape
        if self.mask is not None and self.mask.ndim == 2:
            width = min(self.mask.shape[1], width)
        for name in ("mask", *_OF_TOKENS, *_OF_SEQUENCES):
            value = getattr(self, name)
            if value is None:
                continue
            one, wide = (rows,), (rows, width)
            fitting: list[tuple[int, ...]] = [one if name in _OF_SEQUENCES else wide]
            if name in _BY_SEQUENCE_TOO:
                fitting = [wide, one, (rows, 1)]
            if tuple(value.shape) not in fitting:
                said = " or ".join(map(str, fitting))
                raise ValueError(
                    f"policy: expected {name} of shape {said}, got {tuple(value.shape)}"
                )

    def narrow(self, source: TokenSource) -> TokenSource:
        """The tokens of ``source`` that the policy's loss counts."""
        grid: Grid = source.grid
        if self.mask is None:
            return source
        counted = _widened(self.mask.bool(), grid.shape, fill=False)
        return replace(source, grid=replace(grid, present=grid.present & counted))  # type: ignore[type-var]

    def token_columns(self, part: TokenSlice, shape: tuple[int, int]) -> dict[str, Tensor]:
        """Columns of the tokens that were measured, by name; what is not known is left out."""
        wide = self.wide_columns(_OF_TOKENS, shape, part.logprob.device)
        columns = {name: value.flatten()[part.index] for name, value in wide.items()}
        # Without one this very policy is the old one.
        columns.setdefault("old_logprob", part.logprob)
        return columns

    def wide_columns(
        self, names: Sequence[str], shape: tuple[int, int], device: torch.device
    ) -> dict[str, Tensor]:
        """Fields of tokens as ``[B, L]``, the forward's shape, by name; without the unknown."""
        columns = {}
        for name in names:
            value = getattr(self, name)
            if value is None:
                continue
            value = on_device(value, device)
            value = value[:, None] if value.ndim == 1 else value
            if value.shape[1] == 1:
                value = value.expand(-1, shape[1])
            columns[name] = _widened(value, shape)
        return columns

    def pull_columns(self, source: TokenSource) -> dict[str, Tensor]:
        """What a loss takes of each token, ``[B, L]``: advantage, log-ratio, factor.

        Nothing where that is not all, or where a sequence's ratio needs log-probabilities that
        ``source`` does not have of all tokens.
        """
        shape, device = source.grid.shape, source.grid.present.device
        found = self.wide_columns(("advantage", "old_logprob", "loss_weight"), shape, device)
        old = found.pop("old_logprob", None)
        if not self.is_pull_known:
            return {}
        if old is None:
            return found
        if not isinstance(source, FusedTokens):
            return {}
        present = source.grid.present
        ratio = torch.where(present, source.logprob - old, 0.0)
        if self.ratio_level != "token":
            total = ratio.sum(1, keepdim=True)
            count = present.sum(1, keepdim=True).clamp(min=1)
            ratio = (total / count if self.ratio_level == "sequence" else total).expand(shape)
        return {**found, "log_ratio": ratio}

    def sequence_columns(self, device: torch.device) -> dict[str, Tensor]:
        """Columns of the sequences, by name; what is not known is left out."""
        found = {name: getattr(self, name) for name in _OF_SEQUENCES}
        return {n: on_device(value, device) for n, value in found.items() if value is not None}


def on_device(value: Tensor, device: torch.device) -> Tensor:
    """A tensor without its graph on a device: itself, where it is there already."""
    value = value.detach()
    return value if value.device == device else value.to(device)


def shown_tokens(
    logprob: Tensor | None,
    entropy: Tensor | None,
    logits: Tensor | None,
    token_ids: Tensor | None,
    mask: Tensor | None,
) -> TokenSource:
    """Tokens of a policy as a loop shows them; arguments as of `entropylens.Lens.observe_policy`.

    Raises:
        ValueError: Neither logits with token ids nor log-probabilities with entropies, or shapes
            that do not fit.
    """
    if logits is not None and token_ids is not None:
        return LogitTokens.of(logits.detach(), token_ids.detach(), mask)
    if logprob is None or entropy is None or logits is not None:
        given = {"logprob": logprob, "entropy": entropy, "logits": logits, "token_ids": token_ids}
        names = [name for name, value in given.items() if value is not None]
        raise ValueError(
            f"Lens.observe_policy: expected logits and token_ids, or logprob and entropy, got "
            f"{' and '.join(names) or 'none of them'}"
        )
    for name, value in (("entropy", entropy), ("token_ids", token_ids), ("mask", mask)):
        if value is not None and value.shape != logprob.shape:
            raise ValueError(
                f"Lens.observe_policy: expected {name} of the shape of logprob, "
                f"{tuple(logprob.shape)}, got {tuple(value.shape)}"
            )
    if logprob.ndim != 2:
        raise ValueError(
            f"Lens.observe_policy: expected logprob [B, C], got shape {tuple(logprob.shape)}"
        )
    present = torch.ones_like(logprob, dtype=torch.bool) if mask is None else mask.bool()
    targets = torch.zeros_like(present, dtype=torch.long) if token_ids is None else token_ids
    return FusedTokens(
        logprob=logprob.detach(),
        entropy=entropy.detach(),
        grid=Grid(targets=targets.detach(), present=present),
        hidden=None,
        head=None,
        vocabulary=0,
    )


def join_policies(
    tokens: TokenReading, batches: Sequence[tuple[PolicyBatch, TokenSlice, tuple[int, int]]]
) -> PolicyReading:
    """Join the micro-batches of one step; what one of them lacks is not known.

    Args:
        tokens: All their tokens, joined in the same order.
        batches: Each with its measured tokens and its grid's shape.
    """
    first = batches[0][0]
    columns: list[Mapping[str, Tensor]] = [
        {
            **batch.token_columns(part, shape),
            **batch.sequence_columns(part.logprob.device),
        }
        for batch, part, shape in batches
    ]
    known = [name for name in columns[0] if all(name in one for one in columns)]
    if all(batch.old_logprob is None for batch, _, _ in batches):
        known.remove("old_logprob")
    joined: dict[str, Any] = {name: torch.cat([one[name] for one in columns]) for name in known}
    for name in ("prompts", "completions"):
        texts = [getattr(batch, name) for batch, _, _ in batches]
        if all(text is not None for text in texts):
            joined[name] = [one for text in texts for one in text]
    return PolicyReading(
        tokens=tokens,
        clip=first.clip,
        is_pull_known=all(batch.is_pull_known for batch, _, _ in batches),
        ratio_level=first.ratio_level,
        **joined,
    )


def delimited(token_ids: Tensor, mask: Tensor, delimiter: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which tokens stand before the first delimiter, and which after it.

    The delimiter itself is in neither; where there is none, all tokens are thoughts.

    Args:
        token_ids: ``[B, C]``
        mask: ``[B, C]`` bool: tokens of the completion.
        delimiter: Token ids that follow one another, at least one.

    Returns:
        Thoughts and answers, ``[B, C]`` bool each.

    Example:
        >>> ids = torch.tensor([[5, 9, 6, 7], [5, 6, 7, 8]])
        >>> thoughts, answers = delimited(ids, torch.ones_like(ids, dtype=torch.bool), [9])
        >>> thoughts.int().tolist(), answers.int().tolist()
        ([[1, 0, 0, 0], [1, 1, 1, 1]], [[0, 0, 1, 1], [0, 0, 0, 0]])
    """
    width, length = token_ids.shape[1], len(delimiter)
    begins = torch.zeros_like(mask)
    if length <= width:
        found = [(token_ids == token) & mask for token in delimiter]
        places = width - length + 1
        parts = [part[:, at : at + places] for at, part in enumerate(found)]
        begins[:, :places] = torch.stack(parts).all(0)
    has_begun = begins.cumsum(1) > 0
    is_over = torch.zeros_like(mask)
    if length < width:
        is_over[:, length:] = has_begun[:, : width - length]
    return mask & ~has_begun, mask & is_over


def _widened(values: Tensor, shape: tuple[int, int], fill: float | bool = 0) -> Tensor:
    """``[B, C]`` as the last columns of ``[B, L]``."""
    missing = shape[1] - values.shape[1]
    return values if not missing else torch.nn.functional.pad(values, (missing, 0), value=fill)
