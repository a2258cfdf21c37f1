"""At which length of a step does damage begin, and which normaliser says so beforehand?

- *lines*: six nets on Fashion-MNIST, each after 60, 600 and 3,000 steps of Adam, are moved along an
  update: gradient descent, Adam's own next step, or random. The loss is damaged once it has doubled
  and risen by 0.1 nats, the accuracy once 5 points are lost, on the 256 images on which the update
  is measured, and on 512 held out. A normaliser is as good as the onsets, multiplied with it, are
  alike: the standard deviation of log10, and a 95 % interval from drawing whole trainings anew;
  "within" is that about the mean of the same net and direction, over stages and seeds.
  ``r = step * largest spread of the logits' derivative / pi``: r = 1 is the bound on the Taylor
  radius of arXiv 2603.13552. Batch norm is in training mode, as the loss uses it.
- *temperature*: a perceptron judged on ``logits / T``, T from 0.25 to 64, and moved along gradient
  descent until its loss has doubled; trained at each T as in the paper, and trained once at T = 1.
  Standard deviation of ln, as in the paper.

    python -m benchmarks.step_onset [--seeds N] [--data DIR] [--cache DIR] [--out FILE]
                                    [--figure FILE]

Needs Fashion-MNIST (``apt-get install dataset-fashion-mnist``). Takes a core 85 s a seed; a
training that was followed is kept in the cache and not followed again. Tables are printed, and the
numbers written to ``--out``. A figure needs kaleido and a browser.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from benchmarks.step_parts.onset_figure import draw
from benchmarks.step_parts.onset_lines import EVENTS, GRID, HALVINGS, Direction, follow, gradient
from benchmarks.step_parts.onset_nets import (
    DATA,
    HELD_OUT,
    NETS,
    PROBE,
    TRAINED,
    Split,
    Tempered,
    Training,
    begin,
    perceptron,
    read_split,
)
from benchmarks.step_parts.onset_statistics import NORMALISERS, Record, by_r, spread

STAGES = (60, 600, 3000)
"""Steps of Adam: hardly trained, trained, and sure of every image."""
RATE, BATCH = 2e-3, 64
DIRECTIONS = ("gradient", "adam", "random")
RANDOM = 3
"""Random directions for each net and stage."""
TEMPERATURES = tuple(float(one) for one in np.geomspace(0.25, 64, 8))
TEMPERED_STEPS, TEMPERED_RATE, TEMPERED_BATCH = 120, 1e-2, 256
WIDTH = 165
"""Characters of a table that nothing cuts short."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--data", type=Path, default=DATA, help="Fashion-MNIST's folder")
    parser.add_argument("--cache", type=Path, default=Path("benchmarks/.cache/step_onset"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step_onset.json"))
    parser.add_argument("--figure", type=Path, help="an image of the onsets")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    cells = [(name, seed) for seed in range(asked.seeds) for name in (*NETS, "temperature")]
    records = [
        record
        for name, seed in track(cells, "trainings", console=Console(stderr=True))
        for record in cell(name, seed, asked.data, asked.cache)
    ]
    found = report(records, asked.seeds)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(_rounded(found), indent=1) + "\n")
    if asked.figure:
        places = [f"{name}, {stage} steps" for name in NETS for stage in STAGES]
        draw(found["by_r"], places).write_image(asked.figure)
    console = Console(width=max(Console().width, WIDTH))
    for shown in tables(found):
        console.print(shown)
    return 0


def cell(name: str, seed: int, data: Path, cache: Path) -> list[Record]:
    """The lines of one training, followed now or kept from before."""
    settings = {
        "images": [TRAINED, PROBE, HELD_OUT],
        "training": [*STAGES, RATE, BATCH],
        "random": RANDOM,
        "grid": [*GRID, HALVINGS],
        "tempered": [*TEMPERATURES, TEMPERED_STEPS, TEMPERED_RATE, TEMPERED_BATCH],
    }
    kept, settings = cache / f"{name}-{seed}.json", json.loads(json.dumps(settings))
    if kept.exists() and (read := json.loads(kept.read_text()))["settings"] == settings:
        return list(read["records"])
    split = read_split(data, seed)
    records = tempered(split, seed) if name == "temperature" else lines(name, split, seed)
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = kept.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps({"settings": settings, "records": records}))
    unfinished.replace(kept)
    return records


def lines(name: str, split: Split, seed: int) -> list[Record]:
    """Where damage begins along each direction at each stage of one training."""
    torch.manual_seed(seed)
    training = begin(NETS[name](), split.trained, seed, rate=RATE, batch=BATCH)
    generator = torch.Generator().manual_seed(seed)
    records, taken = [], 0
    for stage in STAGES:
        for _ in range(stage - taken):
            training.step()
        taken = stage
        for direction, update in directions(training, split, generator):
            found = follow(training.net, split.probe, split.held_out, update)
            where = {"net": name, "seed": seed, "stage": stage, "direction": direction}
            records.append(where | found)
    return records


def directions(
    training: Training, split: Split, generator: torch.Generator
) -> Iterable[tuple[str, Direction]]:
    """Gradient descent on the probe, Adam's own next step, and random ones."""
    net = training.net
    yield "gradient", {name: -value for name, value in gradient(net, split.probe).items()}
    ahead, optimizer = deepcopy((net, training.optimizer))
    Training(ahead, optimizer, training.batches).step()
    before = dict(net.named_parameters())
    yield "adam", {n: (after - before[n]).detach() for n, after in ahead.named_parameters()}
    for _ in range(RANDOM):
        yield "random", {n: torch.randn(p.shape, generator=generator) for n, p in before.items()}


def tempered(split: Split, seed: int) -> list[Record]:
    """Where the loss has doubled along gradient descent, at each temperature."""
    records = []
    trained_once = perceptron_at(1.0, split, seed).net
    for temperature in TEMPERATURES:
        nets = {
            "trained at T": Tempered(perceptron_at(temperature, split, seed).net, temperature),
            "trained at T = 1": Tempered(trained_once, temperature),
        }
        for training, net in nets.items():
            descent = {name: -value for name, value in gradient(net, split.probe).items()}
            found = follow(net, split.probe, split.held_out, descent, floor=0.0)
            where = {"net": "temperature", "seed": seed, "temperature": temperature}
            records.append(where | {"training": training} | found)
    return records


def perceptron_at(temperature: float, split: Split, seed: int) -> Tempered:
    """A perceptron trained on the cross-entropy of ``logits / temperature``."""
    torch.manual_seed(seed)
    net = Tempered(perceptron(128, 128, activation=nn.GELU), temperature)
    training = begin(net, split.trained, seed, rate=TEMPERED_RATE, batch=TEMPERED_BATCH)
    for _ in range(TEMPERED_STEPS):
        training.step()
    return net


def report(records: Sequence[Record], seeds: int) -> dict[str, Any]:
    """What the lines come to."""
    followed = [record for record in records if record["net"] != "temperature"]
    by_stage = {f"{n} steps": _where(followed, stage=n) for n in STAGES}
    by_direction = {name: _where(followed, direction=name) for name in DIRECTIONS}
    groups = {"all": followed, **by_stage, **by_direction}
    by_net = {
        f"{name}, {stage}": _where(of_stage, net=name)
        for name in NETS
        for stage, of_stage in by_stage.items()
    }
    temperatures = {}
    for training in ("trained at T", "trained at T = 1"):
        lines_of = _where(records, net="temperature", training=training)
        at = {f"{one:.3g}": by_r(_where(lines_of, temperature=one)) for one in TEMPERATURES}
        temperatures[training] = {
            "std_of_ln_onset": spread(lines_of, "loss", base=np.e),
            "onset_r": {name: one["onset"]["loss"] for name, one in at.items()},
        }
    return {
        "seeds": seeds,
        "lines": len(followed),
        "std_of_log10_onset": {
            event: {
                **{name: spread(group, event, base=10) for name, group in groups.items()},
                "within": spread(followed, event, base=10, within=("net", "direction")),
            }
            for event in EVENTS
        },
        "by_r": {name: by_r(group) for name, group in (groups | by_net).items()},
        "temperature": temperatures,
    }


def _where(records: Sequence[Record], **keys: Any) -> list[Record]:
    return [one for one in records if all(one.get(key) == is_ for key, is_ in keys.items())]


def tables(found: Mapping[str, Any]) -> list[Table]:
    shown = []
    parts = [*(f"{stage} steps" for stage in STAGES), *DIRECTIONS, "within"]
    for event in EVENTS:
        groups = found["std_of_log10_onset"][event]
        columns = ["median", "std", "95 %", "to r_max", "95 %", *parts]
        alike = Table(title=f"{_words(event)}: standard deviation of log10 onset")
        for column in ("normaliser", *columns):
            alike.add_column(column, no_wrap=True)
        for name in NORMALISERS:
            each = [groups[group][name] for group in ("all", *parts)]
            if all("std" in one for one in each):
                one, stds = each[0], [f"{one['std']:.3f}" for one in each]
                interval, ratios = _range(one["interval"]), _range(one["to_r_max_interval"])
                values = [stds[0], interval, f"{one['to_r_max']:.2f}", ratios, *stds[1:]]
                alike.add_row(name, f"{one['median']:.3g}", *values)
        shown.append(alike)
    begins = Table(
        "where", "lines", *map(_words, EVENTS), title="r at onset: lowest, median, below 1"
    )
    worst = Table("where", "loss at start", "loss up by 10 %", "loss ratio", "accuracy", "held out")
    worst.title = "the worst up to r = 1"
    for place, one in found["by_r"].items():
        onsets = (_onset(one["onset"][event]) for event in EVENTS)
        begins.add_row(place, str(one["lines"]), *onsets)
        to_1 = one["up_to_r_1"]
        worst.add_row(
            place,
            f"{one['start']['loss']:.2g}",
            f"{to_1['loss_up_by_a_tenth']} of {one['lines']}",
            f"{to_1['worst_loss_ratio']:.2f}",
            f"{100 * to_1['worst_accuracy_change']:+.1f}",
            f"{100 * to_1['worst_held_out_accuracy_change']:+.1f}",
        )
    tempered = Table("temperature", *found["temperature"], title="r at which the loss has doubled")
    alike = Table("std of ln onset, 95 %", *found["temperature"], title="over temperatures")
    for at in map("{:.3g}".format, TEMPERATURES):
        tempered.add_row(at, *(_onset(one["onset_r"][at]) for one in found["temperature"].values()))
    for name in NORMALISERS:
        each = [one["std_of_ln_onset"][name] for one in found["temperature"].values()]
        if all("std" in one for one in each):
            alike.add_row(name, *(f"{one['std']:.3f}, {_range(one['interval'])}" for one in each))
    return [*shown, begins, worst, tempered, alike]


def _words(event: str) -> str:
    return event.replace("_", " ")


def _onset(one: Mapping[str, Any]) -> str:
    if not one["happened"]:
        return "never"
    return f"{one['lowest']:.2f}, {one['median']:.2f}, {one['below_1']}"


def _range(interval: Sequence[float]) -> str:
    return " to ".join(f"{edge:.2g}" for edge in interval)


def _rounded(value: Any) -> Any:
    """Four digits of each number: what a second run on another machine would find, too."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
