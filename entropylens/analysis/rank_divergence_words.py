"""In plain words: has a rank gone its own way?"""

from collections.abc import Iterator

import numpy as np

from entropylens.analysis.rank_divergence import (
    EQUAL,
    LossShift,
    NotFinite,
    Parting,
    RankDivergence,
)

__all__ = ["loss_reason", "parted_reason", "rank_sentences"]


def rank_sentences(found: RankDivergence) -> list[str]:
    """In what the ranks differ, in plain words, the most important first.

    Args:
        found: From `read_rank_divergence`.

    Returns:
        One sentence or two each; none where nothing differs.
    """
    said = [*_parted_words(found.parted), *map(_wild_words, found.not_finite)]
    never = [EQUAL[one.name] for one in found.partings if one.agreed is None]
    if never:
        said.append(
            f"The {' and the '.join(dict.fromkeys(never))} never agreed between ranks: either "
            f"nothing keeps their weights equal, or each holds a part of the model."
        )
    said += [*map(_shift_words, found.shifts)]
    said += [
        f"Rank {one.rank} takes {one.factor:.2g} times as long for a step as the other ranks."
        for one in found.stragglers
    ]
    return said


def parted_reason(found: RankDivergence) -> str:
    """Which ranks are not equal any more, in at most 100 characters; empty if all are."""
    if not found.parted:
        return ""
    first = found.parted[0]
    who = f"rank {first.ranks[0]}" if len(first.ranks) == 1 else "a rank"
    return f"{who} went its own way at step {first.since:,}: the {EQUAL[first.name]} differs"


def loss_reason(found: RankDivergence) -> str:
    """Whose loss has left the others' for good, in at most 100 characters; empty if none has."""
    wild = next((one for one in found.not_finite if one.lasts), None)
    if wild is not None:
        return f"the loss of rank {wild.rank} is not a finite number since step {wild.first:,}"
    one = next((one for one in found.shifts if one.lasts and one.since is not None), None)
    if one is None:
        return ""
    side, others = ("above" if one.shift > 0 else "below"), "the other ranks'"
    others = others if one.other is None else f"rank {one.other}'s"
    return f"the loss of rank {one.rank} moved {side} {others} around step {one.since:,}"


def _parted_words(parted: tuple[Parting, ...]) -> Iterator[str]:
    if not parted:
        return
    first = parted[0]
    numbers = ", ".join(f"{value:.4g} (rank {rank})" for rank, value in _extremes(first).items())
    gone = f"{_named(first.ranks)} went its own way" if first.ranks else "The ranks parted"
    others = "".join(
        f", the {EQUAL[one.name]} since step {one.since:,}"
        for one in {one.name: one for one in reversed(parted[1:])}.values()
        if one.name != first.name
    )
    yield (
        f"{gone} at step {first.since:,}: the {EQUAL[first.name]}, the same on all ranks up to "
        f"step {first.agreed:,}, was {numbers}{others and '; they differ in' + others[1:]}. A "
        f"tensor was corrupted, or the ranks are not kept equal; go on from a checkpoint of before."
    )


def _extremes(parting: Parting) -> dict[int, float]:
    """The smallest and the largest value, and one that is not finite, with their ranks."""
    values = parting.values
    finite = [rank for rank, value in values.items() if np.isfinite(value)]
    wild = [rank for rank in values if rank not in finite]
    chosen = [min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)]
    return {rank: values[rank] for rank in [*chosen[: 1 if wild else 2], *wild[:1]]}


def _named(ranks: tuple[int, ...]) -> str:
    if len(ranks) == 1:
        return f"Rank {ranks[0]}"
    return f"Each of ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def _wild_words(one: NotFinite) -> str:
    end = "to the end" if one.lasts else f"in {one.steps:,} step{'s' * (one.steps > 1)}"
    return (
        f"The loss of rank {one.rank} was not a finite number from step {one.first:,} on, {end}, "
        f"while other ranks' was."
    )


def _shift_words(one: LossShift) -> str:
    side = "higher" if one.shift > 0 else "lower"
    others = "the other ranks'" if one.other is None else f"rank {one.other}'s"
    if one.since is None:
        return (
            f"The loss of rank {one.rank} is {abs(one.shift):.3g} {side} than {others}, from the "
            f"start: other data, or a machine that computes wrongly."
        )
    end = "is so to the end" if one.lasts else "came back"
    return (
        f"The loss of rank {one.rank} became {abs(one.shift):.3g} {side} against {others} around "
        f"step {one.since:,} ({one.deviations:.0f} standard deviations) and {end}: other data, or "
        f"a machine that computes wrongly."
    )
