"""The images, the nets and the trainings whose updates `step_onset` follows."""

import gzip
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

DATA = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
TRAINED, HELD_OUT = 2000, 512
"""Few training images: 3,000 steps of 64 come round 96 times, and nets get sure of them."""
PROBE = 256
"""Training images on which updates are measured."""
MEAN, DEVIATION = 0.286, 0.32
SIDE, CLASSES, WIDTH, HEADS = 14, 10, 32, 4


@dataclass(frozen=True)
class Images:
    """Fashion-MNIST, averaged over 2 x 2 pixels: ``[n, 1, 14, 14]``, and labels ``[n]``."""

    images: Tensor
    labels: Tensor

    def __getitem__(self, at: Tensor | slice) -> "Images":
        return Images(self.images[at], self.labels[at])


@dataclass(frozen=True)
class Split:
    """What one seed trains on, and what it never sees; the probe is a part of the first."""

    trained: Images
    held_out: Images

    @property
    def probe(self) -> Images:
        return self.trained[:PROBE]


def read_split(folder: Path, seed: int) -> Split:
    """Which images does this seed use?

    Raises:
        FileNotFoundError: The folder has no Fashion-MNIST.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for part, count in (("train", TRAINED), ("t10k", HELD_OUT)):
        pixels = _idx(folder / f"{part}-images-idx3-ubyte.gz", header=16).reshape(-1, 1, 28, 28)
        labels = _idx(folder / f"{part}-labels-idx1-ubyte.gz", header=8)
        chosen = torch.randperm(len(labels), generator=generator)[:count].numpy()
        pooled = avg_pool2d(torch.from_numpy(pixels[chosen]) / 255, 2)
        parts.append(Images((pooled - MEAN) / DEVIATION, torch.from_numpy(labels[chosen]).long()))
    return Split(*parts)


def _idx(path: Path, header: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    if not path.exists():
        raise FileNotFoundError(
            f"step_onset: expected Fashion-MNIST's {path.name} in {path.parent}; "
            "apt-get install dataset-fashion-mnist, or name another folder by --data "
            "or the variable FASHION_MNIST"
        )
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


class Attention(nn.Module):
    """Self-attention, written out: torch's fused one has no forward derivative on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.split = nn.Linear(WIDTH, 3 * WIDTH)
        self.join = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, _ = tokens.shape
        query, key, value = (
            self.split(tokens).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        )
        scores = query @ key.transpose(2, 3) / (WIDTH // HEADS) ** 0.5
        mixed: Tensor = scores.softmax(3) @ value
        return self.join(mixed.transpose(1, 2).reshape(batch, length, WIDTH))


class Transformer(nn.Module):
    """Each of the 14 rows is a token; one block, normalised before each part."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(SIDE, WIDTH)
        self.place = nn.Parameter(0.02 * torch.randn(SIDE, WIDTH))
        self.attend = nn.Sequential(nn.LayerNorm(WIDTH), Attention())
        self.feed = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )
        self.read = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images[:, 0]) + self.place
        tokens = tokens + self.attend(tokens)
        tokens = tokens + self.feed(tokens)
        return self.read(tokens.mean(1))


def perceptron(*widths: int, activation: type[nn.Module], norm: bool = False) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in zip((SIDE * SIDE, *widths), widths, strict=False):
        layers += [nn.Linear(before, after), *[nn.LayerNorm(after)] * norm, activation()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


def convolutions(norm: bool) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((1, 8), (8, 16)):
        layers += [nn.Conv2d(before, after, 3, padding=1), *[nn.BatchNorm2d(after)] * norm]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * (SIDE // 4) ** 2, CLASSES))


NETS: OrderedDict[str, Callable[[], nn.Module]] = OrderedDict(
    linear=lambda: nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, CLASSES)),
    mlp=partial(perceptron, 128, activation=nn.ReLU),
    mlp_layer_norm=partial(perceptron, 64, 64, 64, activation=nn.GELU, norm=True),
    cnn=partial(convolutions, norm=False),
    cnn_batch_norm=partial(convolutions, norm=True),
    transformer=Transformer,
)


class Tempered(nn.Module):
    """A net whose logits are divided by a temperature."""

    def __init__(self, net: nn.Module, temperature: float) -> None:
        super().__init__()
        self.net, self.temperature = net, temperature

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images) / self.temperature


@dataclass(frozen=True)
class Training:
    """A net that Adam trains; batch norm stays in training mode, as the loss uses it."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Iterator[Images]

    def step(self) -> None:
        batch = next(self.batches)
        self.optimizer.zero_grad()
        cross_entropy(self.net(batch.images), batch.labels).backward()
        self.optimizer.step()


def begin(net: nn.Module, data: Images, seed: int, *, rate: float, batch: int) -> Training:
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[Images]:
        while True:
            for at in torch.randperm(len(data.labels), generator=generator).split(batch):
                yield data[at]

    return Training(net, torch.optim.Adam(net.parameters(), lr=rate), batches())
