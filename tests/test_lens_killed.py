"""``kill -9`` of a training process that a Lens watches."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow.parquet as pq
import pytest

import entropylens as el
from entropylens.session import FLUSH_SECONDS

TRAINING = """
import sys, time, torch
import entropylens as el
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with el.Lens(model, optimizer, run_dir=sys.argv[1], resume_step=int(sys.argv[2]) or None) as lens:
    while True:
        loss = model(torch.ones(2, 4)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        lens.step(loss=loss)
        print(lens.last_step, flush=True)
        time.sleep(0.005)
"""
WRITER_FLUSH_SECONDS = 1.0
SLACK_SECONDS = 1.0
"""For a machine that is busy: the threads that flush need a core."""


def kill_at_random(path: Path, resume_step: int, seconds: float) -> float:
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(path), str(resume_step)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(seconds)
    killed = time.time()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return killed


@pytest.mark.soak
def test_a_training_killed_fifty_times_and_resumed_lacks_no_more_than_was_on_its_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, chance = tmp_path / "run", random.Random(0)
    missing, resume_step = [], 0
    for number in range(50):
        killed = kill_at_random(path, resume_step, chance.uniform(0.3, 4.0))
        rows = el.open_run(path).metrics("loss/mean").to_arrow()
        steps = rows["step"].to_pylist()
        assert steps == list(range(1, len(steps) + 1)), number
        if len(steps) > resume_step:
            missing.append(killed - rows["time"].to_pylist()[-1].timestamp())
        files = sorted(map(str, (path / "metrics").glob("*.parquet")))
        if files:
            glob = f"{path}/metrics/*.parquet"
            query = "SELECT step FROM read_parquet(?) WHERE name = 'loss/mean' ORDER BY step"
            sealed = [step for (step,) in duckdb.execute(query, [glob]).fetchall()]
            assert sealed == list(range(1, len(sealed) + 1))
            assert sum(pq.read_table(file).num_rows for file in files) == sum(
                len(pd.read_parquet(file)) for file in files
            )
        resume_step = chance.randint(1, len(steps)) if number % 2 else len(steps)
    assert max(missing) < FLUSH_SECONDS + WRITER_FLUSH_SECONDS + SLACK_SECONDS
    with capsys.disabled():
        print(
            f"\n50 kills: {len(steps)} steps at the end; seconds of training lost: "
            f"median {sorted(missing)[len(missing) // 2]:.2f}, worst {max(missing):.2f}"
        )
