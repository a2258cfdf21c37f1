"""What does watching a training run cost, by an outside clock and by our own meter?

A small Llama is trained twice in one process, in alternating blocks of steps, bare and watched by a
Lens, so that a slow minute of the machine slows both. The difference of the medians of the block
times is the cost; beside it stands what the Lens reported as ``overhead/fraction``.

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
BATCH, LENGTH, VOCABULARY = 16, 128, 2048


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer blocks, within a minute")
    quick = parser.parse_args().quick
    torch.set_num_threads(THREADS)
    cells = {
        preset: measure(preset, limit, blocks=6 if quick else 25)
        for preset, limit in (("fast", 0.03), ("balanced", 0.03), ("full", None))
    }
    print("\npreset     max_overhead   by the clock   by our meter   spread of bare blocks")
    for preset, cell in cells.items():
        limit = "none" if cell["max_overhead"] is None else f"{cell['max_overhead']:.0%}"
        print(
            f"{preset:<10} {limit:>12}   {cell['overhead']:>12.2%}   {cell['reported']:>12.2%}   "
            f"{cell['spread']:>21.2%}"
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
            for block in range(
                blocks + 4
            ):  # the first ones, while the budget settles, are not kept
                for name, training in (("bare", bare), ("watched", watched)):
                    lens.restart_clock()
                    seconds = training.run(BLOCK)
                    if block >= 4:
                        taken[name].append(seconds)
        rows = el.open_run(path).metrics("overhead/fraction").to_arrow()
    settled = [v for s, v in zip(rows["step"].to_pylist(), rows["value"].to_pylist(), strict=True)
               if s > 4 * BLOCK]  # fmt: skip
    without, with_it = (statistics.median(times) for times in taken.values())
    quartiles = statistics.quantiles(taken["bare"], n=4)
    return {
        "max_overhead": limit,
        "overhead": round(with_it / without - 1, 4),
        "reported": round(statistics.mean(settled), 4) if settled else float("nan"),
        "spread": round((quartiles[2] - quartiles[0]) / without, 4),
        "ms_a_step": round(1e3 * without / BLOCK, 1),
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
