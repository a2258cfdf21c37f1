"""Which per-token estimate says what a policy-gradient step does to the entropy?

- ``synthetic``: 4,000 states of 500 actions, logits after Zipf's law with an exponent of the
  state's own, so that tenths of the states lie below 0.6 and above 5.2 nats; one action drawn from
  each, A ~ N(0, 1). What each estimate predicts for the state is compared with what one step of a
  tabular softmax, ``dz = 1e-3 A (e_a - p)``, does to its entropy in float64.
- ``run``: the log of a training, by default the sample run that collapses. What each estimate said
  of a step against what the update did to the entropy, what that comes to over the run, when
  the entropy's fall below 0.25, 0.2 and 0.1 nats could have been foretold, and how much of its
  later course lay in the band that was foretold at 15 % of the run. Left out, which is said, where
  there is no such log.

    python -m benchmarks.entropy_change [--cells NAME ...] [--log RUN] [--out DIR]

Tables are printed, and each cell's numbers are written to ``out/entropy_change/<cell>.json``.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Column, Table
from scipy.stats import spearmanr

from entropylens.analysis.entropy_change import read_entropy_change
from entropylens.analysis.overview import read_curves
from entropylens.diagnostics._estimators import ESTIMATORS, TokenParts
from entropylens.errors import EntropyLensError
from entropylens.rules.blocks import Floats, straight
from entropylens.rules.forecast import FLOOR, forecast_crossing, score_forecasts
from entropylens.store.reader import open_run

EXPONENTS = (0.6, 3.45)
"""Of Zipf's law, from the flattest to the steepest state."""
NOISE = 0.3
"""Standard deviation of a logit around the law, before the exponent multiplies it."""
STEP = 1e-3
LOG = Path("sample_runs/grpo_countdown/logs/collapse")
FLOORS = (0.25, 0.2, FLOOR)
"""Nats; the sample run's entropy falls below the first two."""
EARLY = 0.15
"""Share of a run that the judged band knew."""
WINDOW = 10
"""Entropies in a mean: that of one step is one noisy batch."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cells", nargs="*", choices=CELLS, help="only these")
    parser.add_argument("--log", type=Path, default=LOG, help="the training that `run` reads")
    parser.add_argument("--out", type=Path, default=Path("out/entropy_change"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    cells = asked.cells or [*CELLS]
    if not asked.cells and not asked.log.exists():
        cells.remove("run")
        Console().print(
            f"run is left out: there is no log {asked.log}; name one with --log, or train it: "
            f"python sample_runs/grpo_countdown/train.py --run collapse",
            soft_wrap=True,
        )
    for name in cells:
        found = run(asked.log) if name == "run" else CELLS[name]()
        (asked.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        for shown in TABLES[name](name, found):
            Console().print(shown)
    return 0


def synthetic_tables(title: str, found: Mapping[str, Any]) -> list[Table]:
    shown = Table("estimate", "PCC", "SRCC", "sign agreement", title=title)
    for name in ESTIMATORS:
        shown.add_row(
            name, *(f"{found[key][name]:.3f}" for key in ("pcc", "srcc", "sign_agreement"))
        )
    return [shown]


def run_tables(title: str, found: Mapping[str, Any]) -> list[Table]:
    heads = ["estimate", "steps", "correlation", "95 %", "rank", "slope", "95 %", "over states"]
    agreements = Table(Column(heads[0], no_wrap=True), *heads[1:], title=f"{title}: {found['log']}")
    for name, one in found["estimates"].items():
        keys = ("steps", "correlation", "correlation_interval", "rank_correlation", "slope")
        values = [one[key] for key in (*keys, "slope_interval", "at_states")]
        agreements.add_row(name, *map(_text, values))
    course = Table("over the run", "", title="what it comes to")
    for key in ("first", "last", "measured_steps", "predicted", "measured", "entropy"):
        course.add_row(key, _text(found["totals"][key]))
    for cell, value in found["totals"]["cells"].items():
        course.add_row(f"predicted, {cell}", _text(value))
    course.add_row("explained by y = x", _text(found["identity"]))
    for key, value in (found["next_rollouts"] or {}).items():
        course.add_row(f"next rollouts, {key}", _text(value))
    parts = ["share", "status", "step", "interval", "actual", "error"]
    parts += ["persistence", "straight_line"]
    tables = [agreements, course]
    for floor in FLOORS:
        forecasts = Table(*parts, title=f"the fall of the entropy below {floor} nats, foretold")
        for one in found["forecasts"]:
            if one["floor"] == floor:
                forecasts.add_row(*(_text(one[part]) for part in parts))
        tables.append(forecasts)
    band = Table("its course, foretold", "", title="the entropy's band")
    for key, value in (found["band"] or {"none": "no trend, or too few entropies"}).items():
        band.add_row(key, _text(value))
    return [*tables, band]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(_text, value))
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}"


def run(log: Path = LOG) -> dict[str, Any]:
    """What a training's log says of why its entropy moved, and of its end.

    Args:
        log: A run's directory.

    Returns:
        ``estimates`` by name, ``identity``, ``next_rollouts``, ``totals``, ``tokens``, ``samples``,
        ``band``, of `judge_band`, and ``forecasts`` of each of `FLOORS`. A number that is not known
        is None, as is a step that this run, or a forecast, does not reach.

    Raises:
        EntropyLensError: There is no run, or one that did not measure changes of the entropy.
    """
    logged = open_run(log)
    changes = read_entropy_change(logged)
    if changes is None:
        raise EntropyLensError(
            f"entropy_change: expected a log with entropy/change/measured, got {log}; train with "
            f"diagnostics={{'entropy_change': 1}}"
        )
    course = read_curves(logged).get("entropy/token/mean")
    steps, entropy = (np.zeros(0),) * 2 if course is None else (course.steps, course.values)
    estimates = {one.name: asdict(one) for one in changes.agreements}
    found = {
        "log": str(log),
        "run_id": logged.run_id,
        "estimates": estimates,
        "identity": estimates["exact"]["identity"] if "exact" in estimates else None,
        "next_rollouts": None if changes.skill is None else asdict(changes.skill),
        "totals": asdict(changes.totals),
        "tokens": [asdict(part) for part in changes.tokens],
        "samples": [asdict(part) for part in changes.samples],
        "band": judge_band(steps.astype(np.float64), entropy),
        "forecasts": [
            {
                "floor": floor,
                "share": one.share,
                "status": one.forecast.status,
                "step": one.forecast.step,
                "interval": [one.forecast.low, one.forecast.high],
                "actual": one.actual,
                "is_inside": one.is_inside,
                "error": one.error,
                "persistence": one.persistence_error,
                "straight_line": one.straight_line_error,
            }
            for floor in FLOORS
            for one in score_forecasts(steps, entropy, floor)
        ],
    }
    return dict(_plain(found))


def judge_band(steps: Floats, entropy: Floats, share: float = EARLY) -> dict[str, Any] | None:
    """How much of the entropy's later course lay in the band foretold at a share of the run?

    Args:
        steps: ``[n]`` increasing.
        entropy: ``[n]`` nats.
        share: Of the run's steps that the forecast knew.

    Returns:
        ``inside``: share of later entropies within the band; ``means_inside``: of their means over
        `WINDOW` of them in a row, without overlap. ``actual_at_end`` is the mean of the last
        `WINDOW`, and errors there, foretold less actual, are the median path's, that of the newest
        `WINDOW` known (persistence), and that of a straight line through all that was known. None
        where nothing was foretold, or fewer than `WINDOW` entropies came after.
    """
    kept = np.isfinite(entropy)
    steps, entropy = steps[kept], entropy[kept]
    if not len(steps):
        return None
    is_known = steps <= steps[0] + share * (steps[-1] - steps[0])
    past, known, ahead, came = (
        steps[is_known],
        entropy[is_known],
        steps[~is_known],
        entropy[~is_known],
    )
    # No entropy is below 0: the path is told to the end, whatever it crosses.
    found = forecast_crossing(past, known, 0.0, horizon=steps[-1] - past[-1])
    if len(came) < WINDOW or not len(found.path_step):
        return None

    def band(at: Floats) -> Floats:
        return np.stack([np.interp(at, found.path_step, edge) for edge in found.path])

    def inside(at: Floats, values: Floats) -> float:
        low, _, high = band(at)
        return float(((low <= values) & (values <= high)).mean())

    whole = len(came) // WINDOW * WINDOW
    windows = (values[-whole:].reshape(-1, WINDOW).mean(1) for values in (ahead, came))
    end, actual = ahead[-WINDOW:].mean(), came[-WINDOW:].mean()
    intercept, slope = straight(past, known)
    return {
        "share": share,
        "made_at": float(past[-1]),
        "model": found.model,
        "level": found.level,
        "inside": inside(ahead, came),
        "means_inside": inside(*windows),
        "actual_at_end": float(actual),
        "error_at_end": float(band(end)[1] - actual),
        "persistence_at_end": float(known[-WINDOW:].mean() - actual),
        "straight_line_at_end": float(intercept + slope * end - actual),
    }


def _plain(value: Any) -> Any:
    """What JSON can say: lists for tuples, None for what is not finite."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return float(value) if np.isfinite(value) else None
    return value


def synthetic(states: int = 4000, vocabulary: int = 500, seed: int = 0) -> dict[str, Any]:
    """Agreement of every estimate with the entropy change of one tabular step.

    Returns:
        ``pcc``, ``srcc`` and ``sign_agreement`` by estimate, and the 10, 50 and 90 % quantiles of
        the states' entropies, nats.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = zipf_logits(states, vocabulary, generator)
    logp = logits.log_softmax(1)
    p, entropy = logp.exp(), entropies(logits)
    action = torch.multinomial(p, 1, generator=generator)
    advantage = torch.randn(states, generator=generator, dtype=torch.float64)
    direction = torch.zeros_like(p).scatter_(1, action, 1.0) - p
    true = (entropies(logits + STEP * advantage[:, None] * direction) - entropy) / STEP
    parts = TokenParts(
        logprob=logp.gather(1, action)[:, 0],
        entropy=entropy,
        advantage=advantage,
        pull=advantage,
        expected_discriminator=(p.square() * (logp + entropy[:, None])).sum(1),
        weight=torch.ones(states),
    )
    predicted = {name: estimate(parts) for name, estimate in ESTIMATORS.items()}
    return {
        "pcc": {n: float(np.corrcoef(e, true)[0, 1]) for n, e in predicted.items()},
        "srcc": {n: float(spearmanr(e, true).statistic) for n, e in predicted.items()},
        "sign_agreement": {
            n: float((e.sign() == true.sign()).double().mean()) for n, e in predicted.items()
        },
        "entropy_deciles": np.quantile(entropy, (0.1, 0.5, 0.9)).tolist(),
        "states": states,
        "vocabulary": vocabulary,
        "seed": seed,
    }


def zipf_logits(states: int, vocabulary: int, generator: torch.Generator) -> torch.Tensor:
    """``[states, vocabulary]`` float64, ``s (noise - log rank)`` with s uniform over states."""
    low, high = EXPONENTS
    rank = torch.arange(1, vocabulary + 1, dtype=torch.float64)
    noise = NOISE * torch.randn(states, vocabulary, generator=generator, dtype=torch.float64)
    share = torch.rand(states, 1, generator=generator, dtype=torch.float64)
    return (low + (high - low) * share) * (noise - rank.log())


def entropies(logits: torch.Tensor) -> torch.Tensor:
    logp = logits.log_softmax(1)
    return -(logp.exp() * logp).sum(1)


CELLS: dict[str, Callable[[], dict[str, Any]]] = {"synthetic": synthetic, "run": run}
TABLES: dict[str, Callable[[str, Mapping[str, Any]], list[Table]]] = {
    "synthetic": synthetic_tables,
    "run": run_tables,
}


if __name__ == "__main__":
    sys.exit(main())
