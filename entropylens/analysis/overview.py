"""What happened in a run, in numbers and in sentences."""

import math
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from entropylens.analysis.entropy_change import EntropyChanges, read_entropy_change
from entropylens.analysis.entropy_change_words import change_sentences
from entropylens.analysis.entropy_law import (
    EntropyAndReward,
    law_sentences,
    read_entropy_law,
)
from entropylens.analysis.rank_divergence import RankDivergence, read_rank_divergence
from entropylens.analysis.rank_divergence_words import rank_sentences
from entropylens.analysis.spikes import Jump, Spike, find_jumps, find_spikes
from entropylens.analysis.tokens import TokenChange, changed_tokens, worst_samples
from entropylens.store.query import series
from entropylens.store.reader import Run

__all__ = ["Curve", "Overview", "read_curves", "read_overview", "sentences"]


@dataclass(frozen=True)
class Curve:
    """One series of a run."""

    name: str
    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    def at(self, step: int) -> float | None:
        """The last value at or before a step; None before the first."""
        place = int(np.searchsorted(self.steps, step, side="right")) - 1
        return float(self.values[place]) if place >= 0 else None

    def mean(self, first: int, last: int) -> float | None:
        """Mean of the finite values from a step to a step; None if there are none."""
        inside = self.values[(self.steps >= first) & (self.steps <= last)]
        inside = inside[np.isfinite(inside)]
        return float(inside.mean()) if inside.size else None


@dataclass(frozen=True)
class Overview:
    """What a report says of a run."""

    run: Run
    state: str
    curves: dict[str, Curve]
    """Training series of the whole run, by metric name."""
    evaluation: dict[str, Curve]
    """Series of phase eval, by metric name."""
    spikes: list[Spike]
    """Of the loss."""
    jumps: list[Jump]
    """Of the learning rate."""
    compared: tuple[tuple[int, int], tuple[int, int]] | None
    """Steps before and after that tokens are compared between."""
    tokens: list[TokenChange] = field(default_factory=list)
    samples: list[dict[str, object]] = field(default_factory=list)
    """Highest-loss samples around the worst spike, or of the last steps."""
    events: list[dict[str, object]] = field(default_factory=list)
    policy: EntropyAndReward | None = None
    """Of a run that has a reward."""
    rollout: dict[str, Curve] = field(default_factory=dict)
    """Series of phase rollout, by metric name."""
    changes: EntropyChanges | None = None
    """Of a run that measured what its updates did to the entropy."""
    ranks: RankDivergence | None = None
    """Of a run of several ranks."""

    @property
    def reward(self) -> Curve | None:
        """Mean reward by step, of a run that has one."""
        return self.rollout.get("reward/mean") or self.curves.get("framework/reward")

    def curves_of(self, phase: str) -> dict[str, Curve]:
        """Series of a phase, by metric name."""
        return {"eval": self.evaluation, "rollout": self.rollout}.get(phase, self.curves)

    @property
    def worst(self) -> Spike | None:
        """The spike that rose furthest above its usual value, or stopped being a number."""
        return max(self.spikes, key=_height, default=None)

    @property
    def last_step(self) -> int:
        """Of any series; 0 for an empty run."""
        return max((int(c.steps[-1]) for c in self.curves.values() if len(c.steps)), default=0)


def read_curves(run: Run, phase: str = "train") -> dict[str, Curve]:
    """All series of the whole run (no module), ranks combined, one value a step.

    Args:
        run: The run.
        phase: train, eval or rollout.

    Returns:
        Curves by metric name.
    """
    rows = series(run).to_pandas()
    rows = rows[(rows["phase"] == phase) & (rows["module"].fillna("") == "")]
    return {
        str(name): Curve(str(name), part["step"].to_numpy(), part["value"].to_numpy())
        for name, part in rows.groupby("name", sort=True)
    }


def read_overview(run: Run) -> Overview:
    """Read what a report says of a run.

    Args:
        run: Finished or not.

    Returns:
        The overview; parts that the log lacks are empty.
    """
    curves, rollout = read_curves(run), read_curves(run, "rollout")
    policy = read_entropy_law(curves, rollout)
    loss, rate = curves.get("loss/mean"), curves.get("learning_rate")
    # A policy's loss lies near 0 whatever happens: it has no usual range to leave.
    spikes = [] if loss is None or policy is not None else find_spikes(loss.steps, loss.values)
    jumps = [] if rate is None else find_jumps(rate.steps, rate.values)
    found = Overview(run, run.state(), curves, read_curves(run, "eval"), spikes, jumps, None)
    compared, around = _stretches(found)
    tokens = run.tokens().to_pandas()
    return replace(
        found,
        compared=compared,
        tokens=[] if compared is None or tokens.empty else changed_tokens(tokens, *compared),
        samples=worst_samples(run.samples().to_pandas(), around),
        events=run.events().to_arrow().to_pylist(),
        policy=policy,
        rollout=rollout,
        changes=read_entropy_change(run),
        ranks=read_rank_divergence(run),
    )


def sentences(found: Overview) -> list[str]:
    """What happened, in plain words, the most important first.

    Args:
        found: From `read_overview`.

    Returns:
        One sentence or two each.
    """
    said = [_course(found)]
    said += [] if found.ranks is None else rank_sentences(found.ranks)
    said += [*_losses(found), *map(str, _causes(found)), *_entropies(found)]
    said += [] if found.changes is None else change_sentences(found.changes)[:2]
    said += [] if found.policy is None else law_sentences(found.policy)
    said += [*_clipping(found), *_own_cost(found), *_faults(found)]
    return [sentence for sentence in said if sentence]


def number(value: float | None) -> str:
    """Three significant digits, the way a person writes them.

    Example:
        >>> number(0.00123456), number(12345.6), number(float("nan"))
        ('0.00123', '12,300', 'NaN')
    """
    if value is None:
        return "unknown"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("infinity" if value > 0 else "-infinity")
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.2e}"
    digits = 0 if value == 0 else max(2 - math.floor(math.log10(abs(value))), 0)
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.{digits}f}".rstrip("0").rstrip(".") if digits else f"{rounded:,.0f}"


def _height(spike: Spike) -> float:
    return spike.value - spike.usual if math.isfinite(spike.value) else math.inf


def _stretches(
    found: Overview,
) -> tuple[tuple[tuple[int, int], tuple[int, int]] | None, tuple[int, int]]:
    """Steps to compare tokens between, and steps whose samples are shown."""
    last = found.last_step
    worst = found.worst
    if last < 2:
        return None, (0, last)
    if worst is None:
        third = max(last // 3, 1)
        return ((1, third), (last - third + 1, last)), (last - third + 1, last)
    reach = max(last // 5, 20)
    before = max(worst.start - reach, 1), worst.start - 1
    after = worst.start, min(worst.start + reach, last)
    return (before, after), (worst.start, worst.end or last)


def _course(found: Overview) -> str:
    ended = {
        "finished": "The run finished",
        "running": "The run is still going",
        "failed": "The run failed",
        "terminated": "The run was terminated",
        "crashed": "The process is gone without a word (killed, or the machine stopped)",
        "stalled": "The process lives but its step has not moved for ten minutes",
    }.get(found.state, "The run's state is not known")
    attempts = len(found.run.attempts)
    resumed = f", in {attempts} attempts" if attempts > 1 else ""
    reason = next((s.reason for s in found.run.status() if s.reason), "")
    why = f" ({reason})" if reason and found.state in ("failed", "terminated") else ""
    return f"{ended}{why} after {found.last_step:,} optimiser steps{_took(found)}{resumed}."


def _took(found: Overview) -> str:
    seconds = found.curves.get("step/seconds")
    if seconds is None or not np.isfinite(seconds.values).any():
        return ""
    total = float(np.nansum(seconds.values))
    if total < 120:
        return f" in {total:.0f} s of training"
    return f" in {total / 60:.0f} min of training" if total < 7200 else f" in {total / 3600:.1f} h"


def _losses(found: Overview) -> list[str]:
    loss = found.curves.get("loss/mean")
    reward = found.reward
    said = [] if reward is None else [_reward(reward.values)]
    if loss is None or not np.isfinite(loss.values).any():
        return said if loss is None else [*said, "Not one loss was a finite number."]
    finite = np.isfinite(loss.values)
    if reward is None:
        lowest = int(loss.steps[finite][np.argmin(loss.values[finite])])
        said.append(
            f"The loss went from {number(loss.values[0])} to {number(loss.values[-1])}; "
            f"its lowest was {number(loss.at(lowest))} at step {lowest:,}."
        )
    if not finite.all():
        first = int(loss.steps[~finite][0])
        said.append(
            f"The loss was not a finite number in {int((~finite).sum()):,} steps, "
            f"the first of them step {first:,}."
        )
    for spike in sorted(found.spikes, key=_height, reverse=True)[:3]:
        after = (
            "it had not come back by the end"
            if spike.end is None
            else f"it was back in its former range at step {spike.end:,}"
        )
        said.append(
            f"At step {spike.start:,} the loss left its range (median {number(spike.usual)}) and "
            f"reached {number(spike.value)} at step {spike.peak:,}; {after}."
        )
    return said


def _reward(reward: NDArray[np.float64]) -> str:
    reward = reward[np.isfinite(reward)]
    if not len(reward):
        return "Not one reward was a finite number."
    tenth = max(len(reward) // 10, 1)
    return (
        f"Mean reward went from {number(float(reward[:tenth].mean()))} to "
        f"{number(float(reward[-tenth:].mean()))} (first and last tenth of the run)."
    )


def _causes(found: Overview) -> list[str]:
    said = []
    for jump in found.jumps[:3]:
        follows = [s for s in found.spikes if 0 <= s.start - jump.step <= 50]
        sentence = (
            f"At step {jump.step:,} the learning rate jumped from {number(jump.before)} to "
            f"{number(jump.after)}, {jump.after / jump.before:.0f} times as high"
        )
        if follows:
            delay = follows[0].start - jump.step
            when = {0: "in the same step", 1: "one step later"}.get(delay, f"{delay} steps later")
            sentence += f"; the loss left its range {when}"
        said.append(sentence + ".")
    return said


def _entropies(found: Overview) -> list[str]:
    entropy = found.curves.get("entropy/token/mean")
    if entropy is None or len(entropy.steps) < 2:
        return []
    worst, last = found.worst, found.last_step
    if worst is None:
        tenth = max(last // 10, 1)
        first, final = entropy.mean(0, tenth), entropy.mean(last - tenth, last)
        return [
            f"Mean token entropy went from {number(first)} to {number(final)} nats (first and last "
            f"tenth of the run)."
        ]
    reach = max(last // 10, 10)
    before = entropy.mean(worst.start - reach, worst.start - 1)
    within = entropy.mean(worst.start, last if worst.end is None else worst.end - 1)
    return [
        f"Mean token entropy was {number(before)} nats before the loss left its range and "
        f"{number(within)} while it was out."
    ]


def _clipping(found: Overview) -> list[str]:
    before = found.curves.get("gradient/norm/before_clip")
    if before is None or not np.isfinite(before.values).any():
        return []
    finite = np.isfinite(before.values)
    top = int(before.steps[finite][np.argmax(before.values[finite])])
    typical = float(np.median(before.values[finite]))
    return [
        f"The gradient norm before clipping had a median of {number(typical)} and was largest at "
        f"step {top:,}: {number(before.at(top))}."
    ]


def _own_cost(found: Overview) -> list[str]:
    overhead = found.curves.get("overhead/fraction")
    if overhead is None or not len(overhead.values):
        return []
    changes = sum(event["kind"] == "budget" for event in found.events)
    thinned = f"; it thinned its measurements {changes} times to stay there" if changes else ""
    return [f"entropylens took {np.mean(overhead.values):.1%} of wall time{thinned}."]


def _faults(found: Overview) -> list[str]:
    status = found.run.status()
    faults = sum(sum(s.faults.values()) for s in status)
    lost = sum(s.lost_rows for s in status)
    said = []
    if faults:
        causes = sorted({cause for s in status for cause in s.faults})
        said.append(f"{faults:,} faults of the monitor were counted: {'; '.join(causes)}.")
    if lost:
        said.append(f"{lost:,} rows were lost because the disk did not take them.")
    return said


def started(run: Run) -> datetime | None:
    """When the run was first started; None if its manifest does not say."""
    try:
        return datetime.fromisoformat(run.created).astimezone(UTC)
    except ValueError:
        return None
