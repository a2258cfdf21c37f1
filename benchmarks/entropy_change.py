"""Which per-token estimate says what a policy-gradient step does to the entropy?

- ``synthetic``: 4,000 states of 500 actions, logits after Zipf's law with an exponent of the
  state's own, so that tenths of the states lie below 0.6 and above 5.2 nats; one action drawn from
  each, A ~ N(0, 1). What each estimate predicts for the state is compared with what one step of a
  tabular softmax, ``dz = 1e-3 A (e_a - p)``, does to its entropy in float64.

    python -m benchmarks.entropy_change [--cells NAME ...] [--out DIR]

A table is printed, and each cell's numbers are written to ``out/entropy_change/<cell>.json``.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from entropylens.diagnostics._estimators import ESTIMATORS, TokenParts

EXPONENTS = (0.6, 3.45)
"""Of Zipf's law, from the flattest to the steepest state."""
NOISE = 0.3
"""Standard deviation of a logit around the law, before the exponent multiplies it."""
STEP = 1e-3


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cells", nargs="*", choices=CELLS, help="only these")
    parser.add_argument("--out", type=Path, default=Path("out/entropy_change"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    for name in asked.cells or CELLS:
        found = CELLS[name]()
        (asked.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        Console().print(table(name, found))
    return 0


def table(title: str, found: dict[str, Any]) -> Table:
    shown = Table("estimate", "PCC", "SRCC", "sign agreement", title=title)
    for name in ESTIMATORS:
        shown.add_row(
            name, *(f"{found[key][name]:.3f}" for key in ("pcc", "srcc", "sign_agreement"))
        )
    return shown


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


CELLS: dict[str, Callable[[], dict[str, Any]]] = {"synthetic": synthetic}


if __name__ == "__main__":
    sys.exit(main())
