"""What two processes of one bounded training do; ``python -m control.ranks FOLDER``.

Rank 1's batches differ, its losses are ten times those of rank 0, and what a fault is differs, too.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from entropylens.control import Action, StepBound, StepGuard
from entropylens.control.looking import agree
from entropylens.control.signals import SCALES

STEPS = 34
GRADIENT, LOSS, RATE, NOT_FINITE = 20, 24, 27, 31
"""Steps of which something is wrong, on one rank or on both."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)
        self.is_broken = False

    def forward(self, x: Tensor) -> Tensor:
        if self.is_broken and not torch.is_grad_enabled():
            raise RuntimeError("this rank's forward fails")
        return self.last(self.norm(self.first(x)).tanh())


def batch(number: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + number)
    x = torch.randn(16, 6, generator=generator)
    return x, (x[:, :4] + 0.3).argmax(1)


def train(
    wrap: Callable[[Any], Any],
    bound: StepBound,
    *,
    broken: bool = False,
    has_no_room: bool = False,
) -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    net = Net()
    net.is_broken = broken and rank == 1
    model = wrap(net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    actions: list[Action] = []
    faults: list[str] = []

    def report(action: Action | None, message: str) -> None:
        if action is not None:
            actions.append(action)

    def run(where: str, work: Callable[[], None]) -> None:
        try:
            work()
        except RuntimeError as error:
            faults.append(str(error))

    guard = StepGuard(model, optimizer, bound, report=report, run=run)
    if has_no_room and rank == 1:
        guard._statistics.put_back = no_room  # type: ignore[method-assign]
    losses = []
    for number in range(STEPS):
        x, y = batch(number, rank)
        for group in optimizer.param_groups:
            group["lr"] = 10.0 if number == RATE else 1e-2
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        factor = {GRADIENT: 1e4, NOT_FINITE: float("nan")}.get(number, 1.0) if rank else 1.0
        (loss * factor).backward()
        told = loss.detach() * (1 + 9 * rank) * (100.0 if number == LOSS and rank else 1.0)
        guard.observe(targets=y, loss=told)
        losses.append(told.item())
        optimizer.step()
    guard.close()
    parameters = [
        value.full_tensor() if isinstance(value, DTensor) else value for value in model.parameters()
    ]
    return {
        "actions": [[a.step, a.cause, a.scale, [*a.suspicions]] for a in actions],
        "evidence": [{k: v for k, v in a.evidence.items() if v == v} for a in actions],
        "memory": guard.state_dict(),
        "losses": losses,
        "faults": faults,
        "looks": guard.looks,
        "parameters": [p.detach().flatten().tolist() for p in parameters],
    }


def no_room() -> None:
    raise RuntimeError("no room on this rank")


def flat(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def agreed() -> dict[str, Any]:
    """What ranks make of a look of which they have seen different things."""
    rank, count = torch.distributed.get_rank(), len(SCALES)
    inf, nan = torch.inf, torch.nan
    cases: dict[str, tuple[Any, Any]] = {
        "largest and mean": ([2.0, *[1.0] * count], [5.0, *[4.0] * count]),
        "one is infinite": ([inf, *[1.0] * count], [5.0, *[4.0] * count]),
        "one has no targets": ([2.0, *[1.0] * count], [5.0, *[nan] * count]),
        "one has not looked": ([2.0, *[1.0] * count], None),
    }
    found = {}
    for name, both in cases.items():
        mine = both[rank]
        look = agree(None if mine is None else torch.tensor(mine), torch.device("cpu"))
        found[name] = [look.ratio, look.losses if look.losses is None else [*look.losses]]
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    bound = {"mode": "enforce", "warmup": 8, "every": 1, "gradient_factor": 5.0,
             "loss_factor": 3.0, "deviations": 8.0}  # fmt: skip
    usual, radius = StepBound(**bound), StepBound(**bound, policy="radius", level=0.5)  # type: ignore[arg-type]
    found = {
        "ddp": train(DistributedDataParallel, usual),
        "radius": train(DistributedDataParallel, radius),
        "broken": train(DistributedDataParallel, radius, broken=True),
        "fsdp2": train(fully_shard, usual),
        "fsdp1": train(flat, usual),
        "no room": train(DistributedDataParallel, usual, has_no_room=True),
        "agreed": agreed(),
    }
    rank = torch.distributed.get_rank()
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()


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
