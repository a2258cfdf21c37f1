"""What does watching a training run cost, attributed and by an outside clock?

Each cell is a model and a preset, with the preset's own limit. A training is watched until the
overhead budget has settled, that is until it has changed nothing for three reviews. Then, for at
least one whole interval of the rarest diagnostic:

- *attributed*: time within our hooks and calls as timed from outside of them (less what timing an
  empty call takes), what torch itself spends on calling our hooks, and the CPU time of the writer's
  thread, over the wall time. This is the gate: 1 % for fast, 3 % for balanced.
- *by the clock*: the training goes on watched and, in turn, with our hooks set aside, in blocks of
  a second; the median difference of a pair of blocks against the median bare block, with its
  standard error. This is the check; even on an idle machine it scatters by more than a per cent.
- *by our meter*: what the Lens itself reported as ``overhead/fraction``.

The log is asked whether every diagnostic was measured at least as often as its floor demands, so
that measuring nothing does not pass.

    python benchmarks/overhead.py [--quick] [--again] [--anyway] [--cells NAME ...]

A cell that was measured is kept in ``out/overhead`` and not measured again; ``--again`` does. The
machine has to be idle, unless ``--anyway``.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import entropylens as el
from entropylens.capture.forward import Hook
from entropylens.capture.optimizer import OptimizerTap
from entropylens.registry import all_diagnostics

THREADS = 2
PRESETS = ("fast", "balanced")
LIMIT = {"fast": 0.01, "balanced": 0.03}
KEPT = Path("out/overhead")
PLAIN = ("tokens", "gradients", "update", "step", "matrices")
"""Readings of a plain training; that of updates keeps to a share of time and not to a floor."""
IDLE = 0.93
"""Share of all cores' time that must be idle for the machine to count as such."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="two models, fewer blocks, not kept")
    parser.add_argument("--again", action="store_true", help="measure cells that are kept, too")
    parser.add_argument("--anyway", action="store_true", help="though the machine is not idle")
    parser.add_argument("--cells", nargs="*", help="only these models")
    asked = parser.parse_args()
    torch.set_num_threads(THREADS)
    models = [m for m in MODELS if not asked.cells or m in asked.cells]
    models = models[:2] if asked.quick else models
    cells: dict[str, dict[str, Any]] = {}
    for model in models:
        for preset in PRESETS:
            name = f"{model} {preset}"
            kept = KEPT / f"{name.replace(' ', '-')}.json"
            if kept.exists() and not asked.again and not asked.quick:
                cells[name] = json.loads(kept.read_text())
                continue
            idle = wait_for_idle(asked.anyway)
            print(f"{name} ...", file=sys.stderr, flush=True)
            cells[name] = {"idle": round(idle, 3), **measure(model, preset, quick=asked.quick)}
            if not asked.quick:
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(cells[name]))
    show(cells)
    return 0 if all(cell["floors_kept"] for cell in cells.values()) else 1


def show(cells: dict[str, dict[str, Any]]) -> None:
    print(
        f"\n{'model':<10} {'preset':<9} {'parameters':>11} {'ms a step':>10} {'attributed':>11} "
        f"{'by the clock':>20} {'by our meter':>13} {'widened':>8} {'rows':>6}  floors"
    )
    for name, cell in cells.items():
        model, preset = name.split()
        print(
            f"{model:<10} {preset:<9} {cell['parameters']:>11,} {cell['ms_a_step']:>10.2f} "
            f"{cell['attributed']:>11.2%} {cell['by_clock']:>11.2%} ± {cell['error']:<6.2%} "
            f"{cell['by_meter']:>13.2%} {cell['widening']:>8} {cell['rows']!s:>6}  "
            f"{'kept' if cell['floors_kept'] else 'MISSED'}"
        )
    worst = {
        f"{preset}_worst_share": max(
            (c["attributed"] for n, c in cells.items() if n.endswith(preset)), default=None
        )
        for preset in PRESETS
    }
    print(json.dumps({**worst, "threads": THREADS, "cells": cells}))


# -- trainings -------------------------------------------------------------------------------------


class Perceptron:
    """784-128-10 on random data: the cheapest step that anyone watches."""

    def __init__(self) -> None:
        self.model: Any = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
        self.inputs, self.classes = torch.randn(256, 784), torch.randint(0, 10, (256,))

    def forward(self) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.model(self.inputs)
        loss = nn.functional.cross_entropy(logits, self.classes)
        return loss, {"logits": logits, "targets": self.classes}


class Language:
    """A Llama on random tokens."""

    def __init__(self, batch: int, length: int, **shape: int) -> None:
        self.model: Any = LlamaForCausalLM(LlamaConfig(max_position_embeddings=length, **shape))
        self.tokens = torch.randint(0, shape["vocab_size"], (batch, length))

    def forward(self) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model(input_ids=self.tokens, labels=self.tokens).loss, {}


def language(batch: int, length: int, width: int, layers: int, vocabulary: int) -> Any:
    return lambda: Language(
        batch,
        length,
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
    )


MODELS: dict[str, Callable[[], Any]] = {
    "mlp-1e5": Perceptron,
    "lm-1e6": language(8, 64, 128, 3, 1024),
    "lm-1e7": language(8, 64, 320, 6, 4096),
    "lm-1e8": language(4, 64, 768, 12, 12288),
}


class Training:
    """A model, its data and its loop, with a Lens or without."""

    def __init__(self, make: Callable[[], Any]) -> None:
        torch.manual_seed(0)
        self.task = make()
        self.model = self.task.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.lens: el.Lens | None = None

    def run(self, steps: int) -> float:
        """Train; the seconds it took."""
        began = time.perf_counter()
        for _ in range(steps):
            loss, shown = self.task.forward()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.lens is not None:
                self.lens.step(loss, gradient_norm=norm, **shown)
        return time.perf_counter() - began


# -- a cell ----------------------------------------------------------------------------------------


def measure(model: str, preset: str, *, quick: bool) -> dict[str, Any]:
    training = Training(MODELS[model])
    usual = statistics.median(training.run(3) / 3 for _ in range(3))
    block = max(round((0.3 if quick else 1.0) / usual), 1)
    with tempfile.TemporaryDirectory() as folder:
        watch = partial(el.Lens, training.model, training.optimizer, preset=preset,
                        run_dir=Path(folder) / "run")  # fmt: skip
        with Timers() as timers:
            timers.calibrate(training, steps=min(max(round(1.0 / usual), 3), 1000))
            with watch() as lens:
                training.lens = lens
                settle(training, lens, block, longest=20.0 if quick else 240.0)
                steps = whole_interval(lens, usual, quick)
                first = lens.last_step + 1
                attributed, seconds = attribute(training, lens, steps, timers)
                last = lens.last_step
                widening, rows = lens._session.budget.widening, lens._session.budget.rows
                state = lens.state_dict()
        # Not timed from outside, and as thinned as before.
        with watch(state=state) as lens:
            training.lens = lens
            training.run(3)
            clock = compare(training, lens, block, pairs=4 if quick else 30)
        run = el.open_run(Path(folder) / "run")
        meter = run.metrics("overhead/fraction", steps=(first, last)).to_arrow()
        floors = floors_kept(run, lens, first, last)
    reported = meter["value"].to_pylist()
    return {
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "ms_a_step": round(1e3 * seconds / steps, 3),
        "attributed": round(attributed / seconds, 5),
        "steps": steps,
        **clock,
        "by_meter": round(statistics.mean(reported), 5) if reported else float("nan"),
        "widening": widening,
        "rows": rows,
        "floors_kept": floors,
    }


def settle(training: Training, lens: el.Lens, block: int, *, longest: float) -> None:
    """Train until three reviews in a row have changed nothing."""
    budget, since, known = lens._session.budget, time.perf_counter(), None
    until = since + longest
    reviews, last_review = 0, budget.next_review
    while reviews < 3 and time.perf_counter() < until:
        training.run(max(block // 4, 1))
        settings = (budget.rows, budget.widening)
        if settings != known:
            reviews, known = 0, settings
        if budget.next_review != last_review:
            reviews, last_review = reviews + 1, budget.next_review


def whole_interval(lens: el.Lens, usual: float, quick: bool) -> int:
    """Steps of at least one interval of every diagnostic, and of at least 30 s."""
    session = lens._session
    longest = max(s.interval(session.budget.widening) for s in session._schedules.values())
    steps = max(longest, round((3.0 if quick else 30.0) / usual))
    return -(-steps // longest) * longest


def attribute(
    training: Training, lens: el.Lens, steps: int, timers: "Timers"
) -> tuple[float, float]:
    """Seconds that are ours, and all of them."""
    writer = lens._session.writer
    lens._session.flush()
    before = writer.cpu_seconds
    timers.reset()
    seconds = training.run(steps)
    ours = timers.seconds()
    lens._session.flush()
    forwards = steps if training.model._forward_hooks else 0
    ours += writer.cpu_seconds - before + torchs_own(forward=forwards, optimizer=steps)
    return ours, seconds


class Timers:
    """Times every entry into our code from outside of it; nested ones count once.

    Hooks are timed of the Lenses that are opened while it is active. What timing an empty call
    costs in the midst of a training, with its caches full of other things, is taken off.
    """

    def __init__(self) -> None:
        self._spent, self._calls, self._is_inside, self._empty = 0.0, 0, False, 0.0
        entries = [(Hook, "__call__"), (OptimizerTap, "_before_step"),
                   (OptimizerTap, "_after_step"), (el.Lens, "step")]  # fmt: skip
        self._own = [(kind, name, getattr(kind, name)) for kind, name in entries]

    def __enter__(self) -> "Timers":
        for kind, name, function in self._own:
            setattr(kind, name, self.around(function))
        return self

    def __exit__(self, *_: Any) -> None:
        for kind, name, function in self._own:
            setattr(kind, name, function)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._is_inside:
                return function(*args, **kwargs)
            self._is_inside, began = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._spent += time.perf_counter() - began
                self._calls += 1
                self._is_inside = False

        return timed

    def calibrate(self, training: "Training", steps: int) -> None:
        """What an empty call is timed as."""

        class Empty:
            step = self.around(lambda *args, **kwargs: None)

        training.lens = Empty()  # type: ignore[assignment]
        self.reset()
        training.run(steps)
        self._empty = self._spent / self._calls
        training.lens = None

    def reset(self) -> None:
        self._spent, self._calls = 0.0, 0

    def seconds(self) -> float:
        return self._spent - self._calls * self._empty


def torchs_own(forward: int, optimizer: int) -> float:
    """Seconds that torch takes to call so many empty hooks like ours."""
    module, inputs = nn.Identity(), torch.zeros(1)
    parameter = nn.Parameter(torch.zeros(1))
    stepper = torch.optim.SGD([parameter], lr=0.0)

    def cost(call: Callable[[], Any]) -> float:
        def once() -> float:
            began = time.perf_counter()
            for _ in range(2000):
                call()
            return (time.perf_counter() - began) / 2000

        return min(once() for _ in range(7))

    bare = cost(lambda: module(inputs)), cost(stepper.step)
    module.register_forward_hook(lambda *_: None, with_kwargs=True)
    stepper.register_step_pre_hook(lambda *_: None)
    stepper.register_step_post_hook(lambda *_: None)
    hooked = cost(lambda: module(inputs)), cost(stepper.step)
    each = [max(h - b, 0.0) for h, b in zip(hooked, bare, strict=True)]
    return each[0] * forward + each[1] * optimizer


def compare(training: Training, lens: el.Lens, block: int, *, pairs: int) -> dict[str, float]:
    """Blocks of steps of one training, watched and with every hook of ours set aside.

    One training and not two alike: where their tensors lie in memory alone makes a per cent.
    """
    taken: dict[str, list[float]] = {"bare": [], "watched": []}
    for number in range(pairs):
        for name in ("bare", "watched") if number % 2 else ("watched", "bare"):
            lens.restart_clock()
            with set_aside(training) if name == "bare" else nullcontext():
                taken[name].append(training.run(block))
    usual = statistics.median(taken["bare"])
    differences = [w - b for b, w in zip(taken["bare"], taken["watched"], strict=True)]
    middle = statistics.median(differences)
    spread = 1.4826 * statistics.median(abs(d - middle) for d in differences)
    return {
        "by_clock": round(middle / usual, 5),
        "error": round(1.2533 * spread / len(differences) ** 0.5 / usual, 5),
    }


@contextmanager
def set_aside(training: Training) -> Iterator[None]:
    """Train without the Lens: no call of it, no hook."""
    tables = [
        training.model._forward_hooks,
        training.optimizer._optimizer_step_pre_hooks,
        training.optimizer._optimizer_step_post_hooks,
    ]
    kept, lens = [dict(table) for table in tables], training.lens
    training.lens = None
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        training.lens = lens
        for table, hooks in zip(tables, kept, strict=True):
            table.update(hooks)


def floors_kept(run: el.Run, lens: el.Lens, first: int, last: int) -> bool:
    """Whether every diagnostic was measured in every stretch as long as its floor."""
    rows = {
        t: run.rows(t, steps=(first, last)).to_arrow() for t in ("metrics", "tokens", "samples")
    }
    names = rows["metrics"]["name"].to_pylist()
    steps = rows["metrics"]["step"].to_pylist()
    for name, schedule in lens._session._schedules.items():
        found = all_diagnostics()[name]
        if found.reads not in PLAIN:
            continue
        known = {n for n in found.metrics if "*" not in n}
        table = {"token_table": "tokens", "sample_table": "samples"}.get(name)
        if table is not None:
            at = set(rows[table]["step"].to_pylist())
        else:
            at = {s for s, n in zip(steps, names, strict=True) if n in known}
        if len(at) < (last - first + 1) // schedule.floor:
            print(f"{name}: {len(at)} in {last - first + 1} steps", file=sys.stderr)
            return False
    return True


# -- the machine -----------------------------------------------------------------------------------


def wait_for_idle(anyway: bool) -> float:
    """Wait up to a minute for an idle machine; the idle share of all cores."""
    for _ in range(30):
        idle = idle_share(2.0)
        if idle >= IDLE or anyway:
            return idle
    sys.exit(
        f"overhead: expected an idle machine, got one that is {1 - idle:.0%} busy (load "
        f"{os.getloadavg()[0]:.1f}); end what runs beside, or measure --anyway"
    )


def idle_share(seconds: float) -> float:
    def read() -> tuple[int, int]:
        fields = [int(v) for v in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return fields[3] + fields[4], sum(fields)

    idle, total = read()
    time.sleep(seconds)
    later_idle, later_total = read()
    return (later_idle - idle) / max(later_total - total, 1)


if __name__ == "__main__":
    sys.exit(main())
