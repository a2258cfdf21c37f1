"""What two processes of one training do, of which one is corrupted; ``python -m analysis.ranks``.

``DDP`` keeps them equal until, in the optimiser's step 5, rank 1 adds noise to one gradient.
"""

import os
import sys
import traceback
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import entropylens as el

STEPS = 12
CORRUPTED = 5


def train(folder: Path, *, corrupted: bool) -> None:
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    last = nn.Linear(16, 4)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), last)
    model = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    calls = count(1)

    def corrupt(*_: Any) -> None:
        gradient = last.weight.grad
        is_due = next(calls) == CORRUPTED and corrupted and rank == 1
        if is_due and gradient is not None:
            gradient += 3 * torch.randn(gradient.shape, generator=generator)

    optimizer.register_step_pre_hook(corrupt)
    generator = torch.Generator().manual_seed(rank)
    settings: Any = {"preset": "full", "diagnostics": {"update_norm": 1}, "max_overhead": None}
    with el.Lens(model, optimizer, run_dir=folder / "run", **settings) as lens:
        for _ in range(STEPS):
            x = torch.randn(16, 6, generator=generator)
            optimizer.zero_grad()
            loss = cross_entropy(model(x), x[:, :4].argmax(1))
            loss.backward()
            optimizer.step()
            lens.step(loss=loss)


if __name__ == "__main__":
    try:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo")
        for name in ("healthy", "corrupted"):
            train(Path(sys.argv[1]) / name, corrupted=name == "corrupted")
        torch.distributed.barrier()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    # Tearing a gloo group down while models that used it live on hangs now and then.
    sys.stdout.flush()
    os._exit(0)
