from pathlib import Path
from typing import Any

import pytest
import torch

from entropylens import meeting as module
from entropylens.errors import EntropyLensError
from entropylens.meeting import rank_and_world, run_dir_of_rank_zero


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    found = torch.distributed.HashStore()  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "_store", lambda: found)
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.2)
    monkeypatch.setattr(module, "_held", {})
    return found


def as_rank(number: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Each process counts its own meetings."""
    monkeypatch.setattr(module, "_held", {})
    return {"rank": number, "world_size": 2}


def test_a_single_process_meets_nobody() -> None:
    assert rank_and_world() == (0, 1)
    with run_dir_of_rank_zero("runs/x", rank=0, world_size=1) as meeting:
        assert meeting.run_dir == Path("runs/x")


def test_others_go_where_rank_zero_went(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with run_dir_of_rank_zero("runs/x", **as_rank(0, monkeypatch)) as meeting:
        meeting.run_dir = Path("runs/x-2")
    with run_dir_of_rank_zero("runs/x", **as_rank(1, monkeypatch)) as meeting:
        assert meeting.run_dir == Path("runs/x-2")


def test_a_second_run_of_the_same_name_is_another_meeting(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = as_rank(0, monkeypatch)
    for place in ("x", "x-2"):
        with run_dir_of_rank_zero("x", **ranks) as meeting:
            meeting.run_dir = Path(place)
    ranks = as_rank(1, monkeypatch)
    met = []
    for _ in range(2):
        with run_dir_of_rank_zero("x", **ranks) as meeting:
            met.append(str(meeting.run_dir))
    assert met == ["x", "x-2"]


def test_where_rank_zero_failed_the_others_say_why(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(OSError, match="no space"),
        run_dir_of_rank_zero("x", **as_rank(0, monkeypatch)),
    ):
        raise OSError("no space")
    ranks = as_rank(1, monkeypatch)
    with (
        pytest.raises(EntropyLensError, match="expected rank 0 to open x, but there: OSError: no"),
        run_dir_of_rank_zero("x", **ranks),
    ):
        pass


def test_a_rank_that_comes_alone_fails_instead_of_hanging(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = as_rank(1, monkeypatch)
    with (
        pytest.raises(EntropyLensError, match=r"within 0 s, but it did not .* pass rank=0 and wor"),
        run_dir_of_rank_zero("x", **ranks),
    ):
        pass
