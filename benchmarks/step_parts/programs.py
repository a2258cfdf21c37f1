"""What is trained: data, architectures, optimisers, and each pair's learning rate.

Fashion-MNIST is average-pooled to 14x14 and normalised; the characters are those of Python's own
help, of which the last tenth is held out.
"""

import gzip
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Final, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from entropylens.errors import EntropyLensError

__all__ = [
    "FOLDER",
    "OPTIMISERS",
    "PROGRAMS",
    "RATES",
    "SWEPT",
    "WARMUP",
    "Images",
    "Material",
    "Program",
    "Text",
    "cross_entropy",
    "evaluate",
    "generator",
    "images",
    "text",
]

FOLDER: Final = "FASHION_MNIST"
"""Environment variable: where the pictures are, if not where Debian puts them."""
INSTALLED: Final = Path("/usr/share/datasets/fashion-mnist")
CHARACTERS: Final = tuple(map(chr, (10, *range(32, 127))))
"""What the language model knows: line breaks and printable ASCII."""
CONTEXT: Final = 64
NOISE: Final = 10.0
"""Standard deviations of garbage pictures, where the data have one."""

Batch = tuple[Tensor, Tensor]


class Material(Protocol):
    """Where batches come from."""

    @property
    def classes(self) -> int:
        """How many answers there are."""
        ...

    @property
    def test(self) -> Batch:
        """For judging."""
        ...

    def batch(self, source: torch.Generator, share: float, shifted: bool) -> Batch:
        """A share of a whole batch, of other data than usual if they are to be shifted."""
        ...

    def garbage(self, source: torch.Generator) -> Batch:
        """A batch that nothing can be learned from."""
        ...


@dataclass(frozen=True, eq=False)
class Images:
    """Pictures in classes.

    Args:
        train: Inputs ``[n, 1, 14, 14]`` and labels.
        test: The same, for judging.
        classes: How many labels there are.
        size: Pictures in a whole batch.
    """

    train: Batch
    test: Batch
    classes: int = 10
    size: int = 64

    def batch(self, source: torch.Generator, share: float = 1.0, shifted: bool = False) -> Batch:
        inputs, labels = self.train
        count = len(self._first_half) if shifted else len(labels)
        picked = torch.randint(count, (round(share * self.size),), generator=source)
        picked = self._first_half[picked] if shifted else picked
        return inputs[picked], labels[picked]

    def garbage(self, source: torch.Generator) -> Batch:
        inputs = NOISE * torch.randn(self.size, *self.train[0].shape[1:], generator=source)
        return inputs, torch.randint(self.classes, (self.size,), generator=source)

    @cached_property
    def _first_half(self) -> Tensor:
        return (self.train[1] < self.classes // 2).nonzero()[:, 0]


@dataclass(frozen=True, eq=False)
class Text:
    """Characters, each to be foretold from those before it in its window.

    Args:
        train: ``[n]`` numbers of characters.
        other: Of another text.
        test: Inputs and targets, ``[windows, 64]``.
        classes: How many characters there are.
        size: Windows in a whole batch.
    """

    train: Tensor
    other: Tensor
    test: Batch
    classes: int = len(CHARACTERS)
    size: int = 16

    def batch(self, source: torch.Generator, share: float = 1.0, shifted: bool = False) -> Batch:
        characters = self.other if shifted else self.train
        count = len(characters) - CONTEXT
        first = torch.randint(count, (round(share * self.size), 1), generator=source)
        found = characters[first + torch.arange(CONTEXT + 1)]
        return found[:, :-1], found[:, 1:]

    def garbage(self, source: torch.Generator) -> Batch:
        drawn = torch.randint(self.classes, (2, self.size, CONTEXT), generator=source)
        return drawn[0], drawn[1]


@cache
def images() -> Images:
    """Fashion-MNIST, from `FOLDER` or from where Debian's package puts it.

    Raises:
        EntropyLensError: It is not there.
    """
    folder = Path(os.environ.get(FOLDER, INSTALLED))
    if not (folder / "train-images-idx3-ubyte.gz").exists():
        raise EntropyLensError(
            f"step_faults: expected the four .gz files of Fashion-MNIST in {folder}, found none; "
            f"get them by `apt-get install dataset-fashion-mnist`, or name their folder by --data"
        )
    train, test = (_pictures(folder, name) for name in ("train", "t10k"))
    sd, mean = torch.std_mean(train[0])
    return Images(((train[0] - mean) / sd, train[1]), ((test[0] - mean) / sd, test[1]))


@cache
def text() -> Text:
    """Python's help; source code of its library is the other text."""
    found = _characters("".join(topics[name] for name in sorted(topics)))
    cut = len(found) * 9 // 10
    held = found[cut:]
    windows = (len(held) - 1) // CONTEXT
    inputs, targets = (held[at : at + windows * CONTEXT].view(windows, CONTEXT) for at in (0, 1))
    # In no order, so that the first of them are of all topics.
    order = torch.randperm(windows, generator=torch.Generator().manual_seed(0))
    library = Path(os.__file__).parent
    code = [(library / f"{name}.py").read_text() for name in ("statistics", "tarfile", "argparse")]
    return Text(found[:cut], _characters("".join(code)), (inputs[order], targets[order]))


def _characters(written: str) -> Tensor:
    known = {character: number for number, character in enumerate(CHARACTERS)}
    return torch.tensor([known[character] for character in written if character in known])


def _pictures(folder: Path, name: str) -> Batch:
    raw = _read(folder / f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)
    labels = _read(folder / f"{name}-labels-idx1-ubyte.gz", 8)
    return F.avg_pool2d(torch.from_numpy(raw).float() / 255, 2), torch.from_numpy(labels).long()


def _read(path: Path, skip: int) -> NDArray[np.uint8]:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=skip).copy()


def generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """The randomness of a step, a function of its number: order of data, noise of a fault."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 8 + stream)


# -- architectures -----------------------------------------------------------------------------


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(196, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
        nn.Linear(128, 10),
    )  # fmt: skip


def mlp_layer_norm() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(196, 128), nn.LayerNorm(128), nn.GELU(),
        nn.Linear(128, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 10),
    )  # fmt: skip


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(144, 10),
    )  # fmt: skip


def cnn_batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(144, 10),
    )  # fmt: skip


class Block(nn.Module):
    """Attention written out, for forward-mode derivatives pass through all of it, and an MLP."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        split = self.project(self.before_attention(x)).view(batch, tokens, 3, self.heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / (width // self.heads) ** 0.5
        if self.causal:
            scores = scores + torch.full((tokens, tokens), -1e9).triu(1)
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.join(mixed)
        return x + self.narrow(F.gelu(self.widen(self.before_mlp(x))))


class VisionTransformer(nn.Module):
    """Sixteen patches that overlap, one block, the mean of its tokens."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 5, stride=3)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.block = Block(width, 4, causal=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.block(tokens)).mean(1))


class CharacterModel(nn.Module):
    """One causal block over 64 characters."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(CHARACTERS), width)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.block = Block(width, 4, causal=True)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(CHARACTERS))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.embedding(x) + self.position)))


@dataclass(frozen=True)
class Program:
    """A model, and what it learns.

    Args:
        build: Makes the model with the global randomness.
        material: Gives the data.
        whole: Test samples for the final judgement, or windows.
        part: Those among them that are judged on the way.
    """

    build: Callable[[], nn.Module]
    material: Callable[[], Material]
    whole: int
    part: int


PROGRAMS: Final[Mapping[str, Program]] = {
    "mlp": Program(mlp, images, 10_000, 2_000),
    "mlp_layer_norm": Program(mlp_layer_norm, images, 10_000, 2_000),
    "cnn": Program(cnn, images, 10_000, 2_000),
    "cnn_batch_norm": Program(cnn_batch_norm, images, 10_000, 2_000),
    "vision_transformer": Program(VisionTransformer, images, 10_000, 2_000),
    "character_model": Program(CharacterModel, text, 160, 32),
}


# -- optimisers --------------------------------------------------------------------------------


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters)


def _momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, momentum=0.9)


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, betas=(0.9, 0.999))


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.1)


OPTIMISERS: Final[Mapping[str, Callable[[Any], torch.optim.Optimizer]]] = {
    "sgd": _sgd,
    "momentum": _momentum,
    "adam": _adam,
    "adamw": _adamw,
}
WARMUP: Final[Mapping[str, int]] = {"sgd": 0, "momentum": 0, "adam": 0, "adamw": 20}
"""Steps over which the learning rate rises linearly."""
SWEPT: Final[Mapping[str, tuple[float, ...]]] = {
    "sgd": (0.01, 0.03, 0.1, 0.3, 1.0),
    "momentum": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    "adam": (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
    "adamw": (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
}
RATES: Final[Mapping[str, Mapping[str, float]]] = {
    "mlp": {"sgd": 0.3, "momentum": 0.03, "adam": 0.003, "adamw": 0.003},
    "mlp_layer_norm": {"sgd": 0.3, "momentum": 0.03, "adam": 0.001, "adamw": 0.003},
    "cnn": {"sgd": 0.3, "momentum": 0.03, "adam": 0.01, "adamw": 0.01},
    "cnn_batch_norm": {"sgd": 0.3, "momentum": 0.03, "adam": 0.03, "adamw": 0.01},
    "vision_transformer": {"sgd": 0.3, "momentum": 0.03, "adam": 0.003, "adamw": 0.01},
    "character_model": {"sgd": 0.3, "momentum": 0.1, "adam": 0.03, "adamw": 0.03},
}
"""The best of `SWEPT` by final accuracy without a fault, seed 0: ``--sweep`` shows them."""


# -- judging -----------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, batch: Batch, count: int, classes: int) -> tuple[float, float]:
    """Accuracy in percent and mean loss, of the first samples.

    The model is left alone: what is asked is in evaluation mode. Where a logit is NaN it knows no
    better than chance.
    """
    logits = torch.cat([model(part) for part in batch[0][:count].split(500)]).flatten(0, -2)
    targets = batch[1][:count].flatten()
    loss = cross_entropy(logits, targets).item()
    if logits.isnan().any():
        return 100 / classes, loss
    return 100 * (logits.argmax(-1) == targets).double().mean().item(), loss
