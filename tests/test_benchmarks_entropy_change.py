import json
from pathlib import Path

import pytest

from benchmarks import entropy_change
from entropylens.diagnostics._estimators import ESTIMATORS

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
