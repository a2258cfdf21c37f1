"""A loss term that keeps attention heads from looking everywhere, or at one place only."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

__all__ = ["AttentionEntropyRegulariser", "row_entropies"]

NORMALISATIONS: Final = ("row", "log_t")


def row_entropies(maps: Tensor, rows: Tensor) -> Tensor:
    """How widely does each query spread its attention?

    ``-sum_j a_j log a_j`` with ``0 log 0 = 0``; the derivative at ``a = 0`` is taken as 0, where
    the true one is infinite: a key that is masked gets no gradient.

    Args:
        maps: ``[B, H, T, T]`` attention weights, queries before keys.
        rows: ``[B, T]`` bool: queries to look at.

    Returns:
        ``[B, H, T]``, nats, float32 (float64 from float64); 0 in rows that are not looked at, NaN
        there included.

    Device: the input's; no host synchronisation.
    Cost: O(B H T^2) time, four maps kept for the backward pass.
    """
    if maps.dtype != torch.float64:
        maps = maps.float()
    weights = torch.where((maps == 0) | ~rows[:, None, :, None], 1.0, maps)
    return -(weights * weights.log()).sum(-1)


class AttentionEntropyRegulariser(nn.Module):
    """Penalty on heads whose entropy is far from a threshold that each of them learns.

    Algorithm 1 of arXiv 2501.03489: of a sequence of T tokens, layer l and head h::

        E = mean over positions of H_i                        H_i = -sum_j a_ij log a_ij
        deviation = E - threshold[l, h] log T
        penalty = deviation^2 where |deviation| > tolerance log T, else 0

    averaged over heads, layers and (beyond the paper, which shows one sequence) the sequences of
    the batch, times ``strength``. Of batches that are split or padded otherwise the mean is the
    same.

    A causal query t can reach ``H = log(t + 1)`` at most, so that ``E <= mean_t log(t + 1)``: 0.80
    of log T at T = 128. ``normalise="row"``, the default, takes ``E = log T mean_i H_i / log n_i``
    over the queries with ``n_i > 1`` keys in reach, whose largest value is log T. ``"log_t"`` is as
    published.

    The released code (entropy_regularization.py) differs from its paper: it penalises each query's
    entropy instead of their mean, adds over batch and positions instead of averaging, so that its
    strength of 1e-5 acts like about 1e-5 B T here, and has one threshold for a head of all layers.
    Algorithm 1 and the code take the deviation's absolute value, the displayed formula does not.

    The thresholds are trained with the model: nothing holds them but the penalty itself, which
    draws a head and its threshold towards each other. Add ``parameters()`` to the optimiser,
    without weight decay.

    Args:
        layers: Layers whose maps are given to `forward`.
        heads: Heads of each.
        strength: lambda: what the penalty is multiplied by. 1e-5 as in the paper on CodeParrot.
        tolerance: gamma: deviation without penalty, as a share of log T.
        threshold: What every threshold is at first, as a share of log T. The paper does not say;
            those it learned are 0.20 to 0.52.
        normalise: ``"row"`` or ``"log_t"``.
        causal: Whether a query sees the tokens up to its own place only; else it sees all. Matters
            to ``"row"``. Sliding windows are not known: use ``"log_t"`` there.

    Raises:
        ValueError: ``normalise`` is none of the two, or ``layers`` or ``heads`` is below 1.

    Device: that of the maps, which may differ by layer; no host synchronisation.

    Cost: O(layers B H T^2) time and memory, kept for the backward pass. The maps have to be there,
    so that fused attention is not possible.

    Source: Jha & Reagen (2025), Entropy-guided attention, arXiv 2501.03489, Algorithm 1.

    Example:
        >>> regulariser = AttentionEntropyRegulariser(layers=1, heads=2, strength=1.0, causal=False)
        >>> uniform = torch.full((3, 2, 8, 8), 1 / 8)
        >>> bool(regulariser([uniform]).isclose((0.5 * torch.tensor(8.0).log()).square()))
        True
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        *,
        strength: float = 1e-5,
        tolerance: float = 0.2,
        threshold: float = 0.5,
        normalise: str = "row",
        causal: bool = True,
    ) -> None:
        super().__init__()
        if normalise not in NORMALISATIONS:
            raise ValueError(
                f"AttentionEntropyRegulariser: expected normalise to be one of "
                f"{', '.join(NORMALISATIONS)}, got {normalise!r}"
            )
        if min(layers, heads) < 1:
            raise ValueError(
                f"AttentionEntropyRegulariser: expected layers and heads of at least 1, got "
                f"{layers} and {heads}"
            )
        self.strength, self.tolerance = strength, tolerance
        self.normalise, self.causal = normalise, causal
        self.threshold = nn.Parameter(torch.full((layers, heads), threshold))

    def forward(self, maps: Sequence[Tensor | None], mask: Tensor | None = None) -> Tensor:
        """The term to add to the loss.

        Args:
            maps: ``[B, H, T, T]`` attention weights of each layer, as transformers gives under
                ``output_attentions=True``. There dropout has been applied to them: train with an
                attention dropout of 0.
            mask: ``[B, T]`` bool, or numbers that are 0 at padding, as transformers'
                ``attention_mask``: true where there is a token. What stands in other rows is
                ignored, NaN included. None is everywhere.

        Returns:
            ``[]``, float32 (float64 from float64 maps and thresholds), at least 0; 0 where no
            sequence has two tokens.

        Raises:
            ValueError: A map is missing or has another shape, or their number is not ``layers``.
        """
        found = self._checked(maps)
        device = self.threshold.device
        penalties = [
            self._penalty(layer, threshold.to(layer.device), mask).to(device)
            for layer, threshold in zip(found, self.threshold, strict=True)
        ]
        return self.strength * torch.stack(penalties).mean()

    def _penalty(self, maps: Tensor, threshold: Tensor, mask: Tensor | None) -> Tensor:
        """Of one layer."""
        batch, _, length, _ = maps.shape
        rows = torch.ones(batch, length, dtype=torch.bool, device=maps.device)
        if mask is not None:
            rows = mask.to(maps.device) != 0
        entropy = row_entropies(maps, rows)
        tokens = rows.sum(-1, keepdim=True)
        most = tokens.clamp(min=1).to(entropy.dtype).log()
        if self.normalise == "row":
            reach = rows.cumsum(-1) if self.causal else tokens.expand(rows.shape)
            rows = rows & (reach > 1)
            share = most / torch.where(rows, reach, 2).to(entropy.dtype).log()
            entropy = entropy * torch.where(rows, share, 0.0)[:, None]
        head = entropy.sum(-1) / rows.sum(-1, keepdim=True).clamp(min=1)
        deviation = torch.where(tokens > 1, head - threshold * most, 0.0)
        tolerated = deviation.abs() <= self.tolerance * most
        penalty = torch.where(tolerated, 0.0, deviation.square()).mean(-1)
        return penalty.sum() / (tokens > 1).sum().clamp(min=1)

    def _checked(self, maps: Sequence[Tensor | None]) -> list[Tensor]:
        layers, heads = self.threshold.shape
        found = [layer for layer in maps if layer is not None]
        if len(found) < len(maps) or not found:
            raise ValueError(
                "AttentionEntropyRegulariser: expected attention maps, got None; load the model "
                'with attn_implementation="eager" and call it with output_attentions=True'
            )
        if len(found) != layers:
            raise ValueError(
                f"AttentionEntropyRegulariser: expected maps of {layers} layers, got {len(found)}"
            )
        for layer in found:
            if layer.ndim != 4 or layer.shape[1] != heads or layer.shape[2] != layer.shape[3]:
                raise ValueError(
                    f"AttentionEntropyRegulariser: expected maps of shape [B, {heads}, T, T], got "
                    f"{tuple(layer.shape)}"
                )
        return found
