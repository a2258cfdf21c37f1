import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from math import isfinite, nan, pi
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks import step_faults
from benchmarks.step_parts import faults, guards, programs, scoring
from benchmarks.step_parts.faults import COURSES, FAULTS, PLAIN
from benchmarks.step_parts.programs import OPTIMISERS, PROGRAMS, RATES, SWEPT, Images, generator
from benchmarks.step_parts.training import Plan, Training, run_cell
from entropylens.errors import EntropyLensError

TINY = Plan(fault=12, lead=3, moments=(1, 2, 4), after=2)


def pictures() -> Images:
    source = torch.Generator().manual_seed(0)
    kinds = torch.randn(10, 1, 14, 14, generator=source)

    def some(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(10, (count,), generator=source)
        return kinds[labels] + torch.randn(count, 1, 14, 14, generator=source), labels

    return Images(some(300), some(60), size=16)


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> Images:
    material = pictures()
    for name, program in PROGRAMS.items():
        if program.material is programs.images:
            made = programs.Program(program.build, lambda: material, 60, 30)
            monkeypatch.setitem(PROGRAMS, name, made)
    return material


# -- programs ----------------------------------------------------------------------------------


def test_each_pair_trains_at_a_rate_that_was_swept() -> None:
    assert {*RATES} == {*PROGRAMS}
    for rates in RATES.values():
        assert {*rates} == {*OPTIMISERS} == {*SWEPT}
        assert all(rate in SWEPT[name] for name, rate in rates.items())


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_batch_is_a_function_of_seed_and_step(program: str) -> None:
    material = PROGRAMS[program].material()

    def inputs(seed: int, step: int, **kinds: Any) -> Tensor:
        return material.batch(generator(seed, step), **{"share": 1.0, "shifted": False, **kinds})[0]

    assert inputs(0, 7).equal(inputs(0, 7))
    assert not inputs(0, 7).equal(inputs(0, 8))
    assert not inputs(0, 7).equal(inputs(1, 7))
    assert len(inputs(0, 7, share=1 / 8)) == len(inputs(0, 7)) // 8


def test_the_data_that_come_first_are_half_of_the_classes_or_another_text(little: Images) -> None:
    few = little.batch(generator(0, 0), shifted=True)[1]
    assert few.max() == 4
    assert little.batch(generator(0, 0))[1].max() > 4
    found = programs.text()
    windows = found.other.unfold(0, 65, 1)
    inputs, targets = found.batch(generator(0, 0), shifted=True)
    drawn = torch.cat([inputs[:1], targets[:1, -1:]], dim=1)
    assert (windows == drawn).all(1).any()
    assert inputs[:, 1:].equal(targets[:, :-1])


def test_garbage_is_noise_of_ten_times_the_scale_with_random_labels(little: Images) -> None:
    inputs, labels = little.garbage(generator(0, 0, 1))
    assert inputs.std().item() == pytest.approx(10, rel=0.05)
    assert len(inputs) == little.size
    assert len(labels.unique()) > 5
    drawn, after = programs.text().garbage(generator(0, 0, 1))
    assert drawn.float().mean().item() == pytest.approx(47.5, abs=3)
    assert (drawn[:, 1:] == after[:, :-1]).float().mean() < 0.05


def test_missing_pictures_are_answered_by_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(programs.FOLDER, str(tmp_path))
    with pytest.raises(EntropyLensError, match="apt-get install dataset-fashion-mnist"):
        programs.images.__wrapped__()


def test_a_model_that_knows_nothing_scores_chance(little: Images) -> None:
    model = programs.mlp()
    with torch.no_grad():
        next(model.parameters()).fill_(nan)
    accuracy, loss = programs.evaluate(model, little.test, 60, 10)
    assert accuracy == 10
    assert not isfinite(loss)


def test_judging_touches_nothing_of_the_training() -> None:
    run = Training("cnn_batch_norm", "adam", 0, "none")
    run.step(0)
    before, random = deepcopy(run.snapshot()), torch.get_rng_state()
    first, again = run.judge(60), run.judge(60)
    assert first == again
    assert same(before, run.snapshot())
    assert torch.get_rng_state().equal(random)
    assert all(module.training for module in run.model.modules())


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.equal(other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("policy", [*guards.BASELINES, "update_norm", "gradient_norm"])
def test_a_fork_goes_on_exactly_as_the_run_would_have(policy: str) -> None:
    whole = Training("cnn_batch_norm", "adamw", 3, policy)
    for step in range(4):
        whole.step(step)
    state = whole.snapshot()
    for at in range(2):  # the second fork does not see what the first one did
        fork = Training("cnn_batch_norm", "adamw", 3, policy, state=state)
        for step in range(4, 7):
            fork.step(step)
            if not at:
                whole.step(step)
        assert same(fork.snapshot(), whole.snapshot())
        fork.guard.close()
    whole.guard.close()


# -- faults ------------------------------------------------------------------------------------


def first_updates(optimiser: str, *kinds: faults.Fault | None) -> list[list[Tensor]]:
    """What one step does to the parameters, with each fault."""
    found = []
    for fault in kinds:
        run = Training("mlp", optimiser, 0, "none")
        before = [p.detach().clone() for p in run.model.parameters()]
        run.step(0, fault=fault)
        found.append([p.detach() - b for p, b in zip(run.model.parameters(), before, strict=True)])
    return found


@pytest.mark.parametrize(
    ("name", "factor"), [("rate_x10", 10), ("rate_x1000", 1000), ("gradient_x1000", 1000)]
)
def test_a_spike_makes_a_plain_step_so_many_times_as_long(name: str, factor: float) -> None:
    usual, spiked = first_updates("sgd", None, FAULTS[name])
    for one, other in zip(usual, spiked, strict=True):
        torch.testing.assert_close(other, factor * one, rtol=1e-2, atol=1e-6 * factor)


def test_the_rate_is_its_own_again_when_a_spike_has_ended() -> None:
    run = Training("mlp", "adamw", 0, "none")
    run.step(30, fault=FAULTS["rate_x100"])
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(100 * run.rate)
    run.step(31)
    assert run.optimizer.param_groups[0]["lr"] == run.rate


def test_an_overflow_spoils_a_share_of_the_gradient() -> None:
    gradients = [torch.zeros(1000, 1000), torch.ones(3)]
    FAULTS["overflow_once"].spoil(gradients, 0, 0)
    assert gradients[0].isinf().float().mean().item() == pytest.approx(1e-3, rel=0.2)
    assert gradients[0].isnan().float().mean().item() == pytest.approx(5e-4, rel=0.2)
    few = [torch.zeros(2)]
    FAULTS["overflow_once"].spoil(few, 0, 0)
    assert not few[0].isfinite().all()


def test_settings_change_only_where_there_are_any() -> None:
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=0.5)
    FAULTS["beta2_to_half"].set(optimizer)
    FAULTS["eps_to_1e-20"].set(optimizer)
    (group,) = optimizer.param_groups
    assert (group["betas"], group["eps"], group["lr"]) == ((0.9, 0.5), 1e-20, 0.5)
    assert not FAULTS["eps_to_1e-20"].concerns("momentum")
    assert FAULTS["beta2_to_half"].concerns("adamw")
    assert FAULTS["overflow_once"].concerns("sgd")


def test_rates_of_healthy_courses_rise_from_zero_and_restart_twice() -> None:
    rates = [COURSES["restarts"].rate(step, "sgd") for step in range(600)]
    assert rates[0] == 0
    jumps = [at for at in range(1, 600) if rates[at] > rates[at - 1] + 0.5]
    assert jumps == [200, 400]
    assert max(rates) == 1
    warm = [PLAIN.rate(step, "adamw") for step in range(320)]
    assert warm[0] == 1 / 20
    assert warm[19:] == [1] * 301
    assert {PLAIN.rate(step, "sgd") for step in range(320)} == {1}


# -- guards ------------------------------------------------------------------------------------


class Rows(nn.Module):
    """A matrix, a vector, and a last matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.last = nn.Linear(2, 3, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
            self.first.bias.fill_(1)
            self.last.weight.copy_(torch.arange(6.0).view(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


def guarded(policy: str, rate: float = 1.0) -> tuple[Rows, Any, Any]:
    model = Rows()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    return model, optimizer, guards.BASELINES[policy](model, optimizer)


def taken(model: Rows, guard: Any, gradients: list[Tensor], loss: float = 1.0) -> list[Tensor]:
    """What the step takes off each parameter, given its gradient, at a learning rate of 1."""
    before = [p.detach().clone() for p in model.parameters()]
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    guard.step(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), torch.tensor(loss))
    return [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]


def gradients_of(norms: list[float]) -> list[Tensor]:
    """One for each parameter, of these norms."""
    shapes = [(2, 2), (2,), (3, 2)]
    made = []
    for shape, norm in zip(shapes, norms, strict=True):
        flat = torch.zeros(int(np.prod(shape)))
        flat[0], flat[1] = 0.6 * norm, 0.8 * norm
        made.append(flat.view(shape))
    return made


def norms_of(tensors: list[Tensor]) -> NDArray[np.float64]:
    return np.array([tensor.double().norm().item() for tensor in tensors])


def test_gradient_clipping_leaves_a_joint_norm_of_at_most_one() -> None:
    model, _, guard = guarded("gradient_clipping")
    assert norms_of(taken(model, guard, gradients_of([2, 3, 6]))) == pytest.approx(
        [2 / 7, 3 / 7, 6 / 7], rel=1e-5
    )
    assert guard.interventions == 1
    assert norms_of(taken(model, guard, gradients_of([0.2, 0.3, 0.6]))) == pytest.approx(
        [0.2, 0.3, 0.6], rel=1e-5
    )
    assert guard.interventions == 1


def test_adagc_follows_its_algorithm() -> None:
    drawn = np.exp(np.random.default_rng(0).normal(size=(110, 3)))
    drawn[105, 1] = 1000
    model, _, guard = guarded("adagc")
    typical: NDArray[np.float64] | None = None
    for step, norms in enumerate(drawn):
        if typical is None or step < 100:
            clipped = norms * min(1 / np.sqrt((norms**2).sum()), 1)
            typical = clipped if typical is None else np.minimum(typical, clipped)
        else:
            clipped = norms * np.minimum(1.05 * typical / norms, 1)
            typical = 0.98 * typical + 0.02 * clipped
        found = norms_of(taken(model, guard, gradients_of(list(norms))))
        np.testing.assert_allclose(found, clipped, rtol=2e-3, atol=1e-5)
        if step == 105:
            assert found[1] < 10


def test_zclip_scales_an_outlier_to_below_its_threshold() -> None:
    drawn = 1 + 0.1 * np.random.default_rng(1).random(40)
    drawn[35], drawn[38] = 50, 3
    model, _, guard = guarded("zclip")
    mean = variance = 0.0
    for step, norm in enumerate(drawn):
        kept = norm
        if step >= 25:
            z = (norm - mean) / np.sqrt(variance)
            if z > 2.5:
                kept = mean + 2.5 * np.sqrt(variance) / (z / 2.5)
            mean = 0.97 * mean + 0.03 * kept
            variance = 0.97 * variance + 0.03 * (kept - mean) ** 2
        elif step == 24:
            mean, variance = float(drawn[:25].mean()), float(drawn[:25].var())
        found = np.linalg.norm(norms_of(taken(model, guard, gradients_of([norm, 0, 0]))))
        assert found == pytest.approx(kept, rel=1e-3)
        if step == 35:
            assert found < 1.1
    assert guard.interventions >= 1


def test_adaptive_clipping_holds_each_output_to_a_share_of_its_weights() -> None:
    model, _, guard = guarded("adaptive_gradient_clipping")
    model.first.weight.data = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    gradients = [torch.full((2, 2), 5.0), torch.full((2,), 1e-3), torch.full((3, 2), 5.0)]
    first, bias, last = taken(model, guard, gradients)
    assert first.norm(dim=1).tolist() == pytest.approx([0.01 * 5, 0.01 * 1e-3], rel=1e-2)
    assert bias.tolist() == pytest.approx([1e-3, 1e-3], rel=1e-3)
    assert last.equal(gradients[2])
    assert guard.interventions == 1


def test_stable_adamw_divides_each_tensors_rate_by_its_own_surprise() -> None:
    rate, beta1, beta2, eps, decay = 0.01, 0.9, 0.99, 1e-8, 0.1
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    model = nn.ParameterDict({"weight": weight})
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=(beta1, beta2), eps=eps, weight_decay=decay
    )
    guard = guards.StableAdamW(model, optimizer)
    expected = np.array([1.0, -2.0])
    first = second = np.zeros(2)
    for step, gradient in enumerate([[1.0, 2.0], [1.0, 2.0], [30.0, -2.0]], 1):
        g = np.array(gradient)
        first = beta1 * first + (1 - beta1) * g
        second = beta2 * second + (1 - beta2) * g**2
        m, v = first / (1 - beta1**step), second / (1 - beta2**step)
        rms = np.sqrt((g**2 / np.maximum(v, eps**2)).mean())
        expected = expected - rate / max(1, rms) * (decay * expected + m / (np.sqrt(v) + eps))
        weight.grad = torch.tensor(gradient)
        guard.step(torch.zeros(1), torch.zeros(1), torch.zeros(()))
        np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-5)
    assert rms > 1.2
    assert guard.interventions == 1


@pytest.mark.parametrize(("loss", "norm"), [(9.0, 1.0), (0.0, 1.0), (2.0, 9.0), (nan, nan)])
def test_a_step_out_of_six_deviations_is_skipped(loss: float, norm: float) -> None:
    model, _, guard = guarded("skip_step")
    random = np.random.default_rng(2)
    for _ in range(70):
        usual = [1 + 0.05 * random.normal(), 0, 0]
        taken(model, guard, gradients_of(usual), 2 + 0.05 * random.normal())
    assert guard.interventions == 0
    assert not norms_of(taken(model, guard, gradients_of([norm, 0, 0]), loss)).any()
    assert guard.interventions == 1
    for _ in range(3):
        taken(model, guard, gradients_of([1, 0, 0]), 2.0)
    # A history with a NaN in it calls nothing ordinary.
    assert guard.interventions == (4 if loss != loss else 1)


def test_nothing_is_skipped_in_the_first_steps() -> None:
    model, _, guard = guarded("skip_step")
    for step in range(60):
        taken(model, guard, gradients_of([1, 0, 0]), 1e6 if step == 59 else 1.0)
    assert guard.interventions == 0


def test_the_line_search_takes_the_least_true_loss_of_its_grid() -> None:
    losses = []
    for scale in guards.GRID:
        run = Training("cnn_batch_norm", "sgd", 0, "none", rate=20.0)
        inputs, targets = run.material.batch(generator(0, 0), 1.0, False)
        run.rate *= scale
        run.step(0)
        losses.append(programs.cross_entropy(run.model(inputs), targets).item())
    searched = Training("cnn_batch_norm", "sgd", 0, "line_search", rate=20.0)
    searched.step(0)
    statistics = deepcopy(dict(searched.model.named_buffers()))
    plain = Training("cnn_batch_norm", "sgd", 0, "none")
    plain.step(0)
    assert same(statistics, dict(plain.model.named_buffers()))
    found = programs.cross_entropy(searched.model(inputs), targets).item()
    assert found == pytest.approx(min(losses), abs=1e-6)
    assert min(losses) < losses[0]
    assert searched.guard.interventions == 1


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_the_released_rule_bounds_the_gradients_step_and_not_the_optimisers(
    optimiser: str,
) -> None:
    run = Training("mlp", optimiser, 0, "released_rule", rate=1000.0)
    before = deepcopy(run.model)
    inputs, targets = run.material.batch(generator(0, 0), 1.0, False)
    programs.cross_entropy(before(inputs), targets).backward()
    gradient = [p.grad for p in before.parameters()]
    run.step(0)
    # The change of the logits along the update to first order, in float64 by a small difference.
    double = before.double()
    start = [p.detach().clone() for p in double.parameters()]
    update = [new.double() - old for new, old in zip(run.model.parameters(), start, strict=True)]
    with torch.no_grad():
        old = double(inputs.double())
        for parameter, first, along in zip(double.parameters(), start, update, strict=True):
            parameter.copy_(first + 1e-7 * along)
        change = (double(inputs.double()) - old) / 1e-7
    ratio = (change.amax(1) - change.amin(1)).amax().item() / pi
    assert run.optimizer.param_groups[0]["lr"] == 1000
    assert run.guard.interventions == 1
    if optimiser == "sgd":
        assert ratio == pytest.approx(1, rel=1e-2)
        assert gradient[0] is not None
    else:
        assert ratio > 10


# -- cells and figures -------------------------------------------------------------------------


def test_a_cell_has_every_fault_its_twin_and_what_was_healthy() -> None:
    courses = {"small_batches": faults.Course(steps=5, rate=lambda *_: 1.0, share=1 / 8)}
    found = run_cell("mlp", "adam", 1, "none", TINY, courses=courses)
    assert [*found["runs"]] == ["twin", *FAULTS]
    for run in found["runs"].values():
        assert [*run["moments"]] == ["1", "2", "4"]
        assert len(run["updates"]) == 4
        assert run["steps"] == TINY.lead + 6
    assert {k: seen["steps"] for k, seen in found["healthy"].items()} == {
        "to_the_fault": 9,
        "twin": 9,
        "small_batches": 5,
    }
    assert found["runs"]["overflow_once"]["final"] == {"accuracy": 10, "loss": None}
    assert found["runs"]["overflow_once"]["updates"] == [None] * 4
    assert found == json.loads(json.dumps(found, allow_nan=False))
    straight = Training("mlp", "adam", 1, "none")
    for step in range(TINY.end):
        straight.step(step)
    assert straight.judge(60) == found["runs"]["twin"]["final"]


def run_of(final: float, moments: list[float], loss: float = 1.0, **more: Any) -> dict[str, Any]:
    return {
        "final": {"accuracy": final, "loss": loss},
        "final_part": {"accuracy": final, "loss": loss},
        "moments": {str(at): {"accuracy": x, "loss": loss} for at, x in enumerate(moments)},
        "updates": [1.0, 1.0, 2.0],
        "seconds": 1.0,
        "steps": 10,
        "looks": 0,
        "interventions": 0,
        **more,
    }


def cell_of(policy: str, seed: int, twin: float, final: float, **more: Any) -> dict[str, Any]:
    return {
        "policy": policy,
        "program": "mlp",
        "optimiser": "sgd",
        "seed": seed,
        "before": {"accuracy": 70, "loss": 2.0},
        "runs": {"twin": run_of(twin, [72, 74]), "rate_x10": run_of(final, [60, 73], **more)},
        "healthy": {
            "twin": {"steps": 10, "looks": 0, "interventions": 0},
            "restarts": {"steps": 90, "looks": 4, "interventions": 1},
            "other_data_first": {"steps": 50, "looks": 9, "interventions": 2},
        },
    }


def test_a_run_is_scored_against_the_twin_of_its_seed() -> None:
    (one,) = scoring.score([cell_of("none", 0, 80, 77, updates=[1e-9, None, 5.0], loss=None)])
    assert (one.final, one.spike, one.unguarded) == (3, 12, 3)
    assert one.applied == pytest.approx(2 / 3)
    assert one.length == 5
    assert (one.progress, one.twin_progress) == (-2, 1)
    assert one.band == 2
    assert not one.is_kept


def test_the_band_is_two_points_or_four_deviations_of_the_twins() -> None:
    wide = [cell_of("none", seed, twin, twin - 3) for seed, twin in enumerate([78.0, 79.0, 80.0])]
    assert [run.band for run in scoring.score(wide)] == [4] * 3
    narrow = [cell_of("none", seed, 79 + seed / 10, 70) for seed in range(3)]
    assert [run.band for run in scoring.score(narrow)] == [2] * 3


def test_the_report_has_the_default_at_the_top_and_every_policy_beneath() -> None:
    cells = [
        cell_of("none", 0, 80, 10),
        cell_of("combined", 0, 79, 78.5),
        cell_of("combined", 1, 79, 80),
    ]
    found = scoring.report(cells)
    assert found["default"] == "combined"
    assert found["worst_final_drop"] == 0.5
    assert found["worst_final_drop_at"] == "mlp sgd seed 0, rate_x10"
    assert found["worst_final_drop_from_unguarded"] == 1.5
    assert found["worst_spike_drop"] == 12
    assert found["share_within_band"] == 1
    assert found["share_kept"] == 0
    assert found["progress_share"] == 1
    assert found["healthy_triggers_per_10k_steps"] == 100
    assert found["healthy_looks_per_10k_steps"] == 400
    assert found["other_data_triggers_per_10k_steps"] == 400
    assert found["healthy_triggers_by_course"] == {
        "twin": 0,
        "restarts": pytest.approx(1e4 / 90),
        "other_data_first": 400,
    }
    assert found["worst_healthy_triggers_at"] == "mlp sgd, restarts"
    assert (found["healthy_cost"], found["worst_healthy_cost"]) == (1, 1)
    assert found["by_policy"]["none"]["worst_final_drop"] == 70
    assert found["by_fault"]["rate_x10"]["runs"] == found["by_program"]["mlp"]["runs"] == 2


def test_only_code_counts_when_cells_are_asked_who_made_them() -> None:
    source = 'def f(x):\n    """Says."""\n    return x + 1\n'
    same_code = 'def f( x ):  # adds\n    """Says otherwise."""\n    return (x + 1)\n'
    assert step_faults.plain(source) == step_faults.plain(same_code)
    assert step_faults.plain(source) != step_faults.plain(source.replace("1", "2"))
    assert step_faults.made_by("zclip") != step_faults.made_by("adagc")
    assert step_faults.made_by("combined") != step_faults.made_by("radius")


@contextmanager
def in_this_process(jobs: int) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The command, writing here, on few steps; `calls` are the policies that it trains with."""
    calls: list[str] = []

    def cell(
        program: str, optimiser: str, seed: int, policy: str, *, courses: Any
    ) -> dict[str, Any]:
        calls.append(policy)
        if seed == 7:
            raise OSError("no space")
        few = {"rate_x10": FAULTS["rate_x10"]}
        return run_cell(program, optimiser, seed, policy, TINY, few, {})

    def run(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["step_faults", *words])
        return step_faults.main()

    monkeypatch.setattr(step_faults, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(step_faults, "RESULTS", tmp_path / "results/step_faults.json")
    monkeypatch.setattr(step_faults, "processes", in_this_process)
    monkeypatch.setattr(step_faults, "run_cell", cell)
    return SimpleNamespace(run=run, calls=calls, results=tmp_path / "results/step_faults.json")


def test_cells_are_made_once_and_anew_when_their_code_has_changed(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--only", "mlp", "adam", "--seeds", "1", "--policies", "none", "combined"]
    assert bench.run(*asked) == 0
    assert bench.calls == ["none", "combined"]
    found = json.loads(bench.results.read_text())
    assert found["runs"] == 1
    assert found["cells_missing"] == found["cells_of"] - 2
    assert {*found} >= {
        "worst_final_drop", "worst_spike_drop", "healthy_triggers_per_10k_steps",
        "updates_applied_share", "progress_share", "share_within_band", "by_policy", "by_fault",
        "by_program",
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert "combined: faults" in shown
    assert f"{found['cells_missing']:,} of {found['cells_of']:,} cells are missing" in shown
    bench.calls.clear()
    assert bench.run(*asked) == 0
    assert not bench.calls
    made_by = step_faults.made_by
    monkeypatch.setattr(
        step_faults, "made_by", lambda name: "other" if name == "combined" else made_by(name)
    )
    assert bench.run("--report") == 0
    assert not bench.calls
    assert json.loads(bench.results.read_text())["runs"] == 0
    assert bench.run("--report", "--stale") == 0
    assert json.loads(bench.results.read_text())["runs"] == 1
    assert bench.run(*asked) == 0
    assert bench.calls == ["combined"]


def test_a_cell_that_fails_does_not_stop_the_others(
    bench: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = [step_faults.Wanted(seed, "none", "mlp", "sgd") for seed in (7, 1)]
    assert step_faults.make(wanted, 1) == 1
    assert step_faults.read(wanted[0]) is None
    assert step_faults.read(wanted[1]) is not None
    assert "no space" in capsys.readouterr().out


def test_policies_are_compared_on_the_optimisers_they_are_defined_for() -> None:
    cells = step_faults.every(step_faults.names(None), [*guards.GUARDS], 1)
    assert {cell.optimiser for cell in cells if cell.policy == "stable_adamw"} == {"adam", "adamw"}
    assert {cell.optimiser for cell in cells if cell.policy == "combined"} == {*OPTIMISERS}
    assert step_faults.names(["sgd", "cnn"]) == (["cnn"], ["sgd"])
    assert step_faults.Wanted(4, "combined", "mlp", "sgd").has_courses
    assert not step_faults.Wanted(4, "none", "mlp", "sgd").has_courses


def test_the_sweep_shows_the_best_rate_beside_the_one_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step_faults, "processes", in_this_process)
    monkeypatch.setattr(step_faults, "accuracy_at", lambda *which: 90 - abs(which[2] - 0.1))
    table = step_faults.sweep((["mlp"], ["sgd"]), 1)
    assert [list(column.cells) for column in table.columns][3:] == [["0.1"], ["0.3"]]
