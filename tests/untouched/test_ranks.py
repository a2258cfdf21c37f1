"""Two ranks: DDP and FSDP2, plain, Lightning, Hugging Face and TRL, in one pair of processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from untouched.ranks import RANKS, STEPS, TRAININGS, batches, labels_of, model

import entropylens as el
from entropylens.store.query import series

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("ranks")]

NAMES = list(TRAININGS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two processes have trained; one run directory was taken before they came."""
    found = tmp_path_factory.mktemp("ranks")
    el.Lens(run_dir=found / "ddp" / "run").close()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tests = Path(__file__).parents[1]
    known = {
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "ranks",
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(tests), *sys.path]),
    }
    logs = [open(found / f"rank-{rank}.log", "w") for rank in range(RANKS)]  # noqa: SIM115
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "untouched.ranks", str(found)],
            env={**os.environ, **known, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=log,
            stderr=log,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(300) for process in processes]
    finally:
        for process, log in zip(processes, logs, strict=True):
            process.kill()
            log.close()
    told = "\n".join((found / f"rank-{rank}.log").read_text()[-2000:] for rank in range(RANKS))
    assert codes == [0] * RANKS, told
    return found


def run_of(folder: Path, name: str) -> el.Run:
    return el.open_run(folder / name / ("run-2" if name == "ddp" else "run"))


def combined(folder: Path, name: str, metric: str) -> list[float]:
    return series(run_of(folder, name), metric)["value"].to_pylist()


@pytest.mark.parametrize("name", NAMES)
def test_every_rank_is_untouched_and_its_hooks_are_gone(folder: Path, name: str) -> None:
    for rank in range(RANKS):
        found = json.loads((folder / f"rank-{rank}.json").read_text())[name]
        assert found["differences"] == []
        assert found["hooks"] == []


@pytest.mark.parametrize("name", NAMES)
def test_both_ranks_write_one_run_without_a_fault(folder: Path, name: str) -> None:
    run = run_of(folder, name)
    assert run.state() == "finished"
    assert [(s.rank, s.state, s.faults) for s in run.status()] == [
        (0, "finished", {}),
        (1, "finished", {}),
    ]
    rows = run.metrics("loss/mean").to_arrow()
    assert sorted(zip(rows["step"].to_pylist(), rows["rank"].to_pylist(), strict=True)) == [
        (step, rank) for step in range(1, STEPS + 1) for rank in range(RANKS)
    ]


def joined() -> dict[str, Any]:
    """The first step's batch of both ranks, in one process and in float64."""
    torch.manual_seed(0)
    found = model().double()
    logps, targets, gradients = [], [], []
    for rank in range(RANKS):
        tokens = batches(rank)[0]
        labels = labels_of(tokens, rank)
        out = found(input_ids=tokens, labels=labels)
        found.zero_grad()
        out.loss.backward()
        gradients.append([p.grad.clone() for p in found.parameters()])
        scored = labels[:, 1:] >= 0
        logps.append(out.logits[:, :-1].detach().log_softmax(-1)[scored])
        targets.append(labels[:, 1:][scored])
    logp, target = torch.cat(logps), torch.cat(targets)
    mean = [(one + other) / RANKS for one, other in zip(*gradients, strict=True)]
    return {
        "entropy": -(logp.exp() * logp).sum(-1).mean().item(),
        "surprisal": nn.functional.nll_loss(logp, target).item(),
        "tokens": len(target),
        "gradient": torch.stack([g.norm() for g in mean]).norm().item(),
    }


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "lightning", "lightning_fsdp2"])
def test_ranks_together_say_what_one_process_says_of_the_joined_batch(
    folder: Path, name: str
) -> None:
    expected = joined()
    assert combined(folder, name, "entropy/token/mean")[0] == pytest.approx(
        expected["entropy"], rel=1e-6
    )
    assert combined(folder, name, "surprisal/token/mean")[0] == pytest.approx(
        expected["surprisal"], rel=1e-6
    )
    assert combined(folder, name, "tokens/step")[0] == expected["tokens"]
    before = "gradient/shard_norm/before_clip" if name == "lightning_fsdp2" else (
        "gradient/norm/before_clip"
    )  # fmt: skip
    assert combined(folder, name, before)[0] == pytest.approx(expected["gradient"], rel=1e-5)


def test_shards_together_have_the_norms_of_the_whole(folder: Path) -> None:
    """FSDP2 and DDP train alike; what one logs whole the other logs in parts."""
    for one, whole, other, part in (
        ("ddp", "gradient/norm/after_clip", "fsdp2", "gradient/shard_norm/after_clip"),
        ("ddp", "update/norm", "fsdp2", "update/shard_norm"),
        ("ddp", "parameter/norm", "fsdp2", "parameter/shard_norm"),
        ("lightning", "gradient/norm/after_clip", "lightning_fsdp2",
         "gradient/shard_norm/after_clip"),
    ):  # fmt: skip
        expected = combined(folder, one, whole)
        assert combined(folder, other, part) == pytest.approx(expected, rel=1e-5)
        alone = run_of(folder, other).metrics(part).to_arrow().to_pylist()
        assert all(row["value"] < 0.99 * expected[0] for row in alone if row["step"] == 1)


def test_entropy_and_loss_of_two_ranks_equal_trls_own_reduction(folder: Path) -> None:
    ours = combined(folder, "trl", "entropy/token/mean")
    assert ours == pytest.approx(combined(folder, "trl", "framework/entropy"), abs=1e-5)
    losses = combined(folder, "trl", "loss/mean")
    assert losses == pytest.approx(combined(folder, "trl", "framework/loss"), abs=1e-4)


@pytest.mark.parametrize("name", ["grpo", "grpo_across", "rloo"])
def test_a_policy_of_two_ranks_says_what_trl_reduces_over_them(folder: Path, name: str) -> None:
    """Six completions a rank in groups of four: one group has members on both ranks."""
    for ours, theirs in {
        "entropy/token/mean": "framework/entropy",
        "reward/mean": "framework/reward",
        "group/no_spread/share": "framework/frac_reward_zero_std",
        "completion/length/mean": "framework/completions/mean_length",
        "completion/truncated/share": "framework/completions/clipped_ratio",
    }.items():
        expected = combined(folder, name, theirs)
        assert combined(folder, name, ours) == pytest.approx(expected, abs=1e-5), ours
    right = run_of(folder, name).metrics("reward/component/mean").to_arrow().to_pylist()
    writers = {row["rank"] for row in right}
    assert writers == ({0} if name == "grpo_across" else {0, 1})


def test_both_ranks_come_to_one_decision_about_a_step(folder: Path) -> None:
    events = run_of(folder, "controlled").events().to_arrow().to_pylist()
    told = {
        rank: [
            (e["step"], e["message"], json.loads(e["evidence"])["ratio"])
            for e in events
            if e["kind"] == "control" and e["rank"] == rank
        ]
        for rank in range(RANKS)
    }
    assert told[0] == told[1]
    # Of four steps in a row that are alike the first, second and fourth are written.
    assert [step for step, _, _ in told[0]] == [1, 2, 4]
