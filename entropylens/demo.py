"""The demo: train a small Llama on Python's own source, let the learning rate spike, and watch."""

from __future__ import annotations

import shutil
import sysconfig
import tempfile
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from textwrap import fill
from typing import Any, Final

from entropylens.errors import EntropyLensError

__all__ = ["run_demo"]

STEPS: Final = 400
BATCH: Final = 16
LENGTH: Final = 128
VOCABULARY: Final = 2048
LEARNING_RATE: Final = 2e-3
SPIKE: Final = 30.0
SPIKE_STEPS: Final = 8
CORPUS_FILES: Final = 120


def run_demo(
    out: Path = Path("runs/demo"), *, steps: int | None = None, quiet: bool = False
) -> int:
    """Train, watch, and write the report.

    Args:
        out: The run directory; an earlier demo's is replaced, any other run is left alone.
        steps: Optimiser steps; 400 by default, one to two minutes on two cores.
        quiet: Print nothing.

    Returns:
        The process's exit status, 0.

    Raises:
        EntropyLensError: A package is missing, or ``out`` holds a run that is not a demo's.
    """
    try:
        import torch
        import transformers
    except ModuleNotFoundError as error:
        raise EntropyLensError(
            f"demo: expected torch and transformers to be installed, got {error}; "
            f"pip install 'entropylens[hf]'"
        ) from None
    from rich.console import Console

    steps = STEPS if steps is None else steps
    if steps < 20:
        raise ValueError(f"demo: expected at least 20 steps, got {steps}")
    _clear(out)
    console = Console(quiet=quiet, highlight=False)
    console.print(f"Training a small Llama on Python's standard library for {steps} steps.")
    console.print(f"The learning rate jumps {SPIKE:g}-fold after {_spike_start(steps)} steps.\n")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        _train(out, steps, Path(scratch), console)
    _conclude(out, console)
    return 0


def _clear(out: Path) -> None:
    from entropylens.store.reader import open_run

    if not out.exists():
        return
    run = open_run(out) if (out / "run.json").exists() else None
    ours = run is not None and run.config.get("user", {}).get("demo")
    if run is None or not ours or run.state() in ("running", "stalled"):
        raise EntropyLensError(
            f"demo: expected {out} to be free or an earlier demo's that has ended, got something "
            f"else; "
            f"choose another folder with --out"
        )
    shutil.rmtree(out)


def _spike_start(steps: int) -> int:
    return steps // 2


def _train(out: Path, steps: int, scratch: Path, console: Any) -> None:
    from torch.optim import AdamW
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PrinterCallback,
        Trainer,
        TrainingArguments,
    )

    from entropylens_callbacks.transformers import attach

    with console.status("Learning a vocabulary ..."):
        tokenizer, samples = _corpus()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
        )
    )
    spike = range(_spike_start(steps), _spike_start(steps) + SPIKE_STEPS)
    warm_up = max(steps // 20, 1)

    def rate(step: int) -> float:
        base = min((step + 1) / warm_up, 1.0) * (1.0 - 0.9 * step / steps)
        return base * (SPIKE if step in spike else 1.0)

    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    trainer = Trainer(
        model,
        args=TrainingArguments(
            str(scratch),
            use_cpu=True,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            report_to="none",
            save_strategy="no",
            logging_steps=10,
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=samples,
        processing_class=tokenizer,
        optimizers=(optimizer, LambdaLR(optimizer, rate)),
    )
    trainer.remove_callback(PrinterCallback)
    attach(
        trainer,
        out,
        sample_id="source",
        diagnostics={"token_table": 2, "update_norm": 10},
        config={"demo": True, "spike": list(spike)},
    )
    with _progress(console, steps) as callback:
        trainer.add_callback(callback)
        trainer.train()


def _corpus() -> tuple[Any, list[dict[str, Any]]]:
    """A byte-pair tokenizer and windows of tokens, each with the file and line it starts at."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = Path(sysconfig.get_paths()["stdlib"])
    # Those with an underscore hold the machine's own paths.
    files = [file for file in sorted(folder.glob("*.py")) if not file.name.startswith("_")]
    files = files[:CORPUS_FILES]
    texts = {file.name: file.read_text(encoding="utf-8", errors="replace") for file in files}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, show_progress=False, special_tokens=["<pad>"]
    )
    tokenizer.train_from_iterator(texts.values(), trainer)
    samples = []
    for name, text in texts.items():
        encoded = tokenizer.encode(text)
        tokens, offsets = encoded.ids, encoded.offsets
        line_ends = [at for at, character in enumerate(text) if character == "\n"]
        for start in range(0, len(tokens) - LENGTH, LENGTH):
            window = tokens[start : start + LENGTH]
            line = bisect_left(line_ends, offsets[start][0]) + 1
            samples.append({"input_ids": window, "labels": window, "source": f"{name}:{line}"})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>"), samples


def _progress(console: Any, steps: int) -> Any:
    from contextlib import contextmanager

    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )
    from transformers import TrainerCallback

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]}"),
    )

    @contextmanager
    def shown() -> Iterator[TrainerCallback]:
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=steps, loss="...")

            class Shown(TrainerCallback):  # type: ignore[misc]
                def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                    bar.update(task, completed=state.global_step)

                def on_log(
                    self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
                ) -> None:
                    if "loss" in (logs or {}):
                        bar.update(task, loss=f"{float(logs['loss']):.2f}")

            yield Shown()

    return shown()


def _conclude(out: Path, console: Any) -> None:
    from entropylens.analysis.overview import read_overview, sentences
    from entropylens.analysis.report import write_report
    from entropylens.store.reader import open_run

    run = open_run(out)
    console.print("\nWhat happened:")
    for sentence in sentences(read_overview(run)):
        text = fill(sentence, console.width, initial_indent="  - ", subsequent_indent="    ")
        console.print(text, markup=False)
    report = write_report(run, out / "report.html")
    console.print(f"\nThe log is {out}, the report {report}.")
    console.print(f"  in a browser:      open {report}", soft_wrap=True)
    console.print(f"  in the dashboard:  entropylens dashboard {out.parent}", soft_wrap=True)
    console.print(f"  in the terminal:   entropylens show {out}", soft_wrap=True)
    console.print(f"  as numbers:        entropylens get {out} 'entropy/token/*'", soft_wrap=True)
