"""Hugging Face Trainer and TRL: `attach`, ``report_to="entropylens"`` or `EntropyLensCallback`."""

import functools
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import integration_utils

import entropylens as el
from entropylens_callbacks import HEADLINES, is_number, loggable, with_tokens_at_each_step
from entropylens_callbacks.preferences import PreferenceWatch
from entropylens_callbacks.samples import (
    check_names,
    name_samples,
    take_names,
    without_names,
)
from entropylens_callbacks.trl import PolicyWatch, RolloutOptions

__all__ = ["EntropyLensCallback", "attach"]

log = logging.getLogger("entropylens")

_STATE_FILE: Final = "entropylens-rank-{rank:03d}.pt"


class EntropyLensCallback(TrainerCallback):  # type: ignore[misc]
    """Watches `Trainer.train` and writes a run directory.

    A new Lens is opened by each call of `train`: at step 0 a new run, after
    ``resume_from_checkpoint`` the run that the checkpoint belongs to, from its step on. Checkpoints
    carry a small file of ours for each rank.

    Three ways in do the same: `attach`, this callback in ``callbacks=``, and, once this module has
    been imported, ``TrainingArguments(report_to="entropylens")``.

    Args:
        run_dir: Where the log goes; by default ``<output_dir>/entropylens``.
        sample_id: Names the samples in the log: a column of the training set, or ``"index"`` for
            the row number. None leaves samples numbered within their step.
        forward: Metrics to pass on to the trainer's other loggers as ``entropylens/NAME``, ``*``
            standing for any text.
        rollouts: Of a trainer that generates completions (GRPO, RLOO): which are correct, where
            their thinking ends, whether text is kept.
        **lens: Other arguments of `entropylens.Lens`: ``preset``, ``max_overhead``, ...

    Raises:
        ValueError: When it joins a trainer: its training set has no such column, or no reward
            function has the name that ``rollouts`` gives.
    """

    def __init__(
        self,
        run_dir: str | Path | None = None,
        *,
        sample_id: str | None = None,
        forward: Sequence[str] = HEADLINES,
        rollouts: RolloutOptions | None = None,
        **lens: Any,
    ) -> None:
        self.run_dir = run_dir
        self.options = lens
        self.lens: el.Lens | None = None
        self.trainer: Trainer | None = None
        self._sample_id, self._forward = sample_id, tuple(forward)
        self._rollouts = rollouts or RolloutOptions()
        self._policy: PolicyWatch | None = None
        self._preferences: PreferenceWatch | None = None
        self._resumes_from: str | None = None
        self._names_samples = False

    def join(self, trainer: Trainer) -> None:
        """Take the first place among a trainer's callbacks, and see its losses and its clipping."""
        self.trainer = trainer
        self._names_samples = self._sample_id is not None
        if self._sample_id is not None:
            check_names(trainer, self._sample_id)
        if PolicyWatch.suits(trainer):
            if self._sample_id is not None:
                raise ValueError(
                    f"attach: expected no sample_id for {type(trainer).__name__}, whose samples "
                    f"are completions, got {self._sample_id!r}; leave it out: groups are numbered"
                )
            self._policy = PolicyWatch(trainer, self._rollouts)
            self._policy.join(self)
            if self._policy.missing:
                log.warning("entropylens: %s", self._policy.complaint)
        if PreferenceWatch.suits(trainer):
            self._preferences = PreferenceWatch(trainer)
        callbacks = trainer.callback_handler.callbacks
        # What is added to a log reaches only the callbacks behind.
        callbacks[:] = [self, *(c for c in callbacks if c is not self)]
        trainer.compute_loss = _watched_loss(trainer.compute_loss, self)
        trainer.prediction_step = without_names(trainer.prediction_step)
        trainer.accelerator.clip_grad_norm_ = _watched_clipping(
            trainer.accelerator.clip_grad_norm_, self
        )
        trainer.train = _watched_training(trainer.train, self)

    def name_samples(self) -> None:
        """Name the samples, once: when training begins, for constructors use the set as it is."""
        if self._names_samples and self.trainer is not None and self._sample_id is not None:
            self._names_samples = False
            name_samples(self.trainer, self._sample_id)

    def close(self, state: str = "finished", reason: str = "") -> None:
        """End the run's log and take the hooks out of the model and the optimiser."""
        if self._preferences is not None:
            self._preferences.close()
        if self.lens is not None:
            self.lens.close(state, reason)
            self.lens = None

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        """Join the trainer that is being made."""
        self._join_caller()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the run and hook model and optimiser."""
        caller = _calling_trainer()
        if self._sample_id is not None and caller is not None and caller is not self.trainer:
            raise ValueError(
                "EntropyLensCallback: expected to join the trainer before its data loaders are "
                "made, to name samples, got one that trains already; use attach(trainer, "
                "sample_id=...) or callbacks=[...]"
            )
        self._join_caller()
        self.close("terminated", "train was called again")
        decode = getattr(kwargs.get("processing_class"), "decode", None)
        text = {"decode": lambda token: decode([token])} if decode is not None else {}
        found = _load_state(self._resumes_from or _checkpoint(args, state), state.global_step)
        options = self.options if self._policy is None else with_tokens_at_each_step(self.options)
        self.lens = el.Lens(
            kwargs["model"],
            kwargs.get("optimizer"),
            run_dir=self.run_dir or Path(args.output_dir) / "entropylens",
            state=found,
            reads=[_called(self.trainer, kwargs["model"])],
            **{
                "config": args.to_sanitized_dict(),
                **text,
                **_temperature(self.trainer),
                **options,
            },
        )
        self.lens.watch.reads_loss = self.trainer is None
        self.lens.forward(*self._forward)
        logs_each = args.logging_strategy == "steps" and args.logging_steps == 1
        is_one_step = args.gradient_accumulation_steps == args.world_size == 1
        self.lens.follow(framework_entropy=logs_each and is_one_step)
        if self._policy is not None and self._policy.missing:
            self.lens.event("capture", self._policy.complaint, severity="warning")
        if self._policy is not None:
            self.lens.watch.expect("policy", "sampled", "rollout")
            self.lens.aside("policy", self._policy.begin)
        if self._preferences is not None:
            self.lens.watch.expect("preference")
            self._preferences.open(self.lens, _called(self.trainer, kwargs["model"]))

    def begin_loss(self, inputs: Any) -> None:
        """Tell what the trainer knows of the coming forwards beyond what they show."""
        assert self.lens is not None
        if self._policy is not None and isinstance(inputs, Mapping):
            self.lens.watch.next_policy = self._policy.batch(inputs)
            self.lens.watch.next_sample_ids = self._policy.names(inputs)
        if self._preferences is not None:
            self._preferences.begin(inputs)

    def end_loss(self) -> None:
        """Take what the forwards of such a loss showed."""
        if self._preferences is not None:
            self._preferences.end()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Measure the optimiser step that just ended."""
        if self.lens is not None:
            self.lens.step(step=args[1].global_step)

    def on_log(self, *args: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Keep what the trainer reports beside our numbers, and add ours for its other loggers."""
        if self.lens is None or not logs:
            return
        train = {name: value for name, value in logs.items() if not name.startswith("eval_")}
        self.lens.log(loggable(train), source="framework")
        if self.trainer is None and is_number(logs.get("grad_norm")):
            self.lens.log({"norm/before_clip": logs["grad_norm"]}, source="gradient")
        if "loss" in logs:
            ours = self.lens.take_latest()
            logs.update({f"entropylens/{name}": value for name, value in ours.items()})

    def on_evaluate(self, *args: Any, metrics: Mapping[str, Any], **kwargs: Any) -> None:
        """Write the evaluation's metrics with phase eval; its time is no step's time."""
        if self.lens is None:
            return
        named = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        loss = named.pop("loss", None)
        if is_number(loss):
            self.lens.log({"mean": loss}, source="loss", phase="eval")
        self.lens.log(loggable(named), source="framework", phase="eval")
        self.lens.restart_clock()

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Put our state into the checkpoint, whose time is no step's time."""
        if self.lens is not None:
            self.lens.aside("checkpoint", lambda: self._save_state(_checkpoint(args, state)))
            self.lens.restart_clock()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Seal the log."""
        self.close()

    def _join_caller(self) -> None:
        trainer = _calling_trainer()
        if trainer is not None and trainer is not self.trainer:
            _refuse_second(trainer, self)
            self.join(trainer)

    def _save_state(self, checkpoint: str) -> None:
        assert self.lens is not None
        if Path(checkpoint).is_dir():
            torch.save(self.lens.state_dict(), _state_file(checkpoint))


def attach(
    trainer: Trainer,
    run_dir: str | Path | None = None,
    *,
    sample_id: str | None = None,
    forward: Sequence[str] = HEADLINES,
    rollouts: RolloutOptions | None = None,
    **lens: Any,
) -> EntropyLensCallback:
    """Let a Lens watch ``trainer``: one line before ``trainer.train()``.

    Args:
        trainer: A `transformers.Trainer` or a subclass, as those of TRL.
        run_dir: Where the log goes; by default ``<output_dir>/entropylens``.
        sample_id: Names the samples in the log: a column of the training set, or ``"index"`` for
            the row number. None leaves samples numbered within their step.
        forward: Metrics to pass on to the trainer's other loggers as ``entropylens/NAME``, ``*``
            standing for any text.
        rollouts: Of a trainer that generates completions (GRPO, RLOO): which are correct, where
            their thinking ends, whether text is kept.
        **lens: Other arguments of `entropylens.Lens`: ``preset``, ``max_overhead``, ...

    Returns:
        The callback, first in the trainer's list; its ``lens`` is there while training runs.

    Raises:
        ValueError: The trainer has one already, or its training set has no such column.
    """
    callback = EntropyLensCallback(
        run_dir, sample_id=sample_id, forward=forward, rollouts=rollouts, **lens
    )
    _refuse_second(trainer, callback)
    callback.join(trainer)
    return callback


def _refuse_second(trainer: Trainer, callback: EntropyLensCallback) -> None:
    others = trainer.callback_handler.callbacks
    if any(isinstance(c, EntropyLensCallback) and c is not callback for c in others):
        raise ValueError(
            "attach: expected a trainer without an EntropyLensCallback, got one that has it; "
            "attach once, or leave it out of callbacks= and report_to="
        )


def _called(trainer: Trainer | None, model: Any) -> Any:
    """What the trainer calls: a compiled model is read from outside of its graph."""
    wrapped = getattr(trainer, "model_wrapped", None)
    return model if getattr(wrapped, "_orig_mod", None) is None else wrapped


def _temperature(trainer: Trainer | None) -> dict[str, float]:
    """At which the trainer's loss reads the logits, as those that sample have it."""
    found: Any = getattr(trainer, "temperature", None)
    return {"temperature": float(found)} if is_number(found) else {}


def _calling_trainer() -> Trainer | None:
    """The trainer that is sending an event; the event itself names the model, never the trainer."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    return None


# -- what is wrapped on one trainer ----------------------------------------------------------------


def _watched_loss(compute_loss: Callable[..., Any], callback: EntropyLensCallback) -> Any:
    @functools.wraps(compute_loss)
    def watched(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        names, lens = take_names(inputs), callback.lens
        if lens is None or not model.training or not lens.watch.due:
            return compute_loss(model, inputs, *args, **kwargs)
        lens.watch.next_sample_ids = names
        # Label smoothing and a loss function of the user's own keep the labels from the model.
        lens.watch.next_labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
        lens.aside("loss", lambda: callback.begin_loss(inputs))
        result = compute_loss(model, inputs, *args, **kwargs)
        lens.aside("loss", callback.end_loss)
        lens.watch.next_sample_ids = lens.watch.next_labels = lens.watch.next_policy = None
        loss = result[0] if isinstance(result, tuple) else result
        has_items = kwargs.get("num_items_in_batch") is not None
        lens.observe(loss=loss, loss_is_sum=_is_share(callback.trainer, has_items))
        return result

    return watched


def _is_share(trainer: Trainer | None, has_items: bool) -> bool:
    """Whether `Trainer.training_step` takes losses as they are, to be added up, or as means."""
    told = getattr(trainer, "loss_is_scaled_for_ga", None)
    if told is not None:
        return bool(told)
    takes_items = getattr(trainer, "model_accepts_loss_kwargs", False)
    return (takes_items and has_items) or getattr(trainer, "compute_loss_func", None) is not None


def _watched_clipping(clip: Callable[..., Any], callback: EntropyLensCallback) -> Any:
    @functools.wraps(clip)
    def watched(*args: Any, **kwargs: Any) -> Any:
        norm = clip(*args, **kwargs)
        if callback.lens is not None:
            callback.lens.watch.take_gradient_norm(norm)
        return norm

    return watched


def _watched_training(train: Callable[..., Any], callback: EntropyLensCallback) -> Any:
    @functools.wraps(train)
    def watched(*args: Any, **kwargs: Any) -> Any:
        asked = args[0] if args else kwargs.get("resume_from_checkpoint")
        callback._resumes_from = str(asked) if isinstance(asked, str | Path) else None
        callback.name_samples()
        try:
            return train(*args, **kwargs)
        except BaseException as error:
            state = "failed" if isinstance(error, Exception) else "terminated"
            callback.close(state, f"{type(error).__name__}: {error}")
            raise

    return watched


# -- our part of a checkpoint ----------------------------------------------------------------------


def _checkpoint(args: TrainingArguments, state: TrainerState) -> str:
    return str(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def _state_file(checkpoint: str) -> Path:
    distributed = torch.distributed
    known = distributed.is_available() and distributed.is_initialized()
    rank = distributed.get_rank() if known else 0
    return Path(checkpoint) / _STATE_FILE.format(rank=rank)


def _load_state(checkpoint: str, step: int) -> dict[str, Any] | None:
    """Our state at a step; of a checkpoint that does not have it the step alone, for a new run."""
    if not step:
        return None
    try:
        found: dict[str, Any] = torch.load(_state_file(checkpoint), weights_only=True)
        if found["step"] == step:
            return found
    except FileNotFoundError:
        pass
    except Exception as error:
        log.warning(
            "entropylens: expected our state in %s, got %s: %s; a new run begins at step %d",
            _state_file(checkpoint), type(error).__name__, error, step,
        )  # fmt: skip
    return {"step": step}


integration_utils.INTEGRATION_TO_CALLBACK["entropylens"] = EntropyLensCallback
