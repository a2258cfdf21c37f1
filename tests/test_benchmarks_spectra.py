import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import spectra

SMALL = spectra.Model(layers=2, hidden=24, keys=8, inner=48, vocabulary=200)


def test_the_model_has_the_matrices_of_smollm2_135m() -> None:
    shapes = dict(spectra.Model().shapes())
    assert len(shapes) == 211
    assert sum(m * n for m, n in shapes.values()) == 134_479_872  # with 35,136 in norms 134,515,008


def test_weights_are_the_same_at_every_call_and_hold_a_signal() -> None:
    one, other = spectra.weights(SMALL), spectra.weights(SMALL)
    assert [name for name, _ in SMALL.shapes()] == list(one)
    for name, shape in SMALL.shapes():
        assert tuple(one[name].shape) == shape
        assert (one[name] == other[name]).all()
    wide = spectra.weights(spectra.Model(layers=1, inner=4, vocabulary=4))["0_q"]
    values = np.linalg.svd(wide.numpy(), compute_uv=False)
    assert values[spectra.SIGNAL - 1] > 1.5 * values[spectra.SIGNAL]


def test_every_method_is_timed_on_every_shape() -> None:
    found = spectra.measure(SMALL, repeats=2)
    assert found["worst_relative_error"] < 1e-6
    assert set(found["by_shape"]) == {"200 x 24", "24 x 24", "8 x 24", "48 x 24", "24 x 48"}
    assert sum(one["count"] for one in found["by_shape"].values()) == found["matrices"] == 15
    assert min(found["seconds"].values()) > 0
    assert found["ratio_to_svdvals"] > 0


def test_it_writes_its_figures_and_leaves_out_what_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(spectra, "Model", lambda layers: SMALL)
    out = tmp_path / "new/spectra.json"
    monkeypatch.setattr("sys.argv", ["spectra", "--repeats", "1", "--out", str(out)])
    assert spectra.main() == 0
    written = json.loads(out.read_text())
    assert written == json.loads(capsys.readouterr().out)
    assert written["ratio_to_weightwatcher"] is None
    assert set(written["seconds"]) == set(spectra.METHODS)
