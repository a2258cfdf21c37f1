"""Is there entropic overload without layer norm and nonlinearity, and does a penalty cure it?

arXiv 2501.03489 trains GPT-2 (12 layers, 12 heads, T = 128) on Python source. Here a character
model of 4 layers and 4 heads a layer (width 64, T = 128) learns the source of Python's library: 500
steps of AdamW on 8 windows, its rate the same for all nets.

- *SM+LN+G*: softmax attention, layer norm, GELU. *SM+R*: no layer norm, ReLU. *SM*: neither, the
  feed-forward part is linear.
- strength of the penalty (`entropylens.attention_regulariser`, against log T as published): 0; 1e-5
  as Algorithm 1 has it; 1e-2, which is about what the released code makes of 1e-5, for it adds over
  the batch's 8 windows and 128 places; 1e-2 with thresholds that stay at 0.5.

Entropies are those of all queries of 16 held-out windows, by the diagnostics themselves.

    python -m benchmarks.attention_entropy [--seeds N] [--cache DIR] [--out FILE]

A training is kept in the cache and not done again. One thread, half a minute to a minute each.
"""

import argparse
import hashlib
import inspect
import json
import os
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from math import cos, isfinite, pi
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from benchmarks.step_parts.programs import CHARACTERS
from entropylens.attention_regulariser import AttentionEntropyRegulariser
from entropylens.diagnostics._attention import rows_of_logits
from entropylens.diagnostics.attention_entropy import AttentionEntropy
from entropylens.diagnostics.attention_logits import AttentionLogits
from entropylens.registry import AttentionReading

LAYERS, HEADS, WIDTH, CONTEXT = 4, 4, 64, 128
BATCH, STEPS, WARMUP = 8, 500, 50
MOMENTS: Final = (0, 50, 100, 200, 350, 500)
"""Steps after which the held-out windows are looked at."""
HELD_OUT: Final = 16
NETS: Final[Mapping[str, tuple[bool, str]]] = {
    "SM+LN+G": (True, "gelu"),
    "SM+R": (False, "relu"),
    "SM": (False, "none"),
}
"""Layer norm, and the nonlinearity of the feed-forward part."""
RATE: Final = 2e-3
PENALTIES: Final[Mapping[str, tuple[float, bool]]] = {
    "none": (0.0, True),
    "1e-5": (1e-5, True),
    "1e-2": (1e-2, True),
    "1e-2 held": (1e-2, False),
}
"""Strength, and whether thresholds learn."""
BANDS: Final = ("first", "second", "third", "fourth")
Record = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=Path("benchmarks/.cache/attention_entropy"))
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/attention_entropy.json")
    )
    asked = parser.parse_args()
    torch.set_num_threads(1)
    cells = list(product(range(asked.seeds), PENALTIES, NETS))
    records = [
        cell(name, penalty, seed, asked.cache)
        for seed, penalty, name in track(cells, "trainings", console=Console(stderr=True))
    ]
    found = report(records)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(found, indent=1) + "\n")
    console = Console(width=max(Console().width, 130))
    for shown in tables(found):
        console.print(shown)
    return 0


# -- data and model -------------------------------------------------------------------------------


@cache
def text() -> tuple[Tensor, Tensor]:
    """Code of the library's top modules: to train on, and ``[16, 129]`` of every tenth module."""
    known = {character: number for number, character in enumerate(CHARACTERS)}
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    parts = [
        torch.tensor([known[one] for one in path.read_text(errors="ignore") if one in known])
        for path in files
    ]
    held = torch.cat(parts[::10])
    first = torch.linspace(0, len(held) - CONTEXT - 1, HELD_OUT).long()[:, None]
    train = torch.cat([part for at, part in enumerate(parts) if at % 10])
    return train, held[first + torch.arange(CONTEXT + 1)]


class Layer(nn.Module):
    """Attention and a feed-forward part, each added to what comes in."""

    def __init__(self, norm: bool, activation: str) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) if norm else nn.Identity() for _ in "12"])
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        activations: Mapping[str, nn.Module] = {
            "gelu": nn.GELU(),
            "relu": nn.ReLU(),
            "none": nn.Identity(),
        }
        self.activation = activations[activation]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.qkv(self.norms[0](x)).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2)
        q, k, v = parts.chunk(3, dim=1)
        length = x.shape[1]
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        logits = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf)
        maps = logits.softmax(-1)
        x = x + self.out((maps @ v).transpose(1, 2).flatten(2))
        return x + self.down(self.activation(self.up(self.norms[1](x)))), logits, maps


class Net(nn.Module):
    """Foretells each character; gives logits, and each layer's attention logits and maps."""

    def __init__(self, name: str) -> None:
        super().__init__()
        norm, activation = NETS[name]
        self.characters = nn.Embedding(len(CHARACTERS), WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList([Layer(norm, activation) for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH) if norm else nn.Identity()
        self.head = nn.Linear(WIDTH, len(CHARACTERS), bias=False)
        for table in (self.characters, self.positions):
            nn.init.normal_(table.weight, std=0.5**0.5)

    def forward(self, characters: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        x = self.characters(characters) + self.positions.weight
        logits, maps = [], []
        for layer in self.layers:
            x, scores, weights = layer(x)
            logits.append(scores)
            maps.append(weights)
        return self.head(self.norm(x)), logits, maps


# -- training -------------------------------------------------------------------------------------


def cell(name: str, penalty: str, seed: int, cache: Path) -> Record:
    """One training, done now or kept from before."""
    sizes = (MOMENTS, LAYERS, HEADS, WIDTH, BATCH, STEPS, WARMUP, RATE, PENALTIES[penalty])
    parts = (Layer, Net, text, train, look, *sizes)
    source = "\n".join(inspect.getsource(one) if callable(one) else repr(one) for one in parts)
    made_by = hashlib.sha256(source.encode()).hexdigest()[:12]
    kept = cache / f"{name}-{penalty}-{seed}-{made_by}.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    looks = train(name, *PENALTIES[penalty], seed)
    record = {"net": name, "penalty": penalty, "seed": seed, "looks": looks}
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = kept.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(record))
    unfinished.replace(kept)
    return record


def train(name: str, strength: float, learns: bool, seed: int) -> list[Record]:
    """The looks of one training."""
    torch.manual_seed(seed)
    net, source = Net(name), torch.Generator().manual_seed(seed)
    penalty = AttentionEntropyRegulariser(LAYERS, HEADS, strength=strength, normalise="log_t")
    penalty.requires_grad_(learns)
    groups: list[dict[str, Any]] = [
        {"params": [*net.parameters()]},
        {"params": [*penalty.parameters()], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    characters, looks = text()[0], []
    for step in range(STEPS + 1):
        if step in MOMENTS:
            looks.append({"step": step} | look(net, penalty))
        share = min((step + 1) / WARMUP, 0.55 + 0.45 * cos(pi * step / STEPS))
        for group in optimizer.param_groups:
            group["lr"] = RATE * share
        first = torch.randint(len(characters) - CONTEXT, (BATCH, 1), generator=source)
        windows = characters[first + torch.arange(CONTEXT + 1)]
        logits, _, maps = net(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        (loss + penalty(maps) if strength else loss).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return looks


@torch.no_grad()
def look(net: Net, penalty: AttentionEntropyRegulariser) -> Record:
    """Held-out loss, and what the diagnostics say of the held-out windows."""
    windows = text()[1]
    predicted, logits, maps = net(windows[:, :-1])
    reading = AttentionReading(
        layers={
            str(at): rows_of_logits(one.transpose(1, 2).flatten(0, 1))
            for at, one in enumerate(logits)
        }
    )
    found: dict[str, Any] = {}
    for diagnostic in (AttentionEntropy(), AttentionLogits()):
        for block in diagnostic.measure(reading, diagnostic.initial_state())[0]:
            names, modules = block.columns["name"], block.columns["module"]
            modules = [modules] * len(names) if isinstance(modules, str) else modules
            weights = block.columns["weight"].tolist()
            values = block.columns["value"].tolist()
            for name, module, value, weight in zip(names, modules, values, weights, strict=True):
                if weight > 0:
                    found.setdefault(name, {})[module] = value
    strength = penalty.strength or 1.0
    return {
        "loss": F.cross_entropy(predicted.flatten(0, 1), windows[:, 1:].flatten()).item(),
        "penalty": penalty(maps).item() / strength,
        "threshold": penalty.threshold.mean().item(),
        "metrics": found,
    }


# -- report ---------------------------------------------------------------------------------------


def report(records: Sequence[Record]) -> dict[str, Any]:
    """Means over seeds of the last look, the looks' losses, and each seed's shares."""
    cells: dict[str, Any] = {}
    for name, penalty in product(NETS, PENALTIES):
        group = [one for one in records if (one["net"], one["penalty"]) == (name, penalty)]
        last = [one["looks"][-1] for one in group]
        cells[f"{name}, {penalty}"] = {
            "loss": _mean(one["loss"] for one in last),
            "losses": [round(one["loss"], 3) for one in last],
            "penalty": _mean(one["penalty"] for one in last),
            "threshold": _mean(one["threshold"] for one in last),
            "bands": [_mean(_of(one, f"bands/{band}") for one in last) for band in BANDS],
            "overloaded": [round(_of(one, "overloaded/share"), 3) for one in last],
            "collapsed": [round(_of(one, "collapsed/share"), 3) for one in last],
            "largest_head": _mean(max(_all(one, "head_entropy")) for one in last),
            "layers": {
                short: [_mean(_of(one, long, str(at)) for one in last) for at in range(LAYERS)]
                for short, long in (
                    ("entropy", "entropy/mean"),
                    ("normalised", "entropy/normalised/mean"),
                    ("overloaded", "overloaded/share"),
                    ("largest_logit", "logit/max"),
                )
            },
            "over_time": [
                {
                    "step": step,
                    "loss": _mean(one["looks"][at]["loss"] for one in group),
                    "fourth": _mean(_of(one["looks"][at], "bands/fourth") for one in group),
                    "normalised": _mean(
                        fmean(_all(one["looks"][at], "head_entropy_normalised")) for one in group
                    ),
                }
                for at, step in enumerate(MOMENTS)
            ],
        }
    uniform = sum(torch.arange(1, CONTEXT + 1).double().log().tolist()) / CONTEXT
    return {"seeds": len({one["seed"] for one in records}), "uniform": uniform, "cells": cells}


def tables(found: Mapping[str, Any]) -> list[Table]:
    ends = Table(
        "net, penalty", "loss", *BANDS, "overloaded", "collapsed", "largest E", "threshold"
    )
    ends.title = f"at the end, {found['seeds']} seeds; uniform causal E = {found['uniform']:.2f}"
    layers = Table("net, penalty", "E", "normalised", "overloaded", "largest logit")
    layers.title = "by layer"
    for name, one in found["cells"].items():
        bands = [f"{100 * share:.0f} %" for share in one["bands"]]
        shares = (_join(one["overloaded"]), _join(one["collapsed"]))
        sizes = (f"{one['largest_head']:.2f}", f"{one['threshold']:.3f}")
        ends.add_row(name, _join(one["losses"]), *bands, *shares, *sizes)
        layers.add_row(name, *map(_join, one["layers"].values()))
    return [ends, layers]


def _join(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values)


def _mean(values: Any) -> float:
    mean = fmean(values)
    return round(mean, 4) if isfinite(mean) else mean


def _of(look: Record, name: str, module: str = "") -> float:
    return float(look["metrics"][f"attention/{name}"].get(module, float("nan")))


def _all(look: Record, name: str) -> list[float]:
    return list(look["metrics"][f"attention/{name}"].values())


if __name__ == "__main__":
    sys.exit(main())
