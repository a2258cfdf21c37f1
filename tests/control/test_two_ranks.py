"""Two ranks of one training see different batches and do the same."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from entropylens.control.signals import SCALES

pytestmark = pytest.mark.xdist_group("ranks")

GRADIENT, LOSS, RATE, NOT_FINITE = 20, 24, 27, 31
"""Steps of `control.ranks` of which something is wrong."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What both processes have found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    known = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
    }
    logs = [open(folder / f"rank-{rank}.log", "w") for rank in range(2)]  # noqa: SIM115
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "control.ranks", str(folder)],
            env={**os.environ, **known, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=log,
            stderr=log,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(120) for process in processes]
    finally:
        for process, log in zip(processes, logs, strict=True):
            process.kill()
            log.close()
    told = "\n".join((folder / f"rank-{rank}.log").read_text()[-2000:] for rank in range(2))
    assert codes == [0, 0], told
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", ["ddp", "radius", "broken", "fsdp2"])
def test_both_apply_the_same_factors_and_hold_the_same_weights(ranks: list[Any], name: str) -> None:
    one, other = (found[name] for found in ranks)
    assert one["actions"] == other["actions"]
    assert one["evidence"] == other["evidence"]
    assert one["memory"] == other["memory"]
    assert one["parameters"] == other["parameters"]
    assert one["actions"]
    # They were not the same training.
    assert all(a != b for a, b in zip(one["losses"], other["losses"], strict=True))


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_what_is_wrong_on_one_rank_bounds_both(ranks: list[Any], name: str) -> None:
    for found in ranks:
        steps = {step - 1: (cause, scale) for step, cause, scale, _ in found[name]["actions"]}
        assert {GRADIENT, RATE, NOT_FINITE} <= steps.keys()
        cause, scale = steps[GRADIENT]
        assert cause == "gradient"
        assert 0 < scale < 0.01
        assert steps[NOT_FINITE] == ("gradient not finite", 0.0)


def test_shards_are_bounded_as_the_whole(ranks: list[Any]) -> None:
    whole, parts = (ranks[0][name]["memory"]["memory"] for name in ("ddp", "fsdp2"))
    assert parts["gradients"][:20] == pytest.approx(whole["gradients"][:20], rel=1e-4)
    assert parts["updates"][:8] == pytest.approx(whole["updates"][:8], rel=1e-4)
    assert parts["losses"][:20] == pytest.approx(whole["losses"][:20], rel=1e-4)


def test_shards_of_flat_parameters_are_scaled_by_one_factor(ranks: list[Any]) -> None:
    one, other = (found["fsdp1"] for found in ranks)
    assert one["actions"] == other["actions"]
    assert one["memory"] == other["memory"]
    assert {GRADIENT, RATE, NOT_FINITE} <= {step - 1 for step, *_ in one["actions"]}
    whole = ranks[0]["ddp"]["memory"]["memory"]
    for name in ("gradients", "updates"):
        assert one["memory"]["memory"][name][:8] == pytest.approx(whole[name][:8], rel=1e-3)


def test_where_one_rank_could_not_keep_its_parameters_no_rank_waits_or_acts(
    ranks: list[Any],
) -> None:
    one, other = (found["no room"] for found in ranks)
    assert one["faults"] == []
    assert {*other["faults"]} == {"no room on this rank"}
    assert one["parameters"] == other["parameters"]
    assert one["memory"] == other["memory"]


def test_the_loss_is_the_mean_of_both(ranks: list[Any]) -> None:
    pairs = zip(*(found["ddp"]["losses"] for found in ranks), strict=True)
    means = [sum(pair) / 2 for pair in pairs]
    expected = [mean for number, mean in enumerate(means)
                if number not in (GRADIENT, LOSS, NOT_FINITE)]  # fmt: skip
    assert ranks[0]["ddp"]["memory"]["memory"]["losses"] == pytest.approx(expected, rel=1e-5)


def test_where_one_rank_cannot_look_neither_acts_on_what_the_other_saw(ranks: list[Any]) -> None:
    one, other = (found["broken"] for found in ranks)
    assert one["faults"] == []
    assert other["faults"] == ["this rank's forward fails"]
    assert {cause for _, cause, _, _ in one["actions"]} == {"gradient not finite"}
    causes = {cause for _, cause, _, _ in ranks[0]["radius"]["actions"]}
    assert causes == {"radius", "gradient not finite"}


def test_of_ratios_the_largest_counts_and_of_losses_the_mean(ranks: list[Any]) -> None:
    count = len(SCALES)
    for found in ranks:
        assert found["agreed"] == {
            "largest and mean": [5.0, [2.5] * count],
            "one is infinite": [float("inf"), [2.5] * count],
            "one has no targets": [5.0, None],
            "one has not looked": [None, None],
        }
