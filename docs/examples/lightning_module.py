"""Lightning: one callback; logits and targets are handed over with the loss."""

from pydoc_data.topics import topics
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import entropylens as el
from entropylens_callbacks.lightning import EntropyLensCallback

LENGTH = 32
text = "\n".join(topics.values())[:60_000]
letters = sorted(set(text))
codes = torch.tensor([letters.index(letter) for letter in text])
windows = codes[: len(codes) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)


class Letters(pl.LightningModule):
    """Predicts the next letter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(letters), 32)
        self.memory = nn.GRU(32, 64, batch_first=True)
        self.head = nn.Linear(64, len(letters))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.memory(self.embedding(inputs))[0])

    def loss_of(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def training_step(self, batch: list[torch.Tensor], number: int) -> dict[str, torch.Tensor]:
        inputs, targets = batch[0][:, :-1], batch[0][:, 1:]
        logits = self(inputs)
        loss = self.loss_of(logits, targets)
        self.log("train_loss", loss)
        return {"loss": loss, "logits": logits, "targets": targets}

    def validation_step(self, batch: list[torch.Tensor], number: int) -> None:
        self.log("val_loss", self.loss_of(self(batch[0][:, :-1]), batch[0][:, 1:]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def fit(epochs: int, **options: Any) -> None:
    torch.manual_seed(0)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        log_every_n_steps=5,
        logger=CSVLogger("out/lightning"),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            EntropyLensCallback("runs/lightning", preset="full"),
            ModelCheckpoint("out/lightning/kept", filename="last"),
        ],
    )
    train = DataLoader(TensorDataset(windows[:-64]), batch_size=32, shuffle=True)
    trainer.fit(Letters(), train, DataLoader(TensorDataset(windows[-64:]), 32), **options)


def main() -> None:
    fit(1)
    fit(2, ckpt_path="out/lightning/kept/last.ckpt")
    run = el.open_run("runs/lightning")
    losses = run.metrics("loss/mean", phases="train").to_pandas()
    held_out = run.metrics("loss/mean", phases="eval").to_pandas()
    print(f"{len(losses)} steps, each once; loss {losses.value.iloc[0]:.2f} to "
          f"{losses.value.iloc[-1]:.2f}, held out {held_out.value.iloc[-1]:.2f}; "
          f"{len(run.attempts)} attempts")  # fmt: skip


if __name__ == "__main__":
    main()
