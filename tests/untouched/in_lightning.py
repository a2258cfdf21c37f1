"""Trainings with Lightning."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader
from untouched import tiny
from untouched.trainings import STEPS, Outcome, Watch, adamw, gradient_scaler, training

from entropylens_callbacks.lightning import EntropyLensCallback

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Base(pl.LightningModule):  # type: ignore[misc]
    """Keeps the losses; its optimiser has a schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.validates = False

    def keep(self, loss: Tensor) -> Tensor:
        self.losses.append(loss.item())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, number: int) -> None:
        self.log("val_loss", torch.tensor(float(number)))

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer()
        return [optimizer], [{"scheduler": StepLR(optimizer, 5, 0.5), "interval": "step"}]

    def make_optimizer(self) -> Any:
        return adamw(self)


class Classifier(Base):
    """Logits and targets handed over with the loss."""

    def __init__(self, *, fused: bool = False) -> None:
        super().__init__()
        self.net, self.fused = tiny.Perceptron(), fused

    def training_step(self, batch: Any, number: int) -> Any:
        features, classes = batch
        logits = self.net(features)
        loss = self.keep(nn.functional.cross_entropy(logits, classes))
        return {"loss": loss, "logits": logits, "targets": classes}

    def make_optimizer(self) -> Any:
        return adamw(self, fused=self.fused)


class WithCriterion(Base):
    """A loss module, which is read."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.criterion = tiny.Perceptron(), nn.CrossEntropyLoss()

    def training_step(self, batch: Any, number: int) -> Tensor:
        return self.keep(self.criterion(self.net(batch[0]), batch[1]))


class LanguageModel(Base):
    """A model of transformers within, which is read, beside a frozen one of its class."""

    def __init__(self, model: Any = None) -> None:
        super().__init__()
        self.model = model or tiny.llama()
        self.reference = tiny.llama().eval().requires_grad_(False)

    def training_step(self, batch: Any, number: int) -> Tensor:
        found = self.model(input_ids=batch, labels=batch)
        other = self.reference(input_ids=batch, labels=batch)
        return self.keep(found.loss + nn.functional.mse_loss(found.logits, other.logits))


class Manual(Base):
    """Manual optimisation, accumulating by hand, clipping by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = tiny.Perceptron()

    def training_step(self, batch: Any, number: int) -> None:
        optimizer = self.optimizers()
        loss = self.keep(nn.functional.cross_entropy(self.net(batch[0]), batch[1]) / 2)
        self.manual_backward(loss)
        if number % 2:
            self.clip_gradients(optimizer, 0.5, "norm")
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()


class Adversaries(Base):
    """Two optimisers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = nn.Linear(8, 8), nn.Linear(8, 1)

    def training_step(self, batch: Any, number: int) -> None:
        first, second = self.optimizers()
        loss = self.keep(self.critic(self.generator(batch[0])).mean())
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        made = self.generator(batch[0]).detach()
        loss = self.keep((self.critic(made) - self.critic(batch[0])).mean())
        second.zero_grad()
        self.manual_backward(loss)
        second.step()

    def configure_optimizers(self) -> Any:
        return [adamw(self.generator), torch.optim.SGD(self.critic.parameters(), lr=0.1)]


class Compilable(Base):
    """Nothing in its step that breaks a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny.llama()

    def training_step(self, batch: Any, number: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def on_train_batch_end(self, outputs: Any, batch: Any, number: int) -> None:
        self.losses.append(outputs["loss"].item())


def classes(count: int) -> DataLoader[Any]:
    batches = tiny.class_batches()
    return DataLoader([next(batches) for _ in range(count)], batch_size=None)  # type: ignore[arg-type]


def tokens(count: int) -> DataLoader[Any]:
    batches = tiny.token_batches()
    return DataLoader([next(batches) for _ in range(count)], batch_size=None)  # type: ignore[arg-type]


def fit(
    watch: Watch | None,
    folder: Path,
    make: Callable[[], Any],
    data: Callable[[int], DataLoader[Any]] = classes,
    *,
    batches: int = STEPS,
    compiled: str | None = None,
    saves: bool = False,
    **options: Any,
) -> Outcome:
    module = make()
    model = torch.compile(module, backend=compiled) if compiled else module
    callback: list[Any] = [EntropyLensCallback(folder / "run", **watch)] if watch else []
    if saves:
        callback.append(ModelCheckpoint(folder / "kept", every_n_train_steps=3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=pl.loggers.CSVLogger(str(folder / "csv")),
            log_every_n_steps=3,
            val_check_interval=batches // 2,
            enable_checkpointing=saves,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=callback,
            default_root_dir=str(folder),
            **options,
        )
        trainer.fit(model, data(batches), data(2))
    schedulers = [found.scheduler for found in trainer.lr_scheduler_configs]
    return Outcome(
        module, trainer.optimizers, schedulers, module.losses, folder / "run" if watch else None
    )


def mixed() -> list[Any]:
    return [MixedPrecision("16-mixed", "cpu", gradient_scaler(torch.float16))]


@training("lightning", "automatic")
def automatic(watch: Watch | None, folder: Path) -> Outcome:
    return fit(watch, folder, Classifier, gradient_clip_val=0.5)


@training("lightning", "saving checkpoints")
def saving(watch: Watch | None, folder: Path) -> Outcome:
    return fit(watch, folder, Classifier, saves=True)


@training("lightning", "accumulation")
def accumulation(watch: Watch | None, folder: Path) -> Outcome:
    return fit(watch, folder, WithCriterion, batches=2 * STEPS + 1, accumulate_grad_batches=2)


@training("lightning", "manual")
def manual(watch: Watch | None, folder: Path) -> Outcome:
    return fit(watch, folder, Manual, batches=2 * STEPS)


@training("lightning", "several optimisers")
def several(watch: Watch | None, folder: Path) -> Outcome:
    return fit(watch, folder, Adversaries)


@training("lightning", "gradient scaler")
def scaled(watch: Watch | None, folder: Path) -> Outcome:
    return fit(watch, folder, Classifier, plugins=mixed(), gradient_clip_val=0.5)


@training("lightning", "gradient scaler, fused")
def scaled_fused(watch: Watch | None, folder: Path) -> Outcome:
    return fit(watch, folder, lambda: Classifier(fused=True), plugins=mixed())


@training("lightning", "gradient scaler, manual")
def scaled_manual(watch: Watch | None, folder: Path) -> Outcome:
    return fit(watch, folder, Adversaries, plugins=mixed())


@training("lightning", "bfloat16 autocast")
def bfloat16(watch: Watch | None, folder: Path) -> Outcome:
    return fit(watch, folder, LanguageModel, tokens, precision="bf16-mixed")


@training("lightning", "two models of one class")
def language_model(watch: Watch | None, folder: Path) -> Outcome:
    return fit(watch, folder, LanguageModel, tokens)


@training("lightning", "peft")
def peft(watch: Watch | None, folder: Path) -> Outcome:
    return fit(watch, folder, lambda: LanguageModel(tiny.lora(tiny.llama())), tokens)


@training("lightning", "gradient checkpointing")
def checkpointed(watch: Watch | None, folder: Path) -> Outcome:
    def make() -> LanguageModel:
        model = tiny.llama()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return LanguageModel(model)

    return fit(watch, folder, make, tokens)


class Onward(Compilable):
    """Computes beyond its model's output, in the same graph."""

    def training_step(self, batch: Any, number: int) -> Tensor:
        found = self.model(input_ids=batch, labels=batch)
        return found.loss + 0.01 * torch.logsumexp(found.logits, -1).square().mean()


@training("lightning", "compiled whole by inductor")
def compiled_whole(watch: Watch | None, folder: Path) -> Outcome:
    return fit(watch, folder, Onward, tokens, compiled="inductor")


@training("lightning", "compiled")
def compiled(watch: Watch | None, folder: Path) -> Outcome:
    return fit(watch, folder, Compilable, tokens, compiled="aot_eager")
