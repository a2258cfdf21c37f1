import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analysis.ranks import CORRUPTED, STEPS

from entropylens.analysis import rank_losses
from entropylens.analysis.overview import Curve, read_overview, sentences
from entropylens.analysis.rank_divergence import EQUAL, RankDivergence, read_rank_divergence
from entropylens.analysis.rank_divergence_words import rank_sentences
from entropylens.analysis.rank_grid import Grid
from entropylens.analysis.report import write_report
from entropylens.analysis.verdict import judge
from entropylens.store.reader import Run, open_run
from entropylens.store.writer import RunWriter

pytestmark = pytest.mark.xdist_group("ranks")

GRADIENT, WEIGHTS, UPDATE = EQUAL
LOSS, SECONDS = "loss/mean", "step/seconds"


def written(path: Path, values: Mapping[str, Any]) -> Run:
    """A run from ``[steps, ranks]`` by name; masked where a rank did not tell."""
    (count,) = {one.shape[1] for one in values.values()}
    writers = [RunWriter(path, rank=rank, world_size=count) for rank in range(count)]
    for rank, writer in enumerate(writers):
        for name, grid in values.items():
            column = np.ma.array(grid)[:, rank]
            told = np.flatnonzero(~np.ma.getmaskarray(column))
            rows = {"step": told + 1, "name": [name] * len(told), "value": column.data[told]}
            writer.write("metrics", rows)
        writer.step = len(column)
        writer.close()
    return open_run(path)


def found(path: Path, **values: Any) -> RankDivergence:
    names = {"gradient": GRADIENT, "weights": WEIGHTS, "update": UPDATE}
    names |= {"loss": LOSS, "seconds": SECONDS}
    divergence = read_rank_divergence(written(path, {names[k]: v for k, v in values.items()}))
    assert divergence is not None
    return divergence


def equal(ranks: int, steps: int = 60, seed: int = 0) -> Any:
    """A norm that is noisy from step to step, and the same on all ranks."""
    noise = np.random.default_rng(seed).standard_normal(steps)
    return np.repeat(np.exp(0.1 * noise)[:, None], ranks, 1)


def noisy(ranks: int, steps: int = 1000, seed: int = 0) -> Any:
    """Losses of healthy ranks, each on data of its own."""
    generator = np.random.default_rng(seed)
    falling = 2 + 3 * np.exp(-np.arange(steps) / 200)
    return falling[:, None] + 0.1 * generator.standard_normal((steps, ranks))


def nothing(of: RankDivergence) -> bool:
    return not any((of.partings, of.shifts, of.not_finite, of.stragglers, rank_sentences(of)))


# -- norms ---------------------------------------------------------------------------------------


def test_one_rank_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    run = written(tmp_path / "run", {GRADIENT: equal(1), LOSS: noisy(1)})
    assert read_rank_divergence(run) is None
    assert read_overview(run).ranks is None


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_healthy_ranks_on_different_data_are_not_told_apart(tmp_path: Path, ranks: int) -> None:
    rounded = equal(ranks) * (1 + 1e-6 * np.random.default_rng(1).standard_normal((60, ranks)))
    healthy = found(tmp_path / "run", gradient=rounded, weights=equal(ranks), loss=noisy(ranks))
    assert nothing(healthy)
    assert healthy.ranks == tuple(range(ranks))


@pytest.mark.parametrize("ranks", [3, 4, 8])
def test_the_rank_off_the_median_is_named_with_its_first_step(tmp_path: Path, ranks: int) -> None:
    weights = equal(ranks)
    weights[30:, 1] *= 1.001
    weights[40:, 1] *= 1.1
    (parting,) = found(tmp_path / "run", weights=weights, update=equal(ranks)).partings
    assert (parting.name, parting.since, parting.agreed) == (WEIGHTS, 31, 30)
    assert parting.ranks == (1,)
    assert parting.spread == pytest.approx(0.1011, rel=1e-6)
    assert (parting.differing, parting.compared) == (30, 30)
    assert parting.values[1] == pytest.approx(1.001 * parting.values[0], rel=1e-9)


@pytest.mark.parametrize(("factor", "ranks"), [(3.0, (1,)), (1.05, ())])
def test_of_two_ranks_only_one_that_left_what_both_had_is_named(
    tmp_path: Path, factor: float, ranks: tuple[int, ...]
) -> None:
    gradient = equal(2)
    gradient[30:, 1] *= factor
    (parting,) = found(tmp_path / "run", gradient=gradient).partings
    assert (parting.since, parting.ranks) == (31, ranks)


def test_the_rank_that_kept_its_norm_is_not_blamed_though_it_is_the_larger_one(
    tmp_path: Path,
) -> None:
    gradient = equal(2)
    gradient[30:, 0] /= 4
    (parting,) = found(tmp_path / "run", gradient=gradient).partings
    assert parting.ranks == (0,)


def test_of_two_ranks_none_is_blamed_within_what_the_norm_does_anyway(tmp_path: Path) -> None:
    gradient = equal(2) ** 5
    gradient[30] = np.median(gradient[20:30, 0])
    gradient[30, 1] *= 1.3
    (parting,) = found(tmp_path / "run", gradient=gradient).partings
    assert (parting.since, parting.ranks) == (31, ())


def test_the_last_step_of_agreement_is_one_that_both_told(tmp_path: Path) -> None:
    weights = np.ma.array(equal(2))
    weights[20:30, 1] = np.ma.masked
    weights[30:, 1] *= 2
    (parting,) = found(tmp_path / "run", weights=weights).partings
    assert (parting.since, parting.agreed, parting.compared) == (31, 20, 30)


def test_a_single_corrupted_step_is_told_as_one(tmp_path: Path) -> None:
    gradient = equal(4)
    gradient[20, 3] *= 2
    (parting,) = found(tmp_path / "run", gradient=gradient).partings
    assert (parting.since, parting.ranks) == (21, (3,))
    assert (parting.differing, parting.compared) == (1, 40)


def test_halves_that_differ_name_nobody(tmp_path: Path) -> None:
    weights = equal(4)
    weights[10:, 2:] *= 1.5
    (parting,) = found(tmp_path / "run", weights=weights).partings
    assert (parting.since, parting.ranks) == (11, ())


def test_a_norm_that_is_nan_on_one_rank_parts_it_and_on_all_does_not(tmp_path: Path) -> None:
    gradient = equal(2)
    gradient[10] = np.nan
    gradient[20:, 0] = np.nan
    divergence = found(tmp_path / "run", gradient=gradient)
    (parting,) = divergence.partings
    assert (parting.since, parting.ranks, parting.spread) == (21, (0,), np.inf)
    (said,) = rank_sentences(divergence)
    assert "nan (rank 0)" in said


@pytest.mark.parametrize("ranks", [2, 3])
def test_norms_of_about_nothing_do_not_part_ranks(tmp_path: Path, ranks: int) -> None:
    update = equal(ranks)
    update[20:] = 0.0
    update[25:, 1] = 1e-30
    update[30:, 0] = 1e-13
    divergence = found(tmp_path / "run", update=update, gradient=1e-20 * equal(ranks))
    assert nothing(divergence)


def test_a_rank_that_alone_stops_or_goes_on_is_still_named(tmp_path: Path) -> None:
    update = equal(4)
    update[20:] = [0.0, 1e-30, 1e-14, 1e-6]
    small = 1e-20 * equal(4)
    small[30:, 2] *= 2
    update_parting, small_parting = found(tmp_path / "run", update=update, weights=small).partings
    assert (update_parting.since, update_parting.agreed, update_parting.ranks) == (21, 20, (3,))
    assert (small_parting.since, small_parting.ranks) == (31, (2,))


def test_steps_that_a_rank_did_not_tell_are_not_compared(tmp_path: Path) -> None:
    gradient, loss = np.ma.array(equal(3)), np.ma.array(noisy(3))
    gradient[5:15, 2] = gradient[40:, 1:] = np.ma.masked
    loss[::3, 0] = loss[500:700, 1] = np.ma.masked
    assert nothing(found(tmp_path / "run", gradient=gradient, loss=loss))


def test_ranks_that_hold_parts_of_the_model_are_no_alarm(tmp_path: Path) -> None:
    weights = equal(4) * np.array([1.0, 2.0, 3.0, 4.0])
    divergence = found(tmp_path / "run", weights=weights)
    assert divergence.parted == ()
    assert divergence.partings[0].agreed is None
    (said,) = rank_sentences(divergence)
    assert said.startswith("The parameter norm never agreed between ranks: either nothing")
    healthy = {LOSS: Curve(LOSS, np.arange(40), np.linspace(4.0, 2.0, 40))}
    assert judge("running", "", healthy, ranks=divergence).level == "healthy"


def test_optimisers_are_compared_each_with_itself(tmp_path: Path) -> None:
    writers = [RunWriter(tmp_path / "run", rank=rank, world_size=2) for rank in range(2)]
    for rank, writer in enumerate(writers):
        for step in range(1, 9):
            values = [1.0 + (step > 4) * rank, 7.0]
            columns = {"name": [GRADIENT] * 2, "module": ["one", "two"], "value": values}
            writer.write("metrics", {"step": step, **columns})
        writer.close()
    divergence = read_rank_divergence(open_run(tmp_path / "run"))
    assert divergence is not None
    assert [(one.module, one.since) for one in divergence.partings] == [("one", 5)]


# -- losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [4, 8])
def test_a_rank_whose_loss_left_the_others_is_named(tmp_path: Path, ranks: int) -> None:
    loss = noisy(ranks)
    loss[600:, 2] += 0.3
    (shift,) = found(tmp_path / "run", loss=loss).shifts
    assert (shift.rank, shift.other, shift.lasts) == (2, None, True)
    assert shift.since == pytest.approx(601, abs=30)
    # The median of all ranks moves with one of them, by less the more there are.
    assert shift.shift == pytest.approx(0.3, abs=0.06)


@pytest.mark.parametrize("ranks", [2, 3])
def test_of_few_ranks_the_difference_that_moved_is_told(tmp_path: Path, ranks: int) -> None:
    loss = noisy(ranks)
    loss[:, 0] += 1.0  # data of its own
    loss[600:, 1] -= 0.4
    (shift,) = found(tmp_path / "run", loss=loss).shifts
    assert shift.rank == 1
    assert shift.other == (0 if ranks == 2 else None)
    assert shift.shift == pytest.approx(-0.4, abs=0.05)
    assert shift.since == pytest.approx(601, abs=30)


def test_a_shift_that_came_back_does_not_last(tmp_path: Path) -> None:
    loss = noisy(8, steps=2000)
    loss[600:1000, 5] += 0.4
    divergence = found(tmp_path / "run", loss=loss)
    (shift,) = divergence.shifts
    assert (shift.rank, shift.lasts) == (5, False)
    assert shift.shift == pytest.approx(0.4, abs=0.05)
    (said,) = rank_sentences(divergence)
    assert "and came back" in said


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_whose_data_differ_for_good_are_healthy(tmp_path: Path, ranks: int) -> None:
    loss = noisy(ranks) + np.linspace(0, 1.5, ranks)
    assert nothing(found(tmp_path / "run", loss=loss))


def test_a_rank_that_is_off_from_the_start_is_named_by_four_or_more(tmp_path: Path) -> None:
    loss = noisy(8)
    loss[:, 6] += 0.5
    (shift,) = found(tmp_path / "run", loss=loss).shifts
    assert (shift.rank, shift.since) == (6, None)
    assert shift.shift == pytest.approx(0.5, abs=0.02)


def test_a_shift_is_one_of_five_medians_in_a_row_on_one_side() -> None:
    brief = np.array([0, 1, 1, 1, 1, 0, 1, 1, -1, 1, 1, 1.0])
    assert rank_losses._lasting(brief) is None
    assert rank_losses._lasting(np.append(brief, [1.0, 1.0])) == 9


def test_single_bad_batches_are_no_shift_however_bad(tmp_path: Path) -> None:
    loss = noisy(4)
    loss[[500, 700, 703], 1] = 1e4
    assert nothing(found(tmp_path / "run", loss=loss))


def test_a_rank_whose_loss_is_not_finite_is_told(tmp_path: Path) -> None:
    loss = noisy(3)
    loss[700:, 2] = np.nan
    loss[400, 0] = np.inf
    loss[10] = np.nan
    divergence = found(tmp_path / "run", loss=loss)
    assert [(o.rank, o.first, o.steps, o.lasts) for o in divergence.not_finite] == [
        (0, 401, 1, False),
        (2, 701, 300, True),
    ]
    assert divergence.shifts == ()
    reason = judge("running", "", {}, ranks=divergence).reason
    assert reason == "the loss of rank 2 is not a finite number since step 701"


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_chance_alone_hardly_ever_shifts_a_loss(tmp_path: Path, ranks: int) -> None:
    """Nor with heavy tails: 10 runs in one."""
    generator = np.random.default_rng(ranks)
    for _ in range(10):
        loss = noisy(ranks) + 0.1 * generator.standard_t(3, (1000, ranks))
        grid = Grid(np.arange(1000), tuple(range(ranks)), loss, np.ones(loss.shape, dtype=bool))
        assert rank_losses.shifts(grid) == []


def test_few_losses_are_not_judged(tmp_path: Path) -> None:
    loss = noisy(4, steps=200)
    loss[100:, 0] += 5
    assert nothing(found(tmp_path / "run", loss=loss))


# -- time, words, verdict and report -------------------------------------------------------------


def test_a_straggler_is_named_and_one_slow_step_is_not(tmp_path: Path) -> None:
    seconds = 0.5 + 0.01 * np.random.default_rng(0).random((50, 3))
    seconds[:, 1] *= 1.5
    seconds[7, 0] = 60.0
    (one,) = found(tmp_path / "run", seconds=seconds).stragglers
    assert (one.rank, one.steps) == (1, 50)
    assert one.factor == pytest.approx(1.5, abs=0.02)


def verdict_of(run: Run) -> Any:
    return judge("running", "", {}, ranks=read_rank_divergence(run))


def test_verdict_and_report_say_who_and_since_when(tmp_path: Path) -> None:
    weights, gradient, loss = equal(4, 1000), equal(4, 1000, seed=1), noisy(4)
    gradient[400:, 2] *= 2
    weights[401:, 2] *= 1.1
    loss[600:, 1] += 0.5
    run = written(tmp_path / "run", {GRADIENT: gradient, WEIGHTS: weights, LOSS: loss})
    verdict = verdict_of(run)
    assert verdict.level == "failing"
    assert verdict.reason == "rank 2 went its own way at step 401: the gradient norm differs"
    said = sentences(read_overview(run))
    assert said[1].startswith(
        "Rank 2 went its own way at step 401: the gradient norm, the same on all ranks up to step "
        "400, was "
    )
    assert "they differ in the parameter norm since step 402" in said[1]
    assert said[2].startswith("The loss of rank 1 became 0.")
    page = write_report(run, tmp_path / "report.html").read_text()
    assert "<h2>Norms that differ between ranks</h2>" in page
    assert "600 of 600" in page
    healthy = written(tmp_path / "healthy", {GRADIENT: equal(4), LOSS: noisy(4)})
    page = write_report(healthy, tmp_path / "healthy.html").read_text()
    assert "Norms that differ" not in page
    assert verdict_of(healthy).level == "unknown"


def test_the_verdict_watches_a_loss_that_left_for_good(tmp_path: Path) -> None:
    loss = noisy(4)
    loss[600:, 1] += 0.5
    verdict = verdict_of(written(tmp_path / "run", {LOSS: loss}))
    assert verdict.level == "watch"
    assert verdict.reason.startswith("the loss of rank 1 moved above the other ranks' around step")


# -- two processes -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    known = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
    }
    logs = [open(place / f"rank-{rank}.log", "w") for rank in range(2)]  # noqa: SIM115
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "analysis.ranks", str(place)],
            env={**os.environ, **known, "RANK": str(rank)},
            stdout=log,
            stderr=log,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(120) for process in processes]
    finally:
        for process, log in zip(processes, logs, strict=True):
            process.kill()
            log.close()
    told = "\n".join((place / f"rank-{rank}.log").read_text()[-2000:] for rank in range(2))
    assert codes == [0, 0], told
    return place


def test_ddp_keeps_two_ranks_equal(folder: Path) -> None:
    run = open_run(folder / "healthy" / "run")
    divergence = read_rank_divergence(run)
    assert divergence is not None
    assert divergence.ranks == (0, 1)
    assert divergence.partings == ()
    told = run.metrics(list(EQUAL)).to_pandas()
    assert set(told["name"]) == set(EQUAL)


def test_a_gradient_corrupted_after_the_reduction_is_told_with_its_rank_and_step(
    folder: Path, tmp_path: Path
) -> None:
    run = open_run(folder / "corrupted" / "run")
    divergence = read_rank_divergence(run)
    assert divergence is not None
    first = divergence.parted[0]
    assert (first.ranks, first.since, first.agreed) == ((1,), CORRUPTED, CORRUPTED - 1)
    weights = next(one for one in divergence.parted if one.name == WEIGHTS)
    assert weights.since == CORRUPTED + 1
    assert weights.differing == STEPS - CORRUPTED
    page = write_report(run, tmp_path / "report.html").read_text()
    assert f"Rank 1 went its own way at step {CORRUPTED}" in page
