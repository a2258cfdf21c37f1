from pathlib import Path
from typing import Any

from entropylens.store.reader import open_run
from entropylens_dashboard.findings import findings
from entropylens_dashboard.readings import Readings

LOGS = Path(__file__).parents[2] / "sample_runs" / "grpo_countdown" / "logs"


def test_of_a_policy_the_reward_is_told_and_not_its_loss() -> None:
    said = "\n".join(findings(Readings(), open_run(LOGS / "collapse")))
    assert "Mean reward went from 0.516 to 0.615 (first and last tenth of the run)." in said
    assert "The loss went from" not in said
    assert "left its range" not in said


def test_of_any_other_run_the_loss_is_told(folder: Path, make: Any) -> None:
    make("run")
    said = "\n".join(findings(Readings(), open_run(folder / "run")))
    assert "The loss went from" in said
    assert "reward" not in said
