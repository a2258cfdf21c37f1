"""A probe set gathered from training batches, and a model run on it now and then."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from untouched import tiny

import entropylens as el

pytestmark = pytest.mark.filterwarnings("ignore")
ONLY = dict.fromkeys(["diffusion_entropy", "representation_rank", "class_separation"], 1)


def participation_ratio(states: Tensor) -> float:
    covariance = states.T.cov()
    return float(covariance.trace() ** 2 / covariance.square().sum())


class Data:
    def __init__(self, size: int = 40) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(400, 8, generator=generator)
        self.y = torch.arange(400) % 4
        self.size = size

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        at = slice(step * self.size % 400, step * self.size % 400 + self.size)
        return self.x[at], self.y[at]


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4))


def trained(
    run_dir: Path, model: nn.Module, steps: int, *, shows: bool = True, **given: Any
) -> el.Run:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    data, given = Data(), {"diagnostics": ONLY, "max_overhead": None, **given}
    with el.Lens(model, optimizer, run_dir=run_dir, **given) as lens:
        for step in range(steps):
            x, y = data.batch(step)
            logits = model(x)
            loss = cross_entropy(logits, y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            lens.step(loss=loss, **({"logits": logits, "targets": y} if shows else {}))
    return el.open_run(run_dir)


def values(run: el.Run, name: str) -> dict[tuple[int, str], float]:
    table = run.metrics(name).to_pandas()
    return dict(zip(zip(table["step"], table["module"], strict=True), table["value"], strict=True))


def told(run: el.Run, kind: str = "capture") -> list[str]:
    table = run.events().to_pandas()
    return list(table[table["kind"] == kind]["message"])


def test_the_first_batches_are_the_probe_set_of_the_whole_run(tmp_path: Path) -> None:
    model = network()
    run = trained(tmp_path / "run", model, 5, probe_set=el.ProbeSet(rows=100, layers=["1"]))
    found = values(run, "representation/participation_ratio")
    assert {step for step, _ in found} == {3, 4, 5}
    rows = run.metrics("representation/participation_ratio").to_pandas()
    assert set(rows["weight"]) == {100.0}
    model.eval()
    # All of the first two batches, and twenty rows of the third, which are drawn.
    with torch.no_grad():
        hidden = model[:2](Data().x[:120])
    every = participation_ratio(hidden)
    assert found[5, "1"] == pytest.approx(every, rel=0.1)
    assert told(run, "probe_set") == [
        "representations and attention are measured on 100 rows of training batches up to step 3; "
        "after a resume on others, unless ProbeSet(inputs=...) is given"
    ]


def test_a_probe_set_that_is_given_is_measured_from_the_first_step_on(tmp_path: Path) -> None:
    model, data = network(), Data()
    wanted = el.ProbeSet(inputs=data.x[:60], labels=data.y[:60], layers=["1"])
    run = trained(tmp_path / "run", model, 2, probe_set=wanted)
    model.eval()
    with torch.no_grad():
        expected = participation_ratio(model[:2](data.x[:60]))
    found = values(run, "representation/participation_ratio")
    assert list(found) == [(1, "1"), (2, "1")]
    assert found[2, "1"] == pytest.approx(expected, rel=1e-5)
    assert values(run, "representation/dsmi_labels")


def test_without_targets_rows_have_no_labels(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", network(), 3, shows=False, probe_set=el.ProbeSet(rows=40))
    assert values(run, "representation/participation_ratio")
    assert not values(run, "representation/dsmi_labels")
    assert values(run, "representation/dsmi_input")


def test_attention_and_representations_of_a_language_model_are_written(tmp_path: Path) -> None:
    model = tiny.llama()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    on = {"representation_rank": 1, "attention_entropy": 1, "attention_logits": 1}
    ids = torch.randint(2, 10, (8, 12), generator=torch.Generator().manual_seed(0))
    given: dict[str, Any] = {"diagnostics": on, "max_overhead": None}
    given["probe_set"] = el.ProbeSet(rows=64)
    with el.Lens(model, optimizer, run_dir=tmp_path / "run", **given) as lens:
        for _ in range(3):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            lens.step(loss=loss)
    run = el.open_run(tmp_path / "run")
    entropy = values(run, "attention/entropy/normalised/mean")
    assert {module for _, module in entropy} == {
        f"model.layers.{i}.self_attn" for i in range(len(model.model.layers))
    }
    # Fresh weights attend almost evenly.
    assert all(0.9 < value <= 1.0 for value in entropy.values())
    assert values(run, "representation/participation_ratio")
    assert run.status()[0].faults == {}


def test_a_model_that_cannot_be_inspected_is_named_once(tmp_path: Path) -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                raise RuntimeError("made for training\nonly")
            return self.net(x)

    run = trained(tmp_path / "run", Fails(), 5, probe_set=el.ProbeSet(rows=40))
    said = [one for one in told(run) if "representation" in one]
    assert said == ["no representation/* and no attention/*: RuntimeError: made for training only"]
    assert not values(run, "representation/participation_ratio")
    assert run.state() == "finished"


def test_a_model_of_one_layer_has_none_before_its_head(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", nn.Linear(8, 4), 2)
    assert [one for one in told(run) if "representation" in one] == [
        "no representation/*: no layer stands before the head; name some (ProbeSet(layers=...))"
    ]


def test_a_model_without_inputs_that_can_be_cut_is_named(tmp_path: Path) -> None:
    class Counts(nn.Module):
        """Given rows by an index from somewhere else."""

        def __init__(self) -> None:
            super().__init__()
            self.data, self.net = Data(), network()

        def forward(self, step: int) -> Tensor:
            return self.net(self.data.batch(step)[0])

    model = Counts()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    given: dict[str, Any] = {"diagnostics": ONLY, "max_overhead": None}
    with el.Lens(model, optimizer, run_dir=tmp_path / "run", **given) as lens:
        for step in range(3):
            logits, targets = model(step), model.data.batch(step)[1]
            loss = cross_entropy(logits, targets)
            loss.backward()
            optimizer.step()
            lens.step(loss=loss, logits=logits, targets=targets)
    run = el.open_run(tmp_path / "run")
    assert [one for one in told(run) if "representation" in one] == [
        "no representation/* and no attention/*: rows cannot be cut out of its inputs "
        "(positional ones)"
    ]


def test_layers_that_the_model_does_not_have_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected layers to name modules of the model"):
        trained(tmp_path / "run", network(), 1, probe_set=el.ProbeSet(layers=["encoder"]))
    with pytest.raises(ValueError, match="Lens: expected a model beside probe_set, got None"):
        el.Lens(run_dir=tmp_path / "other", probe_set=el.ProbeSet())


def test_looking_does_not_change_a_bit_of_the_training(tmp_path: Path) -> None:
    weights = []
    for limit in (False, 1):
        model = network()
        torch.manual_seed(7)
        trained(tmp_path / str(limit), model, 6, diagnostics=dict.fromkeys(ONLY, limit),
                probe_set=el.ProbeSet(rows=40))  # fmt: skip
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_of_several_forwards_rows_are_those_of_the_logits_that_are_shown(tmp_path: Path) -> None:
    model, data = network(), Data()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    # The class can be read off the inputs, but not off the unlabelled ones.
    inputs = torch.nn.functional.one_hot(data.y, 8).float() * 9 + 0.1 * data.x
    given: dict[str, Any] = {"diagnostics": ONLY, "max_overhead": None}
    given["probe_set"] = el.ProbeSet(rows=40, layers=["1"])
    with el.Lens(model, optimizer, run_dir=tmp_path / "run", **given) as lens:
        for _ in range(2):
            logits = model(inputs[:40])
            model(data.x[200:240])
            loss = cross_entropy(logits, data.y[:40])
            loss.backward()
            optimizer.step()
            lens.step(loss=loss, logits=logits, targets=data.y[:40])
    found = values(el.open_run(tmp_path / "run"), "representation/nearest_class_mean_accuracy")
    assert list(found.values()) == [1.0, 1.0]


def test_a_kernel_that_cannot_be_looked_at_costs_attention_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(self: Any, *args: Any) -> Any:
        raise RuntimeError("No rule registered for HigherOrderOperator")

    monkeypatch.setattr("entropylens.capture.attention.AttentionTap.__torch_dispatch__", refuses)
    on = {**ONLY, "attention_entropy": 1}
    run = trained(tmp_path / "run", network(), 4, diagnostics=on, probe_set=el.ProbeSet(rows=40))
    assert [one for one in told(run) if "attention" in one] == [
        "no attention/*: RuntimeError: No rule registered for HigherOrderOperator"
    ]
    assert values(run, "representation/norm")


def test_a_model_whose_layers_give_no_states_of_rows_is_named_once(tmp_path: Path) -> None:
    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.first(x.mean(0, keepdim=True))).expand(len(x), 4)

    run = trained(tmp_path / "run", Pools(), 6, probe_set=el.ProbeSet(rows=40, layers=["first"]))
    assert [one for one in told(run) if "representation" in one] == [
        "no representation/*: no layer gave states of each row"
    ]


def test_inputs_whose_rows_cannot_be_kept_are_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, *args: Any) -> bool:
        raise IndexError("out of range")

    monkeypatch.setattr("entropylens.capture.insides.Insides.keep", broken)
    run = trained(tmp_path / "run", network(), 6)
    assert [one for one in told(run) if "representation" in one] == [
        "no representation/* and no attention/*: rows of its inputs (positional ones) cannot be "
        "kept: IndexError: out of range"
    ]
    assert run.status()[0].faults == {}


def test_classes_of_one_row_are_why_nothing_is_told_of_labels(tmp_path: Path) -> None:
    model, data = network(), Data()
    labels = torch.arange(30) // 2
    labels[9] = 20
    labels[8] = 5
    wanted = el.ProbeSet(inputs=data.x[:30], labels=labels)
    run = trained(tmp_path / "run", model, 3, probe_set=wanted)
    assert not values(run, "representation/dsmi_labels")
    assert [one for one in told(run) if "dsmi" in one] == [
        "no representation/dsmi_labels: 1 classes have one row in the probe set, whose spread "
        "cannot be compared with others', as with labels that are tokens"
    ]
