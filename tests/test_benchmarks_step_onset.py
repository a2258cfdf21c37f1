import gzip
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from benchmarks import step_onset
from benchmarks.step_parts import onset_figure, onset_lines, onset_nets, onset_statistics
from benchmarks.step_parts.onset_nets import NETS, Images, Training
from entropylens.analysis.exact_radius import exact_radius

# torch compiles its own derivatives with it when the first is taken forward.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")


def some_images(count: int, seed: int = 0) -> Images:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    images = torch.randn(count, 1, 14, 14, generator=generator)
    images[torch.arange(count), 0, labels] += 2
    return Images(images, labels)


def some_net(name: str, steps: int = 30) -> Training:
    torch.manual_seed(0)
    training = onset_nets.begin(NETS[name](), some_images(64), 0, rate=1e-2, batch=32)
    for _ in range(steps):
        training.step()
    return training


@pytest.fixture
def states() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    drawn = np.random.default_rng(0)
    return 3 * drawn.normal(size=(20, 6)), drawn.normal(size=(20, 6))


def test_with_two_classes_the_margin_radius_is_the_exact_one() -> None:
    logits, slopes = np.array([[3.0, 0.0], [-1.0, 0.5]]), np.array([[2.0, 0.0], [0.0, 5.0]])
    expected = [np.hypot(3, np.pi) / 2, np.hypot(1.5, np.pi) / 5]
    assert onset_lines.margin_radii(logits, slopes) == pytest.approx(expected, rel=1e-12)
    assert onset_lines.smallest_radii(logits, slopes, 1) == pytest.approx([expected[1]], rel=1e-9)


def test_the_smallest_exact_radii_are_those_of_all_samples(
    states: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]],
) -> None:
    every = np.sort(exact_radius(*states))
    assert onset_lines.smallest_radii(*states, 3) == pytest.approx(every[:3], rel=1e-12)
    bound = np.pi / onset_lines.spreads(states[1])
    margin = onset_lines.margin_radii(*states)
    assert (bound <= margin).all()
    assert (margin <= exact_radius(*states) * (1 + 1e-9)).all()
    assert (margin > bound).any()


def test_a_radius_that_cannot_be_told_makes_the_smallest_unknown(
    states: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onset_lines, "exact_radius", lambda *_: np.array([np.nan]))
    assert onset_lines.smallest_radii(*states, 3) is None
    assert onset_lines.logit_scales(*states)["exact_min"] is None


def test_weighted_spreads_are_two_standard_deviations_under_the_softmax(
    states: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]],
) -> None:
    logits, slopes = states
    found = onset_lines.weighted_spreads(logits, slopes)
    for z, a, one in zip(logits, slopes, found, strict=True):
        p = np.exp(z) / np.exp(z).sum()
        assert one == pytest.approx(2 * np.sqrt(p @ a**2 - (p @ a) ** 2), rel=1e-9)
    assert (found <= onset_lines.spreads(slopes)).all()
    two = onset_lines.weighted_spreads(np.zeros((1, 2)), np.array([[1.0, 4.0]]))
    assert two == pytest.approx([3.0])


@pytest.mark.parametrize(
    ("slope", "curvature", "rise", "length"),
    [
        (0.0, 2.0, 4.0, 2.0),
        (-1.0, 2.0, 2.0, 2.0),
        (3.0, 0.0, 6.0, 2.0),
        (3.0, -2.0, 2.0, 1.0),
        (1.0, -2.0, 2.0, np.inf),
        (-1.0, -2.0, 2.0, np.inf),
        (-1.0, 0.0, 2.0, np.inf),
    ],
)
def test_the_quadratic_model_meets_the_rise_first_at(
    slope: float, curvature: float, rise: float, length: float
) -> None:
    assert onset_lines.quadratic_length(slope, curvature, rise) == pytest.approx(length)


def test_the_first_length_of_each_event_is_found_to_a_third_of_a_per_cent() -> None:
    def damage(length: float) -> dict[str, bool]:
        return {
            "loss": length >= 3.21,
            "accuracy": 0.0123 <= length < 0.09 or length > 20,
            "held_out_accuracy": False,
        }

    found = onset_lines.first_lengths(damage, onset_lines.GRID)
    assert found["loss"] == pytest.approx(3.21, rel=4e-3)
    assert found["accuracy"] == pytest.approx(0.0123, rel=0.06)
    assert found["held_out_accuracy"] is None


def test_damage_is_a_doubled_loss_above_the_floor_and_five_points() -> None:
    start = onset_lines.State(0.01, 0.9, 0.8)
    after = onset_lines.State(0.021, 0.85, 0.76)
    assert start.damage(start, 0.0) == dict.fromkeys(onset_lines.EVENTS, False)
    assert after.damage(start, 0.0) == {
        "loss": True,
        "accuracy": True,
        "held_out_accuracy": False,
    }
    assert not after.damage(start, 0.1)["loss"]
    assert onset_lines.State(0.12, 0.9, 0.8).damage(start, 0.1)["loss"]
    assert onset_lines.State(float("nan"), 0.9, 0.8).damage(start, 0.1)["loss"]


def test_linear_logits_are_foretold_whatever_the_updates_length() -> None:
    training, probe = some_net("linear"), some_images(32)
    generator = torch.Generator().manual_seed(1)
    names = dict(training.net.named_parameters())
    update = {n: torch.randn(value.shape, generator=generator) for n, value in names.items()}
    found = onset_lines.follow(training.net, probe, some_images(40, 1), update)
    longer = {name: 7 * value for name, value in update.items()}
    again = onset_lines.follow(training.net, probe, some_images(40, 1), longer)
    assert found["onset"]["loss"] is not None
    for event in ("loss", "accuracy"):
        told = found["linearised_onset"][event]
        assert found["onset"][event] == pytest.approx(told, rel=0.01)
        assert again["onset"][event] == pytest.approx(told, rel=0.01)
    # The loss rises all the way, so that the worst up to r = 1 is there.
    length = 1 / found["scales"]["r_max"] / onset_lines.length_of(update)
    with torch.no_grad():
        for name, value in names.items():
            value.add_(update[name], alpha=length)
        there = float(cross_entropy(training.net(probe.images), probe.labels))
    assert found["within"]["loss_ratio"] == pytest.approx(there / found["start"]["loss"], rel=1e-4)
    assert again["scales"] == pytest.approx(found["scales"], rel=1e-4)
    # For linear logits the curvature is the mean variance of their slopes under the softmax.
    deviation = found["scales"]["weighted_rms"] * np.pi / 2
    assert found["curvature"] == pytest.approx(deviation**2, rel=1e-3)


@pytest.mark.parametrize("name", ["mlp_layer_norm", "cnn_batch_norm", "transformer"])
def test_slope_and_curvature_are_those_of_finite_differences(name: str) -> None:
    training, probe = some_net(name), some_images(64)
    net = training.net
    buffers = deepcopy(dict(net.named_buffers()))
    update = {n: torch.randn_like(p) for n, p in net.named_parameters()}
    found = onset_lines.follow(net, probe, probe, update)
    for key, kept in net.named_buffers():
        assert torch.equal(kept, buffers[key])

    exact = deepcopy(net).double()
    start = parameters_to_vector(exact.parameters()).detach()
    along = parameters_to_vector([value.double() for value in update.values()])
    along = along / along.norm()
    assert found["scales"]["relative_update_norm"] == pytest.approx(1 / float(start.norm()))

    @torch.no_grad()
    def logits(length: float) -> Tensor:
        vector_to_parameters(start + length * along, exact.parameters())
        return exact(probe.images.double())

    # Not longer: a second derivative knows nothing of the kinks of a rectifier.
    losses = [float(cross_entropy(logits(at * 1e-5), probe.labels)) for at in (-1, 0, 1)]
    curvature = (losses[0] - 2 * losses[1] + losses[2]) / 1e-10
    assert found["start"]["loss"] == pytest.approx(losses[1], rel=1e-4)
    assert found["curvature"] == pytest.approx(curvature, rel=0.02, abs=1e-4)
    assert found["scales"]["curvature"] == pytest.approx(abs(found["curvature"]) / 2)
    slopes = (logits(1e-4) - logits(-1e-4)) / 2e-4
    spread = float((slopes.amax(1) - slopes.amin(1)).max())
    assert found["scales"]["r_max"] == pytest.approx(spread / np.pi, rel=2e-3)

    onset = found["onset"]["loss"]
    rise = max(losses[1], 0.1)
    assert cross_entropy(logits(onset), probe.labels) >= losses[1] + rise * 0.999
    assert cross_entropy(logits(onset * 0.99), probe.labels) < losses[1] + rise


def test_directions_descend_and_follow_adam_and_leave_the_training_alone() -> None:
    training = some_net("mlp", steps=3)
    data = some_images(64)
    split = onset_nets.Split(data, some_images(8, 1))
    before = deepcopy(training.net.state_dict())
    batches = [data[:32], data[32:]]
    watched = Training(training.net, training.optimizer, iter(batches))
    found = list(step_onset.directions(watched, split, torch.Generator().manual_seed(0)))
    assert [name for name, _ in found] == ["gradient", "adam", *["random"] * step_onset.RANDOM]
    for name, value in training.net.state_dict().items():
        assert torch.equal(value, before[name])

    training.optimizer.zero_grad()
    cross_entropy(training.net(data.images), data.labels).backward()
    for name, parameter in training.net.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[0][1][name], -parameter.grad)
    Training(training.net, training.optimizer, iter(batches)).step()
    for name, value in training.net.named_parameters():
        torch.testing.assert_close(found[1][1][name], value - before[name])
    assert not torch.equal(found[2][1]["1.weight"], found[3][1]["1.weight"])


def test_a_temperature_divides_the_logits() -> None:
    net, images = NETS["linear"](), some_images(4).images
    torch.testing.assert_close(4 * onset_nets.Tempered(net, 4.0)(images), net(images))


def planted(net: str, seed: int, r: float, scale: float) -> dict[str, Any]:
    unknown = dict.fromkeys(onset_statistics.NORMALISERS)
    return {
        "net": net,
        "seed": seed,
        "onset": {"loss": r / scale, "accuracy": None, "held_out_accuracy": r / scale / 4},
        "linearised_onset": dict.fromkeys(onset_lines.EVENTS, r / scale / 2),
        "scales": {**unknown, "update_norm": 1.0, "r_max": scale, "r_q95": scale**2},
        "start": {"loss": 0.5, "accuracy": 0.9, "held_out_accuracy": 0.8},
        "within": {"loss_ratio": r, "accuracy_change": -r / 100, "held_out_accuracy_change": 0.01},
    }


def test_onsets_are_as_alike_as_they_were_planted() -> None:
    drawn = np.random.default_rng(1)
    scales, ratios = np.exp(drawn.normal(size=(2, 40)))
    scales *= np.repeat(np.exp(2 * drawn.normal(size=10)), 4)
    records = [
        planted("a", at // 4, r, s) for at, (s, r) in enumerate(zip(scales, ratios, strict=True))
    ]
    found = onset_statistics.spread(records, "loss", base=10)
    assert found["r_max"]["lines"] == 40
    assert found["r_max"]["median"] == pytest.approx(np.median(ratios))
    assert found["r_max"]["std"] == pytest.approx(np.std(np.log10(ratios), ddof=1))
    raw = np.log10(ratios / scales)
    assert found["update_norm"]["std"] == pytest.approx(np.std(raw, ddof=1))
    ratio = np.std(raw, ddof=1) / np.std(np.log10(ratios), ddof=1)
    assert found["update_norm"]["to_r_max"] == pytest.approx(ratio)
    assert found["linearised"]["std"] == pytest.approx(0, abs=1e-12)
    assert found["linearised"]["median"] == pytest.approx(2)
    assert found["exact_min"] == {"lines": 0}
    natural = onset_statistics.spread(records, "loss", base=np.e)
    assert natural["r_max"]["std"] == pytest.approx(found["r_max"]["std"] * np.log(10))
    assert onset_statistics.spread(records, "accuracy", base=10)["r_max"] == {"lines": 0}

    draws = np.random.default_rng(2).integers(10, size=(2000, 10))
    stds = [np.std(raw.reshape(10, 4)[draw].ravel(), ddof=1) for draw in draws]
    assert found["update_norm"]["interval"] == pytest.approx(
        np.quantile(stds, (0.025, 0.975)), rel=0.05
    )


def test_within_counts_deviations_from_the_mean_of_the_like() -> None:
    r = np.exp(np.random.default_rng(3).normal(size=(4, 10)))
    shifted = r * np.array([1, 10, 100, 1000])[:, None]
    records = [
        planted("ab"[kind % 2], seed, value, 1.0) | {"direction": "cd"[kind // 2]}
        for kind, values in enumerate(shifted)
        for seed, value in enumerate(values)
    ]
    found = onset_statistics.spread(records, "loss", base=10, within=("net", "direction"))
    logs = np.log10(r)
    expected = np.sqrt(((logs - logs.mean(1, keepdims=True)) ** 2).sum() / 36)
    assert found["r_max"]["std"] == pytest.approx(expected)
    low, high = found["r_max"]["interval"]
    assert low < expected < high
    assert high - low < expected


def test_a_draw_of_the_only_training_deviates_as_all_values_do() -> None:
    values = np.array([1.0, 2.0, 4.0])
    only, like = np.array(["a-0"] * 3), np.array([""] * 3)
    std, stds = onset_statistics.Resampled(only, like).std(values)
    assert std == pytest.approx(np.std(values, ddof=1))
    assert stds == pytest.approx(std)


def test_onsets_below_one_are_counted() -> None:
    records = [planted("a", at, r, 3.0) for at, r in enumerate((0.5, 1.5, 4.0, 1.05))]
    found = onset_statistics.by_r(records)
    assert found["onset"]["loss"] == {
        "happened": 4,
        "below_1": 1,
        "lowest": pytest.approx(0.5),
        "median": pytest.approx(1.275),
        "highest": pytest.approx(4.0),
    }
    assert found["onset"]["accuracy"]["lowest"] is None
    assert found["onset"]["held_out_accuracy"]["below_1"] == 3
    assert found["up_to_r_1"] == {
        "loss_up_by_a_tenth": 2,
        "worst_loss_ratio": 4.0,
        "worst_accuracy_change": -0.04,
        "worst_held_out_accuracy_change": 0.01,
    }


def test_the_figure_shows_each_place_from_the_lowest_to_the_highest_onset() -> None:
    records = [planted("a", at, r, 3.0) for at, r in enumerate((0.5, 1.5, 4.0, 1.05))]
    by_r = {"here": onset_statistics.by_r(records), "there": onset_statistics.by_r(records[:1])}
    (there, here) = onset_figure.draw(by_r, ["here", "there"]).data
    assert here.x == pytest.approx((0.5, 1.275, 4.0))
    assert there.x == pytest.approx((0.5, 0.5, 0.5))
    assert here.y[0] - there.y[0] == pytest.approx(1)


def written(folder: Path) -> Path:
    """Fashion-MNIST's four files, of noise and a bright row for the label."""
    folder.mkdir()
    drawn = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 30)):
        labels = drawn.integers(10, size=count, dtype=np.uint8)
        images = drawn.integers(60, size=(count, 28, 28), dtype=np.uint8)
        images[np.arange(count), 2 * labels] = 255
        for name, header, values in (
            ("images-idx3", bytes(16), images),
            ("labels-idx1", bytes(8), labels),
        ):
            path = folder / f"{part}-{name}-ubyte.gz"
            path.write_bytes(gzip.compress(header + values.tobytes()))
    return folder


def test_images_are_averaged_over_two_by_two_pixels(tmp_path: Path) -> None:
    folder = written(tmp_path / "data")
    read = onset_nets.read_split(folder, seed=3)
    assert read.trained.images.shape == (60, 1, 14, 14)
    assert len(read.held_out.labels) == 30
    pixels = gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes())[16:]
    whole = np.frombuffer(pixels, np.uint8).reshape(60, 14, 2, 14, 2).mean((2, 4)) / 255
    shown = read.trained.images[:, 0].double().numpy() * 0.32 + 0.286
    assert np.sort(shown.mean((1, 2))) == pytest.approx(np.sort(whole.mean((1, 2))), rel=1e-5)
    for image, label in zip(shown, read.trained.labels, strict=True):
        assert image.mean(1).argmax() == label
    other = onset_nets.read_split(folder, seed=4)
    assert not torch.equal(other.trained.labels, read.trained.labels)


def test_without_the_images_it_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        onset_nets.read_split(tmp_path, seed=0)


def test_it_prints_tables_writes_numbers_and_follows_no_training_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nets = {name: NETS[name] for name in ("linear", "mlp")}
    for where in (step_onset, onset_nets):
        monkeypatch.setattr(where, "NETS", nets)
    monkeypatch.setattr(onset_nets, "PROBE", 8)
    monkeypatch.setattr(onset_lines, "SMALLEST", 1)
    monkeypatch.setattr(onset_statistics, "RESAMPLES", 50)
    monkeypatch.setattr(step_onset, "STAGES", (2, 5, 9))
    monkeypatch.setattr(step_onset, "TEMPERATURES", (0.5, 4.0))
    monkeypatch.setattr(step_onset, "RANDOM", 1)
    monkeypatch.setattr(step_onset, "TEMPERED_STEPS", 3)
    out = tmp_path / "results/onset.json"
    asked = ["step_onset", "--seeds", "2", "--data", str(written(tmp_path / "data"))]
    asked += ["--cache", str(tmp_path / "cache"), "--out", str(out)]
    monkeypatch.setattr("sys.argv", asked)
    taken = []
    step = Training.step

    def counted(training: Training) -> None:
        taken.append(training)
        step(training)

    monkeypatch.setattr(Training, "step", counted)
    assert step_onset.main() == 0
    # Four trainings of 9 steps, with one more of Adam's at each stage; six tempered ones of 3.
    assert len(taken) == 4 * (9 + 3) + 6 * 3
    found = json.loads(out.read_text())
    assert found["lines"] == 2 * 2 * 3 * (2 + step_onset.RANDOM)
    assert len(list((tmp_path / "cache").iterdir())) == 6
    linear = found["by_r"]["linear, 9 steps"]
    assert linear["lines"] == 2 * (2 + step_onset.RANDOM)
    shown = capsys.readouterr().out
    assert f"{linear['onset']['loss']['lowest']:.2f}" in shown
    assert "update_norm" in shown
    assert set(found["temperature"]) == {"trained at T", "trained at T = 1"}
    tempered = json.loads((tmp_path / "cache/temperature-0.json").read_text())["records"]
    at = {(one["training"], one["temperature"]): one["start"]["loss"] for one in tempered}
    assert at["trained at T = 1", 0.5] != pytest.approx(at["trained at T = 1", 4.0], rel=0.1)

    monkeypatch.setattr(step_onset, "read_split", None)
    assert step_onset.main() == 0
    assert json.loads(out.read_text()) == found
    monkeypatch.setattr(step_onset, "RATE", 0.1)
    with pytest.raises(TypeError):
        step_onset.main()
