"""The policy that all three runs start from: a small Llama that answers rightly and in many ways.

It learns from right answers drawn at random from all that a puzzle has, so that it is diverse:
there is entropy to lose.
"""

import json
import random
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from datasets import Dataset
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from sample_runs.grpo_countdown.countdown import Puzzle, draw_puzzles, make_tokenizer
from sample_runs.grpo_countdown.evaluation import evaluate
from sample_runs.grpo_countdown.progress import shown

__all__ = ["ON_CPU", "Base", "Size", "held_out", "load_base"]

ON_CPU: Final[dict[str, Any]] = {
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "weight_decay": 0.0,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
"""Settings of both trainers."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the model, its data and the batches are; 1.8 million parameters as it stands."""

    width: int = 192
    """Of the residual stream; a multiple of 12, for there are six heads of even width."""
    layers: int = 4
    """Transformer blocks."""
    held_out: int = 256
    """Puzzles of the evaluation, in no training set."""
    sft_steps: int = 500
    """Optimiser steps of the supervised part; pass@1 is 0.26 after 350 of them, 0.44 after 500."""
    sft_puzzles: int = 20_000
    """Puzzles of the supervised part, each with one right answer."""
    rl_puzzles: int = 4000
    """Puzzles of the reinforcement learning part."""
    batch: int = 128
    """Answers in a step, of both parts."""
    group: int = 16
    """Answers to one puzzle in a step of the reinforcement learning part."""


@dataclass(frozen=True)
class Base:
    """The trained policy and what is known of it."""

    model: Any
    tokenizer: Any
    report: dict[str, Any]
    """Its size, ``evaluation``, ``cpu_seconds`` and ``parameters``."""


def held_out(size: Size) -> list[Puzzle]:
    """The puzzles of the evaluation."""
    return draw_puzzles(size.held_out, seed=2_000_000)


def load_base(folder: Path, size: Size, console: Console) -> Base:
    """The policy as kept in a folder, trained first if it is not there.

    Args:
        folder: Where it is kept.
        size: Of what; a policy of another size is refused.
        console: Where progress is shown.

    Returns:
        The policy.
    """
    if not (folder / "base.json").exists():
        _train(folder, size, console)
    report = json.loads((folder / "base.json").read_text())
    if report["size"] != asdict(size):
        raise SystemExit(
            f"load_base: expected a policy of {asdict(size)} in {folder}, got {report['size']}; "
            f"choose another folder with --base, or delete that one"
        )
    model = LlamaForCausalLM.from_pretrained(folder)
    return Base(model, make_tokenizer(), report)


def _train(folder: Path, size: Size, console: Console) -> None:
    set_seed(0)
    tokenizer = make_tokenizer()
    model = _make_model(size, len(tokenizer), tokenizer)
    puzzles = draw_puzzles(size.sft_puzzles, seed=1, without=held_out(size))
    chosen = random.Random(0)
    rows = [
        {"prompt": puzzle.prompt, "completion": chosen.choice(puzzle.right_answers())}
        for puzzle in puzzles
    ]
    with TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model,
            args=SFTConfig(
                scratch,
                max_steps=size.sft_steps,
                per_device_train_batch_size=size.batch,
                learning_rate=2e-3,
                seed=0,
                **ON_CPU,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        began = time.process_time()
        with shown(trainer, "base policy", ("loss", "mean_token_accuracy"), console):
            trainer.train()
        took = time.process_time() - began
    with console.status("Evaluating the base policy ..."):
        found = evaluate(trainer.model, tokenizer, held_out(size))
    _keep(folder, trainer.model, {
        "size": asdict(size),
        "parameters": model.num_parameters(),
        "cpu_seconds": round(took, 1),
        "evaluation": found,
    })  # fmt: skip


def _make_model(size: Size, vocabulary: int, tokenizer: Any) -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=size.width,
            intermediate_size=size.width * 8 // 3,
            num_hidden_layers=size.layers,
            num_attention_heads=6,
            max_position_embeddings=64,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            tie_word_embeddings=True,
        )
    )


def _keep(folder: Path, model: Any, report: dict[str, Any]) -> None:
    """Whole or not at all: an interrupted training leaves no folder that looks trained."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    (part / "base.json").write_text(json.dumps(report, indent=2) + "\n")
    part.rename(folder)
