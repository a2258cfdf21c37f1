"""A run's steps are bounded through its Lens, and its log says how."""

import json
from io import BytesIO
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import entropylens as el
from entropylens.bounding import _words
from entropylens.control import Action

STEPS, FAULT, CUT = 60, 40, 30
BOUND: dict[str, Any] = {"warmup": 10, "every": 2, "gradient_factor": 5.0, "deviations": 8.0,
                         "loss_factor": 3.0}  # fmt: skip


def model_of() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 4))
    return nn.Sequential(*layers)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(32, 6, generator=generator)
    return x, (x[:, :4] + 0.3).argmax(1)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    lens: el.Lens | None,
    numbers: range,
    gradients: dict[int, float] | None = None,
    rates: dict[int, float] | None = None,
) -> None:
    for number in numbers:
        torch.manual_seed(number)
        x, y = batch(number)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (rates or {}).get(number, 1.0)
        optimizer.zero_grad()
        logits = model(x)
        loss = cross_entropy(logits, y)
        (loss * (gradients or {}).get(number, 1.0)).backward()
        if lens is not None:
            names = [f"{number}.{row}" for row in range(len(x))]
            lens.observe(logits=logits, targets=y, loss=loss, sample_id=names)
        optimizer.step()
        if lens is not None:
            lens.step()


def lens_of(
    model: nn.Module, optimizer: Any, run_dir: Path, bound: el.StepBound | None, **options: Any
) -> el.Lens:
    known = {"run_dir": run_dir, "preset": "fast", "max_overhead": None, "control": bound}
    return el.Lens(model, optimizer, **{**known, **options})


def events(run_dir: Path, kind: str = "control") -> list[dict[str, Any]]:
    run = el.open_run(run_dir)
    assert run.status()[0].faults == {}
    return [e for e in run.events().to_arrow().to_pylist() if e["kind"] == kind]


def metric(run_dir: Path, name: str) -> dict[int, float]:
    rows = el.open_run(run_dir).metrics(name).to_arrow().to_pylist()
    return {row["step"]: row["value"] for row in rows}


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    kept = [torch.as_tensor(v) for one in optimizer.state.values() for v in one.values()]
    return [*model.state_dict().values(), *kept]


def are_equal(one: list[Tensor], other: list[Tensor]) -> bool:
    same = (
        torch.equal(a.nan_to_num(-7), b.nan_to_num(-7)) for a, b in zip(one, other, strict=True)
    )
    return all(same)


def test_an_action_is_an_event_with_its_evidence_and_the_samples(tmp_path: Path) -> None:
    model = model_of()
    optimizer = adamw(model)
    with lens_of(model, optimizer, tmp_path / "run", el.StepBound(mode="enforce", **BOUND)) as lens:
        train(model, optimizer, lens, range(STEPS), {FAULT: 1000.0, 45: nan}, {50: 300.0})
    first, second, third = events(tmp_path / "run")
    assert (first["step"], second["step"], third["step"]) == (FAULT + 1, 46, 51)
    assert {e["rule"] for e in (first, second, third)} == {"step_bound"}
    assert {e["severity"] for e in (first, second, third)} == {"warning"}
    assert {e["mode"] for e in (first, second, third)} == {"enforce"}
    assert {e["before"] for e in (first, second, third)} == {1.0}
    evidence = evidence_of(first)
    assert first["message"] == (
        f"the gradients were far larger than usual: gradients scaled to {first['after']:.3g} of "
        f"what came"
    )
    assert first["after"] == pytest.approx(evidence["typical"] / evidence["gradient_norm"])
    assert evidence["samples"] == [f"{FAULT}.{row}" for row in range(32)]
    assert evidence["suspicions"] == ["gradient"]
    assert evidence["in_a_row"] == 1
    assert second["message"] == "a gradient was not finite: the step was left out"
    assert second["after"] == 0.0
    assert third["message"].startswith("the update was far larger than usual: update scaled to ")
    assert {"update_norm", "typical", "rate", "highest_rate", "ratio", "loss_with",
            "loss_without"} < evidence_of(third).keys()  # fmt: skip
    scales = metric(tmp_path / "run", "control/step_scale")
    assert {step for step, scale in scales.items() if scale < 1} == {FAULT + 1, 46, 51}
    assert scales[FAULT + 1] == pytest.approx(first["after"])
    assert scales[46] == 0.0
    assert metric(tmp_path / "run", "control/interventions/count")[STEPS] == 3.0
    looks = metric(tmp_path / "run", "control/looks/count")
    assert [looks[step] for step in (FAULT, FAULT + 1, 50, 51)] == [0.0, 1.0, 1.0, 2.0]


def evidence_of(event: dict[str, Any]) -> dict[str, Any]:
    found = event["evidence"]
    return json.loads(found) if isinstance(found, str) else dict(found)


def test_of_actions_alike_in_a_row_fewer_and_fewer_are_written(tmp_path: Path) -> None:
    """Gradients that are not finite from step 21 to 30, and once more in step 33."""
    model = model_of()
    optimizer = adamw(model)
    gradients = dict.fromkeys([*range(20, 30), 32], nan)
    with lens_of(model, optimizer, tmp_path / "run", el.StepBound(mode="enforce", **BOUND)) as lens:
        train(model, optimizer, lens, range(36), gradients)
    found = events(tmp_path / "run")
    assert [(e["step"], evidence_of(e)["in_a_row"]) for e in found] == [
        (21, 1), (22, 2), (24, 4), (28, 8), (33, 1)
    ]  # fmt: skip
    assert found[2]["message"].endswith("the step was left out (4 steps in a row)")
    assert metric(tmp_path / "run", "control/interventions/count")[36] == 11.0


def test_two_causes_in_each_step_are_thinned_each_by_itself(tmp_path: Path) -> None:
    model = model_of()
    optimizer = adamw(model)
    bound = el.StepBound(mode="enforce", **{**BOUND, "patience": 50})
    spikes = range(30, 38)
    with lens_of(model, optimizer, tmp_path / "run", bound) as lens:
        train(
            model,
            optimizer,
            lens,
            range(40),
            dict.fromkeys(spikes, 1000.0),
            dict.fromkeys(spikes, 300.0),
        )
    found = events(tmp_path / "run")
    assert [e["step"] for e in found if "gradients were" in e["message"]] == [31, 32, 34, 38]
    assert [e["step"] for e in found if "update was" in e["message"]] == [31, 32, 34, 38]
    assert metric(tmp_path / "run", "control/interventions/count")[40] == 8.0
    scales = metric(tmp_path / "run", "control/step_scale")
    assert scales[31] == pytest.approx(found[0]["after"] * found[1]["after"])


@pytest.mark.parametrize(
    ("cause", "mode", "scale", "count", "words"),
    [
        ("gradient", "enforce", 0.00123456, 1,
         "the gradients were far larger than usual: gradients scaled to 0.00123 of what came"),
        ("gradient", "shadow", 0.5, 2,
         "the gradients were far larger than usual: gradients would have been scaled to 0.5 of "
         "what came (2 steps in a row)"),
        ("gradient not finite", "shadow", 0.0, 1,
         "a gradient was not finite: the step would have been left out"),
        ("update norm", "shadow", 0.25, 1,
         "the update was far larger than usual: update would have been scaled to 0.25 of what "
         "came"),
        ("batch", "enforce", 0.0, 1,
         "the batch was out of the ordinary in more than one way: the step was left out"),
        ("radius", "enforce", 0.25, 1,
         "the update left the safe radius of the logits: update scaled to 0.25 of what came"),
        ("linearised loss", "enforce", 0.0, 1,
         "the update would have raised the loss of the last ordinary batch: the step was left out"),
        ("not finite", "enforce", 1.0, 1,
         "entries of the update were not finite: they were left out"),
        ("not finite", "shadow", 1.0, 1,
         "entries of the update were not finite: they would have been left out"),
    ],
)  # fmt: skip
def test_every_cause_has_its_words(
    cause: str, mode: str, scale: float, count: int, words: str
) -> None:
    action = Action(step=1, mode=mode, cause=cause, scale=scale, suspicions=())
    assert _words(action, count) == words


def test_in_shadow_and_without_a_lens_a_training_is_the_same_to_the_bit(tmp_path: Path) -> None:
    outcomes = []
    for name in ("bare", "lens", "off", "shadow"):
        model = model_of()
        optimizer = adamw(model)
        bound = {
            "off": el.StepBound(mode="off"),
            "shadow": el.StepBound(mode="shadow", **BOUND),
        }.get(name)
        lens = None if name == "bare" else lens_of(model, optimizer, tmp_path / name, bound)
        train(model, optimizer, lens, range(48), {FAULT: 1000.0}, {44: 300.0})
        if lens is not None:
            lens.close()
        outcomes.append(states(model, optimizer))
    assert all(are_equal(outcomes[0], other) for other in outcomes[1:])
    found = events(tmp_path / "shadow")
    assert [e["step"] for e in found][:2] == [FAULT + 1, 45]
    assert {e["mode"] for e in found} == {"shadow"}
    for name in ("lens", "off"):
        assert metric(tmp_path / name, "control/step_scale") == {}
        assert events(tmp_path / name) == []


@pytest.fixture
def pair() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = model_of()
    return model, adamw(model)


@pytest.mark.parametrize(
    ("has_model", "optimizers", "message"),
    [
        (True, 0, "got a model and 0 optimisers"),
        (True, 2, "got a model and 2 optimisers"),
        (False, 1, "got no model and 1 optimisers"),
    ],
)
def test_control_needs_a_model_and_one_optimiser(
    has_model: bool, optimizers: int, message: str, tmp_path: Path
) -> None:
    model = model_of()
    given = [adamw(model) for _ in range(optimizers)] or None
    expected = r"Lens: expected a model and one optimiser to bound the steps of \(control=\), "
    with pytest.raises(ValueError, match=expected + message):
        lens_of(model if has_model else None, given, tmp_path / "run", el.StepBound())  # type: ignore[arg-type]


def test_a_lens_that_stands_alone_among_ranks_cannot_bound_their_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("entropylens.lens.ranks", lambda: 2)
    model = model_of()
    known: dict[str, Any] = {"run_dir": tmp_path / "run", "rank": 0, "world_size": 1}
    with pytest.raises(ValueError, match=r"Lens: expected control= on all 2 ranks"):
        el.Lens(model, adamw(model), control=el.StepBound(), **known)
    el.Lens(model, adamw(model), control=el.StepBound(mode="off"), **known).close()


def test_an_optimiser_that_searches_along_a_line_is_refused(tmp_path: Path) -> None:
    model = model_of()
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(ValueError, match="expected an optimiser that makes one update a step, got "
                       "LBFGS"):  # fmt: skip
        lens_of(model, optimizer, tmp_path / "run", el.StepBound())
    assert el.open_run(tmp_path / "run").state() == "failed"


def test_hooks_are_gone_once_the_lens_is_closed(
    pair: tuple[nn.Module, torch.optim.Optimizer], tmp_path: Path
) -> None:
    model, optimizer = pair
    lens = lens_of(model, optimizer, tmp_path / "run", el.StepBound(mode="enforce"))
    train(model, optimizer, lens, range(3))
    lens.close()
    tables: list[Any] = [module._forward_hooks for module in model.modules()]
    tables += [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
    assert not any(tables)


def test_a_killed_run_resumes_to_the_same_actions_and_weights(tmp_path: Path) -> None:
    """A checkpoint at 30, as `torch.save` keeps it, and a fault at 40."""
    faults: dict[str, Any] = {"gradients": {FAULT: 1000.0, 52: nan}, "rates": {45: 300.0}}
    bound = el.StepBound(mode="enforce", **BOUND)
    model = model_of()
    optimizer = adamw(model)
    with lens_of(model, optimizer, tmp_path / "whole", bound) as lens:
        train(model, optimizer, lens, range(STEPS), **faults)
    expected = states(model, optimizer)

    model = model_of()
    optimizer = adamw(model)
    lens = lens_of(model, optimizer, tmp_path / "parts", bound)
    train(model, optimizer, lens, range(CUT), **faults)
    disk = BytesIO()
    checkpoint = model.state_dict(), optimizer.state_dict(), lens.state_dict()
    torch.save(checkpoint, disk)
    train(model, optimizer, lens, range(CUT, CUT + 12), **faults)
    lens.close("terminated")
    disk.seek(0)
    weights, moments, state = torch.load(disk, weights_only=True)
    model = model_of()
    optimizer = adamw(model)
    model.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    with lens_of(model, optimizer, tmp_path / "parts", bound, state=state) as lens:
        train(model, optimizer, lens, range(CUT, STEPS), **faults)
    assert are_equal(states(model, optimizer), expected)

    def told(name: str) -> list[Any]:
        found = events(tmp_path / name)
        return [(e["step"], e["message"], e["after"], evidence_of(e)) for e in found]

    assert str(told("parts")) == str(told("whole"))
    assert len(told("whole")) == 3
