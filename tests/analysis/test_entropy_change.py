import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs_to_show import write
from scipy.stats import spearmanr

from entropylens.analysis.entropy_change import EntropyChanges, Part, read_entropy_change
from entropylens.analysis.entropy_change_words import (
    change_figures,
    change_rows,
    change_sentences,
)
from entropylens.analysis.overview import read_overview, sentences
from entropylens.analysis.report import write_report
from entropylens.store.reader import Run, open_run
from entropylens.store.writer import RunWriter

COUNT = 120
STEPS = np.arange(1, COUNT + 1)
CELLS = {
    "positive_above": 1.25,
    "positive_below": -0.25,
    "negative_above": -0.125,
    "negative_below": 0.0625,
}
"""Parts of the prediction; 0.0625 is left for tokens without an advantage."""


def planted(seed: int = 0) -> dict[str, Any]:
    """A prediction whose slope is 0.8, and an entropy that half follows it."""
    generator = np.random.default_rng(seed)
    predicted = -0.01 + 0.02 * generator.standard_normal(COUNT)
    measured = 0.8 * predicted + 0.003 * generator.standard_normal(COUNT)
    moved = predicted + 0.01 * generator.standard_normal(COUNT)
    return {
        "entropy/change/predicted": predicted,
        "entropy/change/measured": measured,
        "entropy/token/mean": 3 + np.r_[0.0, moved[:-1].cumsum()],
        **{f"entropy/change/at/{cell}": part * predicted for cell, part in CELLS.items()},
        "covariance/within/mean": -3 * measured + 0.01 * generator.standard_normal(COUNT),
        "entropy/change/estimate/steer": 2 * measured + 0.05 * generator.standard_normal(COUNT),
    }


def written(path: Path, columns: dict[str, Any], every: dict[str, int] | None = None) -> RunWriter:
    writer = RunWriter(path)
    for name, values in columns.items():
        chosen = slice(None, None, (every or {}).get(name, 1))
        write(writer, name, STEPS[: len(values)][chosen], np.asarray(values)[chosen])
    writer.step = COUNT
    return writer


def read(path: Path, columns: dict[str, Any], **more: Any) -> EntropyChanges:
    written(path, columns, **more).close()
    found = read_entropy_change(open_run(path))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("runs") / "run"
    writer = written(path, planted())
    for name, value in (("exact", 0.9), ("natural_gradient", 0.25)):
        found = np.where(STEPS == 7, 1.0, value)
        write(writer, "entropy/change/state/correlation", STEPS, found, module=name)
    row = {"selection": "change", "sequence": 0, "position": 0}
    changes = {"token_id": [5, 6, 5, 7, 6], "predicted_entropy_change": [-1, 0.25, -2, np.nan, 0.5]}
    texts = {"text": [None, "a<b", None, "c", "a<b"], "sample_id": ["x", "y", None, "x", "x"]}
    writer.write("tokens", {"step": 3, **row, **changes, **texts})
    others = {"token_id": [9], "predicted_entropy_change": [-9.0], "selection": "uniform"}
    writer.write("tokens", {"step": 3, **row, **others})
    writer.close()
    return open_run(path)


@pytest.fixture(scope="module")
def found(run: Run) -> EntropyChanges:
    changes = read_entropy_change(run)
    assert changes is not None
    return changes


def test_agreement_is_what_the_textbooks_formulas_give(found: EntropyChanges) -> None:
    columns = planted()
    y = columns["entropy/change/measured"]
    exact, steer, natural = found.agreements
    assert [one.name for one in found.agreements] == ["exact", "steer", "natural_gradient"]
    for one, x in (
        (steer, columns["entropy/change/estimate/steer"]),
        (exact, columns["entropy/change/predicted"]),
        (natural, -columns["covariance/within/mean"]),
    ):
        assert one.steps == COUNT
        assert one.correlation == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)
        assert one.rank_correlation == pytest.approx(spearmanr(x, y).statistic, abs=1e-6)
        assert one.slope == pytest.approx(np.polyfit(x, y, 1)[0], rel=1e-5)
        left = sum((b - a) ** 2 for a, b in zip(x, y, strict=True))
        assert one.identity == pytest.approx(1 - left / (COUNT * np.var(y)), rel=1e-4)
    assert natural.correlation > 0.8  # its metric has the other sign
    assert (exact.at_states, natural.at_states) == pytest.approx((0.9, 0.25))


def test_intervals_hold_the_truth_and_are_as_wide_as_theory_says(found: EntropyChanges) -> None:
    exact = found.agreements[0]
    low, high = exact.slope_interval
    assert low < 0.8 < high
    x = planted()["entropy/change/predicted"]
    error = 0.003 / (np.std(x) * np.sqrt(COUNT))
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.3)
    low, high = exact.correlation_interval
    true = 0.8 * 0.02 / np.hypot(0.8 * 0.02, 0.003)
    assert low < true < high
    by_fisher = np.tanh(np.arctanh(exact.correlation) + np.array([-1.96, 1.96]) / np.sqrt(COUNT))
    assert high - low == pytest.approx(np.ptp(by_fisher), rel=0.4)


def test_intervals_widen_where_steps_remember_each_other(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    short = generator.standard_normal((2, COUNT // 6))
    x, noise = short.repeat(6, axis=1)
    widths = []
    for name, order in (("in order", slice(None)), ("shuffled", generator.permutation(COUNT))):
        columns = {"entropy/change/predicted": x, "entropy/change/measured": x + noise}
        shown = {key: values[order] for key, values in columns.items()}
        widths.append(np.ptp(read(tmp_path / name, shown).agreements[0].correlation_interval))
    assert widths[0] > 1.4 * widths[1]


def test_the_next_entropies_are_compared_with_saying_that_nothing_changes(
    found: EntropyChanges,
) -> None:
    columns = planted()
    entropy, predicted = columns["entropy/token/mean"], columns["entropy/change/predicted"]
    missed = stayed = 0.0
    for at in range(COUNT - 1):
        moved = entropy[at + 1] - entropy[at]
        missed += (moved - predicted[at]) ** 2
        stayed += moved**2
    assert found.skill is not None
    assert (found.skill.pairs, found.skill.updates) == (COUNT - 1, 1)
    assert found.skill.skill == pytest.approx(1 - missed / stayed, rel=1e-4)
    assert found.skill.skill > 0.5
    correlation = np.corrcoef(predicted[:-1], np.diff(entropy))[0, 1]
    assert found.skill.correlation == pytest.approx(correlation, rel=1e-4)


def test_between_rarer_entropies_all_updates_count_and_a_gap_leaves_none(tmp_path: Path) -> None:
    columns = planted()
    rare = read(tmp_path / "rare", columns, every={"entropy/token/mean": 10})
    sums = columns["entropy/change/predicted"].reshape(-1, 10).sum(1)[:-1]
    moved = np.diff(columns["entropy/token/mean"][::10])
    assert rare.skill is not None
    assert (rare.skill.pairs, rare.skill.updates) == (11, 10)
    expected = 1 - ((moved - sums) ** 2).sum() / (moved**2).sum()
    assert rare.skill.skill == pytest.approx(expected, rel=1e-4)
    sparse = dict.fromkeys(("entropy/change/predicted", "entropy/change/measured"), 5)
    one = read(tmp_path / "sparse", columns, every=sparse)
    assert one.skill is not None
    assert (one.skill.pairs, one.skill.updates) == (24, 1)
    both = read(tmp_path / "both", columns, every={**sparse, "entropy/token/mean": 5})
    assert both.skill is None


def test_totals_are_over_the_same_updates_as_the_entropys_course(tmp_path: Path) -> None:
    columns = planted()
    columns["entropy/token/mean"] = columns["entropy/token/mean"][:101]
    found = read(tmp_path / "run", columns)
    totals = found.totals
    assert (totals.first, totals.last, totals.measured_steps, totals.share) == (1, 101, 100, 1)
    predicted = columns["entropy/change/predicted"][:100].sum()
    assert totals.predicted == pytest.approx(predicted, rel=1e-5)
    measured = columns["entropy/change/measured"][:100].sum()
    assert totals.measured == pytest.approx(measured, rel=1e-5)
    moved = columns["entropy/token/mean"]
    assert totals.entropy == pytest.approx((moved[:10].mean(), moved[91:].mean()), rel=1e-5)
    parts = {cell: part * predicted for cell, part in CELLS.items()}
    assert totals.cells == pytest.approx({**parts, "no advantage": 0.0625 * predicted}, rel=1e-4)
    assert sum(totals.cells.values()) == pytest.approx(totals.predicted)


def test_the_entropy_after_the_last_measured_update_counts(tmp_path: Path) -> None:
    columns = planted()
    names = ("entropy/change/predicted", "entropy/change/measured")
    found = read(tmp_path / "run", columns | {name: columns[name][:50] for name in names})
    assert (found.totals.first, found.totals.last, found.totals.measured_steps) == (1, 51, 50)
    moved = columns["entropy/token/mean"]
    expected = moved[:5].mean(), moved[46:51].mean()
    assert found.totals.entropy == pytest.approx(expected, rel=1e-5)


def test_one_noisy_batch_at_either_end_does_not_say_where_the_entropy_went(tmp_path: Path) -> None:
    columns = planted()
    columns["entropy/token/mean"] = np.linspace(0.3, 0.4, COUNT)
    columns["entropy/token/mean"][[0, -1]] = 0.6, 0.1
    first, last = read(tmp_path / "run", columns).totals.entropy
    assert 0.3 < first < last < 0.4


@pytest.mark.parametrize(("count", "known"), [(1, 0), (2, 1), (19, 1), (20, 2)])
def test_a_tenth_of_few_entropies_is_one_at_least(tmp_path: Path, count: int, known: int) -> None:
    columns = planted()
    moved = columns["entropy/token/mean"] = columns["entropy/token/mean"][:count]
    totals = read(tmp_path / "run", columns).totals
    expected = (moved[:known].mean(), moved[-known:].mean()) if known else (np.nan, np.nan)
    assert totals.entropy == pytest.approx(expected, rel=1e-5, nan_ok=True)


def test_a_sum_over_some_updates_says_what_all_would_come_to(tmp_path: Path) -> None:
    columns = planted()
    sparse = dict.fromkeys(("entropy/change/predicted", "entropy/change/measured"), 5)
    found = read(tmp_path / "run", columns, every=sparse)
    assert found.totals.share == pytest.approx(24 / 116, abs=0.01)
    said = change_sentences(found)[0]
    assert re.search(r"2[34] of 11\d updates were measured, and all of them, were they alike", said)
    alike = found.totals.measured / found.totals.share
    assert f"come to {alike:+.3g} nats" in said


def test_tokens_and_samples_are_summed_over_rows_chosen_for_their_change(
    found: EntropyChanges,
) -> None:
    assert found.tokens == [Part("id 5", -3.0, 2), Part("'a<b'", 0.75, 2)]
    assert found.samples == [Part("x", -0.5, 2), Part("y", 0.25, 1)]


def test_at_most_twelve_tokens_are_named_those_of_the_largest_sums(tmp_path: Path) -> None:
    writer = written(tmp_path / "run", planted())
    row = {"selection": "change", "sequence": 0, "position": 0, "step": 1}
    sizes = np.arange(20) * (-1.0) ** np.arange(20)
    writer.write("tokens", {**row, "token_id": np.arange(20), "predicted_entropy_change": sizes})
    writer.close()
    found = read_entropy_change(open_run(tmp_path / "run"))
    assert found is not None
    assert [part.name for part in found.tokens] == [f"id {n}" for n in range(19, 7, -1)]
    assert found.samples == []


def test_the_sentences_say_what_was_planted(found: EntropyChanges) -> None:
    total, identity, cells, rivals, ahead = change_sentences(found)
    numbers = found.totals
    assert f"changed the entropy by {numbers.predicted:+.3g} nats to first order" in total
    first, last = numbers.entropy
    assert f"Mean token entropy went from {first:.3g} to {last:.3g} nats meanwhile" in total
    assert "(means of the first and the last tenth of its measured steps)" in total
    assert re.search(
        r"correlation of 0\.979 \(95%: 0\.9\d+ to 0\.9\d+\) and a slope of 0\.789 \(0\.7\d+ to 0",
        identity,
    )
    exact = found.agreements[0]
    assert f"explains {exact.identity:.1%} of what was measured" in identity
    assert cells.startswith(f"Of the predicted fall of {-numbers.predicted:.3g} nats, states of ")
    assert "states of tokens with positive advantage and S above N took 125%, those with" in cells
    assert "those with negative advantage and S below N took 6%" in cells
    assert "those with negative advantage and S above N gave back 12% and" in cells
    assert "those with positive advantage and S below N gave back 25% (" in cells
    assert "natural_gradient tells best in which steps the entropy moves" in rivals
    assert re.search(r"one update later, the prediction has a skill of 0\.[6-9]\d over", ahead)


def test_a_rise_parts_that_cancel_and_a_prediction_without_skill_are_called_so(
    tmp_path: Path,
) -> None:
    columns = planted()
    rising = {name: -values for name, values in columns.items() if "entropy/change" in name}
    rising["entropy/change/estimate/steer"] = np.zeros(COUNT)
    rising["covariance/within/mean"] = np.random.default_rng(5).standard_normal(COUNT)
    rising["entropy/token/mean"] = columns["entropy/token/mean"]
    _, _, cells, rivals, ahead = change_sentences(read(tmp_path / "rising", rising))
    assert cells.startswith("Of the predicted rise of ")
    assert rivals == (
        "No estimate from each token's own numbers tells in which steps the entropy moves."
    )
    assert "one update later, the prediction has no skill: to say that it stays" in ahead
    even = {**columns, "entropy/change/at/positive_above": np.full(COUNT, 0.1)}
    even["entropy/change/at/negative_above"] = np.full(COUNT, -0.1)
    cells = change_sentences(read(tmp_path / "even", even))[2]
    assert "what is left of larger parts" in cells
    assert "those with positive advantage and S above N +11.9 nats" in cells


def test_updates_beyond_first_order_are_called_so(tmp_path: Path) -> None:
    columns = planted()
    columns["entropy/change/measured"] = 0.2 * columns["entropy/change/measured"]
    found = read(tmp_path / "run", columns)
    assert found.agreements[0].identity < 0
    assert "a constant is closer to what was measured" in change_sentences(found)[1]


def test_without_a_measured_change_there_is_nothing(tmp_path: Path) -> None:
    columns = planted()
    del columns["entropy/change/measured"]
    written(tmp_path / "run", columns).close()
    assert read_entropy_change(open_run(tmp_path / "run")) is None
    RunWriter(tmp_path / "empty").close()
    assert read_entropy_change(open_run(tmp_path / "empty")) is None


@pytest.mark.parametrize("count", [1, 2, 7])
def test_few_steps_have_totals_and_figures_but_no_agreement(tmp_path: Path, count: int) -> None:
    columns = {name: values[:count] for name, values in planted().items()}
    found = read(tmp_path / "run", columns)
    assert (found.agreements, found.skill, change_rows(found)) == ([], None, [])
    assert change_sentences(found)[0].startswith("From step 1 to ")
    assert set(change_figures(found)) == {"change-step", "change-course", "change-cells"}


def test_a_supervised_run_has_neither_advantages_nor_estimates(tmp_path: Path) -> None:
    names = ("entropy/change/predicted", "entropy/change/measured")
    found = read(tmp_path / "run", {name: planted()[name] for name in names})
    assert [one.name for one in found.agreements] == ["exact"]
    assert np.isnan(found.totals.entropy).all()
    assert (found.totals.first, found.totals.last) == (1, COUNT + 1)
    assert len(change_sentences(found)) == 2
    assert set(change_figures(found)) == {"change-step", "change-course"}
    alone = read(tmp_path / "alone", {names[1]: planted()[names[1]]})
    assert alone.agreements == []
    assert set(change_figures(alone)) == {"change-course"}


def test_what_is_no_number_is_left_out_and_a_constant_agrees_with_nothing(tmp_path: Path) -> None:
    columns = planted()
    columns["entropy/change/measured"][10] = np.nan
    columns["entropy/change/predicted"][20] = np.inf
    columns["covariance/within/mean"] = columns["entropy/change/estimate/steer"] = np.ones(COUNT)
    found = read(tmp_path / "run", columns)
    (exact,) = found.agreements
    assert exact.steps == COUNT - 2
    assert np.isfinite(
        [exact.correlation, found.totals.predicted, *found.totals.cells.values()]
    ).all()
    assert found.totals.measured_steps == COUNT - 2


def test_the_report_has_the_section_before_that_of_the_reward(run: Run, tmp_path: Path) -> None:
    page = write_report(run, tmp_path / "report.html").read_text()
    figures = json.loads(re.search(r"const figures = (.*);\n", page)[1])  # type: ignore[index]
    assert {"change-step", "change-course", "change-cells"} <= figures.keys()
    for key in figures:
        assert page.count(f'id="{key}"') == 1
    for title in (
        "Why the entropy moved",
        "What foretells the change of the entropy",
        "Tokens where updates move the entropy most",
        "Samples where updates move the entropy most",
    ):
        assert f"<h2>{title}</h2>" in page
    assert "<code>&#x27;a&lt;b&#x27;</code>" in page
    overview = read_overview(run)
    assert overview.changes is not None
    said, all_said = sentences(overview), change_sentences(overview.changes)
    assert [one in said for one in all_said] == [True, True, False, False, False]
