"""Why a policy's entropy moved, in words, figures and a table."""

from typing import Any, Final

import numpy as np

from entropylens.analysis.entropy_change import CELLS, LEVEL, REST, EntropyChanges
from entropylens.figures.change import cell_figure, course_figure, step_figure

__all__ = ["change_figures", "change_rows", "change_sentences"]

_IN_NATS: Final = ("exact", "extrapolated")
"""Estimates that are changes of the entropy themselves, with no slope of their own to find."""
_CANCELLED: Final = 0.2
"""Share of what pulled to either side; a total below it has no parts worth a percentage."""


def change_sentences(found: EntropyChanges) -> list[str]:
    """What moved the entropy, in plain words, the most important first.

    Args:
        found: From `read_entropy_change`.

    Returns:
        One sentence or two each: what it comes to, how well the prediction was met, at the
        states of which tokens it happens, which of the estimates agrees best, and what it says of
        the next rollouts.
    """
    return [_total(found), *_identity(found), *_cells(found), *_rivals(found), *_next(found)]


def change_figures(found: EntropyChanges) -> dict[str, dict[str, Any]]:
    """Measured against predicted, their sums over the run, and the parts, by key.

    Args:
        found: From `read_entropy_change`.

    Returns:
        Documents for plotly.js.
    """
    known = np.isfinite(found.predicted)
    steps, predicted, measured = (
        values[known] for values in (found.steps, found.predicted, found.measured)
    )
    figures = {}
    if len(steps):
        figures["change-step"] = step_figure(steps, predicted, measured)
    predictions, measurements = ((steps, predicted), (found.steps, found.measured))
    figures["change-course"] = course_figure(predictions, measurements, found.course)
    if any(found.totals.cells.values()):
        labels = {**CELLS, REST: REST}
        shown = {labels[cell]: value for cell, value in found.totals.cells.items()}
        figures["change-cells"] = cell_figure(shown)
    return figures


def change_rows(found: EntropyChanges) -> list[list[str]]:
    """A row of text for each estimate.

    Args:
        found: From `read_entropy_change`.

    Returns:
        Estimate, steps, correlation and its interval, rank correlation, slope and its interval,
        what the identity explains (of the first two alone: the others have another unit), and the
        correlation over the states of a step.
    """
    rows = []
    for one in found.agreements:
        rows.append(
            [
                one.name,
                f"{one.steps:,}",
                f"{one.correlation:.3f}",
                _between(one.correlation_interval, ".3f"),
                f"{one.rank_correlation:.3f}",
                f"{one.slope:#.3g}",
                _between(one.slope_interval, "#.3g"),
                f"{one.identity:.3f}" if one.name in _IN_NATS else "-",
                f"{one.at_states:.3f}" if np.isfinite(one.at_states) else "-",
            ]
        )
    return rows


def _total(found: EntropyChanges) -> str:
    totals = found.totals
    said = (
        f"From step {totals.first:,} to {totals.last:,} the updates should have changed the "
        f"entropy by {totals.predicted:+.3g} nats to first order, and changed it by "
        f"{totals.measured:+.3g} nats, both on fixed states of the batch that each learned from, "
        f"in evaluation mode"
    )
    if totals.share < 1:
        said += (
            f"; {totals.measured_steps:,} of {totals.last - totals.first:,} updates were measured, "
            f"and all of them, were they alike, come to {totals.measured / totals.share:+.3g} nats"
        )
    first, last = totals.entropy
    if np.isnan(first):
        return f"{said}."
    return (
        f"{said}. Mean token entropy went from {first:.3g} to {last:.3g} nats meanwhile (means of "
        f"the first and the last tenth of its measured steps): that is of new batches, and moves "
        f"as the states they hold change, too."
    )


def _identity(found: EntropyChanges) -> list[str]:
    by_name = {one.name: one for one in found.agreements}
    exact, extrapolated = by_name.get("exact"), by_name.get("extrapolated")
    if exact is None:
        return []
    equal = f"that they are equal explains {exact.identity:.1%} of what was measured"
    if not exact.identity > 0:
        equal = "a constant is closer to what was measured: the updates go beyond first order"
    said = (
        f"Step by step, measured and predicted change of the entropy have a correlation of "
        f"{exact.correlation:.3f} ({LEVEL:.0%}: {_between(exact.correlation_interval, '.3f')}) and "
        f"a slope of {exact.slope:#.3g} ({_between(exact.slope_interval, '#.3g')}); {equal}."
    )
    if extrapolated is not None and extrapolated.identity > 0:
        said += (
            f" With first order in the network alone and the softmax taken exactly, equality "
            f"explains {extrapolated.identity:.1%}, at a slope of {extrapolated.slope:#.3g}."
        )
    return [said]


def _cells(found: EntropyChanges) -> list[str]:
    parts = {CELLS[cell]: value for cell, value in found.totals.cells.items() if cell in CELLS}
    parts |= {REST: found.totals.cells[REST]}
    total, pulled = sum(parts.values()), sum(map(abs, parts.values()))
    if not any(value for name, value in parts.items() if name != REST):
        return []
    ordered = sorted(parts.items(), key=lambda part: part[1] * np.sign(total), reverse=True)
    shown = [(name, value) for name, value in ordered if abs(value) >= 0.005 * pulled]
    kind = "fall" if total < 0 else "rise"
    meant = "(S is what the drawn token's logit takes from the entropy, N its mean)"
    if abs(total) < _CANCELLED * pulled:
        listed = _listed([f"those with {name} {value:+.3g} nats" for name, value in shown])
        return [
            f"The prediction is what is left of larger parts: of states by their token, "
            f"{listed} {meant}."
        ]
    listed = _listed(
        [
            f"{'tokens' if at == 0 else 'those'} with {name} "
            f"{'gave back' if value * total < 0 else 'took'} {abs(value / total):.0%}"
            for at, (name, value) in enumerate(shown)
        ]
    )
    return [f"Of the predicted {kind} of {abs(total):.3g} nats, states of {listed} {meant}."]


def _rivals(found: EntropyChanges) -> list[str]:
    rivals = [one for one in found.agreements if one.name not in _IN_NATS]
    if not rivals:
        return []
    best = max(rivals, key=lambda one: one.correlation)
    low, high = best.correlation_interval
    if not low > 0:
        return ["No estimate from each token's own numbers tells in which steps the entropy moves."]
    return [
        f"Of the estimates that know no more than each token's own numbers, {best.name} tells best "
        f"in which steps the entropy moves: correlation {best.correlation:.2f} "
        f"({LEVEL:.0%}: {low:.2f} to {high:.2f})."
    ]


def _next(found: EntropyChanges) -> list[str]:
    skill = found.skill
    if skill is None:
        return []
    ahead = "one update" if skill.updates == 1 else f"{skill.updates:,.0f} updates"
    said = f"On the entropy of new rollouts, {ahead} later, the prediction "
    known = f"{skill.pairs:,} differences, correlation {skill.correlation:.2f}"
    if not skill.skill > 0:
        return [
            f"{said}has no skill: to say that it stays as it is would be no worse ({known}); "
            f"prompts and states differ from one to the next."
        ]
    return [f"{said}has a skill of {skill.skill:.2f} over saying that it stays as it is ({known})."]


def _between(edges: tuple[float, float], form: str) -> str:
    return " to ".join(format(edge, form) for edge in edges)


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
