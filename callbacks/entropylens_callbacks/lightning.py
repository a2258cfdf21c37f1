"""Lightning: `EntropyLensCallback` for ``Trainer(callbacks=[...])``."""

import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyExperiment
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

import entropylens as el
from entropylens.capture.optimizer import unwrap_optimizer
from entropylens.records import Phase
from entropylens_callbacks import HEADLINES, is_number, loggable

__all__ = ["EntropyLensCallback"]

_EVALUATION: Final = re.compile(r"(^|[/_])(val|valid|validation|eval)([/_]|$)")


class EntropyLensCallback(Callback):  # type: ignore[misc]
    """Watches `Trainer.fit` and writes a run directory.

    A step of the log is a batch in which an optimiser stepped: what Lightning's loggers count, from
    1. Several optimisers (manual optimisation) share it; their values carry the names optimizer0,
    optimizer1, ... in the column ``module``.

    Entropy and its kin need logits and targets. They are read, in this order, from what
    ``training_step`` returns as ``{"loss": ..., "logits": ..., "targets": ...}``; from the training
    forwards of the module called ``module``; else of the one model of transformers with trainable
    parameters within the LightningModule, if it is given labels, or of its
    `torch.nn.CrossEntropyLoss` modules, whichever shows tokens first.

    Args:
        run_dir: Where the log goes; by default ``<default_root_dir>/entropylens``.
        module: Name of the submodule whose forwards are read.
        sample_id: Key of the batch that holds the samples' identifiers.
        forward: Metrics to pass on to the Trainer's loggers as ``entropylens/NAME``, ``*`` standing
            for any text.
        is_fallback: Stand back where the Trainer has another EntropyLensCallback.
        **lens: Other arguments of `entropylens.Lens`: ``preset``, ``max_overhead``, ...

    Raises:
        AttributeError: When training begins, there is no submodule ``module``.
    """

    def __init__(
        self,
        run_dir: str | Path | None = None,
        *,
        module: str | None = None,
        sample_id: str | None = None,
        forward: Sequence[str] = HEADLINES,
        is_fallback: bool = False,
        **lens: Any,
    ) -> None:
        self.run_dir = run_dir
        self.options = lens
        self.lens: el.Lens | None = None
        self._module, self._sample_id = module, sample_id
        self._forward = tuple(forward)
        self._is_fallback = is_fallback
        self._state: dict[str, Any] | None = None
        self._state_of: weakref.ref[Trainer] | None = None
        """The Trainer whose training the state stems from; None is a checkpoint's."""
        self._names: dict[int, str] = {}
        self._losses: list[Tensor] = []
        self._stepped: set[str] = set()
        """Optimisers that have stepped in the step in progress."""
        self._has_saved = False
        self._reported: _Reported | None = None

    @property
    def state_key(self) -> str:
        """One for each of the two that a Trainer may have."""
        return f"{type(self).__qualname__}{' (environment)' if self._is_fallback else ''}"

    # -- a run -------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the run, or go on with it, and hook modules and optimisers."""
        self._close(trainer, "terminated", "fit was called again")
        others = [c for c in trainer.callbacks if isinstance(c, EntropyLensCallback)]
        if self._is_fallback and others[0] is not self:
            return
        state = self._take_state(trainer, pl_module)
        optimizers = trainer.optimizers
        reads = self._readable(pl_module)
        self.lens = el.Lens(
            pl_module,
            optimizers,
            run_dir=self.run_dir or Path(trainer.default_root_dir) / "entropylens",
            state=state,
            reads=reads,
            **{"config": dict(pl_module.hparams), **_decoder(pl_module), **self.options},
        )
        several = len(optimizers) > 1
        self._names = {id(o): f"optimizer{i}" if several else "" for i, o in enumerate(optimizers)}
        self._losses = []
        self.lens.watch.reads_loss = False
        self.lens.forward(*self._forward)
        if trainer.loggers:
            self._reported = _Reported(self.lens, trainer)
            trainer.loggers.append(self._reported)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seal the log."""
        self._close(trainer, "finished", "")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Seal the log as failed."""
        state = "failed" if isinstance(exception, Exception) else "terminated"
        self._close(trainer, state, f"{type(exception).__name__}: {exception}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind, however the training ended."""
        self._close(trainer, "terminated", "the trainer was torn down")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training goes on with; everything measured so far is then in files."""
        found: dict[str, Any] = {}
        if self.lens is not None:
            self.lens.aside("checkpoint", partial(_read_state, self.lens, found))
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it for the training that begins next."""
        self._state, self._state_of = state_dict or None, None

    def _close(self, trainer: Trainer, state: str, reason: str) -> None:
        if self._reported is not None and self._reported in trainer.loggers:
            trainer.loggers.remove(self._reported)
        if self.lens is not None:
            # Called again, fit goes on where this Trainer stopped.
            self._state, self._state_of = {}, weakref.ref(trainer)
            self.lens.aside("state", partial(_read_state, self.lens, self._state))
            self.lens.close(state, reason)
        self.lens = self._reported = None

    # -- a step ------------------------------------------------------------------------------

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Remember a loss until its optimiser steps."""
        if self.lens is not None and self.lens.watch.due:
            self._aside("loss", lambda: self._losses.append(_unscaled(trainer, loss)))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """Tell the Lens which optimiser will step, and show it its loss and its gradients."""
        if self.lens is None:
            return
        name = self._names.get(id(unwrap_optimizer(_raw(optimizer))), "")
        self.lens.watch.expect_step(name)
        if self.lens.watch.due:
            self._aside("before step", lambda: self._show_before_step(trainer, optimizer, name))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show a micro-batch and, where an optimiser stepped in it, measure the step."""
        lens = self.lens
        if lens is None:
            return
        if lens.watch.due:
            self._aside("batch end", lambda: self._show_batch(outputs, batch))
        if lens.watch.has_stepped:
            lens.step()
            lens.watch.forget_calls()
            self._stepped.clear()
            self._losses.clear()
            every = trainer.log_every_n_steps
            if self._reported is not None and every and lens.last_step % every == 0:
                self._aside("forward", lambda: self._pass_on(trainer, lens))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is seen from here is evaluation."""
        if self.lens is not None:
            self.lens.watch.phase = Phase.EVAL

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to training; the evaluation's time is no step's time."""
        if self.lens is None:
            return
        if self._reported is None:
            found = {n: v for n, v in trainer.callback_metrics.items() if _EVALUATION.search(n)}
            self._aside("evaluation", lambda: _log_evaluation(self.lens, found))
        self.lens.watch.phase = Phase.TRAIN
        self.lens.restart_clock()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave the checkpoint's time, which begins here, out of the next step's."""
        self._has_saved = True

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """After a checkpoint, begin to count a step's time anew."""
        if self._has_saved and self.lens is not None:
            self._has_saved = False
            self.lens.restart_clock()

    # -- within ------------------------------------------------------------------------------

    def _aside(self, where: str, work: Callable[[], Any]) -> None:
        if self.lens is not None:
            self.lens.aside(where, work)

    def _take_state(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any] | None:
        """What this training goes on with; a new run at the Trainer's step if that is not known."""
        found, self._state = self._state, None
        owner: Any = trainer if self._state_of is None else self._state_of()
        if not trainer.global_step:
            return None
        if not found or owner is not trainer:
            return {"step": _resumed_at(trainer)}
        if pl_module.automatic_optimization and found["step"] != trainer.global_step:
            # A callback before ours saved before we had counted the step.
            return {**found, "step": trainer.global_step, "tokens_seen": None}
        return found

    def _show_before_step(self, trainer: Trainer, optimizer: Any, name: str) -> None:
        assert self.lens is not None
        losses, self._losses = self._losses, []
        if name in self._stepped:
            return
        self._stepped.add(name)
        module = trainer.lightning_module
        is_automatic = module.automatic_optimization
        for loss in losses:
            self.lens.observe(loss=loss, loss_is_sum=not is_automatic, optimizer=name)
        raw = unwrap_optimizer(_raw(optimizer))
        # An optimiser that unscales by itself has scaled gradients still.
        is_scaled = getattr(raw, "_step_supports_amp_scaling", False)
        is_scaled = is_scaled and getattr(trainer.precision_plugin, "scaler", None) is not None
        # In manual optimisation the module has clipped them already, if it does.
        if is_automatic and not is_scaled:
            self.lens.watch.take_gradients(name)
            guard = self.lens.watch.guard
            if guard is not None and _clips(trainer, module):
                guard.take_gradients()

    def _show_batch(self, outputs: Any, batch: Any) -> None:
        assert self.lens is not None
        found = outputs if isinstance(outputs, Mapping) else {}
        logits: Any = found.get("logits")
        targets: Any = found.get("targets")
        shown: dict[str, Any] = {}
        if _are_scores(logits, targets):
            if targets.shape != logits.shape[:-1]:
                logits = logits.movedim(1, -1)
            shown = {"logits": logits, "targets": targets, "mask": found.get("mask")}
        ids = batch.get(self._sample_id) if self._sample_id and isinstance(batch, Mapping) else None
        if shown or ids is not None:
            self.lens.observe(sample_id=ids, **shown)

    def _pass_on(self, trainer: Trainer, lens: el.Lens) -> None:
        values = {f"entropylens/{n}": value for n, value in lens.take_latest().items()}
        others = [logger for logger in trainer.loggers if logger is not self._reported]
        for logger in others if values else []:
            tell = partial(logger.log_metrics, values, step=_counted(trainer))
            lens.aside(f"forward to {type(logger).__name__}", tell)

    def _readable(self, pl_module: LightningModule) -> list[nn.Module]:
        if self._module is not None:
            return [pl_module.get_submodule(self._module)]
        models = _outermost_models(pl_module)
        criteria = [m for m in pl_module.modules() if isinstance(m, nn.CrossEntropyLoss)]
        return [*(models if len(models) == 1 else []), *criteria]


class _Reported(Logger):  # type: ignore[misc]
    """Stands among the Trainer's loggers while it trains, and keeps what they are told."""

    def __init__(self, lens: el.Lens, trainer: Trainer) -> None:
        super().__init__()
        self._lens, self._trainer = lens, trainer

    @property
    def name(self) -> str:
        return "entropylens"

    @property
    def version(self) -> str:
        return ""

    @property
    def experiment(self) -> Any:
        """Takes whatever a module does with its loggers' experiments, and does nothing."""
        return DummyExperiment()

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self._trainer.evaluating:
            _log_evaluation(self._lens, metrics)
        else:
            self._lens.log(loggable(metrics), source="framework")

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


def _are_scores(logits: Any, targets: Any) -> bool:
    """Whether targets are classes of these logits: other trainings have things so named, too.

    The class axis is the last or, as in torch's cross-entropy, the first after the batch.
    """
    if not isinstance(logits, Tensor) or not isinstance(targets, Tensor) or logits.ndim < 2:
        return False
    fits = targets.shape in (logits.shape[:-1], logits.shape[:1] + logits.shape[2:])
    return fits and not targets.is_floating_point() and targets.dtype != torch.bool


def _log_evaluation(lens: el.Lens | None, metrics: Mapping[str, Any]) -> None:
    if lens is None:
        return
    loss = next((metrics[n] for n in ("val_loss", "val/loss") if is_number(metrics.get(n))), None)
    if loss is not None:
        lens.log({"mean": loss}, source="loss", phase="eval")
    lens.log(loggable(metrics), source="framework", phase="eval")


def _read_state(lens: el.Lens, found: dict[str, Any]) -> None:
    found.update(lens.state_dict())


def _raw(optimizer: Any) -> Any:
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _unscaled(trainer: Trainer, loss: Tensor) -> Tensor:
    """A copy of a loss without what Lightning has done to it: a loss scale, a division.

    In automatic optimisation it divides, at an epoch's end by more than there were micro-batches.
    """
    scale = getattr(getattr(trainer.precision_plugin, "scaler", None), "_scale", None)
    copy = loss.detach() / scale if isinstance(scale, Tensor) else loss.detach().clone()
    is_divided = trainer.lightning_module.automatic_optimization
    return copy * trainer.accumulate_grad_batches if is_divided else copy


def _clips(trainer: Trainer, module: LightningModule) -> bool:
    """Whether gradients are clipped between our hook and the optimiser."""
    return bool(trainer.gradient_clip_val) or is_overridden("configure_gradient_clipping", module)


def _counted(trainer: Trainer) -> int:
    """Where Lightning's loggers are on their x axis."""
    return int(getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step))


def _resumed_at(trainer: Trainer) -> int:
    """Steps by a checkpoint without our state; Lightning counts those of every optimiser."""
    return int(trainer.global_step) // max(len(trainer.optimizers), 1)


def _decoder(pl_module: LightningModule) -> dict[str, Any]:
    decode = getattr(getattr(pl_module, "tokenizer", None), "decode", None)
    return {} if decode is None else {"decode": lambda token: decode([token])}


def _outermost_models(module: nn.Module) -> list[nn.Module]:
    """Models of transformers, PEFT's wrappers included, that have parameters to train."""
    found: list[nn.Module] = []
    for child in module.children():
        is_model = hasattr(child, "get_output_embeddings") or hasattr(child, "get_base_model")
        if is_model and any(p.requires_grad for p in child.parameters()):
            found.append(child)
        elif not is_model:
            found += _outermost_models(child)
    return found
