"""Does fine-tuning the matrices of lowest condition number forget less than other matrices would?

A character model (grouped-query attention, so that matrices differ in shape) learns the source code
of Python's library and is then fine-tuned on the prose of Python's help, in matrices that make up
10 % or 25 % of its parameters. They are chosen by each rule of `entropylens.select_tensors`, by the
reverse of two of them, at random, and at random among matrices of the kinds that a rule chose,
which tells the rule's share in its effect from the shapes'; all are fine-tuned besides. Forgetting
is the rise of the held-out loss on code, in nats a character:

- at equal loss on prose: where a run's loss on prose first comes down to the level that all runs of
  its seed and budget reach, linear between measurements. Comparing at equal steps is unfair to
  what learns faster.
- at equal steps: at the end.

    python -m benchmarks.kappa_selection [--seeds N]

Pretrained models and fine-tunings are kept in ``benchmarks/.cache/kappa_selection`` under what they
were made by; a fine-tuning is known by the matrices that it trains, so that two rules that choose
the same share one. Figures go to ``benchmarks/results/kappa_selection.json``. One thread, all of it
about 25 minutes: it can be stopped and goes on.
"""

import argparse
import hashlib
import inspect
import json
import os
import platform
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import cos, nan, pi, sqrt
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean, stdev
from typing import Any, Final

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from benchmarks.step_faults import plain
from benchmarks.step_parts.programs import CHARACTERS
from entropylens.fine_tuning import Selection, select_tensors

CACHE: Final = Path("benchmarks/.cache/kappa_selection")
RESULTS: Final = Path("benchmarks/results/kappa_selection.json")
SEEDS: Final = 3
BUDGETS: Final = (0.1, 0.25)
RULES: Final = ("kappa_to_null", "entropy_deficit", "kappa")
REVERSED: Final = ("kappa_to_null", "kappa")
CHOICES: Final = 3
"""Random choices of each seed and budget."""
MATCHED: Final = 1
"""Random choices among matrices of the kinds that a rule chose: so many queries, gates, ..."""
CONTEXT: Final = 64
BATCH: Final = 16
PRETRAINING: Final = 2_000
MOMENTS: Final = (0, 4, 8, 12, 16, 22, 30, 45, 70, 100)
"""Steps of fine-tuning after which both losses are measured."""
RATE: Final = 1e-3
SLOWLY: Final = 3e-4
"""Learning rate at which all parameters are trained once more: they learn faster."""
WINDOWS: Final = 128
"""Held-out windows of each text."""


# -- texts and model ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """Numbers of characters: ``[n]`` to train on, and held-out windows ``[windows, 65]``."""

    train: Tensor
    held: Tensor

    def batch(self, source: torch.Generator) -> Tensor:
        first = torch.randint(len(self.train) - CONTEXT, (BATCH, 1), generator=source)
        return self.train[first + torch.arange(CONTEXT + 1)]


@cache
def texts() -> dict[str, Text]:
    """Code of the standard library's top modules, and the help's prose; every tenth is held out."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    code = [path.read_text(errors="ignore") for path in files]
    return {"code": text_of(code), "prose": text_of([topics[name] for name in sorted(topics)])}


def text_of(parts: Sequence[str]) -> Text:
    known = {character: number for number, character in enumerate(CHARACTERS)}
    numbers = [torch.tensor([known[one] for one in part if one in known]) for part in parts]
    held = torch.cat(numbers[::10])
    first = torch.linspace(0, len(held) - CONTEXT - 1, WINDOWS).long()[:, None]
    train = torch.cat([part for at, part in enumerate(numbers) if at % 10])
    return Text(train, held[first + torch.arange(CONTEXT + 1)])


class Block(nn.Module):
    """Four query heads on two key-value heads, then a gated perceptron."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width // 2, bias=False)
        self.v = nn.Linear(width, width // 2, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.before_attention(x)
        q, k, v = (
            part(normed).unflatten(-1, (heads, -1)).transpose(1, 2)
            for part, heads in ((self.q, 4), (self.k, 2), (self.v, 2))
        )
        k, v = (part.repeat_interleave(2, dim=1) for part in (k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        normed = self.before_mlp(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Transformer(nn.Module):
    """Foretells each character from those before it."""

    def __init__(self, width: int = 128, depth: int = 6, hidden: int = 320) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(CHARACTERS), width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList([Block(width, hidden) for _ in range(depth)])
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, len(CHARACTERS), bias=False)
        for table in (self.characters, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, characters: Tensor) -> Tensor:
        x = self.characters(characters) + self.positions.weight[: characters.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


# -- training -------------------------------------------------------------------------------------


def pretrained(seed: int) -> Transformer:
    """The model of a seed after training on code; trained here if that is not kept."""
    path = CACHE / f"pretrained-{seed}-{maker('pretrained')}.pt"
    torch.manual_seed(seed)
    model = Transformer()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    source = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    for step in range(PRETRAINING):
        rate = min((step + 1) / 100, 0.55 + 0.45 * cos(pi * step / PRETRAINING))
        optimizer.param_groups[0]["lr"] = 3e-3 * rate
        advance(model, optimizer, texts()["code"].batch(source))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)
    return model


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, windows: Tensor) -> None:
    optimizer.zero_grad()
    loss_of(model, windows).backward()
    optimizer.step()


def fine_tuned(seed: int, names: Sequence[str], rate: float = RATE) -> list[list[float]]:
    """``[step, loss on code, loss on prose]`` at `MOMENTS` of a fine-tuning of these parameters."""
    chosen = hashlib.sha256("\n".join([*sorted(names), str(rate)]).encode()).hexdigest()[:12]
    path = CACHE / f"tuned-{seed}-{chosen}-{maker('tuned')}.json"
    if path.exists():
        return list(json.loads(path.read_text()))
    model = pretrained(seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
    source, curve = torch.Generator().manual_seed(1_000 + seed), [measured(model, 0)]
    for step in range(1, MOMENTS[-1] + 1):
        optimizer.param_groups[0]["lr"] = rate * min(step / 20, 1.0)
        advance(model, optimizer, texts()["prose"].batch(source))
        if step in MOMENTS:
            curve.append(measured(model, step))
    path.with_suffix(".part").write_text(json.dumps(curve))
    path.with_suffix(".part").replace(path)
    return curve


@torch.no_grad()
def measured(model: nn.Module, step: int) -> list[float]:
    return [step, *(loss_of(model, texts()[name].held).item() for name in ("code", "prose"))]


@cache
def maker(of: str) -> str:
    """A hash of what a training depends on, docstrings and layout apart."""
    parts: list[Any] = [texts, text_of, Text, Block, Transformer, loss_of, pretrained, advance]
    facts = [torch.__version__, platform.python_version(), CONTEXT, BATCH, CHARACTERS, PRETRAINING]
    if of == "tuned":
        parts += [fine_tuned, measured]
        facts += [MOMENTS, WINDOWS]
    sources = [plain(inspect.getsource(part)) for part in parts]
    return hashlib.sha256("\n".join([*map(str, facts), *sources]).encode()).hexdigest()[:12]


# -- choices --------------------------------------------------------------------------------------


@cache
def choices(seed: int, budget: float) -> dict[str, list[Selection]]:
    """What is fine-tuned within a budget, by rule; random ones several times."""
    model = pretrained(seed)
    chosen = {rule: select_tensors(model, budget, by=rule) for rule in RULES}
    found = {rule: [selection] for rule, selection in chosen.items()}
    for rule in REVERSED:
        scores = {name: -score for name, score in chosen[rule].scores.items()}
        found[f"highest_{rule}"] = [select_tensors(model, budget, by=scores)]
    drawn = random.Random(seed)
    names = sorted(chosen["kappa"].scores)
    found["random"] = [
        select_tensors(model, budget, by={name: drawn.random() for name in names})
        for _ in range(CHOICES)
    ]
    for rule in ("kappa_to_null", "kappa"):
        found[f"{rule}_matched"] = [
            select_tensors(model, budget, by=matched(chosen[rule], names, drawn))
            for _ in range(MATCHED)
        ]
    return found


def matched(selection: Selection, names: Sequence[str], drawn: random.Random) -> dict[str, float]:
    """Scores of random matrices, as many of each kind as were selected."""
    by_kind = defaultdict[str, list[str]](list)
    for name in names:
        by_kind[kind(name)].append(name)
    counts = Counter(map(kind, selection.names))
    return {one: 0.0 for what in counts for one in drawn.sample(by_kind[what], counts[what])}


def kind(name: str) -> str:
    return name.split(".")[-2]


# -- figures --------------------------------------------------------------------------------------


def cells(seed: int, budget: float) -> dict[str, list[list[list[float]]]]:
    """Curves of a seed and budget, by rule; those of all parameters too."""
    wanted = {
        rule: [fine_tuned(seed, one.names) for one in selections]
        for rule, selections in choices(seed, budget).items()
    }
    every = [name for name, _ in Transformer().named_parameters()]
    wanted["all"] = [fine_tuned(seed, every)]
    wanted["all_slowly"] = [fine_tuned(seed, every, SLOWLY)]
    return wanted


def level_of(curves: Mapping[str, Sequence[Sequence[Sequence[float]]]]) -> float:
    """The loss on prose that every run comes down to."""
    return max(min(prose for _, _, prose in curve) for same in curves.values() for curve in same)


def code_loss_at(curve: Sequence[Sequence[float]], level: float) -> float:
    """Loss on code where that on prose first comes down to a level, NaN where it never does.

    Example:
        >>> code_loss_at([[0, 1.0, 2.0], [10, 2.0, 1.0]], 1.5)
        1.5
    """
    if curve[0][2] <= level:
        return curve[0][1]
    for (_, code, prose), (_, next_code, next_prose) in pairwise(curve):
        if next_prose <= level:
            return code + (next_code - code) * (prose - level) / (prose - next_prose)
    return nan


def forgetting(curves: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of one seed and budget: nats a character by rule, the mean over random choices."""
    level = level_of(curves)
    return {
        rule: {
            "at_equal_loss": fmean(code_loss_at(one, level) - one[0][1] for one in same),
            "at_equal_steps": fmean(one[-1][1] - one[0][1] for one in same),
            "loss_on_prose": fmean(one[-1][2] for one in same),
        }
        for rule, same in curves.items()
    }


def summary(by_seed: Sequence[float]) -> dict[str, float | None]:
    error = stdev(by_seed) / sqrt(len(by_seed)) if len(by_seed) > 1 else None
    return {"mean": fmean(by_seed), "standard_error": error}


def figures(seeds: Sequence[int]) -> dict[str, Any]:
    """Forgetting by budget and rule, and of each rule less that of random choices."""
    by_budget: dict[str, Any] = {}
    for budget in BUDGETS:
        curves = [cells(seed, budget) for seed in seeds]
        found = [forgetting(one) for one in curves]
        chosen = [choices(seed, budget) for seed in seeds]
        by_budget[str(budget)] = {
            "level": [level_of(one) for one in curves],
            "rules": {rule: row(rule, found, chosen) for rule in found[0]},
        }
    start = [fine_tuned(seed, choices(seed, BUDGETS[0])["kappa"][0].names)[0] for seed in seeds]
    return {
        "seeds": len(seeds),
        "parameters": sum(one.numel() for one in Transformer().parameters()),
        "pretrained": {"code": fmean(s[1] for s in start), "prose": fmean(s[2] for s in start)},
        "by_budget": by_budget,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def row(
    rule: str,
    found: Sequence[Mapping[str, Mapping[str, float]]],
    chosen: Sequence[Mapping[str, Sequence[Selection]]],
) -> dict[str, Any]:
    made = {key: summary([one[rule][key] for one in found]) for key in found[0][rule]}
    for key in ("at_equal_loss", "at_equal_steps"):
        made[f"{key}_less_random"] = summary([o[rule][key] - o["random"][key] for o in found])
    selections = [one for by_rule in chosen for one in by_rule.get(rule, ())]
    kinds = Counter(kind(name) for one in selections for name in one.names)
    return {
        **made,
        "by_seed": [one[rule]["at_equal_loss"] for one in found],
        "share": fmean(one.share for one in selections) if selections else 1.0,
        "kinds": {what: count / len(selections) for what, count in kinds.most_common()},
    }


def table(found: Mapping[str, Any], budget: str) -> Table:
    heads = ("at equal loss", "less random", "at equal steps", "loss on prose", "share", "chosen")
    made = Table("rule", *heads, title=f"forgetting, nats a character; budget {budget}")
    for rule, one in found["by_budget"][budget]["rules"].items():
        keys = ("at_equal_loss", "at_equal_loss_less_random", "at_equal_steps", "loss_on_prose")
        kinds = " ".join(f"{what} {count:.2g}" for what, count in one["kinds"].items())
        made.add_row(rule, *(told(one[key]) for key in keys), f"{one['share']:.1%}", kinds)
    return made


def told(value: Mapping[str, float | None]) -> str:
    error = value["standard_error"]
    return f"{value['mean']:.4f}" + ("" if error is None else f" ± {error:.4f}")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"so many, by default {SEEDS}")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    wanted = [(seed, budget) for budget in BUDGETS for seed in range(asked.seeds)]
    for seed, budget in track(wanted, "seeds and budgets"):
        cells(seed, budget)
    found = figures(range(asked.seeds))
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    for budget in found["by_budget"]:
        Console(width=None if sys.stdout.isatty() else 150).print(table(found, budget))
    return 0


if __name__ == "__main__":
    sys.exit(main())
