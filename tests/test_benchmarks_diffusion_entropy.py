import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import diffusion_entropy
from benchmarks.diffusion_entropy import figures, released
from entropylens.diagnostics._diffusion import diffusion_spectral_entropy


@pytest.mark.parametrize("bandwidth", [0.5, 3.0, 10.0])
def test_the_released_algorithm_is_ours_at_its_bandwidth(bandwidth: float) -> None:
    points = np.random.default_rng(0).standard_normal((50, 8))
    ours = diffusion_spectral_entropy(torch.from_numpy(points), bandwidth=bandwidth)
    assert released(points, bandwidth) == pytest.approx(float(ours), abs=1e-9)


def test_figures_are_the_least_speed_up_and_the_greatest_error() -> None:
    cases = [
        {
            "rows": rows,
            "fast": {"speedup": 4 + speed, "error_bits": -1e-7 * speed},
            "exact": {"speedup": 2 + speed, "error_bits": 1e-12},
        }
        for rows, speed in ((1000, 1), (1000, 2), (2000, 3))
    ]
    assert figures(cases) == {
        "fast_speedup_1000": 5,
        "fast_speedup_2000": 7,
        "fast_error_bits": pytest.approx(3e-7),
        "speedup_1000": 3,
        "speedup_2000": 5,
        "error_bits": 1e-12,
    }


def test_a_few_rows_are_measured_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results" / "found.json"
    sizes = ["--rows", "40", "--points", "60", "--draws", "2", "--repeats", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("sys.argv", ["diffusion_entropy", *sizes, "--out", str(out)])
    assert diffusion_entropy.main() == 0
    found = json.loads(out.read_text())
    assert {(case["data"], case["bandwidth"]) for case in found["cases"]} >= {
        ("gaussian", "median"),
        ("network", "released"),
    }
    assert found["speedup_40"] > 0
    assert found["error_bits"] < 1e-9
    assert found["fast_error_bits"] < 1e-3
    assert {row["data"] for row in found["estimate"]} >= {"gaussian", "network"}
    assert [row["classes"] for row in found["random_labels"]] == [2, 10]
