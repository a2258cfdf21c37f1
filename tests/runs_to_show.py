"""Runs for the dashboard's tests, written by the writer that trainings use."""

from typing import Any

import numpy as np

from entropylens.store.writer import RunWriter


def write(writer: RunWriter, name: str, steps: Any, values: Any, **more: Any) -> None:
    columns = {"step": steps, "name": name, "module": "", "value": values, "phase": "train"}
    writer.write("metrics", {**columns, "weight": 64.0, "time": 1.7e9 + np.asarray(steps), **more})


def fill(writer: RunWriter, first: int, last: int, seed: int = 0) -> None:
    """Steps of a training that goes well, from the first to the last."""
    rng = np.random.default_rng([seed, first])
    steps = np.arange(first, last + 1)
    noise = rng.normal(0, 0.02, len(steps))
    entropy = 0.5 + 2 * np.exp(-steps / 300) + noise
    write(writer, "loss/mean", steps, 1.5 + 2 * np.exp(-steps / 200) + noise)
    write(writer, "entropy/token/mean", steps, entropy)
    for level, offset in (("p05", -0.3), ("p25", -0.1), ("p50", 0.0), ("p75", 0.1), ("p95", 0.4)):
        write(writer, f"entropy/token/{level}", steps, entropy + offset)
    write(writer, "gradient/norm/before_clip", steps, np.exp(rng.normal(0, 0.2, len(steps))))
    write(writer, "learning_rate", steps, 1e-3 * np.ones(len(steps)))
    write(writer, "throughput/tokens_per_second", steps, 1e4 + 100 * noise)
    write(writer, "tokens/seen", steps, 64.0 * steps)
    write(writer, "overhead/fraction", steps, 0.02 + noise / 10)
    writer.step = last
