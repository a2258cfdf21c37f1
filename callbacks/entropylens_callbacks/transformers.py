"""Hugging Face Trainer: `attach` a Lens to a trainer, or pass `EntropyLensCallback` to it."""

import functools
import re
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Final

from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import entropylens as el

__all__ = ["EntropyLensCallback", "attach"]

SAMPLE_ID: Final = "entropylens_sample_id"


class EntropyLensCallback(TrainerCallback):  # type: ignore[misc]
    """Watches `Trainer.train` and writes a run directory.

    A new Lens is opened by each call of `train`: at step 0 a new run, after
    ``resume_from_checkpoint`` the same run from the checkpoint's step on.

    On its own it sees what the callback protocol shows. `attach` also shows it the gradient norm
    before clipping at every step, custom losses, sample identifiers and exceptions.

    Args:
        run_dir: Where the log goes; by default ``<output_dir>/entropylens``.
        **lens: Other arguments of `entropylens.Lens`: ``preset``, ``max_overhead``, ...
    """

    def __init__(self, run_dir: str | Path | None = None, **lens: Any) -> None:
        self.run_dir = run_dir
        self.options = lens
        self.lens: el.Lens | None = None
        self.trainer: Trainer | None = None

    def close(self, state: str = "finished", reason: str = "") -> None:
        """End the run's log and take the hooks out of the model and the optimiser."""
        if self.lens is not None:
            self.lens.close(state, reason)
            self.lens = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the run and hook model and optimiser."""
        self.close("terminated", "train was called again")
        decode = getattr(kwargs.get("processing_class"), "decode", None)
        text = {"decode": lambda token: decode([token])} if decode is not None else {}
        self.lens = el.Lens(
            kwargs["model"],
            kwargs.get("optimizer"),
            run_dir=self.run_dir or Path(args.output_dir) / "entropylens",
            resume_step=state.global_step or None,
            **{"config": args.to_sanitized_dict(), **text, **self.options},
        )
        self.lens.watch.reads_loss = self.trainer is None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Measure the optimiser step that just ended."""
        if self.lens is not None:
            self.lens.step(step=args[1].global_step)

    def on_log(self, *args: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Keep what the trainer reports beside our own numbers."""
        if self.lens is None or not logs:
            return
        train = {name: value for name, value in logs.items() if not name.startswith("eval_")}
        self.lens.log(_loggable(train), source="framework")
        if self.trainer is None and _is_number(logs.get("grad_norm")):
            self.lens.log({"norm/before_clip": logs["grad_norm"]}, source="gradient")

    def on_evaluate(self, *args: Any, metrics: Mapping[str, Any], **kwargs: Any) -> None:
        """Write the evaluation's metrics with phase eval; its time is no step's time."""
        if self.lens is None:
            return
        named = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        loss = named.pop("loss", None)
        if _is_number(loss):
            self.lens.log({"mean": loss}, source="loss", phase="eval")
        self.lens.log(_loggable(named), source="framework", phase="eval")
        self.lens.restart_clock()

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """Leave the checkpoint's time out of the next step's."""
        if self.lens is not None:
            self.lens.restart_clock()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Seal the log."""
        self.close()


def attach(
    trainer: Trainer,
    run_dir: str | Path | None = None,
    *,
    sample_id: str | None = None,
    **lens: Any,
) -> EntropyLensCallback:
    """Let a Lens watch ``trainer``: one line before ``trainer.train()``.

    Args:
        trainer: A `transformers.Trainer` or a subclass.
        run_dir: Where the log goes; by default ``<output_dir>/entropylens``.
        sample_id: Names the samples in the log: a column of the training set, or ``"index"`` for
            the row number. None leaves samples numbered within their step.
        **lens: Other arguments of `entropylens.Lens`: ``preset``, ``max_overhead``, ...

    Returns:
        The callback, first in the trainer's list; its ``lens`` is there while training runs.

    Raises:
        ValueError: The trainer has one already, or its training set has no such column.
    """
    if any(isinstance(c, EntropyLensCallback) for c in trainer.callback_handler.callbacks):
        raise ValueError(
            "attach: expected a trainer without an EntropyLensCallback, got one that has it; "
            "attach once, or leave it out of callbacks="
        )
    if sample_id is not None:
        _name_samples(trainer, sample_id)
    callback = EntropyLensCallback(run_dir, **lens)
    callback.trainer = trainer
    trainer.callback_handler.callbacks.insert(0, callback)
    trainer.compute_loss = _watched_loss(trainer.compute_loss, callback)
    trainer.prediction_step = _without_names(trainer.prediction_step)
    trainer.accelerator.clip_grad_norm_ = _watched_clipping(
        trainer.accelerator.clip_grad_norm_, callback
    )
    trainer.train = _watched_training(trainer.train, callback)
    return callback


def _watched_loss(compute_loss: Callable[..., Any], callback: EntropyLensCallback) -> Any:
    @functools.wraps(compute_loss)
    def watched(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        ids, lens = _without_name(inputs), callback.lens
        if lens is None or not model.training:
            return compute_loss(model, inputs, *args, **kwargs)
        lens.watch.next_sample_ids = ids
        # Label smoothing and a loss function of the user's own keep the labels from the model.
        lens.watch.next_labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
        result = compute_loss(model, inputs, *args, **kwargs)
        lens.watch.next_sample_ids = lens.watch.next_labels = None
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


def _without_name(inputs: Any) -> Any:
    """Take the samples' identifiers out of a batch; None where it has none."""
    return inputs.pop(SAMPLE_ID, None) if isinstance(inputs, MutableMapping) else None


def _without_names(prediction_step: Callable[..., Any]) -> Any:
    @functools.wraps(prediction_step)
    def unnamed(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        _without_name(inputs)
        return prediction_step(model, inputs, *args, **kwargs)

    return unnamed


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
        try:
            return train(*args, **kwargs)
        except BaseException as error:
            state = "failed" if isinstance(error, Exception) else "terminated"
            callback.close(state, f"{type(error).__name__}: {error}")
            raise

    return watched


def _name_samples(trainer: Trainer, column: str) -> None:
    """Carry an identifier of each sample from the training set to `compute_loss`."""
    dataset: Any = trainer.train_dataset
    source = _Named(dataset, column)
    source.check()
    trainer.train_dataset = source
    trainer.data_collator = _NamingCollator(trainer.data_collator)
    # Columns that forward() does not take are dropped unless they are in this list.
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns = [*trainer._signature_columns, SAMPLE_ID]


class _Named:
    """A map-style dataset whose samples carry their identifier."""

    def __init__(self, dataset: Any, column: str) -> None:
        self.dataset, self.column = dataset, column

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name in ("dataset", "__getitems__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._named(index, self.dataset[index])

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        # A set that reads a whole batch at once also transforms it at once, maybe at random.
        read = getattr(self.dataset, "__getitems__", None)
        samples = [self.dataset[i] for i in indices] if read is None else read(indices)
        return [self._named(i, sample) for i, sample in zip(indices, samples, strict=True)]

    def _named(self, index: int, found: Mapping[str, Any]) -> dict[str, Any]:
        sample = dict(found)
        sample[SAMPLE_ID] = index if self.column == "index" else sample[self.column]
        return sample

    def check(self) -> None:
        """Refuse a set without the column, before training starts."""
        is_map = hasattr(self.dataset, "__getitem__") and hasattr(self.dataset, "__len__")
        if not is_map or isinstance(self.dataset, IterableDataset):
            raise ValueError(
                f"attach: expected a map-style training set for sample_id={self.column!r}, got "
                f"{type(self.dataset).__name__}"
            )
        first = self.dataset[0]
        if not isinstance(first, Mapping):
            raise ValueError(
                f"attach: expected a training set of mappings for sample_id={self.column!r}, got "
                f"samples of {type(first).__name__}"
            )
        if self.column != "index" and self.column not in first:
            raise ValueError(
                f"attach: expected sample_id to be 'index' or a column of the training set "
                f"({', '.join(map(str, first))}), got {self.column!r}"
            )


class _NamingCollator:
    """Keeps identifiers, which may be text, away from the collator that makes tensors."""

    def __init__(self, collator: Callable[..., Any]) -> None:
        self.collator = collator

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> Any:
        if not all(isinstance(sample, Mapping) and SAMPLE_ID in sample for sample in samples):
            return self.collator(samples)
        ids = [str(sample[SAMPLE_ID]) for sample in samples]
        batch = self.collator(
            [{k: v for k, v in sample.items() if k != SAMPLE_ID} for sample in samples]
        )
        if isinstance(batch, MutableMapping):
            batch[SAMPLE_ID] = ids
        return batch


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _loggable(values: Mapping[str, Any]) -> dict[str, float]:
    """Numbers only, under names that the log allows."""
    named = {
        re.sub(r"/+", "/", re.sub(r"[^a-z0-9_/]+", "_", name.lower())).strip("_/"): value
        for name, value in values.items()
    }
    return {name: float(v) for name, v in named.items() if name and _is_number(v)}
