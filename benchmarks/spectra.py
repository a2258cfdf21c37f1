"""What does a look at the spectrum of every weight matrix of a language model cost?

A model of SmolLM2-135M's shapes: 30 layers of width 576, 9 heads and 3 of keys and values, feed
forward 1,536 wide, an embedding of 49,152 tokens; 211 matrices, 134 million float32 entries,
Gaussian plus a signal of rank 8. Ours is all that a log gets of a matrix: `singular_values`,
`summarise`, `marchenko_pastur`. Against it, matrix by matrix in turn on one thread, in seconds of
CPU time, so that a busy machine changes little:

- ``ratio_to_svdvals``: time of `torch.linalg.svdvals` in float64, the conversion included, over
  ours; wide matrices are given transposed, which LAPACK is faster with.
  ``ratio_to_svdvals_as_stored``: as they are. ``ratio_to_svdvals_float32``: transposed in float32,
  which does not resolve condition numbers above about 1e5. Above 1 ours is faster; medians of whole
  passes.
- ``ratio_to_weightwatcher``: one ``WeightWatcher(model=model).analyze()`` as it comes, over ours.
  It also fits a power law to every matrix, and gives no condition number. Passes take turns.
- ``worst_relative_error``: of any singular value of any matrix, against svdvals in float64.

    python -m benchmarks.spectra [--layers N] [--repeats N] [--out FILE] [--weightwatcher PYTHON]

PYTHON is the interpreter of an environment of its own that has weightwatcher and torch:

    python -m venv ww
    ww/bin/pip install --no-deps weightwatcher powerlaw scikit-learn joblib threadpoolctl \
        cloudpickle mpmath
    ww/bin/pip install torch pandas matplotlib scipy safetensors tqdm

or, for the last line, a ``.pth`` file in its site-packages with the folder of an environment that
has those. Without it the ratio is null.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from entropylens.diagnostics._spectra import marchenko_pastur, singular_values, summarise

THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
SIGNAL = 8
"""Rank of what is planted in each matrix."""


@dataclass(frozen=True)
class Model:
    """Sizes of a Llama."""

    layers: int = 30
    hidden: int = 576
    keys: int = 192
    inner: int = 1536
    vocabulary: int = 49_152

    def shapes(self) -> Iterable[tuple[str, tuple[int, int]]]:
        """Names and shapes of its matrices."""
        yield "embedding", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            for name, shape in {
                "q": (self.hidden, self.hidden),
                "k": (self.keys, self.hidden),
                "v": (self.keys, self.hidden),
                "o": (self.hidden, self.hidden),
                "gate": (self.inner, self.hidden),
                "up": (self.inner, self.hidden),
                "down": (self.hidden, self.inner),
            }.items():
                yield f"{layer}_{name}", shape


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/spectra.json"))
    parser.add_argument("--weightwatcher", metavar="PYTHON", help="an interpreter that has it")
    parser.add_argument("--watch", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model = Model(layers=asked.layers)
    if asked.watch:
        print(json.dumps(watch(model)))
        return 0
    found = measure(model, asked.repeats)
    found |= against_weightwatcher(model, asked.weightwatcher, asked.repeats)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    return 0


def weights(model: Model) -> dict[str, Tensor]:
    """The same at every call."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        name: 0.02 * (drawn(m, n) + drawn(m, SIGNAL) @ drawn(SIGNAL, n) / 4)
        for name, (m, n) in model.shapes()
    }


def look(matrix: Tensor) -> Tensor:
    """Everything about one matrix."""
    m, n = matrix.shape
    singular = singular_values(matrix)
    summarise(singular, (m, n), matrix.dtype)
    marchenko_pastur(singular, (m, n))
    return singular


def _tall(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT.contiguous()


METHODS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "ours": look,
    "svdvals": lambda matrix: torch.linalg.svdvals(_tall(matrix.double())),
    "svdvals_as_stored": lambda matrix: torch.linalg.svdvals(matrix.double()),
    "svdvals_float32": lambda matrix: torch.linalg.svdvals(_tall(matrix)),
}


def measure(model: Model, repeats: int) -> dict[str, Any]:
    """Passes over the model, each method after the others on every matrix."""
    matrices = weights(model)
    for method in METHODS.values():
        method(matrices["0_q"])
    worst = 0.0
    passes: list[dict[str, float]] = []
    by_shape: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for repeat in range(repeats):
        taken: dict[str, float] = defaultdict(float)
        for matrix in matrices.values():
            found = {}
            for name, method in METHODS.items():
                began = time.process_time()
                found[name] = method(matrix)
                seconds = time.process_time() - began
                taken[name] += seconds
                by_shape[_text(matrix.shape)][name].append(seconds)
            worst = max(worst, float((found["ours"] / found["svdvals"] - 1).abs().max()))
        passes.append(taken)
        print(f"pass {repeat + 1}: {_rounded(taken)}", file=sys.stderr, flush=True)
    counts = Counter(_text(matrix.shape) for matrix in matrices.values())
    return {
        "layers": model.layers,
        "matrices": len(matrices),
        "repeats": repeats,
        "threads": 1,
        "torch": torch.__version__,
        "ratio_to_svdvals": _ratio(passes, "svdvals"),
        "ratio_to_svdvals_as_stored": _ratio(passes, "svdvals_as_stored"),
        "ratio_to_svdvals_float32": _ratio(passes, "svdvals_float32"),
        "worst_relative_error": float(f"{worst:.2g}"),
        "seconds": _rounded({n: statistics.median(p[n] for p in passes) for n in METHODS}),
        "by_shape": {
            shape: {
                "count": counts[shape],
                **_rounded({name: statistics.median(all_) for name, all_ in times.items()}),
            }
            for shape, times in by_shape.items()
        },
    }


def against_weightwatcher(model: Model, python: str | None, repeats: int) -> dict[str, Any]:
    """Whole passes of ours and theirs in turn; theirs in an environment of its own."""
    if python is None:
        return {"ratio_to_weightwatcher": None, "weightwatcher": None}
    matrices = weights(model)
    ratios, theirs = [], []
    command = [python, "-m", "benchmarks.spectra", "--watch", "--layers", str(model.layers)]
    environment = {**os.environ, **THREADS, "PYTHONPATH": str(Path(__file__).parents[1])}
    for _ in range(repeats):
        began = time.process_time()
        for matrix in matrices.values():
            look(matrix)
        ours = time.process_time() - began
        child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        told = json.loads(child.stdout.splitlines()[-1])
        ratios.append(told["seconds"] / ours)
        theirs.append(told["seconds"])
        print(f"weightwatcher: {told}, ours {ours:.2f} s", file=sys.stderr, flush=True)
    return {
        "ratio_to_weightwatcher": round(statistics.median(ratios), 2),
        "weightwatcher": {**told, "seconds": round(statistics.median(theirs), 2)},
    }


def watch(model: Model) -> dict[str, Any]:
    """One analysis by WeightWatcher, in the environment that has it."""
    weightwatcher = import_module("weightwatcher")
    net = nn.Module()
    for name, matrix in weights(model).items():
        layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(matrix, requires_grad=False)
        net.add_module(name, layer)
    watcher = weightwatcher.WeightWatcher(model=net)
    began = time.process_time()
    details = watcher.analyze()
    seconds = time.process_time() - began
    return {
        "seconds": round(seconds, 3),
        "matrices": len(details),
        "version": weightwatcher.__version__,
        "torch": torch.__version__,
    }


def _text(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _ratio(passes: Iterable[Mapping[str, float]], name: str) -> float:
    return round(statistics.median(one[name] / one["ours"] for one in passes), 2)


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.3g}") for name, value in seconds.items()}


if __name__ == "__main__":
    raise SystemExit(main())
