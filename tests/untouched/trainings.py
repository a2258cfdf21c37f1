"""Every way people train that we are attached to, as one function: bare, or watched.

``TRAININGS[adapter, mode](watch, folder)`` trains for `STEPS` steps from the same seed and returns
everything that a monitor must not change.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from untouched import tiny

import entropylens as el

__all__ = ["STEPS", "TRAININGS", "Outcome", "differences", "hooks_left"]

STEPS = 12
OVERFLOWING = {torch.float16: 2.0**19, torch.float32: 2.0**127}
"""Loss scales whose gradients overflow in the first steps and later not any more."""

Watch = Mapping[str, Any]


@dataclass
class Outcome:
    """What a training leaves."""

    model: nn.Module
    optimizers: list[Any]
    schedulers: list[Any] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    run_dir: Path | None = None
    states: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.states = {
            "weights": {n: t.detach().clone() for n, t in self.model.state_dict().items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state(legacy=False),  # noqa: NPY002 - the global one
            "python": random.getstate(),
            "losses": self.losses,
        }


TRAININGS: dict[tuple[str, str], Callable[[Watch | None, Path], Outcome]] = {}


def training(adapter: str, mode: str) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        def seeded(watch: Watch | None, folder: Path) -> Outcome:
            torch.manual_seed(0)
            np.random.seed(0)  # noqa: NPY002 - the global one
            random.seed(0)
            return function(watch, folder)

        TRAININGS[adapter, mode] = seeded
        return function

    return register


# -- plain loops -----------------------------------------------------------------------------------


@contextmanager
def lens_over(
    watch: Watch | None, folder: Path, model: nn.Module, optimizer: Any
) -> Iterator[el.Lens | None]:
    if watch is None:
        yield None
    else:
        with el.Lens(model, optimizer, run_dir=folder / "run", **watch) as lens:
            yield lens


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-2, **options)


def loop(
    watch: Watch | None,
    folder: Path,
    model: nn.Module,
    loss_of: Callable[[nn.Module, int], Tensor],
    *,
    tapped: nn.Module | None = None,
    optimizer: Any = None,
    micro_batches: int = 1,
    scaler: torch.amp.GradScaler | None = None,
    autocast: torch.dtype | None = None,
) -> Outcome:
    """A loop as people write it: accumulation, scaling, clipping, a schedule."""
    optimizer = optimizer or adamw(model)
    schedule = StepLR(optimizer, 5, 0.5)
    losses = []
    with lens_over(watch, folder, tapped or model, optimizer) as lens:
        for step in range(STEPS):
            optimizer.zero_grad()
            for part in range(micro_batches):
                cast = torch.autocast("cpu", autocast) if autocast else nullcontext()
                with cast:
                    loss = loss_of(model, step * micro_batches + part) / micro_batches
                (scaler.scale(loss) if scaler else loss).backward()
                losses.append(loss.item())
                if lens is not None:
                    lens.observe(loss=loss, loss_is_sum=True)
            norm = None
            if scaler is None:
                norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            schedule.step()
            if lens is not None:
                lens.step(gradient_norm=norm)
    return Outcome(model, [optimizer], [schedule], losses, folder / "run" if watch else None)


def gradient_scaler(dtype: torch.dtype) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=OVERFLOWING[dtype], growth_interval=3)


def on_tokens(**more: Any) -> Callable[[nn.Module, int], Tensor]:
    batches = tiny.token_batches()

    def loss_of(model: nn.Module, number: int) -> Tensor:
        tokens = next(batches)
        return model(input_ids=tokens, labels=tokens, **more).loss

    return loss_of


@training("plain", "usual")
def plain(watch: Watch | None, folder: Path) -> Outcome:
    return loop(watch, folder, tiny.llama(), on_tokens())


@training("plain", "shown by hand")
def shown(watch: Watch | None, folder: Path) -> Outcome:
    model, batches = tiny.Perceptron(), tiny.class_batches()
    optimizer = adamw(model)
    losses = []
    with lens_over(watch, folder, model, optimizer) as lens:
        for _ in range(STEPS):
            features, classes = next(batches)
            logits = model(features)
            loss = nn.functional.cross_entropy(logits, classes)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if lens is not None:
                lens.step(loss, gradient_norm=norm, logits=logits, targets=classes)
    return Outcome(model, [optimizer], [], losses, folder / "run" if watch else None)


@training("plain", "accumulation")
def accumulation(watch: Watch | None, folder: Path) -> Outcome:
    return loop(watch, folder, tiny.llama(), on_tokens(), micro_batches=3)


@training("plain", "gradient scaler")
def scaled(watch: Watch | None, folder: Path) -> Outcome:
    scaler = gradient_scaler(torch.float16)
    return loop(watch, folder, tiny.llama(), on_tokens(), scaler=scaler, autocast=torch.float16)


@training("plain", "gradient scaler, fused")
def scaled_fused(watch: Watch | None, folder: Path) -> Outcome:
    model, scaler = tiny.llama(), gradient_scaler(torch.float32)
    optimizer = adamw(model, fused=True)
    return loop(watch, folder, model, on_tokens(), optimizer=optimizer, scaler=scaler)


@training("plain", "bfloat16 autocast")
def bfloat16(watch: Watch | None, folder: Path) -> Outcome:
    return loop(watch, folder, tiny.llama(), on_tokens(), autocast=torch.bfloat16)


@training("plain", "gradient checkpointing")
def checkpointed(watch: Watch | None, folder: Path) -> Outcome:
    model = tiny.llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    return loop(watch, folder, model, on_tokens(use_cache=False))


@training("plain", "compiled, tapped within")
def compiled_within(watch: Watch | None, folder: Path) -> Outcome:
    model = tiny.llama()
    compiled = torch.compile(model, backend="aot_eager")
    return loop(watch, folder, compiled, on_tokens(), tapped=model)  # type: ignore[arg-type]


@training("plain", "compiled, tapped outside")
def compiled_outside(watch: Watch | None, folder: Path) -> Outcome:
    compiled: Any = torch.compile(tiny.llama(), backend="aot_eager")
    return loop(watch, folder, compiled, on_tokens())


@training("plain", "compiled optimiser")
def compiled_optimizer(watch: Watch | None, folder: Path) -> Outcome:
    model, batches = tiny.llama(), tiny.token_batches()
    optimizer = adamw(model)
    step, losses = torch.compile(optimizer.step, backend="aot_eager"), []
    with lens_over(watch, folder, model, optimizer) as lens:
        for _ in range(STEPS):
            tokens = next(batches)
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if lens is not None:
                lens.step()
    return Outcome(model, [optimizer], [], losses, folder / "run" if watch else None)


@training("plain", "peft")
def peft(watch: Watch | None, folder: Path) -> Outcome:
    return loop(watch, folder, tiny.lora(tiny.llama()), on_tokens())


@training("plain", "two models of one class")
def two_models(watch: Watch | None, folder: Path) -> Outcome:
    policy, reference = tiny.llama(), tiny.llama().eval().requires_grad_(False)
    batches = tiny.token_batches()

    def loss_of(model: nn.Module, number: int) -> Tensor:
        tokens = next(batches)
        found = model(input_ids=tokens, labels=tokens)
        other = reference(input_ids=tokens, labels=tokens)
        return found.loss + nn.functional.mse_loss(found.logits, other.logits)

    return loop(watch, folder, policy, loss_of)


@training("plain", "packed")
def packed(watch: Watch | None, folder: Path) -> Outcome:
    positions = torch.tensor([[*range(5), *range(tiny.LENGTH - 5)]])
    return loop(watch, folder, tiny.llama(), on_tokens(position_ids=positions))


@training("plain", "padded")
def padded(watch: Watch | None, folder: Path) -> Outcome:
    batches = tiny.token_batches()

    def loss_of(model: nn.Module, number: int) -> Tensor:
        tokens = next(batches)
        mask = torch.arange(tiny.LENGTH) >= torch.tensor([[0], [3], [5], [1]])
        labels = tokens.masked_fill(~mask, -100)
        return model(input_ids=tokens * mask, attention_mask=mask.long(), labels=labels).loss

    return loop(watch, folder, tiny.llama(), loss_of)


@training("plain", "sequence classification")
def classified(watch: Watch | None, folder: Path) -> Outcome:
    batches = tiny.token_batches()

    def loss_of(model: nn.Module, number: int) -> Tensor:
        tokens = next(batches)
        return model(input_ids=tokens, labels=tokens[:, 0] % tiny.CLASSES).loss

    return loop(watch, folder, tiny.classifier(), loss_of)


@training("plain", "encoder-decoder")
def encoder_decoder(watch: Watch | None, folder: Path) -> Outcome:
    return loop(watch, folder, tiny.bart(), on_tokens())


@training("plain", "closure")
def closure(watch: Watch | None, folder: Path) -> Outcome:
    model, batches = tiny.Perceptron().eval(), tiny.class_batches()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    losses = []
    with lens_over(watch, folder, model, optimizer) as lens:
        for _ in range(STEPS):
            features, classes = next(batches)

            def evaluated() -> Tensor:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(features), classes)  # noqa: B023
                loss.backward()
                return loss

            loss = optimizer.step(evaluated)
            losses.append(float(loss.detach()))
            if lens is not None:
                lens.step(loss)
    return Outcome(model, [optimizer], [], losses, folder / "run" if watch else None)


@training("plain", "several optimisers")
def several(watch: Watch | None, folder: Path) -> Outcome:
    model, batches = tiny.llama(), tiny.token_batches()
    optimizers = {"body": adamw(model.model), "head": torch.optim.SGD(model.lm_head.parameters())}
    losses = []
    with lens_over(watch, folder, model, optimizers) as lens:
        for _ in range(STEPS):
            tokens = next(batches)
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            if lens is not None:
                lens.step()
    return Outcome(model, [*optimizers.values()], [], losses, folder / "run" if watch else None)


# -- comparison ------------------------------------------------------------------------------------


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two nested states are not the same to the bit."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if one.keys() != other.keys():
            return [f"{where}: keys {sorted(map(str, one.keys() ^ other.keys()))}"]
        return [d for k in one for d in differences(one[k], other[k], f"{where}/{k}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [f"{where}: {len(one)} and {len(other)} items"]
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{where}/{i}")]
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        same = alike and bool(((one == other) | (one.isnan() & other.isnan())).all())
        return [] if same else [where]
    if isinstance(one, np.ndarray):
        return [] if np.array_equal(one, other) else [where]
    same = one == other or (one != one and other != other)
    return [] if same else [f"{where}: {one} and {other}"]


def hooks_left(outcome: Outcome) -> list[str]:
    """Hooks of ours that are still on the model's modules or on its optimisers."""
    tables = ["_forward_hooks", "_forward_pre_hooks", "_backward_hooks"]
    on_modules = [
        f"{name}.{table}"
        for name, module in outcome.model.named_modules()
        for table in tables
        for hook in getattr(module, table).values()
        if "entropylens" in type(hook).__module__ + getattr(hook, "__module__", "")
    ]
    on_optimizers = []
    for optimizer in outcome.optimizers:
        inner = optimizer
        while hasattr(inner, "optimizer"):
            inner = inner.optimizer
        for table in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            hooks = getattr(inner, table).values()
            on_optimizers += [table for h in hooks if "entropylens" in getattr(h, "__module__", "")]
    return on_modules + on_optimizers


def everything() -> None:
    """Register the trainings of every framework."""
    from untouched import in_lightning, in_transformers  # noqa: F401
