"""What does bounding the steps cost, as a share of a training step?

Five models on random data, one thread, AdamW, no clipping. Of each:

- *ordinary*: the default policy in enforce mode while nothing is suspicious. One training goes on
  bounded and, in turn, with our hooks set aside, in blocks of a whole number of periods of the
  update's measurement (every 8 steps), so that its copy is in. The median difference of a pair of
  blocks over the median bare block, with a 95 % interval, by the process's time on a processor and
  by the wall clock. Pairs go on until the first interval is narrower than a point to either side,
  and there are 200 or 20 seconds of them, or until ``--seconds`` are over. Looks in these
  steps are counted: there should be none.
- *attributed*: the same, timed by a clock around each entry into our code, for four policies. What
  torch spends on calling hooks is not in it, what timing an empty call takes is.
- *look*: what asking the model once takes, in steps: by forward-mode differentiation and by a
  central finite difference, for an eighth, a quarter and all of the batch's rows at the default
  number of states, and for all rows at all states.

    python -m benchmarks.step_bound [--models NAME ...] [--seconds N] [--out FILE] [--report]

Raw figures of each model are kept in ``out/step_bound/<model>.json``; ``--report`` makes tables and
the results' file of what is there. An idle machine; the whole takes about half an hour.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn

from entropylens.capture import probe
from entropylens.capture.asking import Asked, asked
from entropylens.capture.call import Call
from entropylens.capture.forward import Hook
from entropylens.capture.probe import Batch, few_states
from entropylens.capture.tokens import Grid
from entropylens.control import StepBound, StepGuard

KEPT: Final = Path("out/step_bound")
RESULTS: Final = Path("benchmarks/results/step_bound.json")
METHODS: Final = ("combined", "update_norm", "radius", "linearised_search")
LIMIT: Final = 0.03
"""Share of a step's time that the default may take in an ordinary run."""
WIDTH: Final = 0.01
"""Half of the interval, in steps, at which there are enough pairs."""
PAIRS: Final = 200
BUDGETS: Final[Mapping[str, float]] = {"eighth": 1 / 8, "quarter": 1 / 4, "all": 1.0}
"""Shares of a batch's rows that are looked at."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--seconds", type=float, default=240.0, help="of pairs, for each model")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="of what is kept")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    KEPT.mkdir(parents=True, exist_ok=True)
    for name in () if wanted.report else wanted.models:
        print(f"{name} ...", file=sys.stderr, flush=True)
        found = measure(Training(MODELS[name]), wanted.seconds)
        (KEPT / f"{name}.json").write_text(json.dumps(found) + "\n")
    kept = {name: KEPT / f"{name}.json" for name in MODELS}
    raw = {name: json.loads(file.read_text()) for name, file in kept.items() if file.exists()}
    found = figures(raw)
    wanted.out.parent.mkdir(parents=True, exist_ok=True)
    wanted.out.write_text(json.dumps(found, indent=1) + "\n")
    for table in tables(found):
        Console(width=max(Console().width, 150)).print(table)
    return 0


# -- trainings ---------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal, and an MLP, each on a residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        split = self.project(self.before_attention(x)).view(batch, tokens, 3, self.heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.join(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.narrow(F.gelu(self.widen(self.before_mlp(x))))


class Characters(nn.Module):
    """A language model of 96 characters, of the shape of GPT-2."""

    def __init__(self, width: int, layers: int, length: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Attention(width, width // 32) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 96)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(x) + self.position)))


def perceptron() -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    return model, [*torch.randn(16, 64, 784)], [*torch.randint(0, 10, (16, 64))]


def convolution() -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    def layer(before: int, after: int) -> list[nn.Module]:
        convolved = nn.Conv2d(before, after, 3, padding=1)
        return [convolved, nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]

    model = nn.Sequential(
        *layer(1, 32), *layer(32, 64), nn.Flatten(),
        nn.Linear(3136, 312), nn.ReLU(), nn.Linear(312, 10),
    )  # fmt: skip
    return model, [*torch.randn(16, 64, 1, 28, 28)], [*torch.randint(0, 10, (16, 64))]


def characters(width: int, layers: int) -> Callable[[], Any]:
    def make() -> tuple[nn.Module, list[Tensor], list[Tensor]]:
        texts = torch.randint(0, 96, (16, 16, 65))
        return Characters(width, layers), [*texts[..., :-1]], [*texts[..., 1:]]

    return make


def llama() -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1376, num_hidden_layers=7,
        num_attention_heads=8, max_position_embeddings=128,
    )  # fmt: skip
    texts = torch.randint(0, 8192, (4, 8, 128))
    return LlamaForCausalLM(config), [*texts], [*texts[..., 1:]]


MODELS: Final[Mapping[str, Callable[[], Any]]] = {
    "perceptron-1e5": perceptron,
    "convolution-1e6": convolution,
    "characters-1e6": characters(128, 5),
    "characters-1e7": characters(320, 8),
    "llama-3e7": llama,
}


class Training:
    """A model, its data and its loop, bounded or not.

    Args:
        make: Gives a model, and inputs and classes of a few batches.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        torch.manual_seed(0)
        self.model, self.inputs, self.targets = make()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.guard: StepGuard | None = None
        self.period = 1
        """Steps after which what a bound does repeats itself."""
        self._steps = count()

    def bound(self, policy: str, state: Mapping[str, Any] | None = None) -> StepGuard:
        """Bound it from now on; past a policy's first steps unless they are in the state."""
        bound = StepBound(policy=policy, mode="enforce")
        self.guard = StepGuard(self.model, self.optimizer, bound, state=state)
        self.period = bound.every if policy == "combined" else 1
        first = -(-(bound.warmup + 1) // bound.every) * bound.every
        self.run(first if state is None else 1)
        return self.guard

    def unbound(self) -> None:
        """Let go of the guard."""
        if self.guard is not None:
            self.guard.close()
        self.guard = None

    def run(self, steps: int) -> tuple[float, float]:
        """Train; seconds on a processor, and by the clock."""
        began = time.process_time(), time.perf_counter()
        for _ in range(steps):
            at = next(self._steps) % len(self.inputs)
            targets = self.targets[at]
            output: Any = self.model(self.inputs[at])
            logits = output if isinstance(output, Tensor) else output.logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
            loss.backward()
            if self.guard is not None:
                self.guard.observe(targets=targets, loss=loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return time.process_time() - began[0], time.perf_counter() - began[1]


# -- a model -----------------------------------------------------------------------------------


def measure(training: Training, seconds: float) -> dict[str, Any]:
    """All figures of one model.

    Args:
        training: Not bounded.
        seconds: At most, of pairs.
    """
    training.run(3)
    usual = statistics.median(training.run(1)[1] for _ in range(5))
    ordinary, state = pairs(training, usual, seconds)
    return {
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "ordinary": ordinary,
        "methods": {policy: attributed(training, policy, state, seconds) for policy in METHODS},
        "look": looks(training, seconds),
    }


def pairs(
    training: Training, usual: float, seconds: float
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Blocks of steps of one training, bounded and with every hook of ours set aside.

    One training and not two alike: where their tensors lie in memory alone makes a per cent.

    Returns:
        The figures, and the guard's state.
    """
    guard = training.bound("combined")
    before, interventions = guard.looks, guard.interventions
    block = training.period * max(round(0.02 / usual / training.period), 1)
    taken: dict[str, list[tuple[float, float]]] = {"bare": [], "bounded": []}
    began = time.perf_counter()
    for number in count():
        for name in ("bare", "bounded") if number % 2 else ("bounded", "bare"):
            if name == "bounded":
                taken[name].append(training.run(block))
                continue
            with set_aside(training):
                taken[name].append(training.run(block))
        spent = time.perf_counter() - began
        if spent > seconds or (number >= 7 and is_enough(taken, spent)):
            break
    training.unbound()
    found = {
        **{f"{name}_seconds": times for name, times in taken.items()},
        "block": block,
        "looks": guard.looks - before,
        "interventions": guard.interventions - interventions,
    }
    return found, guard.state_dict()


def is_enough(taken: Mapping[str, Sequence[tuple[float, float]]], spent: float) -> bool:
    """Whether an interval is narrow, and of 200 pairs or 20 seconds."""
    by_processor = [[one[0] for one in taken[name]] for name in ("bare", "bounded")]
    return (len(by_processor[0]) >= PAIRS or spent >= 20) and share(*by_processor)[1] < WIDTH


def share(bare: Sequence[float], bounded: Sequence[float]) -> tuple[float, float]:
    """Median difference of pairs over the median bare block, and half of its 95 % interval."""
    usual = statistics.median(bare)
    differences = [with_us - without for without, with_us in zip(bare, bounded, strict=True)]
    middle = statistics.median(differences)
    spread = 1.4826 * statistics.median(abs(one - middle) for one in differences)
    error = 1.2533 * spread / len(differences) ** 0.5
    return middle / usual, 1.96 * error / usual


@contextmanager
def set_aside(training: Training) -> Iterator[None]:
    """Train without the guard: no call of it, no hook."""
    guard, training.guard = training.guard, None
    assert guard is not None
    tables: list[Any] = [
        training.model._forward_hooks,
        training.optimizer._optimizer_step_pre_hooks,
        training.optimizer._optimizer_step_post_hooks,
    ]
    kept = [dict(table) for table in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        training.guard = guard
        # Batch norm has moved on without it.
        guard._statistics.keep()
        for table, hooks in zip(tables, kept, strict=True):
            table.update(hooks)


def attributed(
    training: Training, policy: str, state: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """Time within our code, and in all else, of each of a few periods of steps."""
    with Timer() as timer:
        guard = training.bound(policy, state)
        before = guard.looks
        ours: list[float] = []
        others: list[float] = []
        began = time.perf_counter()
        while len(ours) < 3 or time.perf_counter() - began < min(seconds / 24, 5.0):
            timer.reset()
            whole, _ = training.run(training.period)
            ours.append(timer.seconds / training.period)
            others.append((whole - timer.raw_seconds) / training.period)
        training.unbound()
    return {
        "ours_seconds": ours,
        "other_seconds": others,
        "looks": guard.looks - before,
        "steps": len(ours) * training.period,
    }


class Timer:
    """Times every entry into our code from outside of it; nested ones count once.

    Hooks are timed of the guards that are made while it is active.
    """

    def __init__(self) -> None:
        self.raw_seconds, self._calls, self._is_inside = 0.0, 0, False
        entries = [(Hook, "__call__"), (StepGuard, "observe"), (StepGuard, "_before_step"),
                   (StepGuard, "_after_step")]  # fmt: skip
        self._own = [(kind, name, getattr(kind, name)) for kind, name in entries]
        empty = self.around(lambda: None)
        for _ in range(1000):
            empty()
        self._empty = self.raw_seconds / self._calls
        self.reset()

    @property
    def seconds(self) -> float:
        """On a processor since `reset`, without what timing an empty call takes."""
        return self.raw_seconds - self._calls * self._empty

    def reset(self) -> None:
        """Begin anew."""
        self.raw_seconds, self._calls = 0.0, 0

    def __enter__(self) -> "Timer":
        for kind, name, function in self._own:
            setattr(kind, name, self.around(function))
        return self

    def __exit__(self, *_: Any) -> None:
        for kind, name, function in self._own:
            setattr(kind, name, function)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._is_inside:
                return function(*args, **kwargs)
            self._is_inside, began = True, time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.raw_seconds += time.process_time() - began
                self._calls += 1
                self._is_inside = False

        return timed


# -- one look ----------------------------------------------------------------------------------


def looks(training: Training, seconds: float) -> dict[str, Any]:
    """Seconds of single looks, by method and budget, and of bare steps between them."""
    inputs, targets = training.inputs[0], training.targets[0]
    parameters = dict(training.model.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    training.run(1)
    update = {name: p.detach() - before[name] for name, p in parameters.items()}
    model = asked(training.model)
    found: dict[str, Any] = {"bare": []}
    began, repeats = time.perf_counter(), 0
    while repeats < 2 or (repeats < 15 and time.perf_counter() - began < seconds / 4):
        found["bare"].append(training.run(1)[0])
        for method in ("forward_mode", "finite_difference"):
            for budget in (*BUDGETS, "all_states"):
                model.is_exact = method == "forward_mode"
                batch = rows_of(training.model, inputs, targets, BUDGETS.get(budget, 1.0))
                took = time.process_time()
                look(model, batch, before, update, whole=budget == "all_states")
                took = time.process_time() - took
                is_meant = model.is_exact == (method == "forward_mode")
                found.setdefault(method, {}).setdefault(budget, []).append(
                    took if is_meant else None
                )
        repeats += 1
    return found


def rows_of(model: nn.Module, inputs: Tensor, targets: Tensor, part: float) -> Batch:
    """The first rows of a batch, and the classes of all their places."""
    rows = max(round(len(inputs) * part), 1)
    flat = targets[:rows].reshape(rows, -1)
    given = inputs[:rows]
    takes_names = hasattr(model, "get_output_embeddings")
    call = (
        Call(module=model, kwargs={"input_ids": given})
        if takes_names
        else Call(module=model, args=(given,))
    )
    return Batch(call=call, grid=Grid(targets=flat, present=torch.ones_like(flat).bool()))


def look(
    model: Asked,
    batch: Batch,
    before: Mapping[str, Tensor],
    update: Mapping[str, Tensor],
    *,
    whole: bool = False,
) -> tuple[Tensor, Tensor]:
    """Logits and their derivative along an update: at the usual few states, or at all of them."""
    limit, most = model.limit, batch.grid.present.numel()
    model.limit = most if whole else limit
    try:
        with patch.object(probe, "SEQUENCES", most), patch.object(probe, "TOKENS", 1 << 30):
            states = few_states(model, batch, torch.Generator().manual_seed(0))
    finally:
        model.limit = limit
    assert states is not None
    with torch.no_grad(), model.as_trained():
        return model.derivative(before, update, states.call, states.places)


# -- figures -----------------------------------------------------------------------------------


def figures(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What the raw figures of all models come to.

    Args:
        raw: By model, as `measure` gives them.

    Returns:
        ``mean_cost_share``, of the model with the largest, ``mean_cost_share_by_model``, ``limit``,
        and ``models``.
    """
    models = {name: figures_of(found) for name, found in raw.items()}
    shares = {name: found["ordinary"]["share"] for name, found in models.items()}
    return {
        "mean_cost_share": max(shares.values(), default=None),
        "mean_cost_share_by_model": shares,
        "limit": LIMIT,
        "threads": 1,
        "models": models,
    }


def figures_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What one model's raw figures come to."""
    ordinary, look_times = raw["ordinary"], raw["look"]
    times = [ordinary["bare_seconds"], ordinary["bounded_seconds"]]
    by_processor, by_clock = (
        share(*([one[at] for one in some] for some in times)) for at in (0, 1)
    )
    bare = statistics.median(one[0] for one in times[0]) / ordinary["block"]
    step = statistics.median(look_times["bare"])
    return {
        "parameters": raw["parameters"],
        "ms_a_step": _rounded(1e3 * bare),
        "ordinary": {
            "share": _rounded(by_processor[0]),
            "interval": _rounded(by_processor[1]),
            "by_clock": _rounded(by_clock[0]),
            "by_clock_interval": _rounded(by_clock[1]),
            "microseconds_a_step": _rounded(1e6 * by_processor[0] * bare),
            "pairs": len(times[0]),
            "steps": len(times[0]) * ordinary["block"],
            "looks": ordinary["looks"],
            "interventions": ordinary["interventions"],
        },
        "methods": {
            name: {
                "share": _rounded(
                    statistics.median(one["ours_seconds"]) / statistics.median(one["other_seconds"])
                ),
                "looks_a_step": _rounded(one["looks"] / one["steps"]),
            }
            for name, one in raw["methods"].items()
        },
        "look": {
            method: {name: _in_steps(taken, step) for name, taken in look_times[method].items()}
            for method in ("forward_mode", "finite_difference")
        },
    }


def _in_steps(taken: Sequence[float | None], step: float) -> float | None:
    known = [one for one in taken if one is not None]
    return _rounded(statistics.median(known) / step) if known else None


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Of what an ordinary run costs, and of single looks."""
    ordinary = Table(
        Column("model", no_wrap=True), "parameters", "ms a step", "ordinary", "by the clock",
        "looks / steps", *METHODS, title="share of a step",
    )  # fmt: skip
    budgets = (*BUDGETS, "all_states")
    names = [f"{method}, {name}".replace("_", " ") for method in ("forward", "difference")
             for name in budgets]  # fmt: skip
    once = Table(Column("model", no_wrap=True), *names, title="one look, in steps")
    for name, one in found["models"].items():
        usual = one["ordinary"]
        ordinary.add_row(
            name,
            f"{one['parameters']:,}",
            f"{one['ms_a_step']:.3g}",
            f"{usual['share']:.2%} ± {usual['interval']:.2%}",
            f"{usual['by_clock']:.2%} ± {usual['by_clock_interval']:.2%}",
            f"{usual['looks']} / {usual['steps']:,}",
            *(f"{one['methods'][method]['share']:.1%}" for method in METHODS),
        )
        took = [one["look"][m][b] for m in ("forward_mode", "finite_difference") for b in budgets]
        once.add_row(name, *("-" if value is None else f"{value:.2f}" for value in took))
    return [ordinary, once]


if __name__ == "__main__":
    sys.exit(main())
