"""What does watching cost in a GRPO run, by preset, against the same run that nobody watches?

Two processes train the same steps from the same seed at the same time, one watched and one bare,
each on a core of its own; then they change cores. Both see the same rollouts to the bit, so that
each step is compared with itself: the cost is the time of all watched steps over that of all bare
ones, less 1, over whole multiples of 20 steps, which is how often `balanced` looks at an update;
its standard error is that of the blocks of 20. A preset without a limit of overhead shows what it
asks for, `balanced, limited` what the budget leaves of it. The training is the collapse of
`sample_runs/grpo_countdown`, from its base policy, which must be there.

    python -m benchmarks.grpo_cost [--blocks 3] [--cells NAME ...] [--out DIR]

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

FIRST = 10
"""Steps left out at the start of each run."""
BLOCK = 20
LIMITED = ", limited"
CELLS = ("fast", "balanced", "full", f"balanced{LIMITED}")
BASE = Path("out/grpo_countdown/base")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=3, help="of 20 steps")
    parser.add_argument("--cells", nargs="*", choices=CELLS, default=CELLS)
    parser.add_argument("--out", type=Path, default=Path("out/grpo_cost"))
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--times", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    steps = FIRST + BLOCK * asked.blocks
    if asked.train is not None:
        train(asked.train, steps, asked.times)
        return 0
    if not BASE.exists():
        raise SystemExit(
            f"grpo_cost: expected the base policy in {BASE}, got nothing; run "
            f"python sample_runs/grpo_countdown/train.py --run base"
        )
    found = {}
    for cell in asked.cells:
        found[cell] = compared(cell, asked.blocks)
        print(cell, json.dumps(found[cell]), flush=True)
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "cost.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


def compared(cell: str, blocks: int) -> dict[str, float]:
    sums, own = [], []
    for cores in ((0, 1), (1, 0)):
        with tempfile.TemporaryDirectory() as scratch:
            files = [Path(scratch) / name for name in ("watched", "bare")]
            processes = [
                started(name, blocks, file, core)
                for name, file, core in zip((cell, "bare"), files, cores, strict=True)
            ]
            codes = [process.wait() for process in processes]
            if codes != [0, 0]:
                raise SystemExit(f"grpo_cost: expected both trainings to end, got {codes}")
            told = [json.loads(file.read_text()) for file in files]
        times = (np.array(one["seconds"][FIRST:]).reshape(blocks, BLOCK) for one in told)
        sums.append([one.sum(1) for one in times])
        own.append(told[0]["overhead"])
    watched, bare = np.concatenate(sums, axis=1)
    every = watched / bare - 1
    return {
        "share": float(watched.sum() / bare.sum() - 1),
        "standard_error": float(every.std(ddof=1) / np.sqrt(len(every))),
        "by_our_meter": float(np.mean(own)),
        "bare_step_seconds": float(bare.mean() / BLOCK),
        "steps": len(every) * BLOCK,
    }


def started(name: str, blocks: int, file: Path, core: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "benchmarks.grpo_cost", "--train", name, "--times", str(file)]
    return subprocess.Popen(
        [*command, "--blocks", str(blocks)],
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
            limit: dict[str, Any] = {} if name.endswith(LIMITED) else {"max_overhead": None}
            attach(trainer, run_dir, preset=name.removesuffix(LIMITED), **limit)
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
