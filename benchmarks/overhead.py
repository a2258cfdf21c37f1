"""What does watching a training run cost, by an outside clock and by our own meter?

A small Llama is trained twice in one process, in alternating blocks of steps, bare and watched by
a Lens, so that a slow minute of the machine slows both. The cost is the median difference of a pair
of blocks against the median bare block, with its standard error; beside it stands what the Lens
reported as ``overhead/fraction``.

    python benchmarks/overhead.py [--quick]
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import entropylens as el

THREADS = 2
BLOCK = 10
SETTLING = 2
"""Pairs of blocks, while the budget settles, that are not counted."""
BATCH, LENGTH, VOCABULARY = 16, 128, 2048


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer blocks, within a minute")
    quick = parser.parse_args().quick
    torch.set_num_threads(THREADS)
    cells = {
        preset: measure(preset, limit, blocks=3 if quick else 30)
        for preset, limit in (("fast", 0.03), ("balanced", 0.03), ("full", None))
    }
    print("\npreset     max_overhead   by the clock   standard error   by our meter   ms a step")
    for preset, cell in cells.items():
        limit = "none" if cell["max_overhead"] is None else f"{cell['max_overhead']:.0%}"
        print(
            f"{preset:<10} {limit:>12}   {cell['overhead']:>12.2%}   {cell['error']:>14.2%}   "
            f"{cell['reported']:>12.2%}   {cell['ms_a_step']:>9.1f}"
        )
    print(json.dumps({"quick": quick, "threads": THREADS, **cells}))


def measure(preset: str, limit: float | None, *, blocks: int) -> dict[str, Any]:
    bare, watched = (Training(seed=0) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        with el.Lens(
            watched.model, watched.optimizer, run_dir=path, preset=preset, max_overhead=limit
        ) as lens:
            watched.lens = lens
            taken: dict[str, list[float]] = {"bare": [], "watched": []}
            pairs = [("bare", bare), ("watched", watched)]
            for block in range(blocks + SETTLING):
                for name, training in pairs if block % 2 else reversed(pairs):
                    lens.restart_clock()
                    seconds = training.run(BLOCK)
                    if block >= SETTLING:
                        taken[name].append(seconds)
        rows = el.open_run(path).metrics("overhead/fraction").to_arrow()
    steps, fractions = rows["step"].to_pylist(), rows["value"].to_pylist()
    settled = [f for step, f in zip(steps, fractions, strict=True) if step > SETTLING * BLOCK]
    usual = statistics.median(taken["bare"])
    differences = [w - b for b, w in zip(taken["bare"], taken["watched"], strict=True)]
    middle = statistics.median(differences)
    spread = 1.4826 * statistics.median(abs(d - middle) for d in differences)
    return {
        "max_overhead": limit,
        "overhead": round(middle / usual, 4),
        "error": round(1.2533 * spread / len(differences) ** 0.5 / usual, 4),
        "reported": round(statistics.mean(settled), 4) if settled else None,
        "ms_a_step": round(1e3 * usual / BLOCK, 1),
    }


class Training:
    """A small Llama on random tokens, the same for both."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=128,
                intermediate_size=352,
                num_hidden_layers=4,
                num_attention_heads=4,
                max_position_embeddings=LENGTH,
            )
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.generator = torch.Generator().manual_seed(seed)
        self.lens: el.Lens | None = None

    def run(self, steps: int) -> float:
        """Train; the seconds it took."""
        began = time.perf_counter()
        for _ in range(steps):
            tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=self.generator)
            self.model(input_ids=tokens, labels=tokens).loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.lens is not None:
                self.lens.step(gradient_norm=norm)
        return time.perf_counter() - began


if __name__ == "__main__":
    main()
