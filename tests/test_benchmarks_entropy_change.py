import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from runs_to_show import write

from benchmarks import entropy_change
from entropylens.analysis.entropy_change import ESTIMATES
from entropylens.diagnostics._estimators import ESTIMATORS
from entropylens.errors import EntropyLensError
from entropylens.store.writer import RunWriter

PUBLISHED = {
    "discriminator": 1.000,
    "steer": 0.712,
    "natural_gradient": 0.711,
    "clip_b": 0.639,
    "steer_released": 0.615,
    "token_covariance": 0.510,
}


def test_the_estimates_agree_with_one_step_as_closely_as_the_table_says_and_in_its_order() -> None:
    found = entropy_change.synthetic(states=2000, seed=1)
    assert found["pcc"] == pytest.approx(PUBLISHED, abs=0.05)
    pcc = list(found["pcc"].values())
    # The second and the third are equal to 0.001 in the table: their order is chance.
    assert list(found["pcc"]) == list(PUBLISHED) == list(ESTIMATORS)
    assert pcc[0] > max(pcc[1:3])
    assert min(pcc[1:3]) > pcc[3] > pcc[4] > pcc[5]
    assert found["pcc"]["discriminator"] == pytest.approx(1, abs=1e-5)
    assert found["srcc"]["discriminator"] == pytest.approx(1, abs=1e-5)
    signs = found["sign_agreement"]
    assert signs["discriminator"] > 0.999
    assert signs["steer"] == signs["natural_gradient"] == signs["clip_b"]
    assert signs["clip_b"] == pytest.approx(0.885, abs=0.02)
    assert found["entropy_deciles"] == pytest.approx([0.56, 1.67, 5.28], rel=0.06)


def test_it_prints_a_table_and_writes_each_cell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["entropy_change", "--cells", "synthetic", "--out", str(tmp_path / "new")]
    )
    monkeypatch.setitem(
        entropy_change.CELLS, "synthetic", lambda: entropy_change.synthetic(states=50)
    )
    assert entropy_change.main() == 0
    written = json.loads((tmp_path / "new/synthetic.json").read_text())
    assert set(written) >= {"pcc", "srcc", "sign_agreement"}
    shown = capsys.readouterr().out
    for name in ESTIMATORS:
        assert f"{written['pcc'][name]:.3f}" in next(
            line for line in shown.splitlines() if f" {name} " in line
        )


def trained(path: Path) -> Path:
    """A run whose estimates are the measured change itself, and whose entropy ends at step 178."""
    writer, steps = RunWriter(path), np.arange(1, 241)
    entropy = 1.2 * np.exp(-steps / 71.6)
    changes = np.diff(entropy, append=entropy[-1])
    write(writer, "entropy/token/mean", steps, entropy)
    write(writer, "reward/mean", steps, 0.6 - 0.2 * np.exp(entropy), phase="rollout")
    write(writer, "entropy/change/measured", steps, changes)
    for name, sign in ESTIMATES.values():
        write(writer, name, steps, sign * changes)
    writer.close()
    return path


def test_a_log_is_read_as_it_was_planted(tmp_path: Path) -> None:
    found = entropy_change.run(trained(tmp_path / "run"))
    assert list(found["estimates"]) == list(ESTIMATES)
    assert set(ESTIMATES) == {"exact", "extrapolated", *ESTIMATORS}
    for one in found["estimates"].values():
        assert [one["correlation"], one["slope"]] == pytest.approx([1, 1], abs=1e-5)
        assert one["at_states"] is None
    assert found["identity"] == pytest.approx(1)
    assert found["next_rollouts"]["skill"] == pytest.approx(1, abs=1e-5)
    totals = found["totals"]
    assert (totals["first"], totals["last"]) == (1, 240)
    entropy = 1.2 * np.exp(-np.arange(1, 241) / 71.6)
    for kind in ("predicted", "measured"):
        assert totals[kind] == pytest.approx(entropy[-1] - entropy[0], rel=1e-5)
    assert totals["entropy"] == pytest.approx([entropy[:24].mean(), entropy[-24:].mean()], rel=1e-5)
    actual = {0.25: 112, 0.2: 128, 0.1: 178}
    assert [(one["floor"], one["share"]) for one in found["forecasts"]] == [
        (floor, share)
        for floor, known in ((0.25, 3), (0.2, 3), (0.1, 3))
        for share in (0.15, 0.3, 0.5)[:known]
        if share * 240 < actual[floor]
    ]
    for one in found["forecasts"]:
        assert one["actual"] == pytest.approx(actual[one["floor"]], abs=3)
        assert one["error"] < 5
    band = found["band"]
    assert (band["share"], band["made_at"], band["model"]) == (0.15, 36, "log H on step")
    assert band["actual_at_end"] == pytest.approx(entropy[-10:].mean(), rel=1e-5)
    assert abs(band["error_at_end"]) < 0.01
    assert band["persistence_at_end"] == pytest.approx(
        entropy[26:36].mean() - entropy[-10:].mean(), rel=1e-5
    )
    line = np.poly1d(np.polyfit(np.arange(1, 37), entropy[:36], 1))
    assert band["straight_line_at_end"] == pytest.approx(
        line(235.5) - entropy[-10:].mean(), rel=1e-4
    )


def test_a_band_is_judged_by_what_came_later(monkeypatch: pytest.MonkeyPatch) -> None:
    told = SimpleNamespace(
        path_step=np.array([101.0, 201.0]),
        path=np.array([[0.0, 1.0], [0.5, 2.0], [1.0, 3.0]]),
        model="made up",
        level=0.9,
    )
    asked: dict[str, Any] = {}

    def forecast(steps: Any, entropy: Any, floor: float, *, horizon: float) -> Any:
        asked.update(steps=steps, entropy=entropy, floor=floor, horizon=horizon)
        return told

    monkeypatch.setattr(entropy_change, "forecast_crossing", forecast)
    steps = np.arange(1.0, 202.0)
    entropy = np.full(201, 0.75)  # low edge above it from step 177 on
    entropy[100:110] = [3, -1] * 5  # out of the band one by one, and within it by their mean
    entropy[50] = np.nan
    found = entropy_change.judge_band(steps, entropy, 0.5)
    assert (asked["steps"][-1], len(asked["entropy"]), asked["horizon"]) == (101, 100, 100)
    assert asked["floor"] == 0
    assert found is not None
    # Step 101 is known, so nine of the ten are ahead; windows end at the last step.
    assert found["inside"] == pytest.approx((100 - 9 - 25) / 100)
    assert found["means_inside"] == pytest.approx(0.7)
    assert found["actual_at_end"] == 0.75
    end = 196.5
    assert found["error_at_end"] == pytest.approx(0.5 + 1.5 * (end - 101) / 100 - 0.75)
    assert found["persistence_at_end"] == pytest.approx((9 * 0.75 + 3) / 10 - 0.75)


def test_where_nothing_is_foretold_no_band_is_judged() -> None:
    steps = np.arange(1.0, 401.0)
    noise = np.random.default_rng(1).standard_normal(400)
    for known, entropy in ((0, noise), (400, 1 + 0.1 * noise), (30, 3 - steps[:30] / 100)):
        assert entropy_change.judge_band(steps[:known], entropy[:known]) is None
    falling = np.exp(-steps / 100)
    assert entropy_change.judge_band(steps, falling) is not None
    assert entropy_change.judge_band(steps, np.where(steps > 69, np.nan, falling), 0.9) is None


def test_it_reads_the_log_that_it_is_given_and_leaves_out_one_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        entropy_change.CELLS, "synthetic", lambda: entropy_change.synthetic(states=50)
    )
    command = ["entropy_change", "--out", str(tmp_path / "out"), "--log"]
    monkeypatch.setattr("sys.argv", [*command, str(tmp_path / "none")])
    assert entropy_change.main() == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["synthetic.json"]
    assert f"run is left out: there is no log {tmp_path / 'none'};" in capsys.readouterr().out
    log = trained(tmp_path / "run")
    monkeypatch.setattr("sys.argv", [*command, str(log), "--cells", "run"])
    assert entropy_change.main() == 0
    written = json.loads((tmp_path / "out/run.json").read_text())
    assert written["log"] == str(log)
    shown = capsys.readouterr().out
    assert "left out" not in shown
    for key, value in written["band"].items():
        assert key in shown
        assert isinstance(value, str) or f"{value:.3g}" in shown
    for name in ESTIMATES:
        assert f" {name} " in shown
    assert "reached" in shown or "expected" in shown


def test_a_log_without_measured_changes_is_refused(tmp_path: Path) -> None:
    RunWriter(tmp_path / "run").close()
    with pytest.raises(EntropyLensError, match="expected a log with entropy/change/measured, got"):
        entropy_change.run(tmp_path / "run")
