from dataclasses import replace
from math import log2

import pytest
import readings
import torch

from entropylens.diagnostics._diffusion import (
    bandwidth_health,
    diffusion_matrix,
    diffusion_mutual_information,
    diffusion_spectral_entropy,
    renyi_diffusion_entropy,
)
from entropylens.diagnostics.diffusion_entropy import METRICS, DiffusionEntropy
from entropylens.registry import RepresentationReading


def measured(reading: RepresentationReading) -> dict[str, dict[str, float]]:
    """By layer, then by metric without its folder."""
    blocks, _ = DiffusionEntropy().measure(reading, None)
    return {
        str(block.columns["module"]): {
            name.removeprefix("representation/"): value
            for name, value in zip(
                block.columns["name"], block.columns["value"].tolist(), strict=True
            )
        }
        for block in blocks
        if float(block.columns["weight"]) > 0 and block.columns["module"]
    }


def test_each_number_is_that_of_its_function() -> None:
    reading = readings.representation()
    found = measured(reading)
    assert list(found) == ["layers.0", "layers.1"]
    assert reading.labels is not None
    assert reading.input_clusters is not None
    for name, states in reading.states.items():
        health, released = bandwidth_health(states), bandwidth_health(states, 10.0)
        pairs = torch.pdist(states.double()).sort().values
        expected = {
            "dse": diffusion_spectral_entropy(states),
            "dse_released": diffusion_spectral_entropy(states, bandwidth=10.0),
            "dse_renyi2": renyi_diffusion_entropy(diffusion_matrix(states)),
            "bandwidth": pairs[(len(pairs) - 1) // 2],
            "neighbours": health.neighbours,
            "self_share": health.self_share,
            "dse_is_saturated": health.is_saturated,
            "dse_is_condensed": health.is_condensed,
            "dse_released_is_saturated": released.is_saturated,
            "dse_released_is_too_wide": released.is_too_wide,
        }
        for metric, labels in (
            ("dsmi_labels", reading.labels),
            ("dsmi_input", reading.input_clusters),
        ):
            expected[metric] = diffusion_mutual_information(
                states, labels, generator=torch.Generator().manual_seed(0)
            )
        if name == "layers.1":
            expected["dse_half"] = diffusion_spectral_entropy(states, alpha=0.5)
            expected["dse_one"] = diffusion_spectral_entropy(states, alpha=1.0)
        assert found[name] == pytest.approx(
            {key: float(value) for key, value in expected.items()}, rel=1e-5, abs=1e-6
        )
    written = {f"representation/{name}" for name in found["layers.1"]}
    assert written == set(METRICS) - {"representation/dse_standard_error"}


def test_a_layer_that_parts_the_classes_tells_more_of_them() -> None:
    found = measured(readings.representation(rows=120))
    assert found["layers.1"]["dsmi_labels"] > found["layers.0"]["dsmi_labels"] + 0.2


def test_growing_activations_are_seen_by_the_bandwidth_and_the_released_number_alone() -> None:
    reading = readings.representation()
    grown = replace(reading, states={name: 100 * x for name, x in reading.states.items()})
    small, large = measured(reading)["layers.0"], measured(grown)["layers.0"]
    assert large["bandwidth"] == pytest.approx(100 * small["bandwidth"], rel=1e-5)
    assert large["dse"] == pytest.approx(small["dse"], abs=1e-5)
    assert large["dse_is_saturated"] == small["dse_is_saturated"] == 0
    assert large["dse_released"] == pytest.approx(log2(60), abs=1e-2)
    assert (large["dse_released_is_saturated"], small["dse_released_is_saturated"]) == (1, 0)


def test_a_collapsed_layer_has_no_entropy() -> None:
    found = measured(RepresentationReading(states={"last": torch.full((20, 5), 3.7)}))["last"]
    for name in ("dse", "dse_half", "dse_one", "dse_renyi2", "dse_released"):
        assert found[name] == pytest.approx(0, abs=1e-6)
    assert found["neighbours"] == pytest.approx(19)
    assert "dsmi_labels" not in found


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_layer_that_is_not_finite_is_absent_and_the_others_are_not(bad: float) -> None:
    reading = readings.representation()
    broken = reading.states["layers.0"].clone()
    broken[3, 2] = bad
    found = measured(replace(reading, states={**reading.states, "layers.0": broken}))
    assert found == {"layers.1": pytest.approx(measured(reading)["layers.1"])}


def test_labels_that_are_mostly_alone_leave_their_information_out() -> None:
    found = measured(replace(readings.representation(), labels=list(range(60))))
    assert all("dsmi_labels" not in layer and "dsmi_input" in layer for layer in found.values())


@pytest.mark.parametrize("labels", [[0] * 60, []])
def test_one_class_alone_has_nothing_to_tell(labels: list[int]) -> None:
    reading = replace(readings.representation(), labels=labels, input_clusters=labels)
    assert all(
        not {"dsmi_labels", "dsmi_input"} & set(layer) for layer in measured(reading).values()
    )


def test_flags_are_up_where_the_bandwidth_shows_only_itself() -> None:
    many = readings.representation().states["layers.0"]
    for states, flags in ((many[:4], (1, 1)), (many, (0, 1)), (9 * many, (0, 0))):
        found = measured(RepresentationReading(states={"a": states}))["a"]
        assert (found["dse_is_condensed"], found["dse_released_is_too_wide"]) == flags


def test_of_many_rows_the_entropy_is_estimated_and_nothing_else_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reading = readings.representation(rows=200)
    exact = measured(reading)
    monkeypatch.setattr("entropylens.diagnostics.diffusion_entropy._MOST", 150)
    for name, found in measured(reading).items():
        assert set(found) == {"dse", "dse_standard_error", "bandwidth"}
        assert found["bandwidth"] == pytest.approx(exact[name]["bandwidth"], rel=0.05)
        assert 0 < found["dse_standard_error"] < 0.02
        states = reading.states[name]
        dse = float(diffusion_spectral_entropy(states, bandwidth=found["bandwidth"]))
        assert found["dse"] == pytest.approx(dse, abs=4 * found["dse_standard_error"])
    broken = {**reading.states, "layers.0": reading.states["layers.0"] * torch.nan}
    assert list(measured(replace(reading, states=broken))) == ["layers.1"]


def test_too_few_rows_have_no_scale() -> None:
    assert measured(RepresentationReading(states={"a": torch.randn(2, 3)})) == {}


def test_rows_are_the_weight() -> None:
    blocks, _ = DiffusionEntropy().measure(readings.representation(rows=30), None)
    assert [float(block.columns["weight"]) for block in blocks] == [30, 30, 30]


def test_two_measurements_of_the_same_states_are_the_same() -> None:
    assert measured(readings.representation()) == measured(readings.representation())


def test_the_run_has_the_mean_of_its_layers_where_each_is_known() -> None:
    reading = readings.representation()
    *layers, run = DiffusionEntropy().measure(reading, None)[0]
    assert run.columns["name"] == ["representation/dse"]
    assert run.columns["module"] == ""
    mean = sum(float(layer.columns["value"][0]) for layer in layers) / len(layers)
    assert float(run.columns["value"]) == pytest.approx(mean, rel=1e-6)
    broken = {**reading.states, "layers.1": reading.states["layers.1"] * torch.nan}
    *_, run = DiffusionEntropy().measure(replace(reading, states=broken), None)[0]
    assert float(run.columns["weight"]) == 0
