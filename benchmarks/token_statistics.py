"""What do all seven token statistics cost, in plain reads of the logits?

A read is ``logits.sum()`` on the same threads. Memory is the peak of the process beyond the logits,
measured by the kernel's own high-water mark after a warm-up. TRL's ``entropy_from_logits``, which
computes one of the seven, runs beside it where it is installed.

    python benchmarks/token_statistics.py [--quick]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = 2
# One arena, and every large block mapped on its own, so that what is freed leaves the process.
FIXED = {
    "OMP_NUM_THREADS": str(THREADS),
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
VOCABULARIES = (50_257, 151_936)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer logits, within a minute")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = 1 << (26 if options.quick else 28)
    grid = [(v, dtype) for v in VOCABULARIES for dtype in ("float32", "bfloat16")]
    if options.memory:
        print(json.dumps([measure_memory(*cell, logits=size) for cell in grid]))
        return
    # Timed with the allocator as people have it; memory apart, with one that keeps nothing back.
    child = subprocess.run(
        [sys.executable, *sys.argv, "--memory"],
        env={**os.environ, **FIXED},
        stdout=subprocess.PIPE,
        check=True,
    )
    extra = json.loads(child.stdout.splitlines()[-1])
    cells = [
        measure(*cell, extra[at], logits=size, repeats=3 + 4 * (not options.quick))
        for at, cell in enumerate(grid)
    ]
    print("\nlogits             path        reads   ms       extra MiB   / TRL entropy alone")
    for cell in cells:
        for path in ("compiled", "row blocks"):
            row = cell[path]
            print(
                f"{cell['vocabulary']:>7} {cell['dtype']:<9}  {path:<10} {row['reads']:6.1f}"
                f"   {row['ms']:8.1f}  {row['extra_mib']:8.1f}   {cell_text(row['to_trl'])}"
            )
    judged = [cell["compiled"] for cell in cells if cell["dtype"] == "float32"]
    ratios = [row["to_trl"] for row in judged if row["to_trl"] is not None]
    figures = {
        "ratio_to_read": round(max(row["reads"] for row in judged), 2),
        "extra_mib": round(max(row["extra_mib"] for row in judged), 1),
        "ratio_to_trl": round(max(ratios), 2) if ratios else None,
        "quick": options.quick,
        "threads": THREADS,
        "cells": cells,
    }
    print(json.dumps(figures))


def cell_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


Jobs = dict[str, tuple[Callable[[], Any], float]]


def jobs_of(vocabulary: int, dtype: str, logits: int) -> Jobs:
    """What is run, and the factor from what it reads to all logits."""
    import torch

    from entropylens.diagnostics.token_statistics import token_statistics

    torch.set_num_threads(THREADS)
    rows = logits // vocabulary
    generator = torch.Generator().manual_seed(0)
    values = torch.empty(rows, vocabulary, dtype=getattr(torch, dtype))
    for block in values.split(64):
        block.copy_(3 * torch.randn(block.shape, generator=generator))
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    few = max(rows // 8, 1)

    def run(compiled: bool, count: int) -> Callable[[], Any]:
        return lambda: token_statistics(values[:count], targets[:count], compiled=compiled)

    jobs: Jobs = {
        "read": (lambda: values.sum(), 1.0),
        "compiled": (run(True, rows), 1.0),
        "row blocks": (run(False, few), rows / few),
    }
    try:
        from trl.trainer.utils import entropy_from_logits

        jobs["trl"] = (lambda: entropy_from_logits(values[:few]), rows / few)
    except ImportError:
        pass
    return jobs


def measure_memory(vocabulary: int, dtype: str, *, logits: int) -> dict[str, float]:
    return {name: extra_mib(job) for name, (job, _) in jobs_of(vocabulary, dtype, logits).items()}


def measure(
    vocabulary: int, dtype: str, extra: dict[str, float], *, logits: int, repeats: int
) -> dict[str, Any]:
    jobs = jobs_of(vocabulary, dtype, logits)
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(repeats + 1):  # interleaved: a slow minute of the machine slows all alike
        for name, (job, factor) in jobs.items():
            began = time.perf_counter()
            job()
            if repeat:
                taken[name].append((time.perf_counter() - began) * factor)
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    print(f"{vocabulary} {dtype}: a read takes {1e3 * seconds['read']:.1f} ms", flush=True)
    paths = {
        name: {
            "reads": round(seconds[name] / seconds["read"], 2),
            "ms": round(1e3 * seconds[name], 2),
            "extra_mib": round(extra[name], 1),
            "to_trl": round(seconds[name] / seconds["trl"], 3) if "trl" in seconds else None,
        }
        for name in ("compiled", "row blocks")
    }
    return {"vocabulary": vocabulary, "dtype": dtype, "rows": logits // vocabulary, **paths}


def extra_mib(job: Callable[[], Any]) -> float:
    """Peak resident memory of a second call beyond what was resident before it."""
    job()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    job()
    return (status("VmHWM") - before) / 1024


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise LookupError(field)


if __name__ == "__main__":
    main()
