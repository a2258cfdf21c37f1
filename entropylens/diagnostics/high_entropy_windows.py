"""Where does a completion stay undecided for several tokens in a row, and does it pay?"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.diagnostics._summaries import weighted_mean, wide_dtype
from entropylens.registry import Block, Diagnostic, Metric, PolicyReading, diagnostic

__all__ = ["HighEntropyWindows", "entropy_threshold", "window_means"]

WINDOW: Final = 4
LEVEL: Final = 0.95
EASY: Final = 2 / 3
MEDIUM: Final = 1 / 3
_ROUNDING: Final = 1e-6
"""A share of 2 in 3 computed in float32 may lie this little below two thirds."""

_STEPS = "; only in steps where every token was measured, absent where rows were sampled"
_CLUSTER = (
    "; how undecided they are is in window/threshold, which is the batch's own quantile: all "
    "entropies multiplied by one number leave this as it is"
)
_COUNT = (
    "each sequence with a scored token counts once, one shorter than a window with 0"
    + _STEPS
    + _CLUSTER
)
_HIGH = "the least decided tokens stand together: forking points, or text that falls apart"
_LOW = "the least decided tokens stand alone among decided ones"
_SOURCE = (
    "ARES (2025), arXiv 2510.08457, Sec. 2 and 3, with exact entropies and at every token; its "
    "code counts only after words of a list, by another threshold"
)


def _metric(question: str, formula: str, **other: str) -> Metric:
    fixed = {"unit": "windows", "estimator": _COUNT, "high": _HIGH, "low": _LOW, "source": _SOURCE}
    fixed["cost"] = f"O({WINDOW} tokens + tokens log tokens); no logits"
    return Metric(question=question, formula=formula, **{**fixed, **other})


METRICS: Final[Mapping[str, Metric]] = {
    "window/high/share": _metric(
        "How much do the batch's least decided tokens cluster?",
        f"share of windows with (H_t + ... + H_(t+{WINDOW - 1})) / {WINDOW} > window/threshold",
        unit="1",
        estimator=f"windows of {WINDOW} scored tokens side by side in one sequence"
        + _STEPS
        + _CLUSTER,
    ),
    "window/high/count/mean": _metric(
        "In how many places of a completion do the batch's least decided tokens cluster?",
        "mean over sequences of N_HE, the number of its windows above window/threshold; windows "
        "overlap, one starts at every token",
    ),
    "window/threshold": _metric(
        "Above which mean entropy does a window count as undecided?",
        f"mean over sequences of the quantile {LEVEL:g} of their token entropies, linear "
        "interpolation",
        unit="nats",
        estimator="each sequence with a scored token counts once" + _STEPS,
        high="the most undecided tokens are very undecided",
        low="even the most undecided tokens are decided: exploration has collapsed, whatever the "
        "windows say, which only count against this threshold",
    ),
    "window/high/correct/mean": _metric(
        "In how many places of a right completion do the least decided tokens cluster?",
        "mean of N_HE over sequences with correct = 1",
        high="right answers have the batch's undecided stretches",
        low="right answers come straight, for this batch",
    ),
    "window/high/wrong/mean": _metric(
        "In how many places of a wrong completion do the least decided tokens cluster?",
        "mean of N_HE over sequences with correct = 0",
        high="wrong answers have the batch's undecided stretches: it wanders where it fails",
        low="it fails with fewer undecided stretches than the rest of the batch has",
    ),
    "window/high/difficulty/mean": _metric(
        "In how many places of an answer to a prompt this hard do undecided tokens cluster?",
        "mean of N_HE over sequences whose group's share of right completions is at least 2/3 "
        "(module easy), at least 1/3 (medium), below (hard)",
        high="for easy: undecided where it need not be; for hard: undecided where the work is",
        low="for hard: the batch's undecided stretches are elsewhere",
        source=_SOURCE + "; cuts as in that code",
    ),
}


def window_means(
    entropy: Tensor, present: Tensor, sequence: Tensor, *, window: int = WINDOW
) -> tuple[Tensor, Tensor]:
    """How undecided is the model over each few tokens in a row?

    ``(H_t + ... + H_(t+w-1)) / w``, the forward window that starts at ``t``. Summed window by
    window rather than as differences of a running sum, so that a NaN or a large value reaches only
    the windows that hold it.

    Args:
        entropy: ``[..., T]``, nats, tokens in order.
        present: ``[..., T]`` bool, which are scored tokens.
        sequence: ``[..., T]``, the sequence of each; those of one stand together.
        window: w, tokens.

    Returns:
        Means ``[..., T]``, float32, and a bool ``[..., T]``: true where the window is complete,
        that is all of it scored and in one sequence. Elsewhere the mean means nothing.

    Unit: nats.
    Device: the input's; no host synchronisation.
    Cost: O(window n).
    Source: ARES (2025), arXiv 2510.08457; best with 4 to 8 tokens, diluted with 16 to 32.

    Example:
        >>> H, everything = torch.tensor([1.0, 3.0, 5.0]), torch.ones(3, dtype=torch.bool)
        >>> means, complete = window_means(H, everything, torch.zeros(3), window=2)
        >>> means.tolist(), complete.tolist()
        ([2.0, 4.0, 0.0], [True, True, False])
    """
    if entropy.shape[-1] < window:
        return torch.zeros_like(entropy), torch.zeros_like(present)
    kept = torch.where(present, entropy, 0.0).unfold(-1, window, 1)
    places = sequence.unfold(-1, window, 1)
    complete = present.unfold(-1, window, 1).all(-1) & (places == places[..., :1]).all(-1)
    pad = (0, window - 1)
    means, complete = (
        torch.nn.functional.pad(found, pad) for found in (kept.mean(-1).float(), complete)
    )
    return means, complete


def entropy_threshold(
    entropy: Tensor, present: Tensor, sequence: Tensor, sequences: int, *, level: float = LEVEL
) -> Tensor:
    """Above which entropy is a token among the least decided of its own sequence, on average?

    ``mean over y of Quantile_level({H_t(y)})``, with linear interpolation between order statistics
    (numpy's default), over sequences with at least one token. A lone long sequence counts no more
    than a short one.

    Args:
        entropy: ``[n]``, nats.
        present: ``[n]`` bool.
        sequence: ``[n]``, index of the sequence.
        sequences: Number of sequences.
        level: In 0..1.

    Returns:
        ``[]``, float32; NaN without a token, or where an entropy that counts is NaN.

    Unit: nats.
    Device: the input's; no host synchronisation.
    Cost: O(n log n).
    Source: ARES (2025), arXiv 2510.08457, Sec. 2. Its code differs: an exponential mean (0.99) of
        the batch's median of each sequence's quantile of window means, from the engine's top 10
        log-probabilities, whose tail bucket is in one of its two entropies and not in the other.

    Example:
        >>> H, index = torch.tensor([0.0, 1.0, 2.0, 8.0]), torch.tensor([0, 0, 0, 1])
        >>> entropy_threshold(H, torch.ones(4, dtype=torch.bool), index, 2, level=0.5)
        tensor(4.5000)
    """
    # By sequence, and within it by entropy; what is not present comes after all sequences.
    ordered, order = torch.where(present, entropy, 0.0).sort()
    place = torch.where(present, sequence, sequences)[order]
    ordered = ordered.gather(0, place.argsort(stable=True)).to(wide_dtype(entropy))
    ordered = torch.nn.functional.pad(ordered, (0, 1))
    count = torch.zeros(sequences, device=entropy.device, dtype=torch.long)
    count = count.index_add(0, torch.where(present, sequence, 0), present.long())
    start, last = count.cumsum(0) - count, (count - 1).clamp(min=0)
    at = level * last.to(ordered.dtype)
    below = at.floor().long()
    above = torch.minimum(below + 1, last)
    quantile = torch.lerp(ordered[start + below], ordered[start + above], at - below)
    largest = ordered[start + last]
    return weighted_mean(torch.where(largest.isnan(), torch.nan, quantile), (count > 0).float())


@diagnostic(
    reads="policy",
    every={"fast": 10, "balanced": 1, "full": 1},
    floor={"fast": 200, "balanced": 50, "full": 20},
    metrics=METRICS,
)
class HighEntropyWindows(Diagnostic):
    """Windows of undecided tokens: how many, in right and wrong answers, by difficulty.

    They say how the least decided tokens cluster and where, not how much exploration there is: the
    threshold is a quantile of the same tokens. The level is the threshold itself.

    Of ARES only the counts are here, not the reward made of them: as printed its weight
    ``lambda_d = max(0, (E[N_HE | d] - N_target(d)) / (Var + eps))`` is 0 always, because the target
    ``N_target(d)`` is that very batch mean; only a lagged target makes it work. The released reward
    is another one, in which wrong answers get a bonus of at least 0.15 (easy) to 0.30 (hard) from a
    sigmoid that is 0.5 at 0.
    """

    def measure(self, reading: PolicyReading, state: Any) -> tuple[list[Block], Any]:
        """Count the windows of one step."""
        tokens = reading.tokens
        if tokens.grids is None or not tokens.entropy.numel():
            return [], state
        present, sequence = tokens.present, torch.where(tokens.present, tokens.sequence, 0)
        length = tokens.sequence_tokens
        threshold = entropy_threshold(tokens.entropy, present, sequence, length.numel())
        means, complete = window_means(tokens.entropy, present, sequence)
        # NaN where an entropy is: nothing is known of a window then, and 0 would say it is low.
        unknown = (means + threshold).isnan()
        high = torch.where(unknown, torch.nan, (means > threshold).to(wide_dtype(means)))
        high = torch.where(complete, high, 0.0)
        windows, count = complete.sum(), high.new_zeros(length.numel()).index_add(0, sequence, high)
        counted = (length > 0).float()
        mean = weighted_mean(count, counted)
        blocks = [
            Block.metrics(
                ["window/high/share", "window/high/count/mean", "window/threshold"],
                torch.stack([(high.sum() / windows).float(), mean, threshold]),
                weight=torch.stack([windows.float(), counted.sum(), counted.sum()]),
            )
        ]
        if reading.correct is not None:
            names = ["window/high/correct/mean", "window/high/wrong/mean"]
            right = torch.stack([reading.correct == 1, reading.correct == 0])
            blocks.append(_by_kind(names, "", count, torch.where(right, counted, 0.0)))
        if reading.pass_rate is not None:
            share = reading.pass_rate + _ROUNDING
            kinds = torch.stack([share >= EASY, (share >= MEDIUM) & (share < EASY), share < MEDIUM])
            names, modules = ["window/high/difficulty/mean"] * 3, ["easy", "medium", "hard"]
            blocks.append(_by_kind(names, modules, count, torch.where(kinds, counted, 0.0)))
        return blocks, state


def _by_kind(names: list[str], modules: list[str] | str, count: Tensor, weights: Tensor) -> Block:
    means = weighted_mean(count, weights)
    return Block.metrics(names, means, weight=weights.sum(1), modules=modules)
