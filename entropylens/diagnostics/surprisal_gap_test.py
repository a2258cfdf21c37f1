"""Did this very policy draw the tokens, or something else that is called the same?"""

from collections.abc import Mapping, Sequence
from math import log
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from entropylens.diagnostics._summaries import constants, weighted_mean, wide_dtype
from entropylens.registry import Block, Diagnostic, Metric, SampledReading, diagnostic

__all__ = ["EXPONENTS", "SurprisalGapTest", "evidence_path", "surprisal_cumulants"]

EXPONENTS: Final = (-0.25, -0.1, -0.03, -0.01, -0.003, 0.003, 0.01, 0.03, 0.1, 0.25)
"""The lam of the mixture, each with the same weight. ``exp(lam Y - psi(lam))`` is how much likelier
the token is at the temperature 1 / (1 - lam), so that these are ten rivals, the nearest 0.3 % from
the policy's own temperature; between them none loses more than 30 % of the growth."""
_NOTHING: Final = -1e30
BLOCK_ELEMENTS: Final = 1 << 21
"""Logits at a time: under 64 MiB with all that is made of them."""

_ESTIMATOR = (
    "all tokens that the policy drew, or a sample chosen without looking at them; rows whose "
    "statistics are not a number are left out"
)
_ALARM = (
    "the tokens are not draws of the distribution that the trainer sees: another temperature, "
    "top-p or top-k, stale weights, or an engine that computes differently"
)
_SIGHT = (
    "a temperature off by the share d takes about 10 / (v d^2) tokens, v the mean varentropy: for "
    "v = 1 a thousand for 10 %, a hundred thousand for 1 %, and less than 0.15 % is never seen; "
    "other mismatches take as many with d = |gap_test/gap/mean| / v"
)
_SOURCE = (
    "Y of arXiv 2501.02406 (its constants are not used); test martingale and Ville (1939), as in "
    "Ramdas et al. (2023), arXiv 2210.01948"
)


def _metric(question: str, formula: str, high: str, low: str, **other: str) -> Metric:
    fixed = {"unit": "1", "estimator": _ESTIMATOR, "source": _SOURCE}
    fixed["cost"] = "O(exponents tokens), after one more pass over the logits for the cumulants"
    return Metric(question=question, formula=formula, high=high, low=low, **{**fixed, **other})


METRICS: Final[Mapping[str, Metric]] = {
    "gap_test/z": _metric(
        "Are this step's tokens what the policy would draw, in standard errors?",
        "Z = sum Y / sqrt(sum Var_p(log p)), Y = -log p(token) - H; mean 0 and variance 1 where "
        "the policy drew them",
        "above 3: the tokens are less likely than the policy believes, as from a hotter or older "
        "policy",
        "below -3: they are likelier than it believes, as with top-p, top-k or a cooler sampler",
        estimator=_ESTIMATOR + "; absent where every token was certain; over R ranks the mean of "
        "their Z is not the joint test: its variance is 1/R, so with equally many tokens a rank "
        "multiply it by sqrt(R)",
    ),
    "gap_test/run_z": _metric(
        "Are all tokens tested so far what the policy would draw, in standard errors?",
        "as gap_test/z, with both sums over all tokens tested in this run",
        "above 3: the tokens are less likely than the policy believes; small gaps add up here",
        "below -3: they are likelier than it believes; small gaps add up here",
        estimator=_ESTIMATOR
        + "; for one look: whoever looks at every step sees |Z| > 3 more often "
        "than 1 in 370, and for that there is gap_test/anytime_p; absent where every token was "
        "certain; over R ranks multiply by sqrt(R) as in gap_test/z",
    ),
    "gap_test/anytime_p": _metric(
        "Is it certain by now that something else drew the tokens, however often one looked?",
        "min(1, 1 / max_n M_n), M_n = mean over lam of exp(lam sum Y - sum psi(lam)), sums over "
        "all tokens tested in this run up to the n-th, psi(lam) = log E_p exp(lam Y)",
        "near 1: no mismatch seen yet, which is no proof that there is none: " + _SIGHT,
        "below 0.05: rejected, valid at every step at once; " + _ALARM,
        estimator=_ESTIMATOR + "; the maximum is taken after every token in the order of the "
        "reading and never forgets; over R ranks the smallest is shown, which a reader multiplies "
        "by R (Bonferroni)",
        ranks="min",
    ),
    "gap_test/log_evidence": _metric(
        "How much evidence is there now that something else drew the tokens?",
        "log M_n after this step's last token",
        "above 3 = ln 20: what happens with probability below 0.05, ever; " + _ALARM,
        "below 0: the tokens fit the policy better than the other temperatures that are tried, "
        "which a mismatch of less than 0.15 % in temperature also does; " + _SIGHT,
        unit="nats",
        estimator=_ESTIMATOR + "; over ranks the sum, which is the log of a product of independent "
        "martingales and so again one: 3 is its threshold too",
        ranks="sum",
    ),
    "gap_test/gap/mean": _metric(
        "Are the tokens that the policy drew as surprising as it expects?",
        "mean Y over the tested tokens",
        "less likely than the policy believes: a hotter sampler, or stale weights",
        "likelier than it believes: top-p, top-k or a cooler sampler",
        unit="nats",
    ),
    "gap_test/tokens": _metric(
        "How many drawn tokens were tested in this step?",
        "number of tested tokens",
        "a sharp test",
        "a blunt test",
        unit="tokens",
        ranks="sum",
    ),
}


def surprisal_cumulants(
    logits: Tensor, exponents: Sequence[float], temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """How does the model expect its own surprise to scatter?

    With ``p = softmax(z / T)``, ``H = -sum p log p`` and ``Y = -log p(token) - H``:
    ``psi(lam) = log E_p exp(lam Y) = log sum_i p_i^(1 - lam) - lam H``, that is
    ``lam (Renyi_(1 - lam)(p) - H)``. It is at least 0 (Jensen), and 0 where p is certain or even.

    Args:
        logits: ``[..., V]``, any floating dtype; -inf is probability 0.
        exponents: The lam, each below 1.
        temperature: T > 0.

    Returns:
        Entropy ``[...]``, varentropy ``[...]`` and psi ``[len(exponents), ...]``, float32. NaN
        where the logits of a row hold NaN or +inf or are all -inf.

    Raises:
        ValueError: An exponent of 1 or above, where psi may be infinite; a temperature not above 0.

    Unit: nats; nats squared for the varentropy.
    Device: the logits'; no host synchronisation. Terms and their sums in float32 relative to the
        largest, which is left out of them; all else in float64 where the device has it.
    Cost: O(len(exponents) rows V); at most 64 MiB beyond the logits.
    Source: Renyi (1961).

    Example:
        >>> entropy, varentropy, psi = surprisal_cumulants(torch.zeros(1, 8), (-0.1, 0.1))
        >>> entropy, varentropy, psi.abs().max() < 1e-6
        (tensor([2.0794]), tensor([0.]), tensor(True))
    """
    if not all(lam < 1 for lam in exponents):
        raise ValueError(f"surprisal_cumulants: expected exponents below 1, got {exponents}")
    if not temperature > 0:
        raise ValueError(f"surprisal_cumulants: expected temperature > 0, got {temperature}")
    rows = logits.detach().reshape(-1, logits.shape[-1])
    blocks = rows.split(max(BLOCK_ELEMENTS // rows.shape[1], 1))
    joined = torch.cat([_block_cumulants(block, exponents, temperature) for block in blocks], 1)
    entropy, varentropy, *psi = joined.view(2 + len(exponents), *logits.shape[:-1])
    return entropy, varentropy, torch.stack(psi)


def _block_cumulants(logits: Tensor, exponents: Sequence[float], temperature: float) -> Tensor:
    """``[2 + exponents, rows]``: entropy, varentropy, psi."""
    dtype = wide_dtype(logits)
    x = logits.float()
    x = (x - x.amax(-1, keepdim=True)).div_(temperature)
    # The largest terms are 1 each and counted apart, so that sums of the rest keep their digits.
    # They and -inf become a number whose exp is 0 and that times 0 is 0.
    ties = (x >= 0).sum(-1).to(dtype)
    x.masked_fill_(x >= 0, _NOTHING).clamp_(min=_NOTHING)
    w = x.exp()
    rest = w.sum(-1).to(dtype)
    log_total = torch.log1p(ties - 1 + rest)
    mean = torch.mul(w, x).sum(-1).to(dtype) / (ties + rest)
    entropy = log_total - mean
    deviation = x - mean.float()[:, None]
    squares = w.mul_(deviation).mul_(deviation).sum(-1).to(dtype) + ties * mean.square()
    psi = []
    for lam in exponents:
        # As the product below rounds it: 1.05 against float32's 1.05 is a bias of every token's.
        power = float(np.float32(1 - lam))
        tilted = torch.mul(x, power, out=w).exp_().sum(-1).to(dtype)
        psi.append(torch.log1p(ties - 1 + tilted) - power * log_total - (1 - power) * entropy)
    return torch.stack([entropy, squares / (ties + rest), *psi]).float()


def evidence_path(
    surprisal_gap: Tensor,
    cumulant: Tensor,
    exponents: Sequence[float],
    *,
    sums: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """How much evidence is there, after each token, that the policy did not draw the tokens?

    ``log M_n``, ``M_n = mean over lam of exp(lam sum_{t <= n} Y_t - sum_{t <= n} psi_t(lam))``.
    Where each token was drawn from the very distribution that its psi is of, given what came before
    it, M is a martingale that starts at 1, so that ``P(M_n >= c for any n) <= 1 / c`` (Ville). Any
    order of the tokens does that is fixed without looking at them and keeps each behind those that
    its own distribution was conditioned on: sequence after sequence, each in time. The weights of
    the policy may change from step to step, for they depend on earlier tokens only, but not within
    one.

    Args:
        surprisal_gap: ``[n]``, Y, nats.
        cumulant: ``[len(exponents), n]``, psi, nats.
        exponents: The lam.
        sums: ``[len(exponents)]``, ``lam sum Y - sum psi`` of everything before; None is nothing.

    Returns:
        ``log M`` after each token ``[n]``, and the new sums ``[len(exponents)]``, in float64 where
        the device has it.

    Unit: nats.
    Device: the input's; no host synchronisation.
    Cost: O(len(exponents) n).
    Source: Ville (1939).

    Example:
        >>> path, _ = evidence_path(torch.tensor([2.0, 2.0]), torch.tensor([[0.5, 0.5]]), (0.5,))
        >>> path.tolist()
        [0.5, 1.0]
    """
    lam = constants(exponents, surprisal_gap.device, wide_dtype(surprisal_gap))[:, None]
    running = (lam * surprisal_gap - cumulant).cumsum(1)
    if sums is not None:
        running = running + sums[:, None]
    path = running.logsumexp(0) - log(len(exponents))
    return path, running[:, -1]


@diagnostic(
    reads="sampled",
    every={"fast": 50, "balanced": 10, "full": 1},
    floor={"fast": 500, "balanced": 100, "full": 50},
    metrics=METRICS,
)
class SurprisalGapTest(Diagnostic):
    """Whether drawn tokens are draws of the policy: this step's z, and a p-value for the run.

    Its state is ``lam sum Y - sum psi`` for each lam, the largest log M so far, and the sums of Y
    and of its variance.
    """

    def measure(self, reading: SampledReading, state: Any) -> tuple[list[Block], Any]:
        """Test one step's tokens, and with them all before."""
        gap, device = reading.surprisal_gap, reading.surprisal_gap.device
        if not gap.numel():
            return [], state
        statistics = torch.cat([gap[None], reading.varentropy[None], reading.cumulant])
        counted = reading.present & ~statistics.isnan().any(0)
        gap, varentropy, cumulant = (
            torch.where(counted, column, 0.0).to(wide_dtype(column))
            for column in (gap, reading.varentropy, reading.cumulant)
        )
        known = state is not None and tuple(state["exponents"]) == tuple(reading.exponents)
        path, sums = evidence_path(
            gap, cumulant, reading.exponents, sums=state["sums"].to(device) if known else None
        )
        largest = path.max().clamp(min=0.0)
        tokens = counted.sum()
        moments = torch.stack([gap.sum(), varentropy.sum()])
        run = moments
        if known:
            largest = torch.maximum(largest, state["largest"].to(device))
            run = run + state["moments"].to(device)
        values = [
            moments[0] / moments[1].sqrt(),
            run[0] / run[1].sqrt(),
            (-largest).exp(),
            path[-1],
            weighted_mean(gap, counted.float()),
            tokens,
        ]
        scattered = (torch.where(spread > 0, tokens, 0) for spread in (moments[1], run[1]))
        weight = torch.stack([*scattered, *[tokens] * 4])
        block = Block.metrics(
            list(METRICS), torch.stack([value.float() for value in values]), weight=weight
        )
        state = {
            "exponents": tuple(reading.exponents),
            "sums": sums,
            "largest": largest,
            "moments": run,
        }
        return [block], state
