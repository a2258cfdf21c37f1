"""The images that a seed trains on, those it never sees, and labels in the wrong order."""

import gzip
import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import avg_pool2d

__all__ = ["FOLDER", "Labelled", "Split", "read_split", "shuffled"]

FOLDER: Final = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))


@dataclass(frozen=True)
class Labelled:
    """Images ``[n, 1, side, side]`` and their classes ``[n]``."""

    images: Tensor
    labels: Tensor

    def __getitem__(self, at: slice) -> "Labelled":
        return Labelled(self.images[at], self.labels[at])


@dataclass(frozen=True)
class Split:
    """What one seed trains on, and what it never sees."""

    source: str
    """``fashion``, or ``digits`` where that is not installed."""
    trained: Labelled
    held_out: Labelled

    @property
    def side(self) -> int:
        """Pixels on a side."""
        return self.trained.images.shape[-1]


def read_split(folder: Path, seed: int, trained: int, held_out: int) -> Split:
    """Which images does this seed use?

    Fashion-MNIST averaged over 2 x 2 pixels, both parts standardised by the training pixels' mean
    and deviation; scikit-learn's digits, 8 x 8, where the folder has none.

    Args:
        folder: Of Fashion-MNIST's four ``.gz`` files.
        seed: Chooses them.
        trained: Images to train on; of the digits two thirds of all at most.
        held_out: Images of the test part; of the digits those that are left at most.

    Raises:
        SystemExit: Neither data set is there.
    """
    generator = torch.Generator().manual_seed(seed)
    if (folder / "train-images-idx3-ubyte.gz").exists():
        source, parts = "fashion", (_fashion(folder, "train"), _fashion(folder, "t10k"))
    else:
        source, parts = "digits", _digits(folder)
    chosen = [
        _drawn(part, count, generator)
        for part, count in zip(parts, (trained, held_out), strict=True)
    ]
    deviation, mean = torch.std_mean(chosen[0].images)
    return Split(source, *(Labelled((c.images - mean) / deviation, c.labels) for c in chosen))


def shuffled(labels: Tensor, seed: int) -> Tensor:
    """The same labels in an order that has nothing to do with the images."""
    generator = torch.Generator().manual_seed(seed)
    return labels[torch.randperm(len(labels), generator=generator)]


def _drawn(part: Labelled, count: int, generator: torch.Generator) -> Labelled:
    order = torch.randperm(len(part.labels), generator=generator)[:count]
    return Labelled(part.images[order], part.labels[order])


def _fashion(folder: Path, part: str) -> Labelled:
    pixels = _idx(folder / f"{part}-images-idx3-ubyte.gz", header=16).reshape(-1, 1, 28, 28)
    labels = _idx(folder / f"{part}-labels-idx1-ubyte.gz", header=8)
    return Labelled(avg_pool2d(torch.tensor(pixels).float(), 2), torch.tensor(labels).long())


def _idx(path: Path, header: int) -> NDArray[np.uint8]:
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


def _digits(folder: Path) -> tuple[Labelled, Labelled]:
    try:
        found = import_module("sklearn.datasets").load_digits()
    except ModuleNotFoundError:
        raise SystemExit(
            f"run.py: expected Fashion-MNIST's four .gz files in {folder}, found none, nor "
            f"scikit-learn's digits; apt-get install dataset-fashion-mnist, name another folder by "
            f"--data or the variable FASHION_MNIST, or pip install scikit-learn"
        ) from None
    images = torch.tensor(found.images).float().unsqueeze(1)
    labels = torch.tensor(found.target).long()
    cut = len(labels) * 2 // 3
    return Labelled(images[:cut], labels[:cut]), Labelled(images[cut:], labels[cut:])
