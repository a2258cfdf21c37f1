"""What does watching cost in a GRPO run, by preset, against the same run that nobody watches?

Two processes train the same steps from the same seed at the same time, one watched and one bare,
each on a core of its own; then they change cores. Both see the same rollouts to the bit, so that
each step is compared with itself: the cost is the median over steps of (watched - bare) / bare, of
both placings. The training is `sample_runs/grpo_countdown`'s collapse, from its base policy.

    python -m benchmarks.grpo_cost [--steps 40] [--presets fast balanced full] [--out DIR]

Numbers are printed and written to ``out/grpo_cost/cost.json``. Two cores, otherwise idle.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

FIRST = 5
"""Steps left out at the start of each run."""
BASE = Path("out/grpo_countdown/base")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--presets", nargs="*", default=["fast", "balanced", "full"])
    parser.add_argument("--out", type=Path, default=Path("out/grpo_cost"))
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--times", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.train is not None:
        train(asked.train, asked.steps, asked.times)
        return 0
    found = {}
    for preset in asked.presets:
        found[preset] = compared(preset, asked.steps)
        print(preset, json.dumps(found[preset]), flush=True)
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "cost.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


def compared(preset: str, steps: int) -> dict[str, float]:
    shares, bare_times, own = [], [], []
    for cores in ((0, 1), (1, 0)):
        with tempfile.TemporaryDirectory() as scratch:
            files = [Path(scratch) / name for name in (preset, "bare")]
            processes = [
                started(name, steps, file, core)
                for name, file, core in zip((preset, "bare"), files, cores, strict=True)
            ]
            codes = [process.wait() for process in processes]
            if codes != [0, 0]:
                raise SystemExit(f"grpo_cost: expected both trainings to end, got {codes}")
            told = [json.loads(file.read_text()) for file in files]
        watched, bare = (np.array(one["seconds"][FIRST:]) for one in told)
        shares.append((watched - bare) / bare)
        bare_times.append(bare)
        own.append(told[0]["overhead"])
    every = np.concatenate(shares)
    return {
        "share": float(np.median(every)),
        "mean_share": float(np.concatenate(shares).mean()),
        "standard_error": float(1.2533 * every.std(ddof=1) / np.sqrt(len(every))),
        "by_our_meter": float(np.mean(own)),
        "bare_step_seconds": float(np.median(np.concatenate(bare_times))),
        "steps": len(every),
    }


def started(name: str, steps: int, file: Path, core: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "benchmarks.grpo_cost", "--train", name, "--times", str(file)]
    return subprocess.Popen(
        [*command, "--steps", str(steps)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def train(name: str, steps: int, times: Path) -> None:
    import datasets
    import torch
    import transformers
    from rich.console import Console

    import entropylens as el
    from entropylens_callbacks.transformers import attach
    from sample_runs.grpo_countdown.base import Size, load_base
    from sample_runs.grpo_countdown.train import Recipe, make_trainer

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    size = Size()
    base = load_base(BASE, size, Console(quiet=True))
    overhead = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        recipe = Recipe(learning_rate=3e-4, steps=steps)
        trainer = make_trainer(scratch, 0, recipe, base, size)
        seconds: list[float] = []
        trainer.add_callback(timing(seconds))
        run_dir = Path(scratch) / "run"
        if name != "bare":
            # Without a limit: what the preset asks for, not what the budget would leave of it.
            attach(trainer, run_dir, preset=name, max_overhead=None)
        trainer.train()
        if name != "bare":
            rows = el.open_run(run_dir).metrics("overhead/fraction").to_arrow()
            overhead = float(np.mean(rows["value"].to_pylist() or [np.nan]))
    times.write_text(json.dumps({"seconds": seconds, "overhead": overhead}))


def timing(seconds: list[float]) -> Any:
    from transformers import TrainerCallback

    class Timing(TrainerCallback):  # type: ignore[misc]
        began = time.perf_counter()

        def on_step_end(self, *_: Any, **known: Any) -> None:
            now = time.perf_counter()
            seconds.append(now - self.began)
            self.began = now

    return Timing()


if __name__ == "__main__":
    raise SystemExit(main())
