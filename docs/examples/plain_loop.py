"""A plain PyTorch loop: accumulation, clipping, evaluation, a checkpoint and its resumption."""

from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import nn

import entropylens as el

STEPS, BATCH, LENGTH, MICRO_BATCHES = 60, 16, 32, 2
text = "\n".join(topics.values())[:200_000]
letters = sorted(set(text))
codes = torch.tensor([letters.index(letter) for letter in text])


class Model(nn.Module):
    """Predicts the next letter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(letters), 32)
        self.memory = nn.GRU(32, 64, batch_first=True)
        self.head = nn.Linear(64, len(letters))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.memory(self.embedding(inputs))[0])


def batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Windows of the text, what follows each letter, and where the windows begin."""
    starts = torch.randint(len(codes) - LENGTH - 1, (BATCH,), generator=generator)
    windows = torch.stack([codes[start : start + LENGTH + 1] for start in starts])
    return windows[:, :-1], windows[:, 1:], starts.tolist()


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train(first: int, last: int, model: Model, optimizer: torch.optim.Optimizer,
          lens: el.Lens) -> None:  # fmt: skip
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for _ in range(MICRO_BATCHES):
            inputs, targets, starts = batch(generator)
            logits = model(inputs)
            loss = loss_of(logits, targets)
            (loss / MICRO_BATCHES).backward()
            lens.observe(logits=logits, targets=targets, loss=loss, sample_id=starts)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        lens.step(gradient_norm=norm)
        if lens.last_step % 20 == 0:
            with torch.no_grad(), lens.evaluation():
                inputs, targets, _ = batch(torch.Generator().manual_seed(-1))
                lens.log({"held_out": loss_of(model(inputs), targets)})


def main() -> None:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with el.Lens(model, optimizer, run_dir="runs/plain", preset="full") as lens:
        train(0, STEPS // 2, model, optimizer, lens)
        checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                      "lens": lens.state_dict()}  # fmt: skip
        torch.save(checkpoint, "plain.pt")
        train(STEPS // 2, STEPS // 2 + 7, model, optimizer, lens)  # lost: the machine goes down

    saved = torch.load("plain.pt", weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    with el.Lens(model, optimizer, run_dir="runs/plain", preset="full",
                 state=saved["lens"]) as lens:  # fmt: skip
        train(lens.last_step, STEPS, model, optimizer, lens)

    run = el.open_run("runs/plain")
    losses = run.metrics("loss/mean", phases="train").to_pandas()
    print(f"{len(losses)} steps, each once; loss {losses.value.iloc[0]:.2f} to "
          f"{losses.value.iloc[-1]:.2f}; {len(run.attempts)} attempts")  # fmt: skip
    Path("plain.pt").unlink()


if __name__ == "__main__":
    main()
