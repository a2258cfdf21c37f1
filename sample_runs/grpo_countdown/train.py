"""Reinforcement learning that loses its entropy, that destroys its policy, and that does neither.

A small Llama learns countdown puzzles with TRL's GRPO, on a CPU, watched by entropylens:

- *collapse*: a learning rate of 3e-4. Reward rises, entropy and diversity go.
- *destroyed*: a learning rate of 2e-3. The policy is gone within fifty steps or so.
- *adaptive*: as collapse, with TRL's adaptive entropy bonus, which keeps entropy and diversity.
- *small*: a learning rate of 1e-5, at which first order should be all that there is.

    python sample_runs/grpo_countdown/train.py --run collapse [--steps N] [--out DIR]

The log is in ``out/grpo_countdown/RUN``, and ``evaluation.json`` in it. A run that is finished is
not trained again. The base policy is trained once and kept in ``out/grpo_countdown/base``.
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from rich.console import Console
from rich.table import Table

import entropylens as el

try:
    import datasets
    import torch
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    from entropylens_callbacks.transformers import attach
    from entropylens_callbacks.trl import RolloutOptions
    from sample_runs.grpo_countdown.base import ON_CPU, Base, Size, held_out, load_base
    from sample_runs.grpo_countdown.countdown import LONGEST_ANSWER, draw_puzzles, reward
    from sample_runs.grpo_countdown.evaluation import evaluate
    from sample_runs.grpo_countdown.progress import shown
except ModuleNotFoundError as error:
    raise SystemExit(
        f"train.py: expected entropylens, trl and reasoning-gym to be installed, got {error}; "
        f"pip install -e '.[hf]' trl reasoning-gym"
    ) from None

FOLDER: Final = Path("out/grpo_countdown")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What differs between the runs."""

    learning_rate: float
    """Of AdamW, constant after five steps."""
    steps: int
    """Optimiser steps."""
    entropy_target: float | None = None
    """Nats per token, below which TRL's entropy bonus grows; None is no bonus."""


RECIPES: Final = {
    "collapse": Recipe(learning_rate=3e-4, steps=400),
    "destroyed": Recipe(learning_rate=2e-3, steps=100),
    "adaptive": Recipe(learning_rate=3e-4, steps=200, entropy_target=0.35),
    "small": Recipe(learning_rate=1e-5, steps=60),
}


def main(arguments: Sequence[str] | None = None, size: Size | None = None) -> int:
    """Train what is asked for, unless it is there, and say how it went."""
    asked = _parser().parse_args(arguments)
    size, console = size or Size(), Console(highlight=False)
    torch.set_num_threads(asked.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if asked.run == "base":
        report = load_base(asked.base, size, console).report
        _show({"base": report["evaluation"]}, console)
        console.print(f"Training took {report['cpu_seconds']:.0f} CPU seconds; see {asked.base}.")
        return 0
    recipe = RECIPES[asked.run]
    recipe = replace(recipe, steps=asked.steps or recipe.steps)
    settings = {
        "run": asked.run,
        "seed": asked.seed,
        "preset": asked.preset,
        **asdict(recipe),
        "size": asdict(size),
    }
    out = asked.out or FOLDER / (asked.run if not asked.seed else f"{asked.run}-seed-{asked.seed}")
    if _is_finished(out, settings):
        console.print(f"{out} is finished; delete it to train again.")
    else:
        _train(out, settings, recipe, load_base(asked.base, size, console), console)
    _conclude(out, console)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", required=True, choices=("base", *RECIPES), help="base: the base policy alone"
    )
    parser.add_argument("--steps", type=int, help="of the optimiser; by default the run's own")
    parser.add_argument("--out", type=Path, help=f"the run's log; by default {FOLDER}/RUN")
    parser.add_argument("--base", type=Path, default=FOLDER / "base", help="the base policy")
    parser.add_argument("--preset", default="balanced", help="how much is measured")
    parser.add_argument("--seed", type=int, default=0, help="of the reinforcement learning")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    return parser


def _is_finished(out: Path, settings: dict[str, Any]) -> bool:
    """Whether a run with these settings is there; what is left of one that broke off is deleted."""
    if not out.exists():
        return False
    try:
        run = el.open_run(out)
    except el.EntropyLensError:
        run = None
    ours = run is not None and run.config.get("user", {}).get("grpo_countdown") == settings
    if run is None or not ours or run.state() in ("running", "stalled"):
        raise SystemExit(
            f"train.py: expected {out} to be free or a run with the same settings that has ended, "
            f"got something else; choose another folder with --out"
        )
    if (out / "evaluation.json").exists():
        return True
    shutil.rmtree(out)
    return False


def _train(
    out: Path, settings: dict[str, Any], recipe: Recipe, base: Base, console: Console
) -> None:
    size = Size(**settings["size"])
    with TemporaryDirectory() as scratch:
        trainer = make_trainer(scratch, settings["seed"], recipe, base, size)
        config = {**trainer.args.to_sanitized_dict(), "grpo_countdown": settings}
        del config["output_dir"]
        attach(
            trainer,
            out,
            preset=settings["preset"],
            # A run to study: every update is asked what it did to the entropy, whatever it costs.
            diagnostics={"entropy_change": 1},
            max_overhead=None,
            rollouts=RolloutOptions(record_text=True),
            config=config,
        )
        began, began_cpu = time.monotonic(), time.process_time()
        with shown(trainer, settings["run"], ("reward", "entropy"), console):
            trainer.train()
        took = {
            "seconds": round(time.monotonic() - began, 1),
            "cpu_seconds": round(time.process_time() - began_cpu, 1),
        }
    with console.status("Evaluating ..."):
        after = evaluate(trainer.model, base.tokenizer, held_out(size))
    found = {**settings, **took, "before": base.report["evaluation"], "after": after}
    (out / "evaluation.json").write_text(json.dumps(found, indent=2) + "\n")


def make_trainer(scratch: str, seed: int, recipe: Recipe, base: Base, size: Size) -> Any:
    """TRL's GRPO trainer of a recipe, from the base policy, with its output in ``scratch``."""
    puzzles = draw_puzzles(size.rl_puzzles, seed=1_000_000, without=held_out(size))
    rows = [
        {"prompt": puzzle.prompt, "numbers": puzzle.numbers, "target": puzzle.target}
        for puzzle in puzzles
    ]
    bonus: dict[str, Any] = {}
    if recipe.entropy_target is not None:
        bonus = {"use_adaptive_entropy": True, "entropy_target": recipe.entropy_target}
    return GRPOTrainer(
        base.model,
        reward_funcs=reward,
        args=GRPOConfig(
            scratch,
            max_steps=recipe.steps,
            per_device_train_batch_size=size.batch,
            num_generations=size.group,
            max_completion_length=LONGEST_ANSWER,
            learning_rate=recipe.learning_rate,
            loss_type="grpo",
            temperature=1.0,
            beta=0.0,
            seed=seed,
            **bonus,
            **ON_CPU,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=base.tokenizer,
    )


def _conclude(out: Path, console: Console) -> None:
    found = json.loads((out / "evaluation.json").read_text())
    _show({"before": found["before"], "after": found["after"]}, console)
    console.print(
        f"{found['steps']} steps took {found['cpu_seconds']:.0f} CPU seconds, "
        f"{found['seconds']:.0f} seconds on the clock."
    )
    console.print(f"\nThe log is {out}, the figures are in {out / 'evaluation.json'}.")
    console.print(f"  in the terminal:   entropylens show {out}", soft_wrap=True)
    console.print(f"  in the dashboard:  entropylens dashboard {out.parent}", soft_wrap=True)


def _show(evaluations: dict[str, dict[str, Any]], console: Console) -> None:
    first = next(iter(evaluations.values()))
    samples = first["samples"]
    console.print(
        f"\nOn {first['puzzles']} puzzles that were held out, with {samples} answers to each "
        f"(± the standard error over puzzles):"
    )
    table = Table("", *evaluations, box=None)
    for name, says in {
        "greedy": "right, greedily",
        "pass@1": "right, sampled (pass@1)",
        f"pass@{samples}": f"any of {samples} right (pass@{samples})",
        "distinct": f"different answers of {samples}",
        "distinct_right": f"different right answers of {samples}",
    }.items():
        cells = [f"{e[name]:.3f} ± {e['standard_error'][name]:.3f}" for e in evaluations.values()]
        table.add_row(says, *cells)
    console.print(table)


if __name__ == "__main__":
    raise SystemExit(main())
