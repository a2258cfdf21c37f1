"""The net, as Lightning trains it."""

from collections import OrderedDict
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

__all__ = ["Classifier", "states_of"]


class Classifier(pl.LightningModule):  # type: ignore[misc]
    """Two convolutions, a hidden layer and a head; learns an image's class.

    Args:
        side: Pixels on a side of an image.
        rate: Adam's learning rate.
    """

    def __init__(self, side: int, rate: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.rate = rate
        self.net = nn.Sequential(
            OrderedDict(
                first=nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
                second=nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
                hidden=nn.Sequential(
                    nn.Flatten(), nn.Linear(32 * (side // 4) ** 2, 256), nn.ReLU()
                ),
                head=nn.Linear(256, 10),
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: list[Tensor], number: int) -> dict[str, Tensor]:
        images, labels = batch
        logits = self(images)
        loss = cross_entropy(logits, labels)
        self.log("accuracy", _share_right(logits, labels), on_step=False, on_epoch=True)
        return {"loss": loss, "logits": logits, "targets": labels}

    def validation_step(self, batch: list[Tensor], number: int) -> None:
        images, labels = batch
        logits = self(images)
        self.log("val_loss", cross_entropy(logits, labels))
        self.log("val_accuracy", _share_right(logits, labels))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.rate)


@torch.no_grad()
def states_of(net: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What does each layer make of these images?

    Args:
        net: Its children are the layers, in order.
        images: ``[n, 1, side, side]``.

    Returns:
        By layer ``[n, width]``, float32; of a convolution the mean over places, as the live probe
        takes it.
    """
    states, out = {}, images
    for name, layer in net.named_children():
        out = layer(out)
        states[name] = out.flatten(2).mean(2) if out.ndim > 2 else out
    return states


def _share_right(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(-1) == labels).float().mean()
