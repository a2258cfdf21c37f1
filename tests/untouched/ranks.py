"""What two processes of one distributed training do; ``python -m untouched.ranks FOLDER``.

Each training runs bare and watched, and is compared on its own rank; what was found is written to
``FOLDER/rank-N.json``, the logs to ``FOLDER/NAME/run``.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from untouched import tiny
from untouched.in_lightning import Base
from untouched.in_transformers import grpo, hf, rloo, sft, trained
from untouched.trainings import Outcome, Watch, adamw, differences, hooks_left, lens_over

from entropylens import StepBound
from entropylens_callbacks.lightning import EntropyLensCallback

STEPS = 4
RANKS = 2
CLIP = 0.5


def batches(rank: int) -> list[Tensor]:
    """What a rank trains on; a fifth of the labels, not the same on both, are masked."""
    stream = tiny.token_batches(seed=100 + rank)
    return [next(stream) for _ in range(STEPS)]


def labels_of(tokens: Tensor, rank: int) -> Tensor:
    return tokens.masked_fill(tokens % 5 == rank, -100)


def model() -> Any:
    found = tiny.llama()
    return found.eval()  # no dropout: ranks and a single process are compared


def _whole(values: Any) -> Any:
    """This rank's part of every tensor."""
    if isinstance(values, dict):
        return {k: _whole(v) for k, v in values.items()}
    if isinstance(values, list):
        return [_whole(v) for v in values]
    return values.to_local().clone() if isinstance(values, DTensor) else values


def plain(watch: Watch | None, folder: Path, wrap: Callable[[Any], Any]) -> Outcome:
    rank = torch.distributed.get_rank()
    wrapped = wrap(model())
    optimizer = adamw(wrapped)
    losses = []
    with lens_over(watch, folder, wrapped, optimizer) as lens:
        for tokens in batches(rank):
            loss = wrapped(input_ids=tokens, labels=labels_of(tokens, rank)).loss
            loss.backward()
            norm: Any = nn.utils.clip_grad_norm_(wrapped.parameters(), CLIP)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if lens is not None:
                lens.step(gradient_norm=norm)
        run_dir = lens.run_dir if lens is not None else None
    outcome = Outcome(wrapped, [optimizer], [], losses, run_dir)
    outcome.states = _whole(outcome.states)
    return outcome


def ddp(watch: Watch | None, folder: Path) -> Outcome:
    return plain(watch, folder, DistributedDataParallel)


def fsdp2(watch: Watch | None, folder: Path) -> Outcome:
    def shard(found: Any) -> Any:
        for layer in found.model.layers:
            fully_shard(layer)
        return fully_shard(found)

    return plain(watch, folder, shard)


def transformers_ddp(watch: Watch | None, folder: Path) -> Outcome:
    return trained(watch, folder, hf(folder, max_steps=STEPS))


def controlled_ddp(watch: Watch | None, folder: Path) -> Outcome:
    """With a controller that looks at every step and, in shadow, would scale each."""
    control = StepBound(policy="radius", mode="shadow", level=1e-6, warmup=1)
    return transformers_ddp(None if watch is None else {**watch, "control": control}, folder)


def trl_ddp(watch: Watch | None, folder: Path) -> Outcome:
    return trained(watch, folder, sft(folder, max_steps=STEPS))


def policy_ddp(watch: Watch | None, folder: Path, make: Callable[..., Any], size: int) -> Outcome:
    """``size`` completions a rank in groups of 4; RLOO would take the KL for part of the reward."""
    own = folder / f"rank-{torch.distributed.get_rank()}"
    trainer = make(own, max_steps=STEPS, per_device_train_batch_size=size, beta=0.0)
    return trained(watch, folder, trainer)


class OnRanks(Base):
    """Sharded, where the strategy asks for it."""

    def __init__(self, *, sharded: bool) -> None:
        super().__init__()
        self.net, self.sharded = model(), sharded

    def configure_model(self) -> None:
        if self.sharded:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Tensor, number: int) -> Tensor:
        self.net.eval()
        labels = labels_of(batch, self.trainer.global_rank)
        return self.keep(self.net(input_ids=batch, labels=labels).loss)

    def make_optimizer(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def lightning(watch: Watch | None, folder: Path, *, sharded: bool) -> Outcome:
    module = OnRanks(sharded=sharded)
    callbacks = [] if watch is None else [EntropyLensCallback(folder / "run", **watch)]
    strategy = (
        ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1)
        if sharded
        else DDPStrategy()
    )
    rank = torch.distributed.get_rank()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=strategy,
        max_epochs=1,
        logger=False,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        default_root_dir=str(folder),
    )
    trainer.fit(module, DataLoader(batches(rank), batch_size=None))  # type: ignore[arg-type]
    outcome = Outcome(module, trainer.optimizers, [], module.losses)
    outcome.states = _whole(outcome.states)
    return outcome


TRAININGS: dict[str, Callable[[Watch | None, Path], Outcome]] = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    "transformers": transformers_ddp,
    "controlled": controlled_ddp,
    "trl": trl_ddp,
    "grpo": lambda watch, folder: policy_ddp(watch, folder, grpo, 8),
    "grpo_across": lambda watch, folder: policy_ddp(watch, folder, grpo, 6),
    "rloo": lambda watch, folder: policy_ddp(watch, folder, rloo, 8),
    "lightning": lambda watch, folder: lightning(watch, folder, sharded=False),
    "lightning_fsdp2": lambda watch, folder: lightning(watch, folder, sharded=True),
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    found: dict[str, Any] = {}
    for name, train in TRAININGS.items():
        outcomes = []
        for part, watch in (("bare", None), ("", {"preset": "full", "max_overhead": None})):
            torch.manual_seed(0)
            outcomes.append(train(watch, folder / name / part))
        found[name] = {
            "differences": differences(outcomes[0].states, outcomes[1].states),
            "hooks": hooks_left(outcomes[1]),
            "losses": outcomes[1].losses,
        }
        del outcomes
        gc.collect()
        torch.distributed.barrier()
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    # Tearing a gloo group down while models that used it live on hangs now and then.
    sys.stdout.flush()
    os._exit(0)
