"""Names of samples, carried from a Hugging Face training set to the loss."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Final

from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import Trainer

__all__ = ["check_names", "name_samples", "take_names", "without_names"]

SAMPLE_ID: Final = "entropylens_sample_id"


def check_names(trainer: Trainer, column: str) -> None:
    """Refuse a training set whose samples cannot be named by ``column``.

    Raises:
        ValueError: The training set is not map-style, has no mappings, or no such column.
    """
    _Named(trainer.train_dataset, column).check()


def name_samples(trainer: Trainer, column: str) -> None:
    """Have every batch of ``trainer`` carry an identifier of each of its samples.

    A `datasets.Dataset` stays one, with a column more: trainers ask for its kind, and sort it by
    length. Any other set is wrapped.

    Args:
        trainer: Its training set, its collator and its list of kept columns are replaced.
        column: A column of the training set, or ``"index"`` for the row number.

    Raises:
        ValueError: As `check_names`.
    """
    check_names(trainer, column)
    dataset = trainer.train_dataset
    if type(dataset).__module__.startswith("datasets.") and dataset.format["type"] is None:
        names = range(len(dataset)) if column == "index" else dataset[column]
        trainer.train_dataset = dataset.add_column(SAMPLE_ID, [str(name) for name in names])
    else:
        trainer.train_dataset = _Named(dataset, column)
    trainer.data_collator = _NamingCollator(trainer.data_collator)
    # Columns that forward() does not take are dropped unless they are in this list.
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns = [*trainer._signature_columns, SAMPLE_ID]


def take_names(inputs: Any) -> list[str] | None:
    """Take the identifiers out of a batch; None where it has none.

    A batch of preference pairs holds the chosen rows, then the rejected ones.
    """
    names = inputs.pop(SAMPLE_ID, None) if isinstance(inputs, MutableMapping) else None
    rows = inputs.get("input_ids") if names is not None else None
    if isinstance(rows, Tensor) and names and rows.shape[0] == 2 * len(names):
        return [f"{name}/{part}" for part in ("chosen", "rejected") for name in names]
    return names


def without_names(prediction_step: Callable[..., Any]) -> Any:
    """``prediction_step`` for batches that may carry identifiers."""

    def unnamed(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        take_names(inputs)
        return prediction_step(model, inputs, *args, **kwargs)

    return unnamed


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
        name = index if self.column == "index" else sample[self.column]
        sample[SAMPLE_ID] = name.item() if isinstance(name, Tensor) else name
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

    def __getattr__(self, name: str) -> Any:
        if name == "collator":
            raise AttributeError(name)
        return getattr(self.collator, name)

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
