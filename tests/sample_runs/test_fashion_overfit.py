"""The sample run at a tiny size, its statistics, its figure, and what is committed of it."""

import gzip
import runpy
import sys
from collections.abc import Iterator
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

pytest.importorskip("lightning")

import lightning.pytorch as pl

import entropylens as el
from entropylens.analysis.compare import interval
from entropylens.diagnostics._diffusion import diffusion_spectral_entropy
from entropylens_callbacks.lightning import EntropyLensCallback
from sample_runs.fashion_overfit import figure, images, measuring, net, ranking, run

pytestmark = pytest.mark.filterwarnings("ignore")

FOLDER = Path(run.__file__).parent
TINY = run.Size(trained=48, held_out=24, probe=24, epochs=(0, 1), batch=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fashion-MNIST's four files, of noise and a bright row for the label."""
    made = tmp_path_factory.mktemp("fashion")
    drawn = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 30)):
        labels = drawn.permutation(np.arange(count) % 3).astype(np.uint8)
        pixels = drawn.integers(60, size=(count, 28, 28), dtype=np.uint8)
        pixels[np.arange(count), 2 * labels] = 255
        for name, header, values in (
            ("images-idx3", bytes(16), pixels),
            ("labels-idx1", bytes(8), labels),
        ):
            path = made / f"{part}-{name}-ubyte.gz"
            path.write_bytes(gzip.compress(header + values.tobytes()))
    return made


@pytest.fixture
def threads() -> Iterator[list[str]]:
    before = torch.get_num_threads()
    yield ["--threads", str(before)]
    torch.set_num_threads(before)


# -- images ----------------------------------------------------------------------------------------


def test_images_are_averaged_standardised_and_keep_their_labels(folder: Path) -> None:
    split = images.read_split(folder, 3, 60, 30)
    assert split.source == "fashion"
    assert split.trained.images.shape == (60, 1, 14, 14)
    assert len(split.held_out.labels) == 30
    assert split.trained.images.mean() == pytest.approx(0, abs=1e-5)
    assert split.trained.images.std() == pytest.approx(1, abs=1e-5)
    for part in (split.trained, split.held_out):
        assert torch.equal(part.images[:, 0].mean(2).argmax(1), part.labels)
    again, other = (images.read_split(folder, seed, 60, 30) for seed in (3, 4))
    assert torch.equal(again.trained.images, split.trained.images)
    assert not torch.equal(other.trained.labels, split.trained.labels)


def test_shuffled_labels_are_the_same_labels_in_a_fixed_other_order() -> None:
    labels = torch.arange(1000) % 10
    found = images.shuffled(labels, 5)
    assert torch.equal(found.sort().values, labels.sort().values)
    assert torch.equal(found, images.shuffled(labels, 5))
    assert float((found == labels).float().mean()) == pytest.approx(0.1, abs=0.03)


def test_without_fashion_mnist_there_are_digits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    split = images.read_split(tmp_path, 0, 500, 200)
    assert (split.source, split.side) == ("digits", 8)
    assert (len(split.trained.labels), len(split.held_out.labels)) == (500, 200)


def test_without_either_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SystemExit, match="apt-get install dataset-fashion-mnist"):
        images.read_split(tmp_path, 0, 500, 200)


# -- measuring -------------------------------------------------------------------------------------


def test_states_are_each_layer_s_outputs_and_of_convolutions_the_mean_over_places() -> None:
    torch.manual_seed(0)
    module = net.Classifier(14, 1e-3)
    seen: dict[str, np.ndarray[Any, Any]] = {}
    for name, layer in module.net.named_children():
        layer.register_forward_hook(
            lambda _, __, out, name=name: seen.update({name: out.detach().numpy()})
        )
    given = torch.randn(6, 1, 14, 14)
    module(given)
    states = net.states_of(module.net, given)
    assert list(states) == ["first", "second", "hidden", "head"]
    assert [tuple(state.shape) for state in states.values()] == [(6, w) for w in (16, 32, 256, 10)]
    for name, state in states.items():
        out = seen[name]
        mean = out.mean((2, 3)) if out.ndim == 4 else out
        assert state.numpy() == pytest.approx(mean, abs=1e-6)


def test_every_layer_is_measured_as_the_diagnostics_measure_it() -> None:
    drawn = torch.Generator().manual_seed(0)
    states = {name: torch.randn(40, 24, generator=drawn) for name in ("one", "two")}
    found = {(m.layer, m.name): m.value for m in measuring.measure(states, torch.arange(40) % 4)}
    assert {layer for layer, _ in found} == {"one", "two"}
    for name, state in states.items():
        for key, alpha in (("dse", 0.0), ("dse_half", 0.5), ("dse_one", 1.0)):
            entropy = diffusion_spectral_entropy(state, alpha=alpha)
            assert found[name, key] == pytest.approx(float(entropy), abs=1e-4)
        spread = np.linalg.svd(state.double().numpy(), compute_uv=False)
        shares = spread / spread.sum() + 1e-7
        rank = np.exp(-(shares * np.log(shares)).sum())
        assert found[name, "rankme"] == pytest.approx(rank, rel=1e-4)
        assert {"dsmi_labels", "alpha_req", "within_between_ratio"} <= {
            n for at, n in found if at == name
        }


def test_accuracy_is_of_all_rows_and_states_are_of_the_probe_s() -> None:
    torch.manual_seed(0)
    module = net.Classifier(8, 1e-3).train()
    given = images.Labelled(torch.randn(40, 1, 8, 8), torch.arange(40) % 4)
    taken = measuring.Measuring(EntropyLensCallback(), (0, 2), {"held_out": given}, probe=24)
    taken.on_train_start(pl.Trainer(accelerator="cpu", logger=False), module)
    assert module.training
    found = taken.table().to_pandas().set_index(["layer", "name"])["value"]
    with torch.no_grad():
        logits = module(given.images)
        states = net.states_of(module.net, given.images[:24])
    right = np.mean(logits.numpy().argmax(1) == given.labels.numpy())
    assert found["", "accuracy"] == pytest.approx(right)
    shares = torch.log_softmax(logits.double(), 1)[torch.arange(40), given.labels]
    assert found["", "loss"] == pytest.approx(float(-shares.mean()), rel=1e-5)
    assert found["hidden", "dse"] == pytest.approx(
        float(diffusion_spectral_entropy(states["hidden"])), abs=1e-4
    )


# -- statistics ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clean", "other", "share"),
    [
        ([1, 2, 3], [7, 8, 9], 1.0),
        ([7, 8, 9], [1, 2, 3], 1.0),
        ([1, 1, 1], [1, 1, 1], 0.5),
        ([1, 2, 3, 20], [7, 8, 9, 10], 0.625),
    ],
    ids=["apart", "apart the other way", "equal", "one run on the wrong side"],
)
def test_a_threshold_from_other_seeds_tells_runs_apart(
    clean: list[float], other: list[float], share: float
) -> None:
    found = ranking.told_apart(np.array(clean, float), np.array(other, float))
    assert found == pytest.approx(told_apart_slowly(clean, other))
    assert found == pytest.approx(share)


def told_apart_slowly(clean: list[float], other: list[float]) -> float:
    points = []
    for at in range(len(clean)):
        low = [value for seed, value in enumerate(clean) if seed != at]
        high = [value for seed, value in enumerate(other) if seed != at]
        means = sum(low) / len(low), sum(high) / len(high)
        threshold = sum(means) / 2
        for value, is_other in ((clean[at], False), (other[at], True)):
            if means[0] == means[1] or value == threshold:
                points.append(0.5)
            else:
                says_other = (value > threshold) == (means[1] > means[0])
                points.append(float(says_other == is_other))
    return sum(points) / len(points)


def test_noise_tells_nothing_apart_and_one_seed_is_refused() -> None:
    drawn = np.random.default_rng(0)
    shares = [ranking.told_apart(*drawn.standard_normal((2, 5))) for _ in range(2000)]
    assert np.mean(shares) < 0.52
    with pytest.raises(ValueError, match="expected two or more seeds with both, got 1 and 1"):
        ranking.told_apart(np.ones(1), np.ones(1))


def planted(values: dict[tuple[str, str, int], list[float]], **fixed: str) -> pd.DataFrame:
    """One row for each name, labels, epoch and seed."""
    rows = [
        {"name": name, "labels": labels, "epoch": epoch, "seed": seed, "value": value}
        | {"rows": "training", "layer": "hidden", **fixed}
        for (name, labels, epoch), seeds in values.items()
        for seed, value in enumerate(seeds)
    ]
    return pd.DataFrame(rows)


def test_a_measure_is_sure_from_where_it_stays_sure() -> None:
    apart, mixed = [0.0, 1.0, 2.0], [11.0, 12.0, 13.0]
    values = {("dse", "clean", epoch): apart for epoch in (0, 1, 2, 3, 4)}
    values |= {("dse", "shuffled", epoch): mixed for epoch in (0, 1, 3, 4)}
    values |= {("dse", "shuffled", 2): apart}
    (one,) = ranking.rank(planted(values), "training", ["hidden"])
    assert one.told_apart == {1: 1.0, 2: 0.5, 3: 1.0, 4: 1.0}
    assert one.sure_from == 3
    assert one.effect[4] == pytest.approx(11.0)  # eleven standard deviations of one
    assert one.effect[2] == 0
    unsure = planted(dict.fromkeys(values, values["dse", "clean", 0]))
    assert ranking.rank(unsure, "training", ["hidden"])[0].sure_from is None


def test_what_is_unknown_tells_nothing_and_layers_count_alike() -> None:
    apart = {("rankme", "clean", 1): [0.0, 1.0], ("rankme", "shuffled", 1): [8.0, 9.0]}
    unknown = {("rankme", "clean", 1): [0.0, 1.0], ("rankme", "shuffled", 1): [8.0]}
    found = pd.concat([planted(apart), planted(unknown, layer="first")])
    (one,) = ranking.rank(found, "training", ["hidden", "first"])
    assert one.told_apart == {1: 0.75}
    assert ranking.rank(found, "training", ["first"])[0].told_apart == {1: 0.5}


def test_courses_pair_the_last_epoch_with_the_first_by_seed() -> None:
    found = planted({("dse", "clean", 0): [1.0, 5.0, 9.0], ("dse", "clean", 7): [2.0, 6.0, 10.0]})
    (one,) = ranking.courses(found, "hidden", "dse")
    assert {epoch: at.mean for epoch, at in one.by_epoch.items()} == {0: 5.0, 7: 6.0}
    assert one.by_epoch[0].high == pytest.approx(5 + 4.3027 * 4 / np.sqrt(3), rel=1e-4)
    assert (one.change.low, one.change.mean, one.change.high) == pytest.approx((1.0, 1.0, 1.0))


def test_one_measure_follows_another_by_rank() -> None:
    values = {("dse", "clean", epoch): [float(epoch**2), -float(epoch)] for epoch in range(1, 6)}
    values |= {("norm", "clean", epoch): [float(epoch), -float(epoch**3)] for epoch in range(1, 6)}
    found = planted(values, rows="held_out")
    assert ranking.follows(found, "hidden", "dse", "norm") == pytest.approx(1.0)
    found.loc[(found["name"] == "norm") & (found["seed"] == 0), "value"] *= -0.001
    assert -0.5 < ranking.follows(found, "hidden", "dse", "norm") < 0.9


def test_the_figure_shows_shares_of_what_each_can_be() -> None:
    values = {
        (name, labels, epoch): [height, height + 1]
        for name, height in (("accuracy", 0.0), ("dse", 2.0), ("dsmi_labels", 1.0))
        for labels in ("clean", "shuffled")
        for epoch in (0, 4)
    }
    found = planted(values)
    found.loc[found["name"] == "accuracy", "layer"] = ""
    drawn = figure.draw(found, probe=512)
    lines = {trace.name: trace for trace in drawn.data if trace.line.width}
    assert len(lines) == 6
    assert lines["accuracy, clean labels"].y == pytest.approx([0.5, 0.5])
    assert lines["DSE, median bandwidth / log2 N, shuffled labels"].y == pytest.approx(
        [2.5 / 9] * 2
    )
    information = lines["DSMI with the labels / log2 10, clean labels"]
    assert information.y == pytest.approx([1.5 / log2(10)] * 2)
    assert information.x == pytest.approx([0.0, 2.0])
    assert {trace.line.dash for trace in lines.values()} == {"solid", "dash"}


# -- the whole of it -------------------------------------------------------------------------------


def test_it_trains_once_measures_and_refuses_what_is_not_its_own(
    tmp_path: Path, folder: Path, threads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    asked = ["--out", str(out), "--data", str(folder), "--seeds", "0", "1", *threads]
    assert run.main(asked, TINY) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Left-out runs told apart" in said
    found = pq.read_table(out / "measurements.parquet").to_pandas()
    assert set(found["seed"]) == {0, 1}
    assert set(found["labels"]) == {"clean", "shuffled"}
    assert set(found["rows"]) == {"training", "held_out"}
    assert set(found["epoch"]) == {0, 1}
    assert {"dse", "dse_released", "dsmi_labels", "rankme", "accuracy"} <= set(found["name"])
    before = found[(found["epoch"] == 0) & (found["seed"] == 0) & (found["rows"] == "held_out")]
    clean, other = (
        before[before["labels"] == labels]["value"].to_list() for labels in ("clean", "shuffled")
    )
    assert clean == other  # one net on the same images, which nothing has trained yet

    logs = {name: el.open_run(out / name) for name in ("clean-seed-0", "shuffled-seed-0")}
    for name, log in logs.items():
        assert log.state() == "finished"
        assert log.status()[0].faults == {}
        assert log.metrics("loss/mean", phases="train").to_arrow().num_rows == 3
        assert log.metrics("framework/val_accuracy").to_arrow().num_rows == 1
        assert log.config["user"]["source"] == "fashion"
        told = log.metrics("held_out/hidden/dse", phases="eval").to_arrow()["value"].to_pylist()
        own = found[(found["labels"] == name.split("-")[0]) & (found["seed"] == 0)]
        own = own[(own["rows"] == "held_out") & (own["layer"] == "hidden")]
        assert told == pytest.approx(own[own["name"] == "dse"]["value"].to_list())

    assert run.main(asked, TINY) == 0
    assert el.open_run(out / "clean-seed-0").run_id == logs["clean-seed-0"].run_id
    (out / "clean-seed-0" / "measurements.parquet").unlink()  # as when it broke off
    assert run.main([*asked, "--labels", "clean"], TINY) == 0
    assert el.open_run(out / "clean-seed-0").run_id != logs["clean-seed-0"].run_id
    again = pq.read_table(out / "measurements.parquet").to_pandas()
    assert set(again["labels"]) == {"clean"}
    pd.testing.assert_frame_equal(
        again.reset_index(drop=True),
        found[found["labels"] == "clean"].reset_index(drop=True),
        check_categorical=False,
    )
    with pytest.raises(SystemExit, match="a run with the same settings that has ended"):
        run.main(asked, run.Size(trained=32, held_out=24, probe=24, epochs=(0, 1), batch=16))


def test_what_to_install_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(SystemExit, match=r"pip install -e '..lightning.'"):
        runpy.run_path(run.__file__)


# -- what is committed -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed() -> pd.DataFrame:
    return pq.read_table(FOLDER / "logs" / "measurements.parquet").to_pandas()


def test_the_page_s_tables_are_those_of_the_measurements(committed: pd.DataFrame) -> None:
    page = (FOLDER / "README.md").read_text()
    tables = [
        [ranking.changes_columns(committed), *ranking.changes_rows(committed)],
        [ranking.ranking_columns(committed), *ranking.ranking_rows(committed)],
    ]
    for rows in tables:
        for cells in rows:
            assert f"| {' | '.join(cells)} |" in page


def test_what_the_page_says_in_words_is_so(committed: pd.DataFrame) -> None:
    page = " ".join((FOLDER / "README.md").read_text().split())

    def values(name: str, rows: str, labels: str, layer: str = "hidden") -> pd.DataFrame:
        own = committed[(committed["name"] == name) & (committed["layer"] == layer)]
        own = own[(own["rows"] == rows) & (own["labels"] == labels)]
        return own.pivot(index="seed", columns="epoch", values="value").astype(float)

    clean = values("dse", "held_out", "clean")
    fall, rise = (clean[0] - clean[1]).mean(), (clean[60] - clean[1]).mean()
    assert f"falls by {fall:.2f} bits in the first epoch" in page
    assert f"wins back {rise:.2f}" in page
    shuffled = values("dsmi_labels", "held_out", "shuffled")
    early = interval(list(shuffled[5] - shuffled[0]))
    assert f"by {early.mean:.2f} ({early.low:.2f} to {early.high:.2f}) at epoch 5" in page
    assert shuffled.mean().idxmax() == 5
    assert interval(list(shuffled[60] - shuffled[0])).high < 0  # type: ignore[operator]
    learnt = values("dsmi_labels", "held_out", "clean")
    late = interval(list(learnt[8] - learnt[60]))
    assert f"lose {late.mean:.2f} ({late.low:.2f} to {late.high:.2f}) from epoch 8" in page
    near, head, back = (
        values("dsmi_labels", "training", "shuffled", layer)[60].mean()
        for layer in ("hidden", "head", "second")
    )
    assert f"({near:.2f}, at the head {head:.2f})" in page
    assert back < near < head
    norm = ranking.follows(committed, "hidden", "dse_released", "norm")
    rank = ranking.follows(committed, "hidden", "dse", "effective_rank")
    assert f"rank correlation with their norm is {norm:.2f}" in page
    assert f"(rank correlation {rank:.2f} over all epochs)" in page


def test_both_nets_know_their_labels_by_heart_and_one_alone_has_learnt(
    committed: pd.DataFrame,
) -> None:
    last = committed[(committed["epoch"] == max(run.Size().epochs)) & (committed["layer"] == "")]
    accuracy = last[last["name"] == "accuracy"].set_index(["rows", "labels"])["value"]
    for labels in run.LABELS:
        assert accuracy["training", labels].min() > 0.95
        assert accuracy["training", labels].mean() > 0.99
    assert accuracy["held_out", "clean"].min() > 0.75
    assert accuracy["held_out", "shuffled"].max() < 0.2


@pytest.mark.parametrize("labels", run.LABELS)
def test_the_logs_are_whole_and_say_what_the_measurements_say(
    labels: str, committed: pd.DataFrame
) -> None:
    place = FOLDER / "logs" / f"{labels}-seed-0"
    log = el.open_run(place)
    assert log.state() == "finished"
    assert log.status()[0].faults == {}
    for file in ("run.json", "status/rank-000.json"):
        assert "/tmp" not in (place / file).read_text()
    assert log.config["max_overhead"] == 0.03
    assert log.config["user"]["fashion_overfit"]["labels"] == labels
    assert log.metrics("representation/dse", phases="train").to_arrow().num_rows
    own = committed[(committed["labels"] == labels) & (committed["seed"] == 0)]
    for rows in ("training", "held_out"):
        of_rows = own[own["rows"] == rows]
        for name in ("hidden/dse", "hidden/dse_released", "hidden/dsmi_labels", "accuracy"):
            layer, _, short = name.rpartition("/")
            known = of_rows[(of_rows["layer"] == layer) & (of_rows["name"] == short)]
            told = log.metrics(f"{rows}/{name}").to_arrow()["value"].to_pylist()
            assert told == pytest.approx(known["value"].to_list(), rel=1e-5)


def test_what_is_committed_is_small() -> None:
    for labels in run.LABELS:
        place = FOLDER / "logs" / f"{labels}-seed-0"
        assert sum(file.stat().st_size for file in place.rglob("*") if file.is_file()) < 300_000
    assert (FOLDER / "logs" / "measurements.parquet").stat().st_size < 200_000
